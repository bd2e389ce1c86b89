"""Batch statistics across processes: torch.distributed, MPI and Dask.

Moments are a monoid, so a batch in pieces has the moments of its pieces merged. Here the pieces
are on several processes: ranks of a `torch.distributed` group or an mpi4py communicator, which
gather each other's moments and merge them in the order of ranks (`all_reduce`, `SyncBatchNorm`),
or blocks of a Dask array, merged in a tree that the chunks alone decide (`dask_moments`). Either
way the same data give the same bits, on every rank and on every run.

Imported only by name, and nothing here imports PyTorch, mpi4py or Dask before it is used.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _core
from ._threads import num_threads
from .functional import BatchStats, Gradients, batch_norm_backward, normalize
from .layers import BatchNorm, Saved
from .moments import Moments, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Tensor = NDArray[Any]
    Vector = NDArray[np.float64]
    Activation = str | tuple[str, float] | None

__all__ = ["SyncBatchNorm", "all_reduce", "dask_moments", "dask_normalize"]


# ---- Ranks


class Ranks(NamedTuple):
    """The processes of a group, whichever library started them."""

    size: int
    # An array of the same shape and dtype on every rank -> all of them, (size, ...), by rank.
    gather: Callable[[Tensor], Tensor]


def ranks_of(group: Any) -> Ranks:
    """Recognise a process group: torch.distributed's (None: the default one) or mpi4py's."""
    # Whoever holds a group of a library has imported it.
    mpi, torch = sys.modules.get("mpi4py.MPI"), sys.modules.get("torch")
    if mpi is not None and isinstance(group, mpi.Comm):
        return _mpi_ranks(group, mpi)
    dist = torch.distributed if torch is not None and torch.distributed.is_available() else None
    if group is None:
        if dist is None or not dist.is_initialized():
            raise RuntimeError(
                "group is None, and there is no default process group; expected "
                "torch.distributed.init_process_group() to have been called, or an mpi4py "
                "communicator as group"
            )
        return _torch_ranks(dist.group.WORLD, torch)
    if dist is not None and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group has this process not among its members; expected one it is in")
    if dist is not None and isinstance(group, dist.ProcessGroup):
        return _torch_ranks(group, torch)
    raise TypeError(
        f"group is {group!r:.60} of type {type(group).__name__}; expected a process group of "
        "torch.distributed, an mpi4py communicator, or None for torch's default group"
    )


def _torch_ranks(group: Any, torch: Any) -> Ranks:
    size = torch.distributed.get_world_size(group)

    def gather(mine: Tensor) -> Tensor:
        rows = np.empty((size, *mine.shape), mine.dtype)
        torch.distributed.all_gather(
            list(torch.from_numpy(rows)), torch.from_numpy(mine), group=group
        )
        return rows

    return Ranks(size, gather)


def _mpi_ranks(comm: Any, mpi: Any) -> Ranks:
    if comm == mpi.COMM_NULL or comm.Is_inter():
        kind = "MPI.COMM_NULL" if comm == mpi.COMM_NULL else "an intercommunicator"
        raise ValueError(f"group is {kind}; expected an intracommunicator with this process in it")
    size = comm.Get_size()

    def gather(mine: Tensor) -> Tensor:
        rows = np.empty((size, *mine.shape), mine.dtype)
        comm.Allgather(mine, rows)
        return rows

    return Ranks(size, gather)


# ---- Exchanges. Every rank takes part in each of them, also one with nothing or with an error to
# report: the others would wait for it.

_REFUSED = -1


@contextmanager
def taking_part(ranks: Ranks, refusal: Tensor) -> Iterator[None]:
    """If the body fails, send a refusal in place of what the others wait for, and raise."""
    try:
        yield
    except Exception:
        ranks.gather(refusal)
        raise


def no_moments() -> Tensor:
    """Return the refusal that `merged` understands."""
    return np.array([_REFUSED, 0])


def merged(ranks: Ranks, mine: Moments) -> Moments:
    """Return the moments of all ranks, merged in the order of ranks.

    Two rounds: only ranks that agree on the number of channels can gather as many numbers.
    """
    sizes = ranks.gather(np.array([len(mine.mean), mine.count]))
    channels, counts = sizes[:, 0], sizes[:, 1]
    _refuse_together(channels == _REFUSED)
    if (channels != channels[0]).any():
        raise ValueError(
            f"the moments have {_in_words(channels.tolist())} channels on ranks 0 to "
            f"{ranks.size - 1}; expected the same number on all"
        )
    numbers = ranks.gather(np.stack([mine.mean, mine.m2]))
    return Moments.merge_all(
        Moments(count, mean, m2) for count, (mean, m2) in zip(counts.tolist(), numbers, strict=True)
    )


def merged_batch(ranks: Ranks, mine: Moments) -> Moments:
    """Return the moments of a training batch, which must have more than one value a channel."""
    batch = merged(ranks, mine)
    if batch.count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got one on all "
            f"{ranks.size} ranks together"
        )
    return batch


def no_sums(channels: int) -> Vector:
    """Return the refusal that `summed` understands."""
    sums = np.zeros(1 + 2 * channels)
    sums[0] = _REFUSED
    return sums


def summed(ranks: Ranks, mine: tuple[Any, Any]) -> tuple[Vector, Vector]:
    """Return the gradients of weight and bias added up in the order of ranks.

    One round: the forward before it has made sure of the channels.
    """
    rows = ranks.gather(np.concatenate([[0.0], *mine]))
    _refuse_together(rows[:, 0] == _REFUSED)
    total = rows[0]
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite channel stays its own
        for row in rows[1:]:
            total = total + row
    weight, bias = np.split(total[1:], 2)
    return weight, bias


def _refuse_together(refused: NDArray[np.bool_]) -> None:
    if refused.any():
        which = _in_words(np.flatnonzero(refused).tolist())
        raise RuntimeError(f"rank {which} could not take part; its own exception says why")


def _in_words(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def all_reduce(moments: Moments, group: Any = None) -> Moments:
    """Return the moments of all processes of a group, merged: the same bits on every one.

    Every process of the group must call it, as with any collective operation; one that has no
    values passes `Moments.empty`.

    Parameters
    ----------
    moments : Moments
        Those of this process.
    group : torch.distributed.ProcessGroup, mpi4py.MPI.Comm or None
        Whose processes; None is the default group of ``torch.distributed``. A group of PyTorch's
        needs a backend for CPU tensors, such as gloo.

    Returns
    -------
    Moments
        Of the values of all processes together, merged in the order of ranks by
        `Moments.merge_all`.

    Raises
    ------
    TypeError
        If `group` is something else, or `moments` is (then RuntimeError on the other processes).
    ValueError
        On every process, if they have different numbers of channels; if this process is not in
        `group`.
    RuntimeError
        If `group` is None and there is no default one.

    Notes
    -----
    Two gathers: of ``(channels, count)``, 16 bytes a process, and of mean and M2, 16 bytes a
    channel and process. A process that fails to call is waited for as long as the group's own
    timeout says.
    """
    ranks = ranks_of(group)
    with taking_part(ranks, no_moments()):
        if not isinstance(moments, Moments):
            raise TypeError(
                f"moments is {moments!r:.60} of type {type(moments).__name__}; expected Moments"
            )
    return merged(ranks, moments)


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose batch in training is that of all processes of a group.

    Every process calls it with its part of the batch, of any size, none included; parameters must
    be equal on all of them. Outputs and gradients are those of one process with the parts
    concatenated, to rounding, and the running statistics are the same bits on every process.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, axis, ddof, activation, dtype
        As in `BatchNorm`.
    group : torch.distributed.ProcessGroup, mpi4py.MPI.Comm or None
        Whose processes; None is the default group of ``torch.distributed`` at the time of a call.

    Attributes
    ----------
    group
        Kept by `copy.deepcopy`. Pickling a layer needs a `group` that can be: None, or a
        communicator that MPI predefines.

    Raises
    ------
    TypeError, ValueError
        As `BatchNorm`.

    Notes
    -----
    In training every process must make the same calls. One whose arguments are refused tells the
    others, which raise RuntimeError, and nobody is left waiting. In evaluation nothing is
    exchanged.

    `weight_grad` and `bias_grad` are those of this process' part, like the gradients of any other
    layer: add them up, or average them, over the processes with the rest.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: Any = None,
        axis: int = 1,
        ddof: int = 1,
        activation: Activation = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            axis=axis,
            ddof=ddof,
            activation=activation,
            dtype=dtype,
        )
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.group)] = self.group  # the processes stay the ones they are
        copied = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__getstate__(), memo))
        return copied

    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out: Tensor | None = None,
        *,
        update_stats: bool = True,
    ) -> Tensor:
        """Normalise `x`: in training by the batch of all processes, else by the running statistics.

        Parameters
        ----------
        x, residual, out, update_stats
            As in `BatchNorm`.

        Returns
        -------
        ndarray
            `out`, or a fresh array in the memory order of `x`.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm`; also, on every process, if all of them together have one value a
            channel, or have different numbers of channels.
        RuntimeError
            If another process refused its arguments; if `group` is None and there is no default
            one. Statistics and counters are then as they were.
        """
        if not self.training:
            return super().__call__(x, residual, out, update_stats=update_stats)
        ranks = ranks_of(self.group)
        with taking_part(ranks, no_moments()):
            x = self._checked(x)
            if residual is not None:
                residual = _arrays.array("residual", residual)
            if update_stats:
                self._check_counting()
            seen = _arrays.Canonical(x, self.axis, residual=residual, out=out)
            self._check_state(seen.x.dtype, x, residual, out)
            mine = moments(seen.x, axis=seen.axis)
        batch = merged_batch(ranks, mine)
        var = batch.var()
        y: Tensor = seen.give(
            _core.normalize(
                seen.x,
                batch.mean,
                var,
                self.weight,
                self.bias,
                self.eps,
                seen.axis,
                seen.residual,
                self.activation,
                seen.out,
            )
        )
        if self._observer is not None:
            self._observer(batch)
            return y
        if update_stats:
            self._move_running(batch)
        with np.errstate(invalid="ignore"):
            stats = BatchStats(batch.mean, var, 1 / np.sqrt(var + self.eps), batch.count)
        self._keep(x, stats, residual, y, out)
        return y

    def _check_state(self, dtype: np.dtype[Any], *tensors: Any) -> None:
        """Refuse what `_core.forward` would, before anything is exchanged."""
        _arrays.eps(self.eps, training=True)
        _arrays.check_parameters_apart(tensors[-1], weight=self.weight, bias=self.bias)
        if self.running_mean is not None:
            for name in ("running_mean", "running_var"):
                _arrays.running_statistic(name, getattr(self, name), self.num_features, dtype)
            _arrays.check_running_apart(
                self.running_mean, self.running_var, *tensors, self.weight, self.bias
            )

    def _move_running(self, batch: Moments) -> None:
        momentum = self._momentum()
        if self.running_mean is not None and self.running_var is not None and batch.count:
            with np.errstate(invalid="ignore", over="ignore"):  # what a float32 can hold
                for running, new in (
                    (self.running_mean, batch.mean),
                    (self.running_var, batch.var(self.ddof)),
                ):
                    running[...] = (1 - momentum) * running.astype(np.float64) + momentum * new
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1

    def _gradients(self, dy: ArrayLike, saved: Saved, needs: Sequence[str]) -> Gradients:
        ranks = ranks_of(self.group)
        given: dict[str, Any] = {
            "axis": self.axis,
            "activation": self.activation,
            "residual": saved.residual,
            "y": saved.y,
        }
        with taking_part(ranks, no_sums(self.num_features)):
            self._check_gradients()
            mine = batch_norm_backward(
                dy,
                saved.x,
                saved.stats._replace(count=0),
                self.weight,
                self.bias,
                needs=("weight", "bias"),
                **given,
            )
        sums = summed(ranks, (mine.weight, mine.bias))
        wanted = [name for name in needs if name not in ("weight", "bias")]
        through = batch_norm_backward(
            dy,
            saved.x,
            saved.stats,
            self.weight,
            self.bias,
            needs=wanted,
            sums=sums,
            **given,
        )
        return through._replace(weight=mine.weight, bias=mine.bias)


# ---- Dask

_RECORD = np.dtype([("count", np.int64), ("mean", np.float64), ("m2", np.float64)])


def dask_moments(x: Any, axis: int = 1) -> Any:
    """Return the moments of each channel of a Dask array, lazily: exact, in one pass over it.

    Each block gives its moments where it is, and these merge in a tree: a few numbers a channel
    travel, and no block outlives its task. The tree is that of the array's chunks, so the result
    has the same bits under any scheduler, on any number of workers, and when some of them die.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64
        Rank 2 or more; chunked in any way, along the channels too.
    axis : int
        The channel axis; all others are reduced.

    Returns
    -------
    dask.delayed.Delayed
        Its ``compute()`` gives `Moments`. Dask shows the progress:
        ``with dask.diagnostics.ProgressBar():`` around it, or ``distributed.progress`` of its
        ``persist()``.

    Raises
    ------
    TypeError
        If `x` is no Dask array, or has another dtype.
    ValueError
        If `x` has fewer than two dimensions, no such axis, or an unknown number of channels.

    See Also
    --------
    dask_normalize : what the mean and variance are for.

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
    records = da.reduction(
        x,
        chunk=_block_moments,
        combine=_merge_blocks,
        aggregate=_merge_to_records,
        axis=tuple(i for i in range(x.ndim) if i != axis),
        concatenate=False,
        dtype=_RECORD,
        meta=np.empty((0,), _RECORD),
    )
    # What reads a block and what sums it become one task here; older Dasks leave the graph below
    # a delayed call as it is.
    (records,) = dask.optimize(records)
    return dask.delayed(_from_records)(records)


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

    Take them from ``dask_moments(x).compute()``: were they part of the same computation, every
    block would have to wait in memory for the last one's moments.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64
        Rank 2 or more; chunked in any way, along the channels too.
    mean, var, weight, bias, eps, axis, activation
        As in `bnfast.normalize`.

    Returns
    -------
    dask.array.Array
        With the shape, chunks and dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.normalize`, before anything is computed.

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
    options = {"eps": _arrays.eps(eps, training=False), "axis": axis, "activation": activation}
    if activation is not None:
        _arrays.activation(activation)
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
    # An empty array of this type and rank is refused for what any block would be.
    _core.moments(np.empty((0,) * x.ndim, x.dtype), axis)
    if np.isnan(x.shape[axis]):
        raise ValueError(
            f"x has an unknown number of channels on axis {axis}; expected a known one "
            "(compute_chunk_sizes finds out)"
        )
    return int(axis) % int(x.ndim)


# Tasks: one thread each, since Dask runs as many of them at a time as there are cores to use.


def _block_moments(
    x: Tensor, axis: Sequence[int], keepdims: bool, computing_meta: bool = False
) -> Any:
    if computing_meta:  # Dask wants to see an array, and not yet to reduce one
        return np.empty((0,) * x.ndim, _RECORD)
    (channel_axis,) = set(range(x.ndim)).difference(axis)
    with num_threads(1):
        return moments(x, axis=channel_axis)


def _merge_blocks(parts: Any, axis: Sequence[int], keepdims: bool) -> Moments:
    return Moments.merge_all(_leaves(parts))


def _merge_to_records(parts: Any, axis: Sequence[int], keepdims: bool) -> Tensor:
    total = _merge_blocks(parts, axis, keepdims)
    records = np.empty(len(total.mean), _RECORD)
    records["count"], records["mean"], records["m2"] = total.count, total.mean, total.m2
    return records


def _leaves(parts: Any) -> Iterator[Moments]:
    if isinstance(parts, list):
        for part in parts:
            yield from _leaves(part)
    else:
        yield parts


def _from_records(records: Tensor) -> Moments:
    count = int(records["count"][0]) if len(records) else 0
    return Moments(count, records["mean"].copy(), records["m2"].copy())


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
