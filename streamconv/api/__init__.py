"""The library's calls, one module each, and `run`, which makes a sealed file of a job."""
