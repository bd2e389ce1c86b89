"""Benchmarks for pytest-benchmark: `make bench-suite`."""
