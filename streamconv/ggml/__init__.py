"""GGML's types: encoding rows, with compiled kernels and their numpy references, and choosing a type per tensor."""
