"""GGUF files: the format (format), and strict readers of a file (reader) and of a split set (splits)."""
