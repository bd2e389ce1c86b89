"""Calls with good arguments, some of which a test replaces by bad ones."""

import re

import numpy as np
import pytest
from cases import bits, make_problem, poisoned_like

import bnfast

P = make_problem((6, 4, 5), residual=True)
X, DY, W, B, R = P.x, P.dy, P.weight, P.bias, P.residual
STATS = bnfast.batch_norm_forward(X, W, B)[1]
POPULATION = bnfast.BatchStats.from_population(STATS.mean, STATS.var)


def mentions(*words):
    """A pattern for all of these words in any order."""
    escaped = (re.escape(str(word)) for word in words)
    return "(?is)" + "".join(rf"(?=.*(?<!\w){word}(?!\w))" for word in escaped)


DATA_TYPES = ("float32", "float64", "float16", "bfloat16")
PARAMETER_TYPES = ("float32", "float64")


def zero_stride(shape):
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))


class Call:
    """A call of one function with good arguments, some of which are replaced.

    Arrays that the call may write are poisoned or known, and are compared
    afterwards with their former contents.
    """

    def __init__(self, function, *given, **named):
        self.function, self.given, self.named = function, given, named

    def __repr__(self):
        return self.function.__name__

    def refuses(self, error, words, **changes):
        arguments = {k: copied(v) for k, v in self.named.items()} | changes
        positional = [arguments.pop(name) for name in self.given]
        held = {id(a): a for a in (*positional, *arguments.values()) if type(a) is np.ndarray}
        before = {key: bits(a) for key, a in held.items()}
        counted = bnfast._core.dispatches()
        with pytest.raises(error, match=mentions(*words)):
            self.function(*positional, **arguments)
        assert {key: bits(a) for key, a in held.items()} == before
        assert bnfast._core.dispatches() == counted


def copied(value):
    return value.copy() if isinstance(value, np.ndarray) else value


OUT = poisoned_like(X)
AFFINE = {"weight": W, "bias": B}
RUNNING = {"running_mean": W, "running_var": B**2}
FUSED = {"residual": R, "out": OUT}

forward = Call(bnfast.batch_norm_forward, "x", x=X, **AFFINE, **FUSED)
training = Call(bnfast.batch_norm, "x", x=X, **RUNNING, **AFFINE, **FUSED, training=True)
inference = Call(bnfast.batch_norm, "x", x=X, **RUNNING, **AFFINE, **FUSED)
normalize = Call(bnfast.normalize, "x", "mean", "var", x=X, mean=W, var=B**2, **AFFINE, **FUSED)
scale_shift = Call(bnfast.scale_shift, "x", "scale", "shift", x=X, scale=W, shift=B, **FUSED)
backward = Call(
    bnfast.batch_norm_backward, "dy", "x", "stats", dy=DY, x=X, stats=STATS, **AFFINE, **FUSED
)
moments = Call(bnfast.moments, "x", x=X)

FORWARDS = (forward, training, inference, normalize, scale_shift)
NORMALIZING = FORWARDS[:-1]
ALL = (*FORWARDS, backward, moments)


def each(*calls):
    return pytest.mark.parametrize("call", calls, ids=repr)


PER_CHANNEL = [
    *(
        (c, name)
        for c in (forward, training, inference, normalize, backward)
        for name in ("weight", "bias")
    ),
    *((c, name) for c in (training, inference) for name in RUNNING),
    (normalize, "mean"),
    (normalize, "var"),
    (scale_shift, "scale"),
    (scale_shift, "shift"),
]
