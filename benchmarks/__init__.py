"""Benchmarks of luke_kernels: `python -m benchmarks --help`."""
