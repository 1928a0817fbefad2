"""Many conversions: what is wanted (jobs_file), what was done (state), one of them (job), all of them (run)."""
