"""Batch normalization as one writes it in NumPy: vectorised, with preallocated outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.harness.cases import EPS, Buffers, Case, Data, Run, sigmoid


class NumPy:
    name = "numpy"
    rest = 0.0
    version = np.__version__

    def set_threads(self, n: int) -> None:
        """Do nothing: NumPy's elementwise operations use one thread."""

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        if data.case.half:  # sums of halves overflow or lose all digits
            return {}
        axes = tuple(k for k in range(buffers.x.ndim) if k != data.case.axis % buffers.x.ndim)
        shape = [1] * buffers.x.ndim
        shape[data.case.axis] = -1
        if step == "backward":
            return {"numpy": _backward(data, buffers, axes, shape)}
        return {"numpy": _batch_norm(data, buffers, axes, shape, step == "forward")}


def _finish(case: Case, b: Buffers) -> None:
    if case.adds:
        np.add(b.out, b.residual, out=b.out)
    if case.activation == "relu":
        np.maximum(b.out, 0, out=b.out)
    elif case.activation == "silu":
        np.multiply(b.out, sigmoid(b.out), out=b.out)


def _batch_norm(data: Data, b: Buffers, axes: Any, shape: Any, training: bool) -> Run:
    weight, bias = data.weight.reshape(shape), data.bias.reshape(shape)

    def call() -> np.ndarray:
        mean, var = data.mean.reshape(shape), data.var.reshape(shape)
        if training:
            mean, var = b.x.mean(axes, keepdims=True), b.x.var(axes, keepdims=True)
        np.subtract(b.x, mean, out=b.out)
        np.multiply(b.out, weight / np.sqrt(var + EPS), out=b.out)
        np.add(b.out, bias, out=b.out)
        _finish(data.case, b)
        return b.out

    return Run(call, lambda y: [y])


def _sloped(case: Case, b: Buffers, z: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a function for dy times the activation's slope, which is the residual's gradient.

    ReLU's is taken from y, SiLU's from the pre-activation z, which a forward would have kept.
    """
    if case.activation is None:
        return lambda: b.dy
    if case.activation == "relu":
        return lambda: np.multiply(b.dy, b.y > 0, out=b.out2)
    return lambda: np.multiply(b.dy, case.slope(z), out=b.out2)


def _backward(data: Data, b: Buffers, axes: Any, shape: Any) -> Run:
    weight = data.weight.reshape(shape)
    mean = b.x.mean(axes, np.float64, keepdims=True).astype(b.x.dtype)
    inv_std = 1 / np.sqrt(b.x.var(axes, np.float64, keepdims=True).astype(b.x.dtype) + EPS)
    count = b.x.size // data.case.channels
    z = (b.x - mean) * (weight * inv_std) + data.bias.reshape(shape)
    sloped = _sloped(data.case, b, z)

    def call() -> list[np.ndarray]:
        dy = sloped()
        hat = (b.x - mean) * inv_std
        dbias = dy.sum(axes, keepdims=True)
        dweight = (dy * hat).sum(axes, keepdims=True)
        np.multiply(hat, dweight / count, out=hat)
        np.subtract(dy, hat, out=b.out)
        np.subtract(b.out, dbias / count, out=b.out)
        np.multiply(b.out, weight * inv_std, out=b.out)
        return [b.out, dweight.reshape(-1), dbias.reshape(-1), *([dy] if data.case.adds else [])]

    return Run(call, lambda gradients: gradients)
