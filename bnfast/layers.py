"""Batch norm layers over NumPy arrays, with PyTorch's names and rules."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _core
from .functional import BatchStats, Gradients, batch_norm_backward
from .moments import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Tensor = NDArray[Any]
    Activation = str | tuple[str, float] | None

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "FrozenBatchNorm"]

_NAMES = ("running_mean", "running_var", "weight", "bias")
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class FrozenBatchNorm(_core.FixedMap):
    """An immutable batch norm for inference, from `BatchNorm.freeze`.

    ``frozen(x, residual=None, out=None)`` returns
    ``activation((x - mean) * scale + shift (+ residual))``; it may be called from many threads.

    Parameters
    ----------
    mean, scale, shift : array_like, shape (channels,)
        Kept as read-only float64.
    axis : int
        The channel axis.
    activation : {None, "relu", "relu6", "leaky_relu"} or ("leaky_relu", slope)
        Applied last.

    Attributes
    ----------
    mean, scale, shift : ndarray of float64, shape (channels,)
    axis : int
    activation : str, tuple or None

    Notes
    -----
    The linear map of the paper's Algorithm 2, its mean subtracted first so that a mean far from
    zero costs no digits.
    """

    __slots__ = ()

    def __init__(
        self,
        mean: ArrayLike,
        scale: ArrayLike,
        shift: ArrayLike,
        axis: int = 1,
        activation: Activation = None,
    ) -> None:
        super().__init__(mean, scale, shift, _axis(axis), activation)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.mean, self.scale, self.shift, self.axis, self.activation)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.mean)} channels, axis={self.axis}, "
            f"activation={self.activation!r})"
        )


class BatchNorm:
    """Batch normalization of the channels on one axis, any rank from 2.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of a new batch in the running statistics; None for the cumulative average.
    affine : bool
        Whether there are `weight` and `bias`.
    track_running_stats : bool
        Whether there are running statistics; without, batches are normalised by their own in
        both modes.
    axis : int
        The channel axis.
    ddof : {1, 0}
        The running variance takes a batch's over ``m - ddof``.
    activation : {None, "relu", "relu6", "leaky_relu"} or ("leaky_relu", slope)
        Applied to the output.
    dtype : dtype
        Of the parameters and running statistics: float32, also for float16 and bfloat16 data,
        or float64 for float64 data.

    Attributes
    ----------
    weight, bias, running_mean, running_var : ndarray, shape (num_features,), or None
    weight_grad, bias_grad : ndarray, shape (num_features,), or None
        What `backward` adds into.
    num_batches_tracked : ndarray of int64, shape (), or None
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an option has a type or value that is not accepted.

    Notes
    -----
    Ioffe and Szegedy (2015): Algorithm 1 in training, Algorithm 2's linear map in evaluation.
    Changing `x` in place between a forward and its backward gives the gradient of the changed
    array: there is no version counter.
    """

    _ranks: tuple[int, ...] | None = None  # any
    # The last training forward's input, statistics, whether it had a residual, and its output.
    _saved: tuple[Any, BatchStats, bool, Tensor | None] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        ddof: int = 1,
        activation: Activation = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if isinstance(num_features, bool) or not hasattr(num_features, "__index__"):
            raise TypeError(f"num_features is {num_features!r:.60}; expected an integer")
        if index(num_features) < 0:
            raise ValueError(f"num_features is {num_features}; expected 0 or more")
        kind = np.dtype(dtype)
        if kind not in (np.float32, np.float64):
            raise TypeError(
                f"dtype is {kind}; expected float32, which float16 and bfloat16 data go with too, "
                "or float64"
            )
        if activation is not None:
            _arrays.activation(activation)
        self.num_features = index(num_features)
        self.eps = _arrays.eps(eps, training=False)
        self.momentum = None if momentum is None else _arrays.real("momentum", momentum)
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.axis = _axis(axis)
        self.ddof = _arrays.check_ddof(ddof)
        self.activation = activation
        self.dtype = kind
        self.training = True
        self._observer: Callable[[Moments], None] | None = None

        def new(wanted: bool) -> Tensor | None:
            return np.zeros(self.num_features, kind) if wanted else None

        self.weight, self.bias = new(self.affine), new(self.affine)
        self.weight_grad, self.bias_grad = new(self.affine), new(self.affine)
        tracked = self.track_running_stats
        self.running_mean, self.running_var = new(tracked), new(tracked)
        self.num_batches_tracked = np.zeros((), np.int64) if tracked else None
        self.reset_parameters()

    # ---- state

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0 and the running statistics to their start, in place."""
        self.reset_running_stats()
        _fill(1, self.weight)
        _fill(0, self.bias)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1, the batch count to 0, in place."""
        _fill(0, self.running_mean, self.num_batches_tracked)
        _fill(1, self.running_var)

    def zero_grad(self) -> None:
        """Set `weight_grad` and `bias_grad` to zero."""
        _fill(0, self.weight_grad, self.bias_grad)

    def train(self, mode: bool = True) -> BatchNorm:
        """Switch to training (or, with False, evaluation) and return self."""
        self.training = bool(mode)
        if not self.training:
            self._forget()
        return self

    def eval(self) -> BatchNorm:
        """Switch to evaluation, drop what a backward would need, and return self."""
        return self.train(False)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of parameters and running statistics, under PyTorch's names."""
        return {
            name: np.array(value) for name in _STATE if (value := getattr(self, name)) is not None
        }

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> None:
        """Copy parameters and running statistics in, in place.

        Parameters
        ----------
        state : mapping of str to array_like
            A layer's `state_dict`, or a whole model's.
        strict : bool
            Refuse missing keys and, under the prefix, unknown ones. A missing
            ``num_batches_tracked`` (old checkpoints) is taken as 0 all the same.
        prefix : str
            What this layer's keys begin with, as ``"layer1.0.bn1."``.

        Raises
        ------
        RuntimeError
            If keys are missing or unknown, or shapes differ; nothing is copied then.
        TypeError
            If an entry is not of a floating-point type.
        """
        found = {
            key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)
        }
        own = {name: a for name in _STATE if (a := getattr(self, name)) is not None}
        if strict:
            _check_keys(set(found), set(own), prefix, type(self).__name__)
        new = {
            name: _entry(prefix + name, found[name], a) for name, a in own.items() if name in found
        }
        if "num_batches_tracked" in own:
            new.setdefault("num_batches_tracked", np.zeros((), np.int64))
        for name, value in new.items():
            own[name][...] = value

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_saved"] = state["_observer"] = None
        return state

    # ---- forward and backward

    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out: Tensor | None = None,
        *,
        update_stats: bool = True,
    ) -> Tensor:
        """Normalise `x`: by its own statistics in training, by the running ones in evaluation.

        Parameters
        ----------
        x : array_like
            With `num_features` channels on `axis`.
        residual : array_like, optional
            Added before the activation.
        out : ndarray, optional
            Where to write; `x` or `residual` itself, or apart from both.
        update_stats : bool
            Whether a training forward moves the running statistics: False for the recomputed
            forward of checkpointing.

        Returns
        -------
        ndarray
            `out`, or a fresh array in the memory order of `x`.

        Raises
        ------
        TypeError, ValueError
            As `batch_norm`; every statistic and counter is then as it was.
        """
        self._check_input(x)
        if not self.training and self.track_running_stats:
            return _core.normalize(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.eps,
                self.axis,
                residual,
                self.activation,
                out,
                _NAMES,
                True,
            )
        observed = self._observer is not None
        updates = self.training and self.track_running_stats and update_stats and not observed
        y, (count, mean, var, inv_std) = _core.forward(
            x,
            self.running_mean if updates else None,
            self.running_var if updates else None,
            self.weight,
            self.bias,
            self._momentum(),
            self.eps,
            self.axis,
            self.ddof,
            residual,
            self.activation,
            out,
        )
        if not self.training:
            return y
        if self._observer is not None:
            self._observer(Moments(count, mean, var * count))
            return y
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        self._keep(x, BatchStats(mean, var, inv_std, count), residual, y, out)
        return y

    def backward(self, dy: ArrayLike) -> Any:
        """Return the gradient of the last training forward's input.

        Adds the gradients of weight and bias into `weight_grad` and `bias_grad`.

        Parameters
        ----------
        dy : array_like
            Gradient with respect to that forward's output.

        Returns
        -------
        dx : ndarray
        dresidual : ndarray
            Only where the forward had a residual: then the two are returned as a tuple.

        Raises
        ------
        RuntimeError
            In evaluation mode, before any training forward, or if that forward overwrote its
            input.
        """
        if not self.training:
            raise RuntimeError(
                "backward in evaluation mode: a forward keeps nothing there (for fixed statistics "
                "use batch_norm_backward with BatchStats.from_population)"
            )
        if self._saved is None:
            raise RuntimeError("backward before a forward in training mode: nothing to answer for")
        x, stats, had_residual, y = self._saved
        if x is None:
            raise RuntimeError("backward after a forward with out=x: its input is gone")
        needs = ["x"] + ["weight", "bias"] * self.affine + ["residual"] * had_residual
        gradients = self._gradients(dy, x, stats, y, needs)
        if self.weight_grad is not None and self.bias_grad is not None:
            with np.errstate(invalid="ignore", over="ignore"):  # what a float32 can hold
                self.weight_grad += gradients.weight
                self.bias_grad += gradients.bias
        return (gradients.x, gradients.residual) if had_residual else gradients.x

    def freeze(self) -> FrozenBatchNorm:
        """Return this layer's inference as an immutable callable, whatever mode it is in.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        """
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError("freeze needs running statistics; this layer tracks none")
        stats = BatchStats.from_population(self.running_mean, self.running_var, self.eps)
        scale = stats.inv_std if self.weight is None else self.weight * stats.inv_std
        shift = np.zeros(self.num_features) if self.bias is None else self.bias
        return FrozenBatchNorm(stats.mean, scale, shift, self.axis, self.activation)

    def _keep(
        self, x: Any, stats: BatchStats, residual: ArrayLike | None, y: Tensor, out: Tensor | None
    ) -> None:
        overwritten = out is not None and np.may_share_memory(out, np.asarray(x))
        keeps_y = residual is not None and self.activation is not None
        self._saved = (
            None if overwritten else x,
            stats,
            residual is not None,
            y if keeps_y else None,
        )

    def _gradients(
        self, dy: ArrayLike, x: Any, stats: BatchStats, y: Tensor | None, needs: Sequence[str]
    ) -> Gradients:
        return batch_norm_backward(
            dy,
            x,
            stats,
            self.weight,
            self.bias,
            axis=self.axis,
            activation=self.activation,
            y=y,
            needs=needs,
        )

    def _forget(self) -> None:
        self._saved = None

    def _momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        tracked = 0 if self.num_batches_tracked is None else int(self.num_batches_tracked)
        return 1 / (tracked + 1)  # the cumulative average

    def _check_input(self, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple):
            shape = np.shape(x)
        if self._ranks is not None and len(shape) not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(
                f"x has shape {shape}, {len(shape)}D; {type(self).__name__} expected {expected}"
            )
        if -len(shape) <= self.axis < len(shape) and shape[self.axis] != self.num_features:
            raise ValueError(_arrays.wrong_channels(shape, self.axis, self.num_features))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis}, "
            f"ddof={self.ddof}, activation={self.activation!r}, dtype={self.dtype})"
        )


class BatchNorm1d(BatchNorm):
    """`BatchNorm` of (N, C) or (N, C, L)."""

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` of (N, C, H, W)."""

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` of (N, C, D, H, W)."""

    _ranks = (5,)


def _axis(axis: Any) -> int:
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"axis is {axis!r:.60}; expected an integer")
    return index(axis)


def _fill(value: int, *arrays: Tensor | None) -> None:
    for a in arrays:
        if a is not None:
            a[...] = value


def _check_keys(found: set[str], own: set[str], prefix: str, layer: str) -> None:
    missing = sorted(own - found - {"num_batches_tracked"})
    unknown = sorted(found - own)
    if missing or unknown:
        parts = [
            f"{kind} {', '.join(repr(prefix + name) for name in names)}"
            for kind, names in (("missing", missing), ("unexpected", unknown))
            if names
        ]
        raise RuntimeError(f"state of {layer}: {'; '.join(parts)}")


def _entry(name: str, value: Any, own: Tensor) -> Tensor:
    """Return a state entry as the array it is to be copied into, or say why it cannot be."""
    entry = _arrays.array(name, value)
    if entry.shape != own.shape:
        raise RuntimeError(f"{name} has shape {entry.shape}; expected {own.shape}")
    kinds = "iu" if own.dtype.kind == "i" else "f"
    if entry.dtype.kind not in kinds and entry.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {entry.dtype}; expected one like {own.dtype}")
    with np.errstate(over="ignore"):  # a variance past float32 is infinite there, as in PyTorch
        return entry.astype(own.dtype)
