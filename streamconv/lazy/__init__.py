"""Lazy tensors: nodes that make rows on demand, and the scratch memory that they use."""
