"""Element types: encoding rows into GGML's blocks, the compiled kernels and their numpy reference, output types."""
