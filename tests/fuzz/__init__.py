"""Mutated files for every parser: `make fuzz`, or `python -m tests.fuzz --help`.

Owns: how files are mutated (mutate.py), what is called with them (targets.py), the loop (__main__.py), and the corpus:
one folder of files for each case, valid ones to begin with and all that was ever found.
"""
