"""Mutated files for every parser: `make fuzz`, or `python -m tests.fuzz --help`.

mutate.py mutates files, targets.py calls the library with them, __main__.py is the loop. The corpus has one folder of
files for each case: valid ones as a start, and every finding.
"""
