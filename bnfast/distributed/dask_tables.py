"""Tables of samples and features, as Dask arrays or data frames: reduced or mapped by blocks.

`bnfast.sklearn` gives what is to be done with a block.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfast._threads import num_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnfast._types import Tensor, Vector


def is_table(X: Any) -> bool:
    """Whether this is a Dask array or data frame. Imports nothing: who has one, has imported it."""
    da = sys.modules.get("dask.array")
    return _is_frame(X) or (da is not None and isinstance(X, da.Array))


def _is_frame(X: Any) -> bool:
    dd = sys.modules.get("dask.dataframe")
    return dd is not None and isinstance(X, dd.DataFrame)


def sample_of(X: Any) -> Any:
    """Return one row in memory with the features and types of a table, or none if it has none."""
    if _is_frame(X):
        return X._meta_nonempty.iloc[:1]
    if X.ndim != 2:
        raise ValueError(f"X has shape {X.shape}; expected two dimensions, samples and features")
    if np.isnan(X.shape[1]):
        raise ValueError(
            "X has an unknown number of features; expected a known one (compute_chunk_sizes finds "
            "out)"
        )
    return np.zeros((0 if X.shape[0] == 0 else 1, X.shape[1]), X.dtype)


def reduce_rows(
    X: Any,
    weight: Any,
    dense: Callable[[Any], Tensor],
    block: Callable[[Tensor, Any], Tensor],
    merge: Callable[[Tensor, Tensor], Tensor],
    record: np.dtype[Any],
) -> Tensor:
    """Compute one record per feature, in one pass over a table, on the current scheduler.

    Parameters
    ----------
    X : dask.array.Array or dask.dataframe.DataFrame
        Chunked in any way, also along the features; chunks of rows may have unknown lengths.
    weight : array_like, dask.array.Array, dask.dataframe.Series, number or None
        A number per row, or one for all.
    dense : callable
        Returns an array of a part of a data frame.
    block : callable
        Returns the records of a block, one per feature, from its rows and their weights.
    merge : callable
        Returns the records of two sets of rows together. The order of merging depends on the
        chunks alone.
    record : numpy.dtype

    Returns
    -------
    ndarray of `record`, shape (features,)
    """
    import dask.array as da

    x = X
    if _is_frame(X):
        x = X.map_partitions(dense, meta=np.empty((0, len(X.columns))))
    weight, index = (weight, None) if np.ndim(weight) == 0 else (_weights(weight, x, da), "i")
    merge_rows = partial(_merge_rows, merge=merge)
    records = da.blockwise(
        partial(_row_of_block, block=block),
        "ij",
        x,
        "ij",
        weight,
        index,
        adjust_chunks={"i": 1},
        align_arrays=False,  # which needs known lengths
        dtype=record,
        meta=np.empty((0, 0), record),
    )
    merged: Tensor = da.reduction(
        records, merge_rows, merge_rows, axis=0, dtype=record, meta=np.empty((0,), record)
    ).compute()
    if len(merged) != x.shape[1]:
        raise ValueError(
            f"the blocks of X have {len(merged)} features; expected the {x.shape[1]} of its shape"
        )
    return merged


def map_rows(
    X: Any,
    block: Callable[[Any, Vector | None, Vector | None], Tensor],
    vectors: tuple[Vector | None, Vector | None],
    dtype: np.dtype[Any],
) -> Any:
    """Return a table of the same shape, chunks or index, of what `block` returns, lazily.

    Parameters
    ----------
    X : dask.array.Array or dask.dataframe.DataFrame
        Chunked in any way, also along the features.
    block : callable
        Returns an array of the same shape, from a block and its part of each vector.
    vectors : tuple of (ndarray of shape (features,) or None)
    dtype : numpy.dtype
        Of the result.

    Returns
    -------
    dask.array.Array or dask.dataframe.DataFrame
    """
    import dask.array as da

    if _is_frame(X):
        meta = X._meta.astype(dtype)
        return X.map_partitions(_frame_of_block, block, vectors, meta=meta)
    features = [
        (None, None) if v is None else (da.from_array(v, chunks=(X.chunks[1],)), "j")
        for v in vectors
    ]
    return da.blockwise(
        partial(_on_one_thread, block),
        "ij",
        X,
        "ij",
        *features[0],
        *features[1],
        align_arrays=False,
        dtype=dtype,
        meta=np.empty((0, 0), dtype),
    )


def _weights(weight: Any, x: Any, da: Any) -> Any:
    """Return weights in the chunks of the rows of x, or raise."""
    if hasattr(weight, "to_dask_array"):
        weight = weight.to_dask_array()
    w = weight if isinstance(weight, da.Array) else da.asarray(np.asarray(weight))
    rows = x.shape[0]
    if w.ndim != 1 or not (np.isnan(rows) or np.isnan(w.shape[0]) or w.shape[0] == rows):
        raise ValueError(f"sample_weight has shape {w.shape}; expected ({rows},)")
    if not (np.isnan(rows) or np.isnan(w.shape[0])):
        return w.rechunk((x.chunks[0],))
    if w.numblocks[0] != x.numblocks[0]:
        raise ValueError(
            f"sample_weight has {w.numblocks[0]} blocks for {x.numblocks[0]} of X, of unknown "
            "lengths; expected as many (compute_chunk_sizes finds the lengths)"
        )
    return w


# Tasks. Each runs on one thread, since Dask runs as many tasks at a time as there are cores.


def _row_of_block(x: Tensor, weight: Any, *, block: Callable[..., Tensor]) -> Tensor:
    with num_threads(1):
        return block(x, weight)[None]


def _merge_rows(
    rows: Tensor, axis: Any, keepdims: bool, *, merge: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Merge records of shape (rows, features) in pairs."""
    while len(rows) > 1:
        pairs = len(rows) // 2
        merged = merge(rows[0 : 2 * pairs : 2], rows[1 : 2 * pairs : 2])
        rows = np.concatenate([merged, rows[2 * pairs :]])
    return rows if keepdims else rows[0]


def _on_one_thread(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with num_threads(1):
        return block(*arguments)


def _frame_of_block(part: Any, block: Callable[..., Tensor], vectors: Any) -> Any:
    values = _on_one_thread(block, part, *vectors)
    return type(part)(values, index=part.index, columns=part.columns)
