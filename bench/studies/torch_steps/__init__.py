"""Whole training and evaluation steps of PyTorch networks."""
