"""Batches of conversions: the jobs file (jobs_file), the state file (state), one job (child), all jobs (run)."""
