"""Instruction counts under valgrind: the same on every run, where seconds are not."""
