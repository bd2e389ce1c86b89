"""`SyncBatchNorm`: batch norm over a batch whose parts are on the ranks of a group."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from bnfast import _arrays, _core, _masks, _options
from bnfast.functional import _wanted
from bnfast.layers import _RUNNING, BatchNorm, Saved, _sum
from bnfast.moments import moments

from .forward import ForwardCall, Move
from .merging import Counted, Merging
from .ranks import ranks_of
from .summing import Summing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, DTypeLike

    from bnfast._types import Activation, Tensor, Vector

_PARAMETERS = ("weight", "bias")


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose batch in training is that of all processes of a group.

    Every process calls it with its part of the batch, of any size, zero included; parameters must
    be equal on all of them. Outputs and gradients are those of one process with the parts
    concatenated, up to rounding, and the running statistics have the same bits on every process.

    Parameters
    ----------
    num_features : int
        The number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of a new batch in the running statistics; None for the cumulative average.
    affine : bool
        Whether the layer has `weight` and `bias`.
    track_running_stats : bool
        Whether the layer has running statistics. If False, batches are normalised with their own
        statistics in both modes.
    group : torch.distributed.ProcessGroup, mpi4py.MPI.Comm or None
        The processes; None is the default group of ``torch.distributed`` at the time of a call.
    axis : int
        The channel axis.
    ddof : {1, 0}
        The batch variance that updates `running_var` is divided by ``m - ddof``, where m is the
        number of values per channel on all processes.
    activation : str, ("leaky_relu", float) or None
        Applied to the output: one of the names that `batch_norm` takes.
    dtype : dtype
        The type of parameters and running statistics: float32 (for float16 and bfloat16 data too)
        or float64 (for float64 data).

    Attributes
    ----------
    group : torch.distributed.ProcessGroup, mpi4py.MPI.Comm or None
        `copy.deepcopy` keeps it. A layer can be pickled if its `group` can: None, or a communicator
        that MPI predefines. All other attributes are those of `BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        If an option has a type or value that is not accepted.

    Notes
    -----
    In training every process must make the same calls. If a process cannot do its part (arguments,
    parameters, statistics or options that do not fit, no memory), it raises before anything is
    exchanged and tells the others, which raise RuntimeError. Statistics, counters, gradients and
    outputs are then as they were on all processes, no process is left waiting, and the next call
    works. The same holds if a signal handler raises while a process waits in a forward, unless all
    processes have received all numbers by then: in that case the statistics have moved on every
    process, and only the interrupted one raises. In evaluation nothing is exchanged.

    `weight_grad` and `bias_grad` are those of this process' part, like the gradients of any other
    layer: sum or average them over the processes together with the others.

    Examples
    --------
    A program that ``torchrun`` starts on several processes:

    >>> import numpy as np
    >>> import torch.distributed as dist
    >>> import bnfast
    >>> from bnfast.distributed import SyncBatchNorm, all_reduce
    >>> dist.init_process_group("gloo")
    >>> layer = SyncBatchNorm(2)
    >>> x = np.array([[0.0, 1.0], [2.0, 5.0]], np.float32) + dist.get_rank()
    >>> y = layer(x)  # normalised with the batch of all processes
    >>> bool(np.allclose(all_reduce(bnfast.moments(y)).mean, 0, atol=1e-6))
    True
    >>> dx = layer.backward(y)  # through the mean and variance of that batch
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
        memo[id(self.group)] = self.group  # the same processes, not a copy
        copied = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__getstate__(), memo))
        return copied

    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out: Tensor | None = None,
        *,
        mask: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> Tensor:
        """Normalise `x`: in training with the batch of all processes, else with running statistics.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            Rank 2 or more, with `num_features` channels on `axis`.
        residual : array_like, shape and dtype of `x`, optional
            Added before the activation.
        out : ndarray, shape and dtype of `x`, optional
            Where to write: `x` or `residual` itself, or memory apart from both.
        mask : array_like of bool, or of any of the types of `x`, optional
            Which values of this process' part count in training, or their weights: see
            `bnfast.batch_norm`. It may count none of them; a process without a mask counts all.
        update_stats : bool
            Whether a training forward updates the running statistics. False is for the repeated
            forward of checkpointing.

        Returns
        -------
        ndarray
            `out`, or a fresh array in the memory order of `x`.

        Raises
        ------
        TypeError
            If an argument has a dtype or type that is not accepted.
        ValueError
            If an argument has a wrong shape or value. On every process, if all of them together
            have one value per channel, or masks that count fewer than two or weigh too little, or
            if they have different numbers of channels.
        RuntimeError
            If another process could not take part (its own exception says why); if `group` is None
            and there is no default one. Statistics and counters are then as they were.
        """
        if not self.training:
            return super().__call__(x, residual, out, mask=mask, update_stats=update_stats)
        exchange = Merging(ranks_of(self.group), training=True)
        with exchange:
            call = self._forward_call(x, residual, out, mask, update_stats)
            batch = exchange.merged(call.mine, call.move, call.counted)
        y, stats = call.finish(batch)
        if call.observer is None:
            self._keep(call.x, stats, call.residual, y, out, call.mask)
        return y

    def _forward_call(
        self, x: Any, residual: Any, out: Tensor | None, mask: Any, update_stats: bool
    ) -> ForwardCall:
        """Read and check all arguments of a training forward, and allocate its results.

        After the exchange the other ranks cannot be told of an error, so nothing is read or
        allocated then. Reading options and parameters may run Python code of the caller, so arrays
        are looked at last.
        """
        if self.virtual_batch_size is not None:
            raise RuntimeError(
                "virtual_batch_size is set; SyncBatchNorm takes the batch of all processes"
            )
        observer = self._observer
        updates = (
            observer is None
            and _options.truth("update_stats", update_stats)
            and _options.truth("track_running_stats", self.track_running_stats)
        )
        rates = self._rates() if updates else None
        channels = _options.channel_count("num_features", self.num_features)
        eps = _options.eps(self.eps, training=True)
        activation = _options.plain_activation(self.activation, _core.ACTIVATIONS)
        axis = _options.integer("axis", self.axis)
        x = self._checked(x)
        residual = _maybe_array("residual", residual)
        mask = None if mask is None else _masks.read(mask).copy()
        given = [_maybe_array(name, getattr(self, name)) for name in _PARAMETERS]
        canonical = _arrays.Canonical(x, axis, residual=residual, out=out)
        _arrays.check_channels(canonical.shape, axis, channels)
        weight, bias = (
            None if value is None else _arrays.parameter(name, value, channels, out)
            for name, value in zip(_PARAMETERS, given, strict=True)
        )
        others = (x, residual, out, *given)
        move = None if rates is None else self._move(*rates, channels, canonical.x.dtype, others)
        target = _core.new_output(canonical.x) if canonical.out is None else canonical.out
        mine = moments(canonical.x, axis=canonical.axis, mask=mask)
        counted = None if mask is None else Counted.of(mask, canonical.x, canonical.axis)
        return ForwardCall(
            x,
            residual,
            canonical,
            target,
            weight,
            bias,
            eps,
            activation,
            observer,
            move,
            mine,
            mask,
            counted,
        )

    def _rates(self) -> tuple[float, int]:
        """Return momentum and ddof; raise if the counter cannot count the batch."""
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
        """Return the running update; raise if statistics share memory with `others`."""
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
        """Return the gradient of the last training forward's input, through the batch of all ranks.

        Adds the gradients of weight and bias, of this process' part, to `weight_grad` and
        `bias_grad`.

        Parameters
        ----------
        dy : array_like, shape and dtype of the forward's `x`
            Gradient of the loss with respect to that forward's output.

        Returns
        -------
        dx : ndarray, shape and dtype of the forward's `x`
        dresidual : ndarray, shape and dtype of the forward's `x`
            Only if the forward had a residual; the two are then returned as a tuple.

        Raises
        ------
        RuntimeError
            In evaluation mode, before any training forward, if that forward overwrote its input,
            or if another process could not take part.
        TypeError, ValueError
            If `dy` does not fit that forward, or `weight_grad` or `bias_grad` cannot be added to.
            Both are then unchanged.
        """
        if not self.training:
            return super().backward(dy)  # it raises
        saved = self._saved
        channels = self.num_features if saved is None else len(saved.stats.mean)
        exchange = Summing(ranks_of(self.group), channels)
        with exchange:
            if saved is None or saved.x is None or saved.lacks_residual:
                return super().backward(dy)  # it raises
            call = self._backward_call(dy, saved)
            sums = exchange.summed(*call.sums)
        dx, dresidual = call.finish(sums)
        return (dx, dresidual) if saved.had_residual else dx

    def _backward_call(self, dy: Any, saved: Saved) -> _BackwardCall:
        """Read and check all arguments of a backward, and sum over this rank's part."""
        axis = _options.integer("axis", self.axis)
        activation = _options.plain_activation(self.activation, _core.ACTIVATIONS)
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
        canonical = _arrays.Canonical(saved.x, axis, dy=dy, residual=saved.residual, y=saved.y)
        arguments: dict[str, Any] = {
            "dy": canonical.dy,
            "x": canonical.x,
            "mean": mean,
            "inv_std": inv_std,
            **parameters,
            "axis": canonical.axis,
            "residual": canonical.residual,
            "activation": activation,
            "y": canonical.y,
            "mask": saved.mask,
        }
        only_sums = (False, True, True, False)
        _, *sums, _ = _core.backward(**arguments, count=0, out=None, needs=only_sums)
        totals: list[Any] = []
        if affine:
            self._check_gradients()
            for grad, new in zip((self.weight_grad, self.bias_grad), sums, strict=True):
                totals.append((np.asarray(grad), _sum(cast("Tensor", grad), new)))
        arguments.update(count=saved.stats.count, out=_core.new_output(canonical.x), needs=wanted)
        return _BackwardCall(arguments, sums, totals)


class _BackwardCall(NamedTuple):
    """A backward with all its arguments read and checked, and memory for the input's gradient."""

    arguments: dict[str, Any]
    # The gradients of weight and bias over this rank's part.
    sums: Sequence[Any]
    # The layer's arrays that they are added to, and the new values of these.
    totals: Sequence[tuple[Tensor, Tensor]]

    def finish(self, sums: tuple[Vector, Vector]) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and residual."""
        dx, _, _, dresidual = _core.backward(**self.arguments, sums=sums)
        for grad, total in self.totals:
            grad[...] = total
        return dx, dresidual


def _maybe_array(name: str, value: Any) -> Tensor | None:
    return None if value is None else _arrays.array(name, value)
