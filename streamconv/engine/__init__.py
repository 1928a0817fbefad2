"""The layout and memory proof of an output (layout, split), its job (job), and the workers that make it (pool)."""
