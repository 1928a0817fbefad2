"""Writing an output: its names, locks and space (destination), its bytes (directio), its progress on disk (journal),
the safe order of steps (sink), and the files written with it (manifest, modelfile)."""
