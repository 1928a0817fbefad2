"""What streamconv costs, measured beside the other ways of doing the same: see README.md."""
