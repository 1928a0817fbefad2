"""The public functions of the library, one module each, and `run`, which turns a job into a finished file."""
