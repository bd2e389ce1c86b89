"""Masks: which values of a batch count, and how much.

A mask is bool, or weights of 0 or more. It has one value per position, for all channels: the axes
of `x` with 1 on the channel axis, or without that axis; each other axis has the length of `x`'s
or 1.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from . import _arrays, _options
from ._errors import listed, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ._types import Array


_MOST = np.finfo(np.float64).max


class Weights(NamedTuple):
    """A mask as the kernels read it."""

    # One weight per position, in the memory order of x, float64 for float64 data and else float32;
    # None if all are 1.
    row: Array | None
    positions: int
    is_bool: bool

    def counted(self, first: int, end: int) -> int:
        """Return how many of the positions in this range have a positive weight."""
        return end - first if self.row is None else int(np.count_nonzero(self.row[first:end]))


def read(mask: Any) -> Array:
    """Return a mask as a plain array of bool or of a type of data, or raise."""
    a = _arrays.array("mask", mask)
    if a.dtype != np.bool_ and not _arrays.is_data_type(a.dtype):
        expected = listed(("bool", *_arrays.DATA_NAMES))
        raise TypeError(f"mask has dtype {a.dtype}; expected {expected}")
    return a


def check_fits(mask: Array, shape: tuple[int, ...], axis: Any) -> None:
    """Refuse a mask of another shape than x's, where it is not used; other faults are not its."""
    if type(axis) is int and -len(shape) <= axis < len(shape):
        _without_channels(mask, shape, axis % len(shape))


def arrange(mask: Array, x: Array, axis: int) -> Weights:
    """Return the weights of x's positions; `axis` is one of x's, and the mask was read."""
    axis %= x.ndim
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    flat = _without_channels(mask, x.shape, axis)
    if flat.shape != shape:
        flat = np.broadcast_to(flat, shape)
    if not x.flags.c_contiguous:
        flat = flat.transpose([i - (i > axis) for i in _arrays.memory_order(x) if i != axis])
    kept = np.float64 if x.dtype.type is np.float64 else np.float32
    if flat.dtype == np.bool_:
        ones = bool(flat.all())
        return Weights(None if ones else flat.astype(kept, "C").reshape(-1), prod(shape), True)
    with np.errstate(all="ignore"):  # a weight may be too large for float32
        row = flat.astype(kept, "C").reshape(-1)
    if row.size:
        _check_range(row)
    return Weights(None if bool((row == 1).all()) else row, prod(shape), False)


def _without_channels(mask: Array, of_x: tuple[int, ...], axis: int) -> Array:
    shape = of_x[:axis] + of_x[axis + 1 :]
    if mask.shape == shape:
        return mask
    flat = mask
    if mask.ndim == len(of_x) and mask.shape[axis] == 1:
        flat = mask.reshape(mask.shape[:axis] + mask.shape[axis + 1 :])
    fits = flat.ndim == len(shape) and all(
        n in (1, size) for n, size in zip(flat.shape, shape, strict=True)
    )
    if not fits:
        full = (*shape[:axis], 1, *shape[axis:])
        raise ValueError(
            f"mask has shape {mask.shape}; expected {full} or {shape} for x of shape {of_x}, "
            "where each axis may also have length 1"
        )
    return flat


def _check_range(row: Array) -> None:
    least, most = row.min(), row.max()
    if not (least >= 0 and most < np.inf):
        wrong = row[~((row >= 0) & (row < np.inf))][0]
        raise ValueError(f"mask has a weight of {wrong}; expected finite numbers of 0 or more")
    if not most < _MOST / row.size:
        raise ValueError(
            f"mask has {row.size} weights of up to {most}; expected ones whose sum is finite"
        )


def check_enough(mask: Array, x: Array, axis: int) -> None:
    """Refuse a mask that counts fewer than two positions of a batch; an empty one is allowed."""
    weights = arrange(mask, x, axis)
    counted = weights.counted(0, weights.positions)
    if weights.positions and counted < 2:
        refuse_few(counted, x.shape)


def refuse_few(counted: int, shape: tuple[int, ...]) -> NoReturn:
    """Refuse a mask that counts one position or none: they have no variance."""
    raise ValueError(
        "Expected more than 1 value per channel when training, got a mask that counts "
        f"{counted} of input size {tuple(shape)}"
    )


def refuse_light(weight: float, ddof: float) -> NoReturn:
    """Refuse weights whose sum leaves no variance over ``count - ddof``."""
    raise ValueError(
        f"mask has weights that sum to {weight:g}; expected more than {ddof:g}, the ddof of "
        "running_var"
    )


def lengths_mask(lengths: ArrayLike, size: int | None = None) -> Array:
    """Return the mask of padded sequences: True for the first ``lengths[n]`` positions of each.

    Parameters
    ----------
    lengths : array_like of integers, shape (N,)
        The length of each sequence, 0 to `size`.
    size : int, optional
        The padded length L; the longest of `lengths` if None.

    Returns
    -------
    ndarray of bool, shape (N, L)
        A mask for data of shape (N, C, L), or for (N, L, C) with ``axis=-1``.

    Raises
    ------
    TypeError
        If `lengths` are no integers, or `size` is none.
    ValueError
        If `lengths` is not a row, or a length is negative or above `size`.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.lengths_mask([2, 0, 3])
    array([[ True,  True, False],
           [False, False, False],
           [ True,  True,  True]])
    """
    row = _arrays.array("lengths", lengths)
    if row.dtype.kind not in "iu" and row.size:
        raise TypeError(f"lengths has dtype {row.dtype}; expected integers")
    if row.ndim != 1:
        raise ValueError(f"lengths has shape {row.shape}; expected (N,)")
    least, longest = (int(row.min()), int(row.max())) if row.size else (0, 0)
    padded = max(longest, 0) if size is None else _options.integer("size", size)
    if padded < 0:
        raise ValueError(f"size is {shown(padded)}; expected 0 or more")
    if longest > padded or least < 0:
        wrong = longest if longest > padded else least
        raise ValueError(f"lengths has a length of {wrong}; expected 0 to {padded}")
    return np.arange(padded) < row.reshape(-1, 1)
