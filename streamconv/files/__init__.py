"""Sources: bounds-checked reads of untrusted files, where a model lies, what a file really is, strict JSON."""
