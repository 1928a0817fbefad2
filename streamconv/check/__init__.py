"""Compare a finished file with its source: tensors and keys."""
