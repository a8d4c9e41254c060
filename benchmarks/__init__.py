"""Benchmarks: one file per question, each beside its floor in the same run. `python -m benchmarks --help`."""
