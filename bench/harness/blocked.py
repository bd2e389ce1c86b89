"""Blocked layouts: nChw16c holds 16 channels of one place side by side, then those of the next."""

from __future__ import annotations

import numpy as np

from bench.harness.shapes import Shape


def blocked(array: np.ndarray, block: int) -> np.ndarray:
    """Return an array (N, C, ...) as (N, C / block, places, block); a view where NumPy can."""
    n, c = array.shape[:2]
    return array.reshape(n, c // block, block, -1).transpose(0, 1, 3, 2)


def plain(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Return a blocked array in its plain shape."""
    return array.transpose(0, 1, 3, 2).reshape(shape)
