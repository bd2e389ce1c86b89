"""A case: one shape, layout, variant and type, its data, and what the answers should be.

Every contestant gets the same arrays. They begin at a cache line, as PyTorch's own tensors do and
as oneDNN's streaming stores require, or `offset` bytes after one. NumPy's allocator puts large
arrays at offset 16; oneDNN then works on aligned copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import bnfast
from bench.harness import shapes
from bnfast import _core

EPS = 1e-5
STEPS = ("forward", "backward", "inference")
DTYPES = ("float32", "float64", "float16", "bfloat16")
# By name: the activation, and whether a residual is added before it.
EVERY_VARIANT = {
    "plain": (None, False),
    "relu": ("relu", False),
    "add_relu": ("relu", True),
    "silu": ("silu", False),
}
# Those that this bnfast can do.
VARIANTS = [
    name
    for name, (activation, _) in EVERY_VARIANT.items()
    if activation in (None, *_core.ACTIVATIONS)
]
LINE = 64
# How many random values are drawn. Larger arrays repeat them: drawing 250 million takes longer than
# measuring.
VALUES_DRAWN = 1 << 22
Formula = Callable[[np.ndarray], np.ndarray]


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


# By activation: its value and its slope, as functions of the pre-activation.
FORMULAS: dict[str | None, tuple[Formula, Formula]] = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    "silu": (
        lambda z: z * sigmoid(z),
        lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z))),
    ),
}


def numpy_type(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of that name; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def empty(shape: shapes.Shape, dtype: Any, offset: int = 0) -> np.ndarray:
    """Return an array that begins `offset` bytes after a cache line.

    Its memory is NumPy's, so it has huge pages where NumPy's arrays have them.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 2 * LINE, np.uint8)
    start = (offset - memory.ctypes.data) % LINE
    return memory[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Case:
    shape: shapes.Shape
    layout: str
    variant: str = "plain"
    dtype: str = "float32"
    offset: int = 0

    @property
    def half(self) -> bool:
        """Whether the data have half precision; their parameters are float32 then."""
        return self.dtype in ("float16", "bfloat16")

    @property
    def parameter_type(self) -> str:
        return "float32" if self.half else self.dtype

    @property
    def memory(self) -> shapes.Shape:
        return shapes.in_layout(self.shape, self.layout)[0]

    @property
    def axis(self) -> int:
        return shapes.in_layout(self.shape, self.layout)[1]

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_type(self.dtype).itemsize

    @property
    def planar(self) -> bool:
        return self.layout == "nchw"

    @property
    def activation(self) -> str | None:
        return EVERY_VARIANT[self.variant][0]

    @property
    def adds(self) -> bool:
        return EVERY_VARIANT[self.variant][1]

    def activated(self, z: np.ndarray) -> np.ndarray:
        return FORMULAS[self.activation][0](z)

    def slope(self, z: np.ndarray) -> np.ndarray:
        """Return the activation's derivative at the pre-activation z."""
        return FORMULAS[self.activation][1](z)

    def __str__(self) -> str:
        return f"{shapes.label(self.shape)} {self.layout} {self.variant} {self.dtype}"


@dataclass
class Buffers:
    """One set of arrays, axes in memory order. All contestants write into the same outputs."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    y: np.ndarray  # the forward's result: with a residual, the backward takes its mask from it
    out: np.ndarray
    out2: np.ndarray  # the residual's gradient
    sum_dy: np.ndarray
    sum_dyx: np.ndarray

    def inputs(self) -> list[np.ndarray]:
        return [self.x, self.dy, self.residual, self.y]

    def outputs(self) -> list[np.ndarray]:
        return [self.out, self.out2, self.sum_dy, self.sum_dyx]


@dataclass
class Run:
    """A contestant's call, and a function from what it returns to y or the gradients."""

    call: Callable[[], Any]
    answer: Callable[[Any], list[np.ndarray]]
    note: str = ""


class Data:
    """Parameters of a case, and `sets` copies of its arrays with equal values."""

    def __init__(self, case: Case, sets: int = 1) -> None:
        self.case = case
        self.rng = np.random.default_rng(0)
        self.weight, self.bias, self.mean, self.var = (self._vector() for _ in range(4))
        self.var += 0.5
        self.sets = [self._buffers(None)]
        self.sets[0].y[...] = self._normalized()
        self.sets += [self._buffers(self.sets[0]) for _ in range(sets - 1)]

    def _vector(self) -> np.ndarray:
        return self.rng.random(self.case.channels).astype(self.case.parameter_type)

    def _empty(self) -> np.ndarray:
        return empty(self.case.memory, numpy_type(self.case.dtype), self.case.offset)

    def _random(self) -> np.ndarray:
        array = self._empty()
        drawn = self.rng.standard_normal(min(array.size, VALUES_DRAWN), np.float32)
        flat = array.reshape(-1)
        for start in range(0, array.size, drawn.size):
            part = flat[start : start + drawn.size]
            part[...] = drawn[: part.size]
        return array

    def _buffers(self, like: Buffers | None) -> Buffers:
        inputs = [self._random() if like is None else self._empty() for _ in range(4)]
        if like is not None:
            for array, source in zip(inputs, like.inputs(), strict=True):
                array[...] = source
        vectors = [np.zeros(self.case.channels, self.case.parameter_type) for _ in range(2)]
        return Buffers(*inputs, self._empty(), self._empty(), *vectors)

    def _normalized(self) -> np.ndarray:
        z = bnfast.batch_norm_forward(
            self.sets[0].x, self.weight, self.bias, eps=EPS, axis=self.case.axis,
            residual=self._residual(self.sets[0]),
        )[0]  # fmt: skip
        return self.case.activated(z)

    def _residual(self, buffers: Buffers) -> np.ndarray | None:
        return buffers.residual if self.case.adds else None

    @cached_property
    def sampled(self) -> np.ndarray:
        """Indices of the channels in which answers are checked."""
        return np.unique(np.linspace(0, self.case.channels - 1, 5).astype(int))

    def columns(self, array: np.ndarray) -> np.ndarray:
        """Return the sampled channels of an array as float64 columns."""
        picked = np.moveaxis(array, self.case.axis, -1)[..., self.sampled]
        return picked.reshape(-1, self.sampled.size).astype(np.float64)

    def expected(self, step: str) -> list[np.ndarray]:
        """Return the right answer in the sampled channels, in float64."""
        b = self.sets[0]
        x, weight, bias, mean, var = self.columns(b.x), *(
            v[self.sampled].astype(np.float64)
            for v in (self.weight, self.bias, self.mean, self.var)
        )  # fmt: skip
        if step != "inference":
            mean, var = x.mean(0), x.var(0)
        hat = (x - mean) / np.sqrt(var + EPS)
        pre = hat * weight + bias + (self.columns(b.residual) if self.case.adds else 0)
        if step != "backward":
            return [self.case.activated(pre)]
        dy = self.columns(b.dy) * self.case.slope(pre)
        dx = weight / np.sqrt(var + EPS) * (dy - dy.mean(0) - hat * (dy * hat).mean(0))
        return [dx, (dy * hat).sum(0), dy.sum(0)] + ([dy] if self.case.adds else [])

    def error(self, step: str, run: Run) -> float:
        """Return the relative root mean square error of an answer.

        It is infinite where a value was not written. A maximum would be too strict: rounding
        may put one value near the kink of ReLU on either side of it.
        """
        for array in self.sets[0].outputs():
            array.fill(np.nan)
        answers = run.answer(run.call())
        worst = 0.0
        for answer, right in zip(answers, self.expected(step), strict=True):
            got = (
                self.columns(answer) if right.ndim > 1 else answer[self.sampled].astype(np.float64)
            )
            worst = max(worst, float(np.sqrt(((got - right) ** 2).mean() / (right**2).mean())))
        return worst if worst == worst else math.inf

    def tolerance(self, step: str) -> float:
        if self.case.half:  # two units in the last place: PyTorch rounds before it adds
            return 2.0**-6 if self.case.dtype == "bfloat16" else 1e-2
        return 1e-2 if step == "backward" and self.case.activation == "relu" else 1e-3
