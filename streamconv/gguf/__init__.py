"""GGUF files: what they are (format), and a strict reader of one (reader) or of a split set (set)."""
