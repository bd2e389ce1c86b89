"""Moments and normalisation of Dask arrays, block by block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfast import _arrays, _core, _masks, _options
from bnfast._threads import num_threads
from bnfast.functional import normalize
from bnfast.moments import Moments, moments

from .counts import check_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike

    from bnfast._types import Activation, Tensor, Vector

_RECORD = np.dtype([("count", np.int64), ("mean", np.float64), ("m2", np.float64)])
_WEIGHTED = np.dtype([("count", np.float64), ("mean", np.float64), ("m2", np.float64)])


def dask_moments(x: Any, axis: int = 1, mask: Any = None) -> Any:
    """Return the moments of each channel of a Dask array, lazily: exact, in one pass over it.

    The moments of each block are computed where the block is, and merged in a tree: a few numbers
    per channel are sent, and no block outlives its task. The tree depends on the array's chunks
    alone, so the result has the same bits under any scheduler, on any number of workers, and when
    some of them die.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64
        Rank 2 or more; chunked in any way, along the channels too.
    axis : int
        The channel axis; all others are reduced.
    mask : dask.array.Array or array_like of bool, or of any of the types of `x`, optional
        Which values count, or their weights: see `bnfast.moments`. It gets the chunks of `x`.

    Returns
    -------
    dask.delayed.Delayed
        Its ``compute()`` gives `Moments`. Dask shows the progress:
        ``with dask.diagnostics.ProgressBar():`` around it, or ``distributed.progress`` of its
        ``persist()``.

    Raises
    ------
    TypeError
        If `x` is no Dask array, or `x` or `mask` has another dtype.
    ValueError
        If `x` has fewer than two dimensions, no such axis, or an unknown number of channels; if
        `mask` does not fit `x`, or `x` has an unknown shape beside a mask; from ``compute()``, if
        blocks of `x` are not what its chunks say, or have different numbers of rows in different
        channels, or if a weight is negative or not finite.

    See Also
    --------
    dask_normalize : normalise an array by this mean and variance.

    Examples
    --------
    >>> import dask.array as da
    >>> from bnfast.distributed import dask_moments
    >>> x = da.ones((1000, 3), chunks=(100, 3), dtype="float32")
    >>> dask_moments(x).compute().count
    1000
    """
    import dask
    import dask.array as da

    axis = _checked_axis(x, axis, da)
    weights = None if mask is None else _full_mask(mask, x, axis, da)
    record = _RECORD if weights is None or weights.dtype == np.bool_ else _WEIGHTED
    records = da.reduction(
        x,
        chunk=_block_moments,
        combine=_merge_blocks,
        aggregate=partial(_merge_to_records, record=record),
        axis=tuple(i for i in range(x.ndim) if i != axis),
        concatenate=False,
        dtype=record,
        meta=np.empty((0,), record),
        weights=weights,
    )
    # Fuses reading a block and summing it into one task; older versions of Dask do not optimise
    # the graph below a delayed call.
    (records,) = dask.optimize(records)
    return dask.delayed(_from_records)(records, x.shape[axis])


def dask_normalize(
    x: Any,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Activation = None,
) -> Any:
    """Return a Dask array normalised by a given mean and variance, lazily, block by block.

    Take these from ``dask_moments(x).compute()``. In one computation with the moments, every block
    would have to stay in memory until those of the last one are known.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64
        Rank 2 or more; chunked in any way, along the channels too.
    mean, var : array_like of float32, float64, float16 or bfloat16, shape (channels,)
    weight, bias : array_like of any of these types, shape (channels,), optional
        Gamma and beta; 1 and 0 if None.
    eps : float
        Added to the variance; at least 0.
    axis : int
        The channel axis.
    activation : str, ("leaky_relu", float) or None
        Applied last: one of the names that `bnfast.batch_norm` takes.

    Returns
    -------
    dask.array.Array
        With the shape, chunks and dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        If an argument has a type, shape or value that is not accepted; before anything is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> from bnfast.distributed import dask_moments, dask_normalize
    >>> x = da.random.default_rng(0).normal(5, 2, (1000, 3), chunks=(100, 3))
    >>> m = dask_moments(x).compute()
    >>> y = dask_normalize(x, m.mean, m.var(), eps=0)
    >>> float(abs(y.mean(axis=0)).max().compute()) < 1e-12
    True
    """
    import dask.array as da

    axis = _checked_axis(x, axis, da)
    channels = x.shape[axis]
    vectors = [
        _arrays.constant("mean", mean, channels),
        _arrays.constant("var", var, channels),
        np.ones(channels) if weight is None else _arrays.constant("weight", weight, channels),
        np.zeros(channels) if bias is None else _arrays.constant("bias", bias, channels),
    ]
    options = {"eps": _options.eps(eps, training=False), "axis": axis, "activation": activation}
    if activation is not None:
        _options.activation(activation, _core.ACTIVATIONS)
    index = tuple(range(x.ndim))
    pairs = ((da.from_array(vector, chunks=(x.chunks[axis],)), (axis,)) for vector in vectors)
    return da.blockwise(
        _normalize_block,
        index,
        x,
        index,
        *(argument for pair in pairs for argument in pair),
        dtype=x.dtype,
        meta=np.empty((0,) * x.ndim, x.dtype),
        **options,
    )


def _checked_axis(x: Any, axis: Any, da: Any) -> int:
    if not isinstance(x, da.Array):
        raise TypeError(f"x is {x!r:.60} of type {type(x).__name__}; expected a Dask array")
    # Checks type, rank and axis as for any block, on an empty array.
    _core.moments(np.empty((0,) * x.ndim, x.dtype), axis)
    if np.isnan(x.shape[axis]):
        raise ValueError(
            f"x has an unknown number of channels on axis {axis}; expected a known one "
            "(compute_chunk_sizes finds out)"
        )
    return int(axis) % int(x.ndim)


def _full_mask(mask: Any, x: Any, axis: int, da: Any) -> Any:
    """Return a mask with the shape and chunks of x, or raise."""
    if any(np.isnan(n) for n in x.shape):
        raise ValueError(
            f"x has shape {x.shape} beside a mask; expected a known one (compute_chunk_sizes finds "
            "out)"
        )
    given = mask if isinstance(mask, da.Array) else da.asarray(_masks.read(mask))
    # Checks the type as for any block.
    _masks.read(np.empty(0, given.dtype))
    full = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    if given.ndim == x.ndim - 1:
        given = da.expand_dims(given, axis)
    fits = given.ndim == x.ndim and all(
        n in (1, size) for n, size in zip(given.shape, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask has shape {np.shape(mask)}; expected {full}, or without its axis {axis}, for x "
            f"of shape {x.shape}"
        )
    # First the chunks of x, then its channels: blocks then repeat one value without copies.
    chunks = [c if n == sum(c) else (1,) for c, n in zip(x.chunks, given.shape, strict=True)]
    return da.broadcast_to(given.rechunk(tuple(chunks)), x.shape, chunks=x.chunks)


# Tasks. Each runs on one thread, since Dask runs as many tasks at a time as there are cores.


def _block_moments(
    x: Tensor,
    weights: Tensor | None = None,
    *,
    axis: Sequence[int],
    keepdims: bool,
    computing_meta: bool = False,
) -> Any:
    if computing_meta:  # Dask asks for an empty result, not for a reduction
        return np.empty((0,) * x.ndim, _RECORD)
    (channel_axis,) = set(range(x.ndim)).difference(axis)
    mask = None
    if weights is not None and x.shape[channel_axis]:
        mask = np.take(weights, [0], channel_axis)
    with num_threads(1):
        return moments(x, axis=channel_axis, mask=mask)


def _merge_blocks(parts: Any, axis: Sequence[int], keepdims: bool) -> Moments:
    return Moments.merge_all(_leaves(parts))


def _merge_to_records(
    parts: Any, axis: Sequence[int], keepdims: bool, record: np.dtype[Any] = _RECORD
) -> Tensor:
    total = _merge_blocks(parts, axis, keepdims)
    check_count(total.count)
    records = np.empty(len(total.mean), record)
    records["count"], records["mean"], records["m2"] = total.count, total.mean, total.m2
    return records


def _leaves(parts: Any) -> Iterator[Moments]:
    if isinstance(parts, list):
        for part in parts:
            yield from _leaves(part)
    else:
        yield parts


def _from_records(records: Tensor, channels: int) -> Moments:
    """Return the moments in the records; raise if the blocks do not fit the array's chunks."""
    if len(records) != channels:
        raise ValueError(
            f"the blocks of x have {len(records)} channels; expected the {channels} of its shape"
        )
    counts = sorted(set(records["count"].tolist()))
    weighted = records.dtype == _WEIGHTED
    # Sums of the same weights differ by rounding if blocks have other numbers of channels.
    if len(counts) > 1 and counts[-1] - counts[0] > (1e-9 * counts[-1] if weighted else 0):
        found = ", ".join(map(str, counts))
        raise ValueError(
            f"the blocks of x have {found} values in channels of different blocks; "
            "expected as many in each"
        )
    return Moments(counts[0] if counts else 0, records["mean"].copy(), records["m2"].copy())


def _normalize_block(
    x: Tensor,
    mean: Vector,
    var: Vector,
    weight: Vector,
    bias: Vector,
    *,
    eps: float,
    axis: int,
    activation: Activation,
) -> Tensor:
    with num_threads(1):
        return normalize(x, mean, var, weight, bias, eps=eps, axis=axis, activation=activation)
