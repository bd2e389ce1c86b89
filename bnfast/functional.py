"""Batch normalization as functions over NumPy arrays.

These functions hold signatures, defaults and documentation; `_core` does the work. Every tensor
argument of a call has the shape of `x`, which has two or more axes, one of them the channel axis
`axis`. In formulas, m is the number of values per channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _core, _errors, _masks, _options
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
    """The statistics that a batch was normalised with, which its backward needs.

    Attributes
    ----------
    mean : ndarray of float64, shape (channels,)
        The mean of the batch.
    var : ndarray of float64, shape (channels,)
        Its biased variance, the sum of squared deviations divided by `count`.
    inv_std : ndarray of float64, shape (channels,)
        ``1 / sqrt(var + eps)``.
    count : int or float
        Values per channel, or the sum of their weights. 0 means that the statistics are constants,
        not those of a batch.

    Notes
    -----
    With virtual batches the arrays have the shape (runs, channels).

    Examples
    --------
    `batch_norm_forward` returns one:

    >>> import numpy as np
    >>> import bnfast
    >>> y, stats = bnfast.batch_norm_forward(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> stats.mean, stats.var, stats.count
    (array([ 2., 20.]), array([  1., 100.]), 2)

    `from_population` makes one of known statistics:

    >>> fixed = bnfast.BatchStats.from_population(mean=[0.0, 5.0], var=[4.0, 16.0], eps=0.0)
    >>> fixed.inv_std, fixed.count
    (array([0.5 , 0.25]), 0)
    """

    mean: Vector
    var: Vector
    inv_std: Vector
    count: float  # type: ignore[assignment]  # replaces the method tuple.count

    @classmethod
    def from_population(cls, mean: ArrayLike, var: ArrayLike, eps: float = 1e-5) -> BatchStats:
        """Return constant statistics, such as the running ones of a layer in evaluation mode.

        Parameters
        ----------
        mean, var : array_like of float32, float64, float16 or bfloat16, shape (channels,)
            Population mean and variance.
        eps : float
            Added to the variance; at least 0.

        Returns
        -------
        BatchStats
            With ``count`` 0: in a backward, no gradient flows through these statistics.

        Raises
        ------
        TypeError, ValueError
            If an argument has a type, shape or value that is not accepted.
        """
        means = _arrays.constant("mean", mean)
        variances = _arrays.constant("var", var, len(means))
        added = _options.eps(eps, False)
        return cls(means, variances, _core.inv_std(variances, added), 0)


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the inputs of a batch norm.

    Attributes
    ----------
    x : ndarray or None
        With the shape and dtype of the input.
    weight, bias : ndarray of float64, shape (channels,), or None
    residual : ndarray or None
        With the shape and dtype of the input.

    Notes
    -----
    A gradient that was not asked for is None.
    """

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
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
) -> Tensor:
    """Normalise each channel, with the batch's statistics or with running ones.

    The order of the positional arguments is that of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more. Not copied if some order of its axes is C-contiguous.
    running_mean, running_var : ndarray of float32 or float64, shape (channels,), optional
        Float64 only if `x` is float64. Required in inference. In training, if given, updated in
        place: ``running = (1 - momentum) * running + momentum * batch``.
    weight, bias : array_like of any of the types of `x`, shape (channels,), optional
        Gamma and beta; 1 and 0 if None.
    training : bool
        Normalise with the batch's mean and variance, and update the running ones.
    momentum : float
        The weight of this batch in the running statistics.
    eps : float
        Added to the variance; above 0 in training, at least 0 in inference.
    axis : int
        The channel axis.
    ddof : {1, 0}
        The batch variance that updates `running_var` is divided by ``m - ddof``, where m is the
        number of values per channel: 1 as in PyTorch and the paper, 0 as in Keras, ONNX and Flax.
    residual : array_like, shape and dtype of `x`, optional
        Added before the activation.
    activation : str, ("leaky_relu", float) or None
        Applied last: "relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "tanh", "silu" or
        "gelu". The number is the slope, above 0 and at most 1; without it, 0.01.
    out : ndarray, shape and dtype of `x`, optional
        Where to write: `x` or `residual` itself, or memory apart from both.
    mask : array_like of bool, or of any of the types of `x`, optional
        Which values count in training, or their weights, 0 or more: the shape of `x` with 1 on the
        channel axis, or without that axis; any other axis may have length 1, too. What has weight
        0 is normalised like the rest, and changes no statistic, whatever it holds. m is then the
        sum of the weights.
    virtual_batch_size : int, optional
        In training, rows of axis 0 are normalised in runs of so many, the last of which may be
        shorter, each with its own statistics. The running ones move once for each run, in order.

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
        If an argument has a wrong shape or value, or if in training a batch (or a virtual one) has
        one value per channel, or a mask counts fewer than two.

    See Also
    --------
    batch_norm_forward : also returns the statistics that `batch_norm_backward` needs.

    Notes
    -----
    Algorithm 1 of Ioffe and Szegedy (2015) in training, Algorithm 2's line 11 in inference.

    ``x - mean`` is computed in the type of `x`. A difference beyond the range of that type (3.4e38
    in float32) is infinite, and so is the output, as in PyTorch. The statistics are float64, and
    stay finite.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], dtype=np.float32)
    >>> running_mean, running_var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> y = bnfast.batch_norm(x, running_mean, running_var, training=True)
    >>> y.round(3)
    array([[-1.225, -1.225],
           [ 0.   ,  0.   ],
           [ 1.225,  1.225]], dtype=float32)
    >>> running_mean, running_var  # moved by a tenth of the way to the batch's
    (array([0.2, 2. ], dtype=float32), array([ 1. , 10.9], dtype=float32))

    In inference the running statistics are used, and stay as they are:

    >>> bnfast.batch_norm(x, running_mean, running_var, activation="relu").round(3)
    array([[0.8  , 2.423],
           [1.8  , 5.452],
           [2.8  , 8.481]], dtype=float32)
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
            mask=mask,
            virtual_batch_size=virtual_batch_size,
        )[0]
        return y
    if running_mean is None:
        raise ValueError(
            "running_mean and running_var are None; expected both in inference (training=True "
            "normalises with the batch)"
        )
    # Inference does not use momentum, but a wrong value is an error all the same.
    if type(momentum) is not float or momentum != 0.1:
        _options.real("momentum", momentum)
    if mask is not None:
        _masks.check_fits(_masks.read(mask), np.shape(x), axis)
    if virtual_batch_size is not None:
        _options.run_length("virtual_batch_size", virtual_batch_size)
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
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
) -> tuple[Tensor, BatchStats]:
    """Normalise with the batch's statistics, and return what the backward needs.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more.
    weight, bias : array_like of any of the types of `x`, shape (channels,), optional
        Gamma and beta; 1 and 0 if None.
    eps : float
        Added to the variance; above 0.
    axis : int
        The channel axis.
    residual : array_like, shape and dtype of `x`, optional
        Added before the activation.
    activation : str, ("leaky_relu", float) or None
        Applied last: one of the names that `batch_norm` takes.
    out : ndarray, shape and dtype of `x`, optional
        Where to write: `x` or `residual` itself, or memory apart from both.
    moments : Moments, optional
        The moments of a whole batch that `x` is a part of. `x` is then normalised with them,
        `stats` are those of the whole batch, and no statistics are computed here.
    mask : array_like of bool, or of any of the types of `x`, optional
        Which values count, or their weights: see `batch_norm`. The count is their sum, a float
        unless the mask is of bool.
    virtual_batch_size : int, optional
        Rows of axis 0 are normalised in runs of so many, the last of which may be shorter. `stats`
        then have arrays of shape (runs, channels), and the count of all runs together.

    Returns
    -------
    y : ndarray
        ``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``: `out`, or a fresh
        array in the memory order of `x`.
    stats : BatchStats
        Float64 for every type of `x`: a float32 mean ruins the backward at a mean of 1e6.

    Raises
    ------
    TypeError
        If an argument has a dtype or type that is not accepted.
    ValueError
        If an argument has a wrong shape or value, if a batch (or a virtual one) has one value per
        channel or a mask counts fewer than two, if `moments` are of fewer values per channel than
        `x` has, or if `virtual_batch_size` is given beside them.

    See Also
    --------
    batch_norm_backward : takes ``sums``, the counterpart of `moments`.

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

    Of two sequences of three steps, the second is padded by one:

    >>> x = np.array([[[1.0, 2.0, 3.0]], [[5.0, 9.0, np.nan]]])
    >>> _, stats = bnfast.batch_norm_forward(x, mask=bnfast.lengths_mask([3, 2]))
    >>> stats.mean, stats.count
    (array([4.]), 5)
    """
    given = None if moments is None else _parts_of(moments)
    y, (count, mean, var, inv_std) = _core.forward(
        x,
        None,
        None,
        weight,
        bias,
        0.0,
        eps,
        axis,
        1,
        residual,
        activation,
        out,
        None,
        given,
        mask,
        virtual_batch_size,
    )
    return y, BatchStats(mean, var, inv_std, count)


def _parts_of(moments: Any) -> tuple[float, Vector, Vector]:
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
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
) -> Gradients:
    """Return the gradients of a batch norm, through its mean and variance.

    Parameters
    ----------
    dy : array_like, shape and dtype of `x`
        Gradient of the loss with respect to the forward's output.
    x : array_like of float32, float64, float16 or bfloat16
        The forward's input, of rank 2 or more.
    stats : BatchStats
        The statistics that `batch_norm_forward` returned; `BatchStats.from_population` for
        constant ones.
    weight, bias : array_like of any of the types of `x`, shape (channels,), optional
        The forward's; 1 and 0 if None. `bias` matters only if there is an activation.
    axis : int
        The channel axis.
    residual : array_like, shape and dtype of `x`, optional
        The forward's.
    activation : str, ("leaky_relu", float) or None
        The forward's. Its derivative is recomputed from `x` (and `residual`), or read from `y`.
    y : array_like, shape and dtype of `x`, optional
        The forward's output. If the activation is piecewise linear (relu, relu6, leaky_relu), it
        can replace `residual`, and saves a recomputation; otherwise it is not read.
    out : ndarray, shape and dtype of `x`, optional
        Where to write the gradient of `x`: `dy` or `x` itself, or memory apart from all inputs.
    needs : iterable of {"x", "weight", "bias", "residual"}, optional
        The gradients to compute; by default all that apply. The others cost nothing.
    sums : (array_like, array_like), of any of the types of `x`, shape (channels,) each, optional
        The gradients of weight and bias over a whole batch that `x` is a part of. `stats` must
        then be those of the whole batch. The gradient of `x` flows through these sums, and they
        are not computed here.
    mask : array_like of bool, or of any of the types of `x`, optional
        The forward's. A gradient that arrives where the weight is 0 goes on like any other: to
        weight and bias, and through the statistics to the values that count. Where it is 0, it
        adds nothing, whatever `x` holds.
    virtual_batch_size : int, optional
        The forward's. The gradients of weight and bias are the sums over the runs.

    Returns
    -------
    Gradients
        ``x`` (`out`, or a fresh array) and ``residual`` (always fresh) with the shape and dtype of
        `x`, ``weight`` and ``bias`` in float64 with shape (channels,); None for those that `needs`
        leaves out.

    Raises
    ------
    TypeError
        If an argument has a dtype or type that is not accepted.
    ValueError
        If an argument has a wrong shape or value, if `needs` has an unknown name, or if `stats`
        are of a batch of another size.

    Notes
    -----
    A batch in parts (on several processes, or too large for memory), whose forward took `moments`,
    needs two calls per part. The first, with ``stats._replace(count=0)`` and
    ``needs=("weight", "bias")``, gives the part's sums; add these up over the parts. The second
    takes the totals as `sums`.

    This is the chain rule of the paper's section 3. At a kink of the activation the gradient is
    PyTorch's: 0 for relu and relu6, the slope for leaky_relu, 0 at -3 and 1 at 3 for hardswish.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    >>> dy = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> y, stats = bnfast.batch_norm_forward(x)
    >>> gradients = bnfast.batch_norm_backward(dy, x, stats)
    >>> gradients.x.round(4)
    array([[ 0.2291,  0.0115],
           [-0.3436, -0.0172],
           [ 0.1145,  0.0057]])
    >>> gradients.weight.round(4), gradients.bias
    (array([-1.069 ,  1.3363]), array([1., 1.]))
    """
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
            mask,
            virtual_batch_size,
        )
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
    mean, var : array_like of any of the types of `x`, shape (channels,)
        The digits of a float64 mean beyond those of `x` count too.
    weight, bias : array_like of any of the types of `x`, shape (channels,), optional
        Gamma and beta; 1 and 0 if None.
    eps : float
        Added to the variance; at least 0.
    axis : int
        The channel axis.
    residual : array_like, shape and dtype of `x`, optional
        Added before the activation.
    activation : str, ("leaky_relu", float) or None
        Applied last: one of the names that `batch_norm` takes.
    out : ndarray, shape and dtype of `x`, optional
        Where to write: `x` or `residual` itself, or memory apart from both.

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
        If an argument has a wrong shape or value.

    Notes
    -----
    Line 11 of the paper's Algorithm 2. The mean is subtracted first, so that a mean far from zero
    loses no digits.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> bnfast.normalize(x, mean=[1.0, 20.0], var=[4.0, 25.0], eps=0)
    array([[ 0., -2.],
           [ 1.,  2.]])
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
    scale, shift : array_like of any of the types of `x`, shape (channels,), or None
        1 and 0 if None.
    axis : int
        The channel axis.
    residual : array_like, shape and dtype of `x`, optional
        Added before the activation.
    activation : str, ("leaky_relu", float) or None
        Applied last: one of the names that `batch_norm` takes.
    out : ndarray, shape and dtype of `x`, optional
        Where to write: `x` or `residual` itself, or memory apart from both.

    Returns
    -------
    ndarray
        `out`, or a fresh array in the memory order of `x`.

    Raises
    ------
    TypeError
        If an argument has a dtype or type that is not accepted.
    ValueError
        If an argument has a wrong shape or value.

    Notes
    -----
    A batch norm written as such a map needs ``shift - mean * scale``, rounded: an error that grows
    with ``mean * scale``. `normalize` and the layers avoid it by subtracting the mean first.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> bnfast.scale_shift(x, scale=[2.0, 0.5], shift=[-3.0, 0.0], activation="relu")
    array([[ 0.,  5.],
           [ 3., 15.]])
    """
    return _core.normalize(
        x, None, None, scale, shift, 0.0, axis, residual, activation, out, _SCALE_SHIFT
    )
