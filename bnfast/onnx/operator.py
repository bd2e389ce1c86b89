"""Evaluate the operator BatchNormalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnfast import _arrays, _core, _options
from bnfast.functional import BatchStats, batch_norm_forward, normalize
from bnfast.inference import rounded

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["batch_normalization"]


def batch_normalization(
    x: ArrayLike,
    scale: ArrayLike,
    B: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Any:
    """Evaluate ONNX's operator BatchNormalization (opset 15).

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, shape (N, C, ...) or (N,)
        Rank 1 is one channel.
    scale, B : array_like of any of the types of `x`, shape (C,)
        Gamma and beta.
    mean, var : array_like of any of the types of `x`, shape (C,)
        The statistics to normalise with or, in training, the running ones. Not changed.
    epsilon : float
        Added to the variance; above 0 in training.
    momentum : float
        The weight of the *old* running value.
    training_mode : {0, 1}
        1 normalises with the batch.

    Returns
    -------
    y : ndarray
        Shape and dtype of `x`.
    running_mean, running_var : ndarray, shape (C,)
        Only in training, when the three are returned as a tuple. Dtype of `mean` and of `var`;
        ``running = running * momentum + batch * (1 - momentum)``, computed in float64 and rounded
        once. The batch variance is divided by m. An empty batch changes neither.

    Raises
    ------
    TypeError
        If an argument has a dtype or type that is not accepted.
    ValueError
        If an argument has a wrong shape or value: `training_mode` is neither 0 nor 1, `momentum` is
        not finite.
    """
    if training_mode not in (0, 1):
        raise ValueError(f"training_mode is {training_mode!r}; expected 0 or 1")
    x = np.asanyarray(x)
    batch = x[:, None] if x.ndim == 1 else x
    if not training_mode:
        return normalize(batch, mean, var, scale, B, eps=epsilon).reshape(x.shape)
    old = _options.real("momentum", momentum)
    if batch.ndim > 1 and batch.size == batch.shape[1] > 0:
        # With one value per channel, the mean is that value. PyTorch refuses it; the ONNX operator
        # does not.
        own = batch.reshape(-1)
        y = normalize(batch, own, np.zeros_like(own), scale, B, eps=_options.eps(epsilon, True))
        stats = BatchStats.from_population(own, np.zeros_like(own), epsilon)
    else:
        y, stats = batch_norm_forward(batch, scale, B, eps=epsilon)
    moved = []
    for name, value, new in (("mean", mean, stats.mean), ("var", var, stats.var)):
        given = _arrays.array(name, value)
        running = _arrays.parameter(name, given, len(new)).astype(np.float64)
        if batch.size:
            running = _core.moved_average(running, new, 1 - old)
        moved.append(rounded(running, given.dtype))
    return y.reshape(x.shape), *moved
