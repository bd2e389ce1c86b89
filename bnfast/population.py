"""Population statistics: into layers, and how far they have moved."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _errors
from .layers import _RUNNING, BatchNorm
from .moments import Moments, moments_of

if TYPE_CHECKING:
    from ._types import Vector


def load_statistics(layer: Any, moments: Moments) -> None:
    """Write population statistics into the running mean and variance of a batch norm, in place.

    Parameters
    ----------
    layer : BatchNorm or torch.nn.Module
        bnfast's layer, or a batch norm of PyTorch or derived from it, with running statistics.
    moments : Moments
        Of the layer's inputs: two or more values per channel, as many channels as the layer has.

    Raises
    ------
    TypeError
        If an argument has a type that is not accepted.
    ValueError
        If `moments` have another number of channels, or fewer than two values per channel.
    RuntimeError
        If the layer has no running statistics.

    See Also
    --------
    recompute_statistics : collects the moments of a whole data set, and writes them.

    Notes
    -----
    The variance is the unbiased one, over ``count - 1``: Algorithm 2 of Ioffe and Szegedy (2015).
    ``num_batches_tracked`` stays as it is.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> layer = bnfast.BatchNorm(1)
    >>> clients = [np.array([[1.0], [3.0]]), np.array([[5.0], [7.0], [9.0]])]
    >>> bnfast.load_statistics(layer, bnfast.Moments.merge_all(map(bnfast.moments, clients)))
    >>> layer.running_mean, layer.running_var
    (array([5.], dtype=float32), array([10.], dtype=float32))
    """
    moments_of("moments", moments)
    if moments.count <= 1:
        raise ValueError(
            f"moments are of {moments.count} values per channel; expected at least two, for a "
            "variance"
        )
    values = (moments.mean, moments.var(ddof=1))
    if isinstance(layer, BatchNorm):
        _write_arrays(layer, values)
    elif _is_torch_layer(layer):
        _write_tensors(layer, values)
    else:
        raise TypeError(
            f"layer is {_errors.described(layer)}; expected a BatchNorm, or a batch norm of PyTorch"
        )


def _write_arrays(layer: BatchNorm, values: tuple[Vector, Vector]) -> None:
    running = [getattr(layer, name) for name in _RUNNING]
    _check_tracked(layer, running)
    for name, array in zip(_RUNNING, running, strict=True):
        _arrays.check_updatable(f"the layer's {name}", array, len(values[0]))
    with np.errstate(all="ignore"):  # values outside the range of float32 become infinite
        for array, new in zip(running, values, strict=True):
            np.asarray(array)[...] = new


def _is_torch_layer(layer: Any) -> bool:
    """Whether it is a batch norm of PyTorch; one can exist only where PyTorch was imported."""
    module = sys.modules.get("torch.nn.modules.batchnorm")
    return module is not None and isinstance(layer, module._BatchNorm)


def _write_tensors(layer: Any, values: tuple[Vector, Vector]) -> None:
    torch: Any = sys.modules["torch"]
    running = [getattr(layer, name) for name in _RUNNING]
    _check_tracked(layer, running)
    for name, tensor in zip(_RUNNING, running, strict=True):
        if tuple(tensor.shape) != values[0].shape:
            raise ValueError(
                f"the layer's {name} has shape {tuple(tensor.shape)}; expected {values[0].shape}, "
                "one value per channel of moments"
            )
    with torch.no_grad():
        for tensor, new in zip(running, values, strict=True):
            tensor.copy_(torch.from_numpy(new))


def _check_tracked(layer: Any, running: list[Any]) -> None:
    if any(value is None for value in running):
        raise RuntimeError(
            f"{type(layer).__name__} has no running statistics to write; expected a layer with "
            "track_running_stats=True"
        )


class Drift(NamedTuple):
    """How far each channel's distribution has moved.

    Attributes
    ----------
    kl_divergence : ndarray of float64, shape (channels,)
        The Kullback-Leibler divergence of the new distribution from the old one, in nats, both
        taken as normal: 0 if they are equal, infinite if the old one is a single value that the
        new one is not.
    mean_difference : ndarray of float64, shape (channels,)
        The new mean minus the old one, in units of the root of the two variances' average.
    """

    kl_divergence: Vector
    mean_difference: Vector


def drift(old: Moments, new: Moments) -> Drift:
    """Return how far each channel has moved between two sets of values.

    Parameters
    ----------
    old, new : Moments
        Of one or more values per channel, with the same number of channels: those of training
        data, say, and of what a service saw today.

    Returns
    -------
    Drift
        The divergence and the standardised difference of means, one value per channel.

    Raises
    ------
    TypeError
        If an argument is not a `Moments`.
    ValueError
        If the numbers of channels differ, or one of them is of no values.

    Notes
    -----
    With the biased means and variances m and v,
    ``kl = (log(v_old / v_new) + (v_new + (m_new - m_old)**2) / v_old - 1) / 2`` (Kullback and
    Leibler, 1951) and ``difference = (m_new - m_old) / sqrt((v_old + v_new) / 2)``.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> rng = np.random.default_rng(0)
    >>> old = bnfast.moments(rng.normal(0, 1, (10000, 2)))
    >>> new = bnfast.moments(rng.normal([0, 2], 1, (10000, 2)))
    >>> moved = bnfast.drift(old, new)
    >>> moved.mean_difference.round(1)
    array([0., 2.])
    >>> moved.kl_divergence.round(1)
    array([0., 2.])
    """
    moments_of("old", old), moments_of("new", new)
    if old.mean.shape != new.mean.shape:
        raise ValueError(f"new has {len(new.mean)} channels; expected {len(old.mean)}, as old has")
    for name, part in (("old", old), ("new", new)):
        if not part.count:
            raise ValueError(f"{name} is of no values; expected one or more per channel")
    before, after, delta = old.var(), new.var(), new.mean - old.mean
    with np.errstate(all="ignore"):
        spread = np.sqrt((before + after) / 2)
        divergence = (np.log(before / after) + (after + delta**2) / before - 1) / 2
        difference = delta / spread
    same = (before == after) & (delta == 0)
    points = (before == 0) | (after == 0)
    divergence = np.where(same, 0.0, np.where(points, np.inf, np.maximum(divergence, 0)))
    return Drift(divergence, np.where(same, 0.0, difference))
