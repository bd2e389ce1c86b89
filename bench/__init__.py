"""Benchmarks. README.md says what each file is; run all from the repository's root."""
