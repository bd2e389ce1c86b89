"""Calls on (1, 16, 4, 4), which is so small that a call is nearly all overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from bench.harness import shapes

(SHAPE,) = shapes.TINY


def arrays() -> tuple[np.ndarray, ...]:
    """Return x, mean, var, weight and bias."""
    vectors = (np.ones(SHAPE[1], np.float32) for _ in range(4))
    return np.ones(SHAPE, np.float32), *vectors


def calls() -> dict[str, Callable[[], Any]]:
    """Return calls by name. Each makes a new result unless its name says otherwise."""
    arguments = x, _, _, weight, bias = arrays()
    training = bnfast.BatchNorm2d(SHAPE[1])
    inference = bnfast.BatchNorm2d(SHAPE[1]).eval()
    frozen, out = bnfast.BatchNorm2d(SHAPE[1]).freeze(), np.empty_like(x)
    stats = bnfast.batch_norm_forward(x)[1]
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    view = last.transpose(0, 3, 1, 2)  # NCHW axes over channels-last memory
    return {
        "FrozenBatchNorm": lambda: frozen(x),
        "FrozenBatchNorm, out=": lambda: frozen(x, out=out),
        "batch_norm": lambda: bnfast.batch_norm(*arguments),
        "batch_norm, out=": lambda: bnfast.batch_norm(*arguments, out=out),
        "batch_norm, axis=-1": lambda: bnfast.batch_norm(last, *arguments[1:], axis=-1),
        "batch_norm, channels-last view": lambda: bnfast.batch_norm(view, *arguments[1:]),
        "batch_norm, training": lambda: bnfast.batch_norm(*arguments, True),
        "batch_norm_forward": lambda: bnfast.batch_norm_forward(x, weight, bias),
        "batch_norm_backward": lambda: bnfast.batch_norm_backward(x, x, stats, weight, bias),
        "moments": lambda: bnfast.moments(x),
        "BatchNorm2d": lambda: inference(x),
        "BatchNorm2d, training": lambda: training(x),
    }
