"""Many conversions: their description (jobs_file), finished jobs (state), one job (child), all jobs (run)."""
