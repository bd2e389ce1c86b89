"""Batch renormalization: layers whose training output is close to the one in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _core, _masks, _options
from .functional import BatchStats, Gradients
from .layers import _RUNNING, BatchNorm, Saved
from .moments import Moments, moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, DTypeLike

    from ._types import Activation, Tensor, Vector


class Correction(NamedTuple):
    """What takes a batch's normalised values towards those by the running statistics.

    ``(x - mean) / sigma_batch * r + d``. r and d are constants in the backward.
    """

    r: Vector
    d: Vector

    @classmethod
    def of(
        cls,
        batch: Moments,
        running_mean: Any,
        running_var: Any,
        eps: float,
        rmax: float,
        dmax: float,
    ) -> Correction:
        """Return the correction of a batch, from running statistics that it has not moved yet."""
        if not batch.count:  # an empty batch moves and corrects nothing
            return cls(np.ones_like(batch.mean), np.zeros_like(batch.mean))
        with np.errstate(all="ignore"):
            sigma = np.sqrt(np.asarray(running_var, np.float64) + eps)
            ratio = np.sqrt(batch.var() + eps) / sigma
            shift = (batch.mean - np.asarray(running_mean, np.float64)) / sigma
        return cls(np.clip(ratio, 1 / rmax, rmax), np.clip(shift, -dmax, dmax))

    def parameters(self, weight: Any, bias: Any) -> tuple[Vector, Vector]:
        """Return the weight and bias of a plain batch norm with the same output."""
        gamma = 1.0 if weight is None else np.asarray(weight, np.float64)
        beta = 0.0 if bias is None else np.asarray(bias, np.float64)
        with np.errstate(all="ignore"):
            return gamma * self.r, beta + gamma * self.d

    def weight_gradient(self, weight: Vector, bias: Vector) -> Vector:
        """Return the layer's weight gradient from those of that batch norm's weight and bias."""
        with np.errstate(all="ignore"):
            return weight * self.r + bias * self.d


def checked_limits(rmax: Any, dmax: Any) -> tuple[float, float]:
    """Return the limits of r and d, or raise."""
    most_r, most_d = _options.real("rmax", rmax), _options.real("dmax", dmax)
    if most_r < 1:
        raise ValueError(f"rmax is {most_r}; expected 1 or more")
    if most_d < 0:
        raise ValueError(f"dmax is {most_d}; expected 0 or more")
    return most_r, most_d


class BatchRenorm(BatchNorm):
    """Batch renormalization of the channels on one axis (Ioffe 2017).

    In training a batch is normalised by its own mean and deviation, then corrected to what the
    running statistics would give, within limits: ``y = (z * r + d) * weight + bias``, where z is
    the batch's normalised values. Small batches, or batches of similar examples, train so without
    depending on each other. In evaluation it is `BatchNorm`, and so is its state.

    Parameters
    ----------
    num_features : int
        The number of channels.
    eps : float
        Added to the variances.
    momentum : float or None
        The weight of a new batch in the running statistics; None for the cumulative average.
    affine : bool
        Whether the layer has `weight` and `bias`.
    rmax, dmax : float
        Limits: r stays within 1/rmax and rmax (1 or more), d within -dmax and dmax (0 or more).
        With 1 and 0 the layer trains as `BatchNorm` does. They are plain attributes, which a
        schedule may change at any time; the paper starts with 1 and 0, and moves to 3 and 5.
    axis : int
        The channel axis.
    ddof : {1, 0}
        As in `BatchNorm`.
    activation : str, ("leaky_relu", float) or None
        Applied to the output: one of the names that `batch_norm` takes.
    dtype : dtype
        The type of parameters and running statistics: float32 (for float16 and bfloat16 data too)
        or float64 (for float64 data).

    Attributes
    ----------
    rmax, dmax : float
    weight, bias, running_mean, running_var, weight_grad, bias_grad, num_batches_tracked, training
        As in `BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        If an option has a type or value that is not accepted.

    Notes
    -----
    Section 3 of Ioffe (2017), *Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models*. With sigma = sqrt(running_var + eps), and the running statistics as
    they were before this batch, ``r = clip(sigma_batch / sigma, 1 / rmax, rmax)`` and
    ``d = clip((mean_batch - running_mean) / sigma, -dmax, dmax)``. No gradient flows through them.

    The batch is read twice: its statistics decide what is written.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> layer = bnfast.BatchRenorm(1, dtype=np.float64)
    >>> x = np.array([[1.0], [3.0]])
    >>> layer(x).ravel().round(2)  # as running statistics of 0 and 1 would give
    array([1., 3.])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        rmax: float = 3.0,
        dmax: float = 5.0,
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
            axis=axis,
            ddof=ddof,
            activation=activation,
            dtype=dtype,
        )
        self.rmax, self.dmax = checked_limits(rmax, dmax)

    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out: Tensor | None = None,
        *,
        mask: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> Tensor:
        """Normalise `x` with its own statistics, corrected; in evaluation with the running ones.

        Parameters and errors are those of `BatchNorm`.
        """
        # Without tracked statistics it is plain, as the PyTorch modules are.
        corrects = self.training and self.track_running_stats and self._observer is None
        if not corrects:
            return super().__call__(x, residual, out, mask=mask, update_stats=update_stats)
        limits = checked_limits(self.rmax, self.dmax)
        if self.virtual_batch_size is not None:
            raise ValueError(
                f"virtual_batch_size is {self.virtual_batch_size}; expected None: "
                f"{type(self).__name__} corrects whole batches"
            )
        x = self._checked(x)
        mask = None if mask is None else _masks.read(mask)
        if residual is not None and type(residual) is not np.ndarray:
            residual = _arrays.array("residual", residual)
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError("BatchRenorm in training needs running statistics; one is None")
        mean, var = (
            _arrays.running_statistic(name, value, self.num_features, x.dtype)
            for name, value in zip(_RUNNING, (self.running_mean, self.running_var), strict=True)
        )
        batch = moments(x, axis=self.axis, mask=mask)
        if mask is not None:
            _masks.check_enough(mask, x, self.axis)
        eps = _options.eps(self.eps, training=True)
        correction = Correction.of(batch, mean, var, eps, *limits)
        weight, bias = correction.parameters(self.weight, self.bias)
        updates = update_stats is True or _options.truth("update_stats", update_stats)
        momentum = self.momentum if updates else 0.0
        if momentum is None:
            self._check_counting()
        y, (count, mean, var, inv_std) = _core.forward(
            x,
            self.running_mean if updates else None,
            self.running_var if updates else None,
            weight,
            bias,
            momentum,
            self.eps,
            self.axis,
            self.ddof,
            residual,
            self.activation,
            out,
            self.num_batches_tracked if updates else None,
            (batch.count, batch.mean, batch.m2),
            mask,
        )
        stats = BatchStats(mean, var, inv_std, count)
        self._keep(x, stats, residual, y, out, mask, correction)
        return y

    def _gradients(self, dy: ArrayLike, saved: Saved, needs: Sequence[str]) -> Gradients:
        """Return the gradients by those of the plain batch norm with the same output."""
        correction = saved.correction
        if correction is None:
            return super()._gradients(dy, saved, needs)
        weight, bias = correction.parameters(self.weight, self.bias)
        found = self._plain_gradients(dy, saved, needs, weight, bias)
        if found.weight is None or found.bias is None:
            return found
        return found._replace(weight=correction.weight_gradient(found.weight, found.bias))

    def __repr__(self) -> str:
        plain = super().__repr__().replace(", track_running_stats=True", "")
        return f"{plain[:-1]}, rmax={self.rmax}, dmax={self.dmax})"


class BatchRenorm1d(BatchRenorm):
    """`BatchRenorm` for (N, C) or (N, C, L); other ranks are refused."""

    _ranks = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """`BatchRenorm` for (N, C, H, W); other ranks are refused."""

    _ranks = (4,)


class BatchRenorm3d(BatchRenorm):
    """`BatchRenorm` for (N, C, D, H, W); other ranks are refused."""

    _ranks = (5,)
