"""An output file: its names and space (destination), its bytes (directio), what survives a crash (journal), and the
order that makes it safe (sink); manifest says what is in it."""
