"""A finished file compared with its source: tensors and keys."""
