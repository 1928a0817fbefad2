"""What is written where (layout), what decides it (job), and the workers that make it (pool)."""
