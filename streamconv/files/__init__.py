"""Sources: bounds-checked reads of untrusted files, finding a model, recognising file types, strict JSON."""
