"""Prepare a trained network: fold batch norms into their neighbours, recompute statistics.

In inference a batch norm is the affine map ``y = (x - mean) * scale + shift`` per channel. A linear
or convolution layer beside it can do this map (section 3.1 of Ioffe and Szegedy, 2015). All
arithmetic is in float64 and rounded once, to the type of the given weight, half types included.
"""

from __future__ import annotations

import sys
from collections.abc import Sized
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import numpy as np

from . import _arrays, _errors, _options
from .layers import BatchNorm, FrozenBatchNorm
from .moments import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import ArrayLike

    from ._types import Floats, Vector

__all__ = ["fold", "fold_before", "recompute_statistics"]

Batch = TypeVar("Batch")


def fold(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: BatchNorm | FrozenBatchNorm,
    *,
    out_axis: SupportsIndex = 0,
    groups: SupportsIndex = 1,
) -> tuple[Floats, Floats]:
    """Merge a batch norm that *follows* a linear or convolution layer into it.

    ``bn(layer(x))`` in inference equals ``folded(x)``, for any padding, stride and dilation.

    Parameters
    ----------
    weight : array_like of float32, float64, float16 or bfloat16
        The layer's weight: ``(out, in)`` or ``(out, in / groups, ...)``; with ``out_axis=1``
        the ``(in, out / groups, ...)`` of a transposed convolution. With its own `out_axis` and
        ``groups=1`` any other layout, such as Keras' ``(height, width, in, out)`` (-1).
    bias : array_like of shape (out,), or None
        The layer's bias.
    bn : BatchNorm or FrozenBatchNorm
        With ``out`` channels, running statistics and no activation. Its mode does not matter.
    out_axis : int
        The axis of `weight` that holds the output channels.
    groups : int
        The groups of the convolution. They matter only for a transposed one (``out_axis=1``).

    Returns
    -------
    weight, bias : ndarray
        New arrays of the dtype of `weight`, for any dtype of `bias`. They are computed in float64
        and rounded once, to nearest even. Values outside the range of that type become infinite.

    Raises
    ------
    TypeError
        If `bn` is another object or an array is of another dtype; PyTorch's modules and
        parameters are folded by `bnfast.torch.freeze`.
    ValueError
        If shapes do not fit, or `bn` has an activation, which cannot be folded.
    RuntimeError
        If `bn` has no running statistics.

    Notes
    -----
    With inputs far from zero the folded layer adds large terms that cancel, as the unfolded layer
    does before its batch norm. The error is then that of rounding the weights; bnfast's accuracy
    guarantee for normalization does not apply.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> rng = np.random.default_rng(0)
    >>> x, weight = rng.normal(size=(8, 4)), rng.normal(size=(3, 4))
    >>> bn = bnfast.BatchNorm(3, dtype=np.float64)
    >>> y = bn(x @ weight.T)  # a training call updates the running statistics
    >>> folded, bias = bnfast.fold(weight, None, bn)
    >>> np.allclose(x @ folded.T + bias, bn.eval()(x @ weight.T))
    True
    """
    _refuse_pytorch(weight=weight, bias=bias, bn=bn)
    weight, dtype = _checked_weight(weight)
    axis = _checked_axis("out_axis", out_axis, weight.ndim)
    groups = _checked_groups(groups, weight)
    mean, scale, shift = _checked_affine(bn)
    along = _along(scale, weight, axis, groups, "output")
    old_bias = _checked_bias(bias, mean.size)
    with np.errstate(all="ignore"):
        new_weight, new_bias = weight * along, (old_bias - mean) * scale + shift
    return rounded(new_weight, dtype), rounded(new_bias, dtype)


def fold_before(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: BatchNorm | FrozenBatchNorm,
    *,
    in_axis: SupportsIndex = 1,
    groups: SupportsIndex = 1,
    padded: bool = False,
) -> tuple[Floats, Floats]:
    """Merge a batch norm that *precedes* a linear or convolution layer into it.

    ``layer(bn(x))`` in inference equals ``folded(x)`` where every output uses the whole kernel.
    Zero padding breaks that. The layer pads ``bn(x)`` with zeros, but the folded layer pads ``x``
    with zeros, which the batch norm would have mapped to ``shift - mean * scale``. At the border
    the two differ, unless that value is zero in every channel.

    Parameters
    ----------
    weight : array_like of float32, float64, float16 or bfloat16
        The layer's weight: ``(out, in)`` or ``(out, in / groups, ...)``; with ``in_axis=0`` the
        ``(in, out)`` of a linear layer or ``(in, out / groups, ...)`` of a transposed convolution.
    bias : array_like of shape (out,), or None
        The layer's bias.
    bn : BatchNorm or FrozenBatchNorm
        With ``in`` channels, running statistics and no activation. Its mode does not matter.
    in_axis : {1, 0}
        The axis of `weight` that holds the input channels.
    groups : int
        The groups of the convolution.
    padded : bool
        Whether the convolution pads with zeros. True is refused where it makes the result
        inexact.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the dtype of `weight`, for any dtype of `bias`. They are computed in float64
        and rounded once, to nearest even. Values outside the range of that type become infinite.

    Raises
    ------
    TypeError
        If `bn` is another object or an array is of another dtype; PyTorch's modules and
        parameters are folded by `bnfast.torch.freeze`.
    ValueError
        If shapes do not fit, or if `bn` has an activation. If ``padded=True``, or the layer is a
        transposed convolution (whose outputs use different parts of the kernel), and `bn` does not
        map zero to zero exactly in all channels.
    RuntimeError
        If `bn` has no running statistics.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> rng = np.random.default_rng(0)
    >>> x, weight = rng.normal(size=(8, 4)), rng.normal(size=(3, 4))
    >>> bn = bnfast.BatchNorm(4, dtype=np.float64)
    >>> y = bn(x)  # a training call updates the running statistics
    >>> folded, bias = bnfast.fold_before(weight, None, bn)
    >>> np.allclose(x @ folded.T + bias, bn.eval()(x) @ weight.T)
    True
    """
    _refuse_pytorch(weight=weight, bias=bias, bn=bn)
    weight, dtype = _checked_weight(weight)
    axis = _options.integer("in_axis", in_axis)
    if axis not in (0, 1):
        raise ValueError(f"in_axis is {axis}; expected 1, or 0 for weights of shape (in, out, ...)")
    groups = _checked_groups(groups, weight)
    mean, scale, shift = _checked_affine(bn)
    padded = _options.truth("padded", padded)
    with np.errstate(all="ignore"):
        at_zero = shift - mean * scale
    _refuse_uneven(at_zero, padded=padded, transposed=axis == 0 and weight.ndim > 2)

    along = _along(scale, weight, axis, groups, "input")
    old_bias = _checked_bias(bias, weight.shape[0] if axis == 1 else weight.shape[1] * groups)
    with np.errstate(all="ignore"):
        through = weight * _along(at_zero, weight, axis, groups, "input")
        new_weight, new_bias = weight * along, old_bias + _summed(through, axis, groups)
    return rounded(new_weight, dtype), rounded(new_bias, dtype)


def recompute_statistics(
    forward: Callable[[Batch], object],
    batches: Iterable[Batch],
    layers: Iterable[BatchNorm],
    *,
    progress: bool | Callable[[int], object] = False,
) -> None:
    """Give batch norm layers the exact mean and variance of a whole data set.

    Algorithm 2 (steps 8 to 11) of Ioffe and Szegedy (2015), with the batches' moments merged by
    the formula of Chan, Golub and LeVeque. The result is that of all batches as one, for any sizes
    and order. Averaging the batches' variances, as the paper's text does, loses the spread between
    their means.

    Parameters
    ----------
    forward : callable
        Runs the network: called as ``forward(batch)`` once for every batch; its result is ignored.
        During the call the `layers` normalize by the batch, as in training, and do not change their
        running statistics and counters. It must not change parameters.
    batches : iterable
        The arguments for `forward`. Each must give a layer more than one value per channel. If
        `forward` is a layer, a batch may be a pair of data and mask, (x, mask); any other `forward`
        takes a pair as it is, and gives the mask to its layers.
    layers : iterable of BatchNorm
        The layers to update. A layer that `forward` calls several times gets the moments of all its
        inputs merged. Without layers nothing is run.
    progress : bool or callable
        True counts batches on stderr; a callable is called with the number of batches done.

    Raises
    ------
    TypeError
        If `forward` or `progress` cannot be called, or one of the `layers` is not a `BatchNorm`.
    RuntimeError
        If a layer has no running statistics to update, or `forward` never called it with values.
    ValueError
        If there is no batch, or a layer saw fewer than two values per channel.

    Notes
    -----
    ``running_mean`` and ``running_var`` are written in place, after the last batch. If anything
    raises before that, `forward` included, they all stay unchanged. The layers' modes are always
    restored; ``num_batches_tracked`` does not change.

    The variance is the unbiased one (over ``count - 1``), for any ``ddof`` of the layer.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> data = np.arange(12.0).reshape(6, 2)
    >>> layer = bnfast.BatchNorm(2, dtype=np.float64)
    >>> bnfast.recompute_statistics(layer, [data[:4], data[4:]], [layer])
    >>> layer.running_mean, layer.running_var
    (array([5., 6.]), array([14., 14.]))
    """
    if not callable(forward):
        raise TypeError(f"forward is {_errors.shown(forward)}; expected a callable taking a batch")
    targets = _checked_layers(layers)
    if not targets:
        return
    iterator = _iterator_of(batches)
    done = 0
    with _reporting(progress, batches) as report, _observing(targets) as totals:
        for batch in iterator:
            _run(forward, batch)
            done += 1
            report(done)
    if done == 0:
        raise ValueError("batches is empty; expected at least one batch")
    _write_statistics(targets, totals)


def _run(forward: Callable[[Any], object], batch: Any) -> None:
    is_pair = isinstance(batch, tuple) and len(batch) == 2 and np.ndim(batch[0]) > 1
    if is_pair and isinstance(forward, BatchNorm):
        forward(batch[0], mask=batch[1])
    else:
        forward(batch)


def _iterator_of(batches: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(batches)
    except TypeError:
        raise TypeError(
            f"batches is of type {type(batches).__name__}; expected an iterable"
        ) from None


# ---- folding


def _refuse_pytorch(**given: Any) -> None:
    """Refuse PyTorch's modules and parameters, and name the function that takes them."""
    torch = sys.modules.get("torch")  # who has a module has imported it
    module = getattr(getattr(torch, "nn", None), "Module", ())
    tensor = getattr(torch, "Tensor", ())
    for name, value in given.items():
        kind = type(value)
        if issubclass(kind, module):
            expected = "a bnfast.BatchNorm or FrozenBatchNorm" if name == "bn" else "an array"
        elif name != "bn" and issubclass(kind, tensor) and value.requires_grad:
            expected = f"an array, as {name}.detach()"
        else:
            continue
        raise TypeError(
            f"{name} is of PyTorch's type {kind.__name__}; expected {expected} "
            "(a model of PyTorch's is folded by bnfast.torch.freeze)"
        )


def _checked_weight(values: ArrayLike) -> tuple[Floats, np.dtype[Any]]:
    """Return a weight of at least two axes in float64, and its original type."""
    array = _checked_floats("weight", values)
    if array.ndim < 2:
        raise ValueError(f"weight has shape {array.shape}; expected at least two axes, out and in")
    return array.astype(np.float64), array.dtype.newbyteorder("=")


def _checked_floats(name: str, values: ArrayLike) -> Floats:
    array = _arrays.array(name, values)
    _arrays.check_type(name, array)
    return array


def rounded(values: Floats, dtype: np.dtype[Any]) -> Floats:
    """Round to nearest even, once; values outside the type's range become infinite.

    `ml_dtypes` converts float64 to bfloat16 by way of float32, which would round twice. Here the
    float32 step rounds to odd: toward zero, with the last bit set if anything was lost. Then no
    number falls on the midpoint of two bfloat16 values unless it was there before.
    """
    with np.errstate(all="ignore"):
        if not _arrays.is_bfloat16(dtype):
            return values.astype(dtype)
        single = values.astype(np.float32)
        beyond = np.abs(single) > np.abs(values)
        odd = np.where(beyond, np.nextafter(single, np.float32(0)), single)
        odd.view(np.uint32)[...] |= odd != values
        return odd.astype(dtype)


def _checked_bias(bias: ArrayLike | None, channels: int) -> Vector:
    if bias is None:
        return np.zeros(channels)
    array = _checked_floats("bias", bias)
    if array.shape != (channels,):
        raise ValueError(
            f"bias has shape {array.shape}; expected ({channels},), one for each output channel"
        )
    return array.astype(np.float64)


def _checked_axis(name: str, axis: SupportsIndex, ndim: int) -> int:
    number = _options.integer(name, axis)
    if not -ndim <= number < ndim:
        raise ValueError(
            f"{name} is {_errors.shown(number)}; expected an axis of a weight with {ndim} axes"
        )
    return number % ndim


def _checked_groups(groups: SupportsIndex, weight: Floats) -> int:
    number = _options.integer("groups", groups)
    if number < 1 or weight.shape[0] % number:
        raise ValueError(
            f"groups is {_errors.shown(number)}; expected a divisor of the weight's first axis, "
            f"{weight.shape[0]}"
        )
    return number


def _checked_affine(bn: BatchNorm | FrozenBatchNorm) -> tuple[Vector, Vector, Vector]:
    """Return the mean, scale and shift of `bn`; raise if it has an activation."""
    if not isinstance(bn, (BatchNorm, FrozenBatchNorm)):
        raise TypeError(
            f"bn is of type {type(bn).__name__}; expected a BatchNorm or a FrozenBatchNorm"
        )
    if bn.activation is not None:
        raise ValueError(
            f"bn has the activation {bn.activation!r}, which does not fold; "
            "expected a layer without one, and the activation applied afterwards"
        )
    with np.errstate(all="ignore"):
        frozen = bn if isinstance(bn, FrozenBatchNorm) else bn.freeze()
    mean, scale, shift = (
        np.asarray(values, np.float64) for values in (frozen.mean, frozen.scale, frozen.shift)
    )
    return mean, scale, shift


def _along(values: Vector, weight: Floats, axis: int, groups: int, role: str) -> Vector:
    """Reshape one value per channel so that it multiplies `weight` along `axis`.

    In PyTorch's layouts axis 0 has all channels of its side. Axis 1 has the channels of one group
    of the other side; the groups follow one another along axis 0.
    """
    repeats = groups if axis == 1 else 1
    channels = weight.shape[axis] * repeats
    if channels != values.size:
        raise ValueError(
            f"weight of shape {weight.shape} has {channels} {role} channels (axis {axis}, "
            f"groups {groups}) and bn has {values.size}; expected the same number"
        )
    if repeats == 1:
        return values.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    by_group = values.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
    return by_group.reshape(by_group.shape + (1,) * (weight.ndim - 2))


def _summed(through: Floats, axis: int, groups: int) -> Vector:
    """Sum, for each output of a layer, the terms of all its inputs, which are along `axis`."""
    if axis == 1:
        return np.asarray(through.sum(axis=tuple(range(1, through.ndim))))
    rows, *others = through.shape
    grouped = through.reshape(groups, rows // groups, *others)
    return np.asarray(grouped.sum(axis=(1, *range(3, grouped.ndim)))).reshape(-1)


def _refuse_uneven(at_zero: Vector, *, padded: bool, transposed: bool) -> None:
    """Raise if some outputs would see only a part of the batch norm's output for zero."""
    if not (padded or transposed) or not at_zero.any():
        return
    reason = (
        "padded is True: the convolution pads the batch norm's output with zeros, the folded one "
        "its input"
        if padded
        else "weight is a transposed convolution's, whose outputs see differing parts of the kernel"
    )
    channels = np.flatnonzero(at_zero)
    raise ValueError(
        f"{reason}. That is exact only where bn maps 0 to 0 in every channel, and here it maps it "
        f"to {at_zero[channels[0]]:.6g} in channel {channels[0]} ({channels.size} such channels); "
        "keep the batch norm, for example as bn.freeze()"
    )


# ---- statistics


def _checked_layers(layers: Iterable[BatchNorm]) -> Sequence[BatchNorm]:
    """Return the distinct layers, after checking that their running statistics can be written."""
    try:
        row = iter(layers)
    except TypeError:
        raise TypeError(
            f"layers is of type {type(layers).__name__}; expected an iterable of BatchNorm layers"
        ) from None
    given: dict[int, BatchNorm] = {}
    for i, layer in enumerate(row):
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers[{i}] is of type {type(layer).__name__}; expected a BatchNorm")
        given[id(layer)] = layer
        if layer.running_mean is None or layer.running_var is None:
            raise RuntimeError(
                f"layers[{i}] has no running statistics to update; "
                "expected a layer with track_running_stats=True"
            )
        for name in ("running_mean", "running_var"):
            _arrays.check_updatable(f"layers[{i}].{name}", getattr(layer, name), layer.num_features)
        if layer._observer is not None:
            raise RuntimeError(
                f"layers[{i}] is already being observed by another recompute_statistics; "
                "expected calls one after the other"
            )
    return list(given.values())


@contextmanager
def _observing(layers: Sequence[BatchNorm]) -> Iterator[list[Moments]]:
    """Let the layers normalize by their batches, and collect the moments of their inputs."""
    totals = [Moments.empty(layer.num_features) for layer in layers]

    def observe(i: int, moments: Moments) -> None:
        totals[i] = totals[i].merge(moments)

    modes = [layer.training for layer in layers]
    try:
        for i, layer in enumerate(layers):
            layer._observer = partial(observe, i)
            layer.train()
        yield totals
    finally:
        for layer in layers:
            layer._observer = None
        for layer, mode in zip(layers, modes, strict=True):
            layer.train(mode)


def _write_statistics(layers: Sequence[BatchNorm], totals: Sequence[Moments]) -> None:
    for i, moments in enumerate(totals):
        if moments.count == 0:
            raise RuntimeError(f"layers[{i}] saw no values; expected forward to call every layer")
        if moments.count <= 1:
            raise ValueError(
                f"layers[{i}] saw {_seen(moments.count)} in all batches; "
                "expected at least two, for a variance"
            )
    exact = [values for moments in totals for values in (moments.mean, moments.var(ddof=1))]
    running = [a for layer in layers for a in (layer.running_mean, layer.running_var)]
    with np.errstate(all="ignore"):  # values outside the range of float32 become infinite
        for target, values in zip(running, exact, strict=True):
            if target is not None:
                target[...] = values


def _seen(count: float) -> str:
    """Return, for a message, what a layer saw that has no variance over ``count - 1``."""
    return "one value per channel" if count == 1 else f"values whose weights sum to {count:g}"


@contextmanager
def _reporting(
    progress: bool | Callable[[int], object], batches: Iterable[object]
) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number of batches done."""
    if callable(progress):
        yield progress
    elif not isinstance(progress, bool):
        raise TypeError(
            f"progress is {_errors.shown(progress)}; expected True, False or a callable"
        )
    elif not progress:
        yield lambda done: None
    else:
        total = f"/{len(batches)}" if isinstance(batches, Sized) else ""
        try:
            yield lambda done: print(
                f"\rrecompute_statistics: batch {done}{total}", end="", file=sys.stderr, flush=True
            )
        finally:
            print(file=sys.stderr)
