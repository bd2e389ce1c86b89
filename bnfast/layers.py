"""Batch norm layers over NumPy arrays, with PyTorch's names and rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _core, _errors, _masks, _options
from .functional import BatchStats, Gradients, batch_norm_backward
from .moments import Moments, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, DTypeLike

    from ._types import Activation, Tensor


__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "FrozenBatchNorm"]

_RUNNING = ("running_mean", "running_var")
_NAMES = (*_RUNNING, "weight", "bias")
_STATE = ("weight", "bias", *_RUNNING, "num_batches_tracked")


class FrozenBatchNorm(_core.FixedMap):
    """An immutable batch norm for inference, which `BatchNorm.freeze` makes.

    ``frozen(x, residual=None, out=None)`` returns
    ``activation((x - mean) * scale + shift (+ residual))``. Many threads may call it at once.

    Parameters
    ----------
    mean, scale, shift : array_like of float32, float64, float16 or bfloat16, shape (channels,)
        Copied.
    axis : int
        The channel axis.
    activation : str, ("leaky_relu", float) or None
        Applied last: one of the names that `batch_norm` takes.

    Attributes
    ----------
    mean, scale, shift : ndarray of float64, shape (channels,)
        Read-only.
    axis : int
    activation : str, ("leaky_relu", float) or None

    Raises
    ------
    TypeError, ValueError
        If an argument has a type, shape or value that is not accepted.

    Notes
    -----
    The linear map of the paper's Algorithm 2. The mean is subtracted first, so that a mean far
    from zero loses no digits.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> frozen = bnfast.FrozenBatchNorm(mean=[1.0, 2.0], scale=[3.0, 0.5], shift=[0.0, 10.0])
    >>> frozen(np.array([[1.0, 2.0], [2.0, 4.0]]))
    array([[ 0., 10.],
           [ 3., 11.]])
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
        super().__init__(mean, scale, shift, _options.integer("axis", axis), activation)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.mean, self.scale, self.shift, self.axis, self.activation)

    def __repr__(self) -> str:
        try:
            channels = len(self.mean)
        except RuntimeError:  # a repr must not raise
            return f"{type(self).__name__}(never initialised)"
        return (
            f"{type(self).__name__}({channels} channels, axis={self.axis}, "
            f"activation={self.activation!r})"
        )


class BatchNorm:
    """Batch normalization of the channels on one axis, for arrays of rank 2 or more.

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
    axis : int
        The channel axis.
    ddof : {1, 0}
        The batch variance that updates `running_var` is divided by ``m - ddof``, where m is the
        number of values per channel: 1 as in PyTorch and the paper, 0 as in Keras, ONNX and Flax.
    activation : str, ("leaky_relu", float) or None
        Applied to the output: one of the names that `batch_norm` takes.
    dtype : dtype
        The type of parameters and running statistics: float32 (for float16 and bfloat16 data too)
        or float64 (for float64 data).
    virtual_batch_size : int or None
        In training, rows of axis 0 are normalised in runs of so many, each with its own statistics
        ("ghost batches"); None for all together.

    Attributes
    ----------
    weight, bias, running_mean, running_var : ndarray of `dtype`, shape (num_features,), or None
    weight_grad, bias_grad : ndarray of `dtype`, shape (num_features,), or None
        `backward` adds to them.
    num_batches_tracked : ndarray of int64, shape (), or None
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an option has a type or value that is not accepted.

    Notes
    -----
    Ioffe and Szegedy (2015): Algorithm 1 in training, Algorithm 2's linear map in evaluation.

    There is no version counter. If `x` or the residual is changed in place between a forward and
    its backward, the gradient is that of the changed array; if weight or bias is changed, that of
    the changed layer. The output may be changed freely, unless it was written over the residual:
    the backward then reads it in place of the residual.

    Examples
    --------
    A training step, then evaluation:

    >>> import numpy as np
    >>> import bnfast
    >>> layer = bnfast.BatchNorm(2, dtype=np.float64)
    >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    >>> y = layer(x)
    >>> dx = layer.backward(np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
    >>> layer.weight_grad.round(4), layer.bias_grad
    (array([-1.069 ,  1.3363]), array([1., 1.]))
    >>> layer.weight -= 0.1 * layer.weight_grad
    >>> layer.zero_grad()
    >>> layer.eval()(x).round(2)
    array([[0.8 , 1.35],
           [1.84, 3.11],
           [3.92, 6.63]])
    """

    _ranks: tuple[int, ...] | None = None  # any
    # What the last training forward saved for its backward.
    _saved: Saved | None = None
    virtual_batch_size: int | None = None  # of layers that were pickled without it

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
        virtual_batch_size: int | None = None,
    ) -> None:
        kind = _dtype(dtype)
        if activation is not None:
            _options.activation(activation, _core.ACTIVATIONS)
        self.num_features = _options.channel_count("num_features", num_features)
        self.eps = _options.eps(eps, training=False)
        self.momentum = None if momentum is None else _options.real("momentum", momentum)
        self.affine = _options.truth("affine", affine)
        self.track_running_stats = _options.truth("track_running_stats", track_running_stats)
        self.axis = _options.integer("axis", axis)
        self.ddof = _options.ddof(ddof)
        self.activation = activation
        self.dtype = kind
        if virtual_batch_size is not None:
            _options.run_length("virtual_batch_size", virtual_batch_size)
        self.virtual_batch_size = virtual_batch_size
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
        """Switch to training or evaluation mode.

        Parameters
        ----------
        mode : bool
            True for training, False for evaluation, which frees what a backward would need.

        Returns
        -------
        BatchNorm
            The layer itself.
        """
        self.training = _options.truth("mode", mode)
        if not self.training:
            self._forget()
        return self

    def eval(self) -> BatchNorm:
        """Switch to evaluation mode and return the layer: ``train(False)``."""
        return self.train(False)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of parameters and running statistics, under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``num_batches_tracked``, as
            far as the layer has them.
        """
        return {
            name: np.array(value) for name in _STATE if (value := getattr(self, name)) is not None
        }

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> None:
        """Copy a state into the layer's parameters and running statistics, in place.

        Parameters
        ----------
        state : mapping of str to array_like
            The `state_dict` of a layer or of a whole model.
        strict : bool
            Refuse missing keys and unknown keys that begin with `prefix`. A missing
            ``num_batches_tracked`` (old checkpoints) is never refused: beside running statistics
            it is taken as 0.
        prefix : str
            The beginning of this layer's keys, such as ``"layer1.0.bn1."``.

        Raises
        ------
        RuntimeError
            If keys are missing or unknown, or shapes differ; nothing is copied then.
        TypeError
            If an entry is not of a floating-point type, or `state` is not a mapping.
        ValueError
            If a batch count is negative or too large for int64, or one of the layer's arrays
            cannot be written to.
        """
        found = _entries(state, prefix)
        own = self._own_arrays()
        if _options.truth("strict", strict):
            _check_keys(set(found), set(own), prefix, type(self).__name__)
        new = {
            name: _entry(prefix + name, found[name], a) for name, a in own.items() if name in found
        }
        if "num_batches_tracked" in own and not new.keys().isdisjoint(_RUNNING):
            new.setdefault("num_batches_tracked", np.zeros((), np.int64))
        # Check the layer's arrays again: reading the state may have run code that changed them.
        for name, a in self._own_arrays().items():
            if name in new:
                _arrays.copy_into(a, new[name])

    def _own_arrays(self) -> dict[str, Tensor]:
        """Return the arrays that a state is copied into; raise if one cannot be written to."""
        own = {name: a for name in _STATE if (a := getattr(self, name)) is not None}
        for name, a in own.items():
            if name == "num_batches_tracked":
                _arrays.check_counter(a)
            else:
                _arrays.check_updatable(f"the layer's {name}", a, self.num_features)
        return {name: np.asarray(a) for name, a in own.items()}

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
        mask: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> Tensor:
        """Normalise `x` with its own statistics in training, with the running ones in evaluation.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            Rank 2 or more, with `num_features` channels on `axis`.
        residual : array_like, shape and dtype of `x`, optional
            Added before the activation.
        out : ndarray, shape and dtype of `x`, optional
            Where to write: `x` or `residual` itself, or memory apart from both.
        mask : array_like of bool, or of any of the types of `x`, optional
            Which values count in training, or their weights: see `batch_norm`. `backward` reads it
            again.
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
            If an argument has a wrong shape or value, or if in training there is one value per
            channel, or a mask counts fewer than two. Statistics and counters are then unchanged.
        """
        x = self._checked(x)
        if mask is not None:
            mask = _masks.read(mask)
        if not self.training and self._has_running_stats():
            if mask is not None:
                _masks.check_fits(mask, x.shape, self.axis)
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
        updates = (
            self.training
            and self.track_running_stats
            and (update_stats is True or _options.truth("update_stats", update_stats))
            and self._observer is None
        )
        momentum = self.momentum if updates else 0.0  # None: the core computes it from the counter
        if momentum is None:
            self._check_counting()
            if self.num_batches_tracked is None:
                momentum = 0.0  # there are no running statistics
        if residual is not None and type(residual) is not np.ndarray:
            residual = _arrays.array("residual", residual)
        y, (count, mean, var, inv_std) = _core.forward(
            x,
            self.running_mean if updates else None,
            self.running_var if updates else None,
            self.weight,
            self.bias,
            momentum,
            self.eps,
            self.axis,
            self.ddof,
            residual,
            self.activation,
            out,
            self.num_batches_tracked if updates else None,
            mask=mask,
            virtual_batch_size=self.virtual_batch_size,
        )
        if not self.training:
            return y
        if self._observer is not None:
            self._observer(self._moments_of(x, BatchStats(mean, var, inv_std, count), mask))
            return y
        self._keep(x, BatchStats(mean, var, inv_std, count), residual, y, out, mask)
        return y

    def _moments_of(self, x: Tensor, stats: BatchStats, mask: Tensor | None) -> Moments:
        """Return the moments of a batch from its statistics, which virtual ones have by runs."""
        if self.virtual_batch_size is not None:
            return moments(x, axis=self.axis, mask=mask)
        with np.errstate(all="ignore"):
            return Moments(stats.count, stats.mean, stats.var * stats.count)

    def backward(self, dy: ArrayLike) -> Any:
        """Return the gradient of the last training forward's input.

        Adds the gradients of weight and bias to `weight_grad` and `bias_grad`.

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
            In evaluation mode, before any training forward, or if that forward overwrote its
            input.
        TypeError, ValueError
            If `dy` does not fit that forward, or `weight_grad` or `bias_grad` cannot be added to.
        """
        if not self.training:
            raise RuntimeError(
                "backward in evaluation mode: a forward keeps nothing there (for fixed statistics "
                "use batch_norm_backward with BatchStats.from_population)"
            )
        if self._saved is None:
            raise RuntimeError("backward before a forward in training mode: nothing to answer for")
        saved = self._saved
        if saved.x is None:
            raise RuntimeError("backward after a forward with out=x: its input is gone")
        if saved.lacks_residual:
            raise RuntimeError(
                "backward after a forward with out=residual: its residual is gone, which the "
                f"derivative of {self.activation!r} needs"
            )
        needs = ["x"] + ["weight", "bias"] * self.affine + ["residual"] * saved.had_residual
        gradients = self._gradients(dy, saved, needs)
        if self.affine:
            self._check_gradients()  # only now: no code of the caller runs after this
            weights, biases = np.asarray(self.weight_grad), np.asarray(self.bias_grad)
            sums = _sum(weights, gradients.weight), _sum(biases, gradients.bias)
            weights[...], biases[...] = sums
        return (gradients.x, gradients.residual) if saved.had_residual else gradients.x

    def freeze(self) -> FrozenBatchNorm:
        """Return an immutable callable that does this layer's inference; its mode does not matter.

        Returns
        -------
        FrozenBatchNorm
            With copies of the running statistics and parameters, in float64.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.

        Examples
        --------
        >>> import numpy as np
        >>> import bnfast
        >>> layer = bnfast.BatchNorm(2, activation="relu", dtype=np.float64)
        >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
        >>> y = layer(x)  # a training call updates the running statistics
        >>> frozen = layer.freeze()
        >>> frozen
        FrozenBatchNorm(2 channels, axis=1, activation='relu')
        >>> bool(np.allclose(frozen(x), layer.eval()(x)))
        True
        """
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError("freeze needs running statistics; this layer tracks none")
        stats = BatchStats.from_population(self.running_mean, self.running_var, self.eps)
        scale = stats.inv_std
        if self.weight is not None:
            weight = _arrays.constant("weight", self.weight, self.num_features)
            with np.errstate(all="ignore"):
                scale = weight * scale
        shift = np.zeros(self.num_features) if self.bias is None else self.bias
        return FrozenBatchNorm(stats.mean, scale, shift, self.axis, self.activation)

    def _keep(
        self,
        x: Tensor,
        stats: BatchStats,
        residual: Tensor | None,
        y: Tensor,
        out: Tensor | None,
        mask: Tensor | None = None,
        correction: Any = None,
    ) -> None:
        """Save what a backward needs.

        The derivative of an activation is recomputed from the inputs, not read from `y`, since the
        caller may change `y`.
        """
        needs_residual = self.activation is not None and residual is not None
        covered = _overwritten(residual, out)
        self._saved = Saved(
            None if _overwritten(x, out) else x,
            stats,
            residual is not None,
            residual if needs_residual and not covered else None,
            y if needs_residual and covered else None,
            needs_residual
            and covered
            and not _options.is_from_output(self.activation, _core.ACTIVATIONS),
            mask,
            self.virtual_batch_size,
            correction,
        )

    def _gradients(self, dy: ArrayLike, saved: Saved, needs: Sequence[str]) -> Gradients:
        return self._plain_gradients(dy, saved, needs, self.weight, self.bias)

    def _plain_gradients(
        self,
        dy: ArrayLike,
        saved: Saved,
        needs: Sequence[str],
        weight: ArrayLike | None,
        bias: ArrayLike | None,
    ) -> Gradients:
        return batch_norm_backward(
            dy,
            saved.x,
            saved.stats,
            weight,
            bias,
            axis=self.axis,
            residual=saved.residual,
            activation=self.activation,
            y=saved.y,
            needs=needs,
            mask=saved.mask,
            virtual_batch_size=saved.virtual_batch_size,
        )

    def _forget(self) -> None:
        self._saved = None

    def _check_gradients(self) -> None:
        """Refuse gradients that cannot be added to."""
        if self.affine:
            for name in ("weight_grad", "bias_grad"):
                _arrays.check_updatable(name, getattr(self, name), self.num_features)

    def _check_counting(self) -> None:
        """Refuse a batch counter that cannot count this batch; a layer may have no counter."""
        if self.num_batches_tracked is not None:
            _arrays.check_counter(self.num_batches_tracked)
            _arrays.check_room(self.num_batches_tracked)
        elif self.momentum is None and self._has_running_stats():
            raise TypeError(
                "num_batches_tracked is None; expected an array of int64, for the cumulative "
                "average of momentum=None"
            )

    def _momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 1.0
        return 1 / (int(self.num_batches_tracked) + 1)

    def _has_running_stats(self) -> bool:
        """Whether evaluation uses running statistics; it then refuses a missing one."""
        return self.running_mean is not None or self.running_var is not None

    def _checked(self, x: Any) -> Tensor:
        """Return `x` as an array; raise if it does not have this layer's rank and channels."""
        array = x if type(x) is np.ndarray else _arrays.array("x", x)
        shape = array.shape
        if self._ranks is not None and len(shape) not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(
                f"x has shape {shape}, {len(shape)}D; {type(self).__name__} expected {expected}"
            )
        axis = self.axis if type(self.axis) is int else _options.integer("axis", self.axis)
        if -len(shape) <= axis < len(shape) and shape[axis] != self.num_features:
            raise ValueError(_arrays.wrong_channels(shape, axis, self.num_features))
        return array

    def __repr__(self) -> str:
        runs = self.virtual_batch_size
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis}, "
            f"ddof={self.ddof}, activation={self.activation!r}, dtype={self.dtype}"
            + (")" if runs is None else f", virtual_batch_size={runs})")
        )


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) or (N, C, L); other ranks are refused. Its parameters are the same."""

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for (N, C, H, W); other ranks are refused. Its parameters are the same."""

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for (N, C, D, H, W); other ranks are refused. Its parameters are the same."""

    _ranks = (5,)


class Saved(NamedTuple):
    """What a training forward saves for its backward."""

    x: Any  # None if the output was written over it
    stats: BatchStats
    had_residual: bool
    residual: Tensor | None
    y: Tensor | None
    lacks_residual: bool = False  # it is needed and was overwritten, and y cannot replace it
    mask: Tensor | None = None
    virtual_batch_size: int | None = None
    correction: Any = None  # of BatchRenorm


def _overwritten(tensor: Tensor | None, out: Tensor | None) -> bool:
    if tensor is None or out is None:
        return False
    return np.may_share_memory(tensor, np.asarray(out))


def _dtype(value: Any) -> np.dtype[Any]:
    expected = "float32, which float16 and bfloat16 data go with too, or float64"
    if value is None:  # NumPy would read it as float64
        raise TypeError(f"dtype is None; expected {expected}")
    dtype = value if isinstance(value, np.dtype) else _options.dtype("dtype", value, expected)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"dtype is {dtype}; expected {expected}")
    return dtype


def _fill(value: int, *arrays: Tensor | None) -> None:
    for a in arrays:
        if a is not None:
            a[...] = value


def _sum(total: Tensor, new: Any) -> Any:
    """Return the sum in the type of `total`; values outside its range become infinite."""
    with np.errstate(all="ignore"):
        return (total + new).astype(total.dtype, copy=False)


def _check_keys(found: set[str], own: set[str], prefix: str, layer: str) -> None:
    missing = sorted(own - found - {"num_batches_tracked"})
    unknown = sorted(found - own)
    if missing and prefix and {f".{name}" for name in missing} <= found:
        raise RuntimeError(
            f"state of {layer}: prefix is {prefix!r}; expected {prefix + '.'!r}, "
            f"with the dot of {prefix + '.' + missing[0]!r}"
        )
    if missing or unknown:
        parts = [
            f"{kind} {', '.join(repr(prefix + name) for name in names)}"
            for kind, names in (("missing", missing), ("unexpected", unknown))
            if names
        ]
        raise RuntimeError(f"state of {layer}: {'; '.join(parts)}")


def _entries(state: Any, prefix: Any) -> dict[str, Any]:
    """Return the entries whose keys begin with the prefix, and remove it from their keys."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state is of type {type(state).__name__}; expected a mapping of names to arrays"
        )
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is {_errors.shown(prefix)}; expected a string")
    names = (key for key in state if isinstance(key, str) and key.startswith(prefix))
    return {name[len(prefix) :]: state[name] for name in names}


def _entry(name: str, value: Any, own: Tensor) -> Tensor:
    """Return a state entry with the type of `own`, or raise if it cannot be copied into it."""
    entry = _arrays.array(name, value)
    if entry.shape != own.shape:
        raise RuntimeError(f"{name} has shape {entry.shape}; expected {own.shape}")
    kinds = "iu" if own.dtype.kind == "i" else "f"
    if entry.dtype.kind not in kinds and not _arrays.is_bfloat16(entry.dtype):
        raise TypeError(f"{name} has dtype {entry.dtype}; expected one like {own.dtype}")
    entry = _arrays.copied(entry)
    if kinds == "iu" and not 0 <= int(entry) <= _arrays.MOST_BATCHES:
        raise ValueError(f"{name} is {entry}; expected 0 to {_arrays.MOST_BATCHES}")
    with np.errstate(all="ignore"):  # a variance beyond float32 becomes infinite, as in PyTorch
        return entry.astype(own.dtype)
