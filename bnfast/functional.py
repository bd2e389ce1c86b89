"""Batch normalization as functions over NumPy arrays.

The thin side of `_core`: signatures, defaults and documentation. Every tensor argument of a call
has the shape of `x`, of any rank from 2, with its channels on `axis`; m is the number of values a
channel has in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from . import _arrays, _core, _errors, _options
from .moments import Moments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from ._types import Activation, Tensor, Vector


__all__ = [
    "BatchStats",
    "Gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "normalize",
    "scale_shift",
]

_RUNNING = ("running_mean", "running_var", "weight", "bias")
_SCALE_SHIFT = ("mean", "var", "scale", "shift")


class BatchStats(NamedTuple):
    """What a batch was normalised with, kept for its backward.

    Attributes
    ----------
    mean, var, inv_std : ndarray of float64, shape (channels,)
        The batch's mean, its biased variance (divided by m), and ``1 / sqrt(var + eps)``.
    count : int
        m, the values per channel; 0 says that the numbers are constants, not a batch's.
    """

    mean: Vector
    var: Vector
    inv_std: Vector
    count: int  # type: ignore[assignment]  # tuple.count, which nobody misses here

    @classmethod
    def from_population(cls, mean: ArrayLike, var: ArrayLike, eps: float = 1e-5) -> BatchStats:
        """Return constant statistics, as an eval-mode layer has them.

        Parameters
        ----------
        mean, var : array_like, shape (channels,)
            Population mean and variance.
        eps : float
            Added to the variance.

        Returns
        -------
        BatchStats
            With ``count`` 0: a backward with it lets no gradient through the statistics.
        """
        means = _arrays.constant("mean", mean)
        variances = _arrays.constant("var", var, len(means))
        added = _options.eps(eps, False)
        return cls(means, variances, _core.inv_std(variances, added), 0)


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the inputs of a batch norm; None where not wanted."""

    x: Tensor | None
    weight: Vector | None
    bias: Vector | None
    residual: Tensor | None


def batch_norm(
    x: ArrayLike,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    ddof: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each channel, with the batch's statistics or with running ones.

    The positional order of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more. Read in place whenever some order of its axes is C-contiguous.
    running_mean, running_var : ndarray, shape (channels,), optional
        Float32, or, where `x` is, float64. Needed in inference. In training updated in place, if
        given: ``running = (1 - momentum) * running + momentum * batch``.
    weight, bias : array_like, shape (channels,), optional
        Gamma and beta, of any of these types; 1 and 0 where left out.
    training : bool
        Normalise with the batch's mean and variance, and update the running ones.
    momentum : float
        The weight of this batch in the running statistics.
    eps : float
        Added to the variance; above 0 in training, at least 0 in inference.
    axis : int
        The channel axis.
    ddof : {1, 0}
        The running variance takes the batch's over ``m - ddof``: 1 as in PyTorch and the paper,
        0 as in Keras, ONNX and Flax.
    residual : array_like, optional
        Added before the activation; shape and dtype of `x`.
    activation : {None, "relu", "relu6", "leaky_relu", "hardswish"} or ("leaky_relu", slope)
        Applied last; the slope, 0.01 unless given, is above 0 and at most 1.
    out : ndarray, optional
        Where to write; `x` or `residual` itself, or apart from both.

    Returns
    -------
    ndarray
        ``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``: `out`, or a fresh
        array in the memory order of `x`.

    Raises
    ------
    TypeError
        If an argument has a dtype or type that is not accepted.
    ValueError
        If an argument has a wrong shape or value, or channels have one value each in training.

    See Also
    --------
    batch_norm_forward : keeps the statistics for `batch_norm_backward`.

    Notes
    -----
    Algorithm 1 of Ioffe and Szegedy (2015) in training, Algorithm 2's line 11 in inference.

    ``x - mean`` is formed in the type of `x`. Where values lie further from their mean than that
    type reaches (3.4e38 in float32), the difference is infinite, and so is the output, as in
    PyTorch; the statistics are not, being float64.
    """
    if (running_mean is None) != (running_var is None):
        missing, given = (
            ("running_mean", "running_var")
            if running_mean is None
            else ("running_var", "running_mean")
        )
        raise ValueError(f"{missing} is None beside a {given}; expected both or neither")
    if training is not False and _options.truth("training", training):
        y: Tensor = _core.forward(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            momentum,
            eps,
            axis,
            ddof,
            residual,
            activation,
            out,
        )[0]
        return y
    if running_mean is None:
        raise ValueError(
            "running_mean and running_var are None; expected both in inference (training=True "
            "normalises with the batch)"
        )
    # Of no use here, but a bad one is a mistake all the same.
    if type(momentum) is not float or momentum != 0.1:
        _options.real("momentum", momentum)
    return _core.normalize(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        eps,
        axis,
        residual,
        activation,
        out,
        _RUNNING,
        True,
    )


def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Tensor | None = None,
    moments: Moments | None = None,
) -> tuple[Tensor, BatchStats]:
    """Normalise with the batch, and return what the backward needs.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more.
    weight, bias : array_like, shape (channels,), optional
        Gamma and beta, of any of these types; 1 and 0 if None.
    eps : float
        Added to the variance; above 0.
    axis : int
        The channel axis.
    residual : array_like, optional
        Added before the activation; shape and dtype of `x`.
    activation : str, ("leaky_relu", slope) or None
        Applied last, as in `batch_norm`.
    out : ndarray, optional
        Where to write; `x` or `residual` itself, or apart from both.
    moments : Moments, optional
        The moments of a batch that `x` is only a part of. `x` is normalised by them, `stats` are
        of that batch, and nothing is summed here.

    Returns
    -------
    y : ndarray
        As `batch_norm` returns it.
    stats : BatchStats
        Float64 whatever the data are: a float32 mean ruins the backward at a mean of 1e6.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; also if `moments` are of fewer values than `x` has, or of one.

    See Also
    --------
    batch_norm_backward : whose ``sums`` are the other half of a batch in parts.

    Notes
    -----
    Algorithm 1 of the paper.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> x = np.arange(12, dtype=np.float32).reshape(6, 2)
    >>> y, stats = bnfast.batch_norm_forward(x)
    >>> stats.mean, stats.count
    (array([5., 6.]), 6)

    The same batch in two parts:

    >>> total = bnfast.moments(x[:4]) + bnfast.moments(x[4:])
    >>> parts = [bnfast.batch_norm_forward(part, moments=total)[0] for part in (x[:4], x[4:])]
    >>> bool(np.allclose(np.concatenate(parts), y))
    True
    """
    given = None if moments is None else _parts_of(moments)
    y, (count, mean, var, inv_std) = _core.forward(
        x, None, None, weight, bias, 0.0, eps, axis, 1, residual, activation, out, None, given
    )
    return y, BatchStats(mean, var, inv_std, count)


def _parts_of(moments: Any) -> tuple[int, Vector, Vector]:
    if not isinstance(moments, Moments):
        raise TypeError(f"moments is {_errors.described(moments)}; expected Moments")
    if any(part is None for part in (moments.mean, moments.m2)):
        raise TypeError("moments have no mean or no m2; expected one value per channel each")
    return moments.count, moments.mean, moments.m2


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    y: ArrayLike | None = None,
    out: Tensor | None = None,
    needs: Iterable[str] | None = None,
    sums: tuple[ArrayLike, ArrayLike] | None = None,
) -> Gradients:
    """Return the gradients of a batch norm, through its mean and variance.

    Parameters
    ----------
    dy : array_like
        Gradient with respect to the output; shape and dtype of `x`.
    x : array_like
        The forward's input.
    stats : BatchStats
        What the forward returned; `BatchStats.from_population` for constant statistics.
    weight, bias : array_like, shape (channels,), optional
        The forward's (`bias` only matters where there is an activation).
    axis : int
        The channel axis.
    residual : array_like, optional
        The forward's.
    activation : str, ("leaky_relu", slope) or None
        The forward's. Its derivative is recomputed from `x` (and `residual`), or read from `y`.
    y : array_like, optional
        The forward's output. It can replace `residual`, and saves a recomputation, if the
        activation is piecewise linear (relu, relu6, leaky_relu); it is not read otherwise.
    out : ndarray, optional
        Where to write the gradient of `x`; `dy` or `x` itself, or apart from all.
    needs : iterable of {"x", "weight", "bias", "residual"}, optional
        The gradients wanted; all that apply, by default. What is not asked for costs nothing.
    sums : (array_like, array_like), each of shape (channels,), optional
        The gradients of weight and bias over a batch that `x` is only a part of, as are
        `stats` then, whose ``count`` is that batch's. The gradient of `x` flows through them, and
        nothing is summed here.

    Returns
    -------
    Gradients
        ``x`` (`out`, or fresh) and ``residual`` (always fresh) in the dtype of `x`, ``weight``
        and ``bias`` in float64; None for what `needs` leaves out.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; also for an unknown name in `needs`, or for `stats` of another batch size.

    Notes
    -----
    A batch in parts (on several processes, or too large to be in memory at once), whose forward
    took `moments`, takes two calls per part: one under ``stats._replace(count=0)`` with
    ``needs=("weight", "bias")``, whose results are added up over the parts, and one with those
    ``sums``.

    The chain rule of the paper's section 3. At a kink of the activation the gradient is
    PyTorch's: 0 for relu and relu6, the slope for leaky_relu, 0 at -3 and 1 at 3 for hardswish.
    """
    _check_tells(y, residual, activation)
    wanted = _wanted(needs, residual, activation, y, out)
    mean, _, inv_std, count = _stats_of(stats)
    if sums is not None:
        sums = _sums_of(sums)
        if needs is None:
            wanted = (True, False, False, wanted[3])
        elif wanted[1] or wanted[2]:
            raise ValueError(
                "needs names 'weight' or 'bias' beside sums, which are their gradients; "
                "expected 'x' and 'residual' alone"
            )
    return Gradients(
        *_core.backward(
            dy,
            x,
            mean,
            inv_std,
            count,
            weight,
            bias,
            axis,
            residual,
            activation,
            y,
            out,
            wanted,
            sums,
        )
    )


def _check_tells(y: Any, residual: Any, activation: Any) -> None:
    """Refuse an output in the residual's place where it does not tell the derivative."""
    if y is None or residual is not None or activation is None:
        return
    name, _ = _options.activation(activation, _core.ACTIVATIONS)
    if not _core.ACTIVATIONS[name].from_output:
        raise ValueError(
            f"y is given without residual, but the derivative of {name} is not told by the output; "
            "expected the forward's residual, or no y where it had none"
        )


def _wanted(
    needs: Iterable[str] | None, residual: Any, activation: Any, y: Any, out: Any
) -> tuple[bool, ...]:
    if needs is None:
        return (True, True, True, residual is not None)
    try:
        names = {needs} if isinstance(needs, str) else set(needs)
    except TypeError:
        raise TypeError(f"needs is {_errors.shown(needs)}; expected names of gradients") from None
    unknown = names.difference(Gradients._fields)
    if unknown:
        raise ValueError(
            f"needs names {', '.join(sorted(map(repr, unknown)))}; "
            f"expected some of {', '.join(map(repr, Gradients._fields))}"
        )
    if "residual" in names and activation is not None and residual is None and y is None:
        raise ValueError(
            "needs names 'residual', but residual and y are None; expected one of them, to tell "
            "where the activation was flat"
        )
    if out is not None and "x" not in names:
        raise ValueError("out is given, but needs leaves out 'x', which it would hold")
    return tuple(field in names for field in Gradients._fields)


def _sums_of(sums: Any) -> tuple[ArrayLike, ArrayLike]:
    if not isinstance(sums, tuple | list) or len(sums) != 2 or any(s is None for s in sums):
        raise TypeError(
            f"sums is {_errors.described(sums)}; expected the gradients of weight "
            "and bias, one value per channel each"
        )
    return sums[0], sums[1]


def _stats_of(stats: Any) -> BatchStats:
    if not isinstance(stats, BatchStats):
        raise TypeError(
            f"stats is {_errors.described(stats)}; expected the BatchStats that "
            "batch_norm_forward returned"
        )
    for name in ("mean", "inv_std"):
        if getattr(stats, name) is None:
            raise TypeError(f"stats.{name} is None; expected one value per channel")
    return stats


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each channel with a given mean and variance.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more.
    mean, var : array_like, shape (channels,)
        Float32 or float64; a float64 mean is applied to float64 precision.
    weight, bias, eps, axis, residual, activation, out
        As in `batch_norm` in inference.

    Returns
    -------
    ndarray
        ``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Notes
    -----
    Line 11 of the paper's Algorithm 2, the mean subtracted first.
    """
    for name, value in (("mean", mean), ("var", var)):
        if value is None:
            raise TypeError(f"{name} is None; expected one value per channel")
    return _core.normalize(x, mean, var, weight, bias, eps, axis, residual, activation, out)


def scale_shift(
    x: ArrayLike,
    scale: ArrayLike | None,
    shift: ArrayLike | None,
    *,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the affine map ``activation(x * scale + shift (+ residual))``.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more.
    scale, shift : array_like, shape (channels,)
        1 and 0 where None.
    axis, residual, activation, out
        As in `batch_norm`.

    Returns
    -------
    ndarray
        `out`, or a fresh array in the memory order of `x`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Notes
    -----
    A batch norm written as one such map has a rounded ``shift - mean * scale`` in it, an error
    that grows with ``mean * scale``; `normalize` and the layers subtract the mean first.
    """
    return _core.normalize(
        x, None, None, scale, shift, 0.0, axis, residual, activation, out, _SCALE_SHIFT
    )
