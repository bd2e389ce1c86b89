"""The problems that the tests use, and the memory orders of their arrays."""

import os
import platform
import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest
from wide import wide

import bnfast
from bnfast import _core

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

# Sanitizers use larger stack frames and keep freed memory, so neither can be measured with them.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
DTYPES = (np.float32, np.float64)
HALVES = (
    np.float16,
    pytest.param(
        bfloat16,
        id="bfloat16",
        marks=pytest.mark.skipif(bfloat16 is None, reason="bfloat16 needs ml_dtypes"),
    ),
)
EVERY_DTYPE = (*DTYPES, *HALVES)
ACTIVATIONS = (None, *_core.ACTIVATIONS, ("leaky_relu", 0.3))
# Those whose derivative the output tells.
FROM_OUTPUT = tuple(
    a for a in ACTIVATIONS if a not in _core.ACTIVATIONS or _core.ACTIVATIONS[a].from_output
)
NAMES = ("x", "weight", "bias", "residual")
# Instruction sets that round a product before adding to it: plain C does if the compiler's
# baseline has no fused multiply-add, and x86-64's has none.
WITHOUT_FMA = {"scalar", "sse2"} if platform.machine().lower() in ("x86_64", "amd64") else set()


@dataclass(frozen=True)
class Problem:
    """The arguments of one forward and one backward."""

    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray | None
    axis: int
    activation: object
    eps: float

    @property
    def options(self):
        """The keywords that forward, backward and inference have in common."""
        return {"axis": self.axis, "activation": self.activation, "residual": self.residual}

    @property
    def channels(self):
        return self.x.shape[self.axis]

    @property
    def m(self):
        return self.x.size // self.channels

    def exact(self):
        """The reference's arguments, in a type wider than the data."""
        return (
            *(wide(a) for a in (self.x, self.weight, self.bias)),
            wide(self.eps),
            self.axis,
            None if self.residual is None else wide(self.residual),
            self.activation,
        )

    def replace(self, **changes):
        return replace(self, **changes)


def computed_in(dtype):
    """The type that data of this type are computed in, which is also that of their parameters."""
    return np.dtype(dtype if np.dtype(dtype).itemsize > 2 else np.float32)


def make_problem(
    shape,
    dtype=np.float32,
    *,
    axis=1,
    activation=None,
    residual=False,
    arrange=np.ascontiguousarray,
    seed=0,
):
    """Values of both signs, also weights; pre-activations on both sides of 0 and 6."""
    rng = np.random.default_rng([seed, *shape])
    channels = shape[axis]

    def draw(scale, center=0.0):
        return arrange((rng.standard_normal(shape) * scale + center).astype(dtype))

    sign = rng.choice([-1.0, 1.0], channels)
    return Problem(
        x=draw(1.5, 0.7),
        dy=draw(1.0, 0.2),
        weight=(sign * rng.uniform(0.5, 3.0, channels)).astype(computed_in(dtype)),
        bias=rng.normal(1.0, 2.0, channels).astype(computed_in(dtype)),
        residual=draw(1.0) if residual else None,
        axis=axis,
        activation=activation,
        eps=1e-5,
    )


def forward(p, **more):
    """Run bnfast's training forward of a problem, into a poisoned `out`."""
    out = poisoned_like(p.x)
    y, stats = bnfast.batch_norm_forward(
        p.x, p.weight, p.bias, eps=p.eps, out=out, **p.options, **more
    )
    assert y is out
    return y, stats


def backward(p, stats, **more):
    """Run bnfast's backward of a problem, into a poisoned `out` unless one is given."""
    more.setdefault("out", poisoned_like(p.x))
    return bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options, **more)


def poisoned_like(a):
    """An array in which every element that is not written can be seen."""
    return np.full_like(a, np.nan)


def read_only(a):
    """A read-only copy."""
    a = a.copy()
    a.flags.writeable = False
    return a


def bits(a):
    """The bytes of an array in axis order: compares floats exactly, NaN and -0 included."""
    return np.asarray(a).tobytes()


# --- Memory orders; all keep values and shape --------------------------------------


def with_memory_order(*order):
    """Axes are in memory in this order: (0, 2, 3, 1) is channels-last."""

    def arrange(a):
        return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))

    return arrange


def with_gaps(a):
    """Every second element of the last axis of a larger array."""
    larger = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    view = larger[..., ::2]
    view[...] = a
    return view


def backwards(a):
    """The first axis runs from high addresses to low ones."""
    return np.ascontiguousarray(a[::-1])[::-1]


def at_offset(nbytes):
    """The first element is `nbytes` past a multiple of 64."""

    def arrange(a):
        store = np.zeros(a.nbytes + 128, np.uint8)
        start = -store.ctypes.data % 64 + nbytes
        view = store[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
        view[...] = a
        return view

    return arrange


# Of (N, C, H, W) with axis=1. The layout is the one that the kernels should see.
CONTIGUOUS_ORDERS = {
    "nchw": (np.ascontiguousarray, "planar"),
    "channels_last": (with_memory_order(0, 2, 3, 1), "interleaved"),
    "fortran": (np.asfortranarray, "planar"),
    "channels_first": (with_memory_order(1, 0, 2, 3), "planar"),
    "nhcw": (with_memory_order(0, 2, 1, 3), "planar"),
    "channels_last_of_transposed": (with_memory_order(3, 2, 0, 1), "interleaved"),
}
COPIED_ORDERS = {
    "gaps": with_gaps,
    "backwards": backwards,
    "misaligned": at_offset(1),
}
ALL_ORDERS = {name: arrange for name, (arrange, _) in CONTIGUOUS_ORDERS.items()} | COPIED_ORDERS

# Around every vector width (4, 8, 16 elements), their unrolled multiples and
# the powers of two where tiles probably end.
INNER_SIZES = (*range(1, 41), 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 16383, 16384, 16385)
CHANNEL_COUNTS = (*range(1, 41), 63, 64, 65, 511, 512, 513)
OUTER_SIZES = (*range(1, 10), 31, 32, 33, 255, 257, 4099)
# Around the sizes where sums are cut into blocks: some 2^14 values of a planar channel,
# some 2^15 values of interleaved rows.
BLOCK_EDGES = (
    *((rows, 512) for rows in (63, 64, 65, 129)),
    *((rows, 7) for rows in (4680, 4681, 4682, 9363)),
    *((rows, 2) for rows in (16383, 16384, 16385, 33001)),
    *((images, 3, 5) for images in (3276, 3277, 6553)),
    *((2, 3, inner) for inner in (16400, 32769, 40001)),
    (40_001, 1),
    (3, 1, 20_001),
    (129, 513),
)
# Around the sizes where several rows of few channels are taken at once, and eight times as many.
FEW_CHANNELS = tuple(
    (rows, channels)
    for channels in (2, 3, 5, 6, 8, 11, 12, 15, 16, 17)
    for rows in (7, 8, 9, 63, 64, 65, 131, 1031)
)
SIZES = (
    *((3, 4, inner) for inner in INNER_SIZES),
    *((5, channels) for channels in CHANNEL_COUNTS),
    *((2, channels, 3) for channels in CHANNEL_COUNTS),
    *((outer, 3, 5) for outer in OUTER_SIZES),
    *((outer, 7) for outer in OUTER_SIZES if outer > 1),
    *FEW_CHANNELS,
    *BLOCK_EDGES,
)


def peak(function):
    """The most bytes that a call has allocated at one time; NumPy reports its own."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def by_direction(counts):
    """Sum the counters of dispatches: {direction: times}."""
    found = {}
    for (direction, *_), times in counts.items():
        found[direction] = found.get(direction, 0) + times
    return found


# --- Masks: arrays of shape `positions`, which is that of x without the channel axis. Each counts
# --- two values or more.


def first_of_each(positions, rng):
    """Padded sequences."""
    lengths = np.asarray(rng.integers(0, positions[-1] + 1, positions[:-1]))
    mask = np.arange(positions[-1]) < lengths[..., None]
    mask.reshape(-1)[:2] = True
    return mask


def scattered(positions, rng):
    mask = rng.random(positions) < 0.6
    mask.reshape(-1)[:2] = True
    return mask


def long_gaps(positions, rng):
    """A stretch in the middle, one value before it and one at the end: blocks are left out."""
    mask = np.zeros(positions, bool)
    flat = mask.reshape(-1)
    flat[flat.size // 2 : flat.size // 2 + flat.size // 8 + 1] = True
    flat[[flat.size // 3, -1]] = True
    return mask


def weights(positions, rng):
    return rng.uniform(0.25, 3, positions)


def weights_and_zeros(positions, rng):
    return weights(positions, rng) * scattered(positions, rng)


def weights_of_all_sizes(positions, rng):
    return 10.0 ** rng.uniform(-6, 6, positions) * scattered(positions, rng)


MASKS = (
    *(first_of_each, scattered, long_gaps),
    *(weights, weights_and_zeros, weights_of_all_sizes),
)


def mask_of(p, make, seed=0):
    """A mask for a problem's x."""
    positions = np.delete(p.x.shape, p.axis).tolist()
    return make(positions, np.random.default_rng([seed, *positions]))
