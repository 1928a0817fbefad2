"""Many conversions: what is wanted (jobs_file), what was done (state), one of them (child), all of them (run)."""
