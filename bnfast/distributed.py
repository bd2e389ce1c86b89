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
from contextlib import suppress
from copy import deepcopy
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from . import _arrays, _core, _errors, _options
from ._threads import num_threads
from .functional import BatchStats, _wanted, normalize
from .layers import BatchNorm, Saved, _sum
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
    # Takes an array, of the same shape and dtype on every rank, and fills another, (size, ...),
    # with those of all, by rank. One step of the interpreter: an exception of a signal handler
    # finds it not begun, or over.
    gather: Callable[[Tensor, Tensor], object]


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
    def gather(mine: Tensor, rows: Tensor) -> object:
        given, wanted = [torch.from_numpy(mine)], [list(torch.from_numpy(rows))]
        # `torch.distributed.all_gather` is many steps, and between two of them its work gets lost.
        return list(map(methodcaller("wait"), map(group.allgather, [wanted], [given])))

    return Ranks(torch.distributed.get_world_size(group), gather)


def _mpi_ranks(comm: Any, mpi: Any) -> Ranks:
    if comm == mpi.COMM_NULL or comm.Is_inter():
        kind = "MPI.COMM_NULL" if comm == mpi.COMM_NULL else "an intercommunicator"
        raise ValueError(f"group is {kind}; expected an intracommunicator with this process in it")
    return Ranks(comm.Get_size(), comm.Allgather)


# ---- Exchanges

# Where a gathered row has its number of channels, its sum of squares or its status, none of which
# is below zero: that it did not come yet, or that its rank could not take part.
_UNSENT, _REFUSED = -2, -1
_MOST_VALUES = int(np.iinfo(np.int64).max)


class Exchange:
    """One rank's part in what a call sends round its group: begun, it is taken to the end.

    All that can be refused is refused in the `with` block of an exchange, before anything is sent.
    Whatever is raised there, also by a signal handler while this rank waits, a refusal takes the
    place of what the others wait for, so that they raise as well and nobody is out of step.
    """

    def __enter__(self) -> None:
        """Begin; what was raised before the others cannot be told."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            # Both libraries' own errors: the group is broken, and what is on its way says it.
            with suppress(RuntimeError):
                self._make_up()

    def _make_up(self) -> None:
        """Do what the others still wait for."""
        raise NotImplementedError


class Merging(Exchange):
    """The merge of all ranks' moments, in the order of ranks.

    Two gathers: only ranks that agree on the number of channels can gather as many numbers.

    Parameters
    ----------
    ranks : Ranks
    training : bool
        Whether one value per channel in all is an error.
    """

    def __init__(self, ranks: Ranks, training: bool = False) -> None:
        self._ranks, self._training = ranks, training
        self._sizes = np.full((ranks.size, 2), _UNSENT, np.int64)
        self._numbers = np.empty((ranks.size, 2, 0))
        self._move: Move | None = None

    def merged(self, mine: Moments, move: Move | None = None) -> Moments:
        """Return the moments of all ranks, once running statistics have moved towards them.

        They move on every rank or on none, whatever is raised meanwhile.
        """
        numbers = np.stack([mine.mean, mine.m2])
        self._numbers = np.full((self._ranks.size, *numbers.shape), float(_UNSENT))
        self._move = move
        size = np.array([numbers.shape[1], mine.count], np.int64)
        self._ranks.gather(size, self._sizes)
        if disagreement := self._disagreement():
            raise disagreement
        if numbers.size:
            self._ranks.gather(numbers, self._numbers)
        if refusal := self._refusal():
            raise refusal
        return self._finish()

    def _disagreement(self) -> Exception | None:
        """Return the error that sizes are for all ranks."""
        channels, counts = self._sizes.T.tolist()
        on_all = f"ranks 0 to {self._ranks.size - 1}"
        if _REFUSED in channels:
            return _refusal(channels)
        if len(set(channels)) > 1:
            return ValueError(
                f"the moments have {_in_words(channels)} channels on {on_all}; expected the same "
                "number on all"
            )
        if sum(counts) > _MOST_VALUES:
            return ValueError(
                f"the moments have {_in_words(counts)} values per channel on {on_all}, "
                f"{sum(counts)} together; expected at most {_MOST_VALUES}"
            )
        if self._training and sum(counts) == 1:
            return ValueError(
                "Expected more than 1 value per channel when training, got one on all "
                f"{self._ranks.size} ranks together"
            )
        return None

    def _refusal(self) -> Exception | None:
        """Return the error of a rank that agreed on sizes and was then interrupted."""
        return _refusal(self._numbers[:, 1, :1].ravel().tolist())

    def _finish(self) -> Moments:
        with np.errstate(all="ignore"):  # whatever one rank's caller would have it raise
            batch = Moments.merge_all(
                Moments(count, mean, m2)
                for count, (mean, m2) in zip(self._sizes[:, 1].tolist(), self._numbers, strict=True)
            )
            if self._move is not None:
                self._move(batch)
        return batch

    def _make_up(self) -> None:
        if self._sizes[0, 0] == _UNSENT:
            self._ranks.gather(np.array([_REFUSED, 0], np.int64), self._sizes)
        elif self._disagreement() is None:
            if _UNSENT in self._numbers[0, 1, :1]:
                refused = np.full(self._numbers.shape[1:], float(_REFUSED))
                self._ranks.gather(refused, self._numbers)
            elif self._refusal() is None:
                self._finish()


class Summing(Exchange):
    """The sum of all ranks' gradients of weight and bias, in the order of ranks.

    One gather: the forward before it has made sure of the channels.
    """

    def __init__(self, ranks: Ranks, channels: int) -> None:
        self._ranks = ranks
        self._rows = np.full((ranks.size, 1 + 2 * channels), float(_UNSENT))

    def summed(self, weight: Vector, bias: Vector) -> tuple[Vector, Vector]:
        """Return the sums."""
        self._ranks.gather(np.concatenate([[0.0], weight, bias]), self._rows)
        if refusal := _refusal(self._rows[:, 0].tolist()):
            raise refusal
        total = self._rows[0, 1:]
        with np.errstate(all="ignore"):  # whatever one rank's caller would have it raise
            for row in self._rows[1:, 1:]:
                total = total + row
        return total[: len(weight)], total[len(weight) :]

    def _make_up(self) -> None:
        if self._rows[0, 0] == _UNSENT:
            refused = np.full(self._rows.shape[1:], float(_REFUSED))
            self._ranks.gather(refused, self._rows)


def _refusal(status: Sequence[float]) -> RuntimeError | None:
    refused = [rank for rank, number in enumerate(status) if number == _REFUSED]
    if not refused:
        return None
    return RuntimeError(
        f"rank {_in_words(refused)} could not take part; its own exception says why"
    )


class Move(NamedTuple):
    """What moves running statistics towards a batch from where they were: twice is as once."""

    # Of mean and variance: what writes them, and what they were.
    running: Sequence[tuple[Callable[[Vector], object], Vector]]
    momentum: float
    ddof: int
    # What counts the batch.
    count_batch: Callable[[], object] | None

    def __call__(self, batch: Moments) -> None:
        if self.running and batch.count:
            for (write, old), new in zip(
                self.running, (batch.mean, batch.var(self.ddof)), strict=True
            ):
                write((1 - self.momentum) * old + self.momentum * new)
        if self.count_batch is not None:
            self.count_batch()


def plain_activation(value: Any) -> Activation:
    """Return an activation in Python's own types, which run nobody's code where they are used."""
    return _options.plain_activation(value, _core.ACTIVATIONS)


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
        On every process, if they have different numbers of channels, or more than ``2**63 - 1``
        values per channel together. On this process, if it has more than that alone, or if the
        attributes of `moments` were changed into what are no moments (then RuntimeError on the
        other processes); if it is not in `group`.
    RuntimeError
        If another process could not take part; if `group` is None and there is no default one.

    Notes
    -----
    Two gathers: of ``(channels, count)``, 16 bytes a process, and of mean and M2, 16 bytes a
    channel and process. A process that fails to call is waited for as long as the group's own
    timeout says.
    """
    exchange = Merging(ranks_of(group))
    with exchange:
        return exchange.merged(_sendable(moments))


def _sendable(given: Any) -> Moments:
    """Return moments as they are now, their attributes being anybody's to change."""
    if not isinstance(given, Moments):
        raise TypeError(f"moments is {_errors.kind(given)}; expected Moments")
    mine = Moments(given.count, given.mean, given.m2)
    _check_count(mine.count)
    return mine


def _check_count(count: int) -> None:
    if count > _MOST_VALUES:
        raise ValueError(f"moments.count is {count}; expected at most {_MOST_VALUES}")


_PARAMETERS = ("weight", "bias")
_RUNNING = ("running_mean", "running_var")


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
    In training every process must make the same calls. Whatever one of them cannot do (arguments,
    parameters, statistics or options that do not fit, no memory) it refuses before anything is
    exchanged, and tells the others, which raise RuntimeError: statistics, counters, gradients and
    outputs are as they were on all, nobody is left waiting, and the next call finds all in step.
    So it is where a signal handler raises something while a process waits in a forward, unless
    all have their numbers by then: the statistics have moved on every process in that case, and
    the exception comes out on one. In evaluation nothing is exchanged.

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
            If another process could not take part, whose own exception says why; if `group` is
            None and there is no default one. Statistics and counters are then as they were.
        """
        if not self.training:
            return super().__call__(x, residual, out, update_stats=update_stats)
        exchange = Merging(ranks_of(self.group), training=True)
        with exchange:
            call = self._forward_call(x, residual, out, update_stats)
            batch = exchange.merged(call.mine, call.move)
        y, stats = call.finish(batch)
        if call.observer is None:
            self._keep(call.x, stats, call.residual, y, out)
        return y

    def _forward_call(
        self, x: Any, residual: Any, out: Tensor | None, update_stats: bool
    ) -> _ForwardCall:
        """Read all that a training forward takes, and refuse what does not fit.

        After the exchange nobody could be told: nothing is looked at again, and there is room for
        the results. Options and parameters may run Python code of the caller's, so arrays are
        looked at last.
        """
        observer = self._observer
        updates = (
            observer is None
            and _options.truth("update_stats", update_stats)
            and _options.truth("track_running_stats", self.track_running_stats)
        )
        rates = self._rates() if updates else None
        channels = _options.channel_count("num_features", self.num_features)
        eps, activation = _options.eps(self.eps, training=True), plain_activation(self.activation)
        axis = _options.integer("axis", self.axis)
        x = self._checked(x)
        residual = _maybe_array("residual", residual)
        given = [_maybe_array(name, getattr(self, name)) for name in _PARAMETERS]
        seen = _arrays.Canonical(x, axis, residual=residual, out=out)
        _arrays.check_channels(seen.shape, axis, channels)
        weight, bias = (
            None if value is None else _arrays.parameter(name, value, channels, out)
            for name, value in zip(_PARAMETERS, given, strict=True)
        )
        others = (x, residual, out, *given)
        move = None if rates is None else self._move(*rates, channels, seen.x.dtype, others)
        target = _core.new_output(seen.x) if seen.out is None else seen.out
        mine = moments(seen.x, axis=seen.axis)
        return _ForwardCall(
            x, residual, seen, target, weight, bias, eps, activation, observer, move, mine
        )

    def _rates(self) -> tuple[float, int]:
        """Return momentum and ddof, the batch being one that can be counted."""
        self._check_counting()
        return _options.real("momentum", self._momentum()), _options.ddof(self.ddof)

    def _move(
        self,
        momentum: float,
        ddof: int,
        channels: int,
        dtype: np.dtype[Any],
        others: Sequence[Tensor | None],
    ) -> Move:
        """Return what moves the running statistics, which share no memory with the others."""
        pair = [getattr(self, name) for name in _RUNNING]
        running = []
        if any(value is not None for value in pair):
            for name, value in zip(_RUNNING, pair, strict=True):
                old = _arrays.running_statistic(name, value, channels, dtype).astype(np.float64)
                running.append((partial(np.copyto, np.asarray(value), casting="same_kind"), old))
            _arrays.check_running_apart(*pair, *others)
        counter, count = self.num_batches_tracked, None
        if counter is not None:
            count = partial(np.copyto, np.asarray(counter), int(counter) + 1)
        return Move(running, momentum, ddof, count)

    def backward(self, dy: ArrayLike) -> Any:
        """Return the gradient of the last training forward's input, through all ranks' batch.

        Adds the gradients of weight and bias over this process' part into `weight_grad` and
        `bias_grad`.

        Parameters
        ----------
        dy : array_like
            Gradient with respect to that forward's output.

        Returns
        -------
        dx, dresidual : ndarray
            As in `BatchNorm`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `BatchNorm`; RuntimeError also if another process could not take part. `weight_grad`
            and `bias_grad` are then as they were.
        """
        if not self.training:
            return super().backward(dy)  # which says why not
        saved = self._saved
        channels = self.num_features if saved is None else len(saved.stats.mean)
        exchange = Summing(ranks_of(self.group), channels)
        with exchange:
            if saved is None or saved.x is None:
                return super().backward(dy)  # which says why not
            call = self._backward_call(dy, saved)
            sums = exchange.summed(*call.sums)
        dx, dresidual = call.finish(sums)
        return (dx, dresidual) if saved.had_residual else dx

    def _backward_call(self, dy: Any, saved: Saved) -> _BackwardCall:
        """Read all that a backward takes, refuse what does not fit, and sum over this part."""
        axis, activation = _options.integer("axis", self.axis), plain_activation(self.activation)
        affine = _options.truth("affine", self.affine)
        dy = _maybe_array("dy", dy)
        needs = ["x"] + ["residual"] * saved.had_residual
        wanted = _wanted(needs, saved.residual, activation, saved.y, None)
        mean, _, inv_std, _ = saved.stats
        given = {name: getattr(self, name) for name in _PARAMETERS}
        parameters = {
            name: None if value is None else _arrays.parameter(name, value, len(mean))
            for name, value in given.items()
        }
        seen = _arrays.Canonical(saved.x, axis, dy=dy, residual=saved.residual, y=saved.y)
        arguments: dict[str, Any] = {
            "dy": seen.dy,
            "x": seen.x,
            "mean": mean,
            "inv_std": inv_std,
            **parameters,
            "axis": seen.axis,
            "residual": seen.residual,
            "activation": activation,
            "y": seen.y,
        }
        only_sums = (False, True, True, False)
        _, *sums, _ = _core.backward(**arguments, count=0, out=None, needs=only_sums)
        totals: list[Any] = []
        if affine:
            self._check_gradients()
            for grad, new in zip((self.weight_grad, self.bias_grad), sums, strict=True):
                totals.append((np.asarray(grad), _sum(cast("Tensor", grad), new)))
        arguments.update(count=saved.stats.count, out=_core.new_output(seen.x), needs=wanted)
        return _BackwardCall(arguments, sums, totals)


class _ForwardCall(NamedTuple):
    """A training forward with all that it takes, read and checked, and room for its result."""

    x: Tensor
    residual: Tensor | None
    seen: _arrays.Canonical
    target: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: Activation
    observer: Callable[[Moments], None] | None
    move: Move | None
    mine: Moments

    def finish(self, batch: Moments) -> tuple[Tensor, BatchStats]:
        """Return the output, and what the batch was normalised with."""
        with np.errstate(all="ignore"):
            var = batch.var()
            stats = BatchStats(batch.mean, var, 1 / np.sqrt(var + self.eps), batch.count)
            if self.observer is not None:
                self.observer(batch)
        _core.normalize(
            self.seen.x,
            batch.mean,
            var,
            self.weight,
            self.bias,
            self.eps,
            self.seen.axis,
            self.seen.residual,
            self.activation,
            self.target,
        )
        return self.seen.give(self.target), stats


class _BackwardCall(NamedTuple):
    """A backward with all that it takes, read and checked, and room for the input's gradient."""

    arguments: dict[str, Any]
    # The gradients of weight and bias over this part.
    sums: Sequence[Any]
    # The layer's arrays that they are added into, and what these become.
    totals: Sequence[tuple[Tensor, Tensor]]

    def finish(self, sums: tuple[Vector, Vector]) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and residual."""
        dx, _, _, dresidual = _core.backward(**self.arguments, sums=sums)
        for grad, total in self.totals:
            grad[...] = total
        return dx, dresidual


def _maybe_array(name: str, value: Any) -> Tensor | None:
    return None if value is None else _arrays.array(name, value)


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
        If `x` has fewer than two dimensions, no such axis, or an unknown number of channels; from
        ``compute()``, if its blocks are not what its chunks say, or have different numbers of rows
        in different channels.

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
    _check_count(total.count)
    records = np.empty(len(total.mean), _RECORD)
    records["count"], records["mean"], records["m2"] = total.count, total.mean, total.m2
    return records


def _leaves(parts: Any) -> Iterator[Moments]:
    if isinstance(parts, list):
        for part in parts:
            yield from _leaves(part)
    else:
        yield parts


def _from_records(records: Tensor, channels: int) -> Moments:
    """Return what is in the records, if the blocks were what the array's chunks say."""
    if len(records) != channels:
        raise ValueError(
            f"the blocks of x have {len(records)} channels; expected the {channels} of its shape"
        )
    counts = sorted(set(records["count"].tolist()))
    if len(counts) > 1:
        raise ValueError(
            f"the blocks of x have {_in_words(counts)} values in channels of different blocks; "
            "expected as many in each"
        )
    return Moments(sum(counts), records["mean"].copy(), records["m2"].copy())


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
