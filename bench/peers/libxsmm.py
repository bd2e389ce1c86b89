"""libxsmm's fused batch normalization through its C API (libxsmm.c), in its own blocked layout.

libxsmm chooses the block by itself: of up to 64 channels with AVX-512, of up to 32 without, so
nChw64c for the shapes here. It knows no plain layout: what it says of NHWC is not implemented. Its
eps is fixed at 1e-7, it sums E[x^2] - E[x]^2 in float32, and it updates no running statistics. Its
backward writes the activation's mask into dy, and so does here with a copy of dy.
Converting to and from its layout is not timed.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import numpy as np

from bench.harness import compiled
from bench.harness.blocked import blocked, plain
from bench.harness.cases import EPS, STEPS, Buffers, Data, Run, empty

HINT = "Debian, Ubuntu: apt install libxsmm-dev"
# Its BLAS is asked for by the parts of it that are not used here.
LIBRARIES = ("-lxsmm", "-lxsmmnoblas", "-lpthread", "-lrt", "-ldl", "-lm")
NAMES = (
    "x", "y", "residual", "dy", "dx", "dresidual",
    "weight", "bias", "mean", "inv_std", "var", "dweight", "dbias",
)  # fmt: skip
STEPS_IN_C = {step: number for number, step in enumerate(STEPS)}


class _Pointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in NAMES)


def _load() -> ctypes.CDLL:
    try:
        code = compiled.load(Path(__file__).with_name("libxsmm.c"), *LIBRARIES)
    except compiled.Missing as error:
        raise compiled.Missing(f"libxsmm cannot be used ({HINT}): {error}") from error
    code.version.restype = code.target.restype = ctypes.c_char_p
    code.make_plan.restype = ctypes.c_void_p
    code.make_plan.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int,
    ]  # fmt: skip
    code.bind_arrays.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Pointers)]
    for function in (code.block, code.run_plan, code.destroy_plan):
        function.argtypes = [ctypes.c_void_p]
    return code


class Libxsmm:
    name = "libxsmm"
    rest = 0.0

    def __init__(self) -> None:
        self.code = _load()
        self.version = f"{self.code.version().decode()}, {self.code.target().decode()}"
        self.threads = 1

    def set_threads(self, n: int) -> None:
        self.threads = n

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        case = data.case
        if case.layout == "nhwc" or case.activation not in (None, "relu"):
            return {}
        if case.dtype != "float32":
            return {}
        plan = self._plan(data, step)
        if plan is None:
            return {}
        arrays = _arrays(data, buffers, plan.block)
        if step == "backward":  # its own statistics, which libxsmm's backward takes
            forward = self._plan(data, "forward")
            forward.bind(arrays, FORWARD)
            forward()
            plan.bind(arrays, BACKWARD)
        else:
            plan.bind(arrays, FORWARD)
        return {"libxsmm": Run(plan, lambda _: _answer(data, arrays, step), f"nChw{plan.block}c")}

    def _plan(self, data: Data, step: str) -> _Plan | None:
        case = data.case
        n, c, *space = case.shape
        dims = (ctypes.c_int * 4)(n, c, *(space or (1, 1)))
        fused = (bool(case.activation), case.adds)
        made = self.code.make_plan(STEPS_IN_C[step], *fused, dims, self.threads)
        return _Plan(self.code, made) if made else None


class _Plan:
    """A plan in C, and the arrays that it must keep alive; it is destroyed with this object."""

    def __init__(self, code: ctypes.CDLL, plan: int) -> None:
        self.code, self.plan, self.run = code, ctypes.c_void_p(plan), code.run_plan
        self.block = code.block(self.plan)
        weakref.finalize(self, code.destroy_plan, ctypes.c_void_p(plan))

    def bind(self, arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
        self.arrays = arrays
        given = {name: arrays[name].ctypes.data for name in names if name in arrays}
        if self.code.bind_arrays(self.plan, ctypes.byref(_Pointers(**given))):
            raise RuntimeError("libxsmm refuses the arrays")

    def __call__(self) -> None:
        if self.run(self.plan):
            raise RuntimeError("libxsmm failed")


FORWARD = ("x", "y", "residual", "weight", "bias", "mean", "inv_std", "var")
BACKWARD = ("x", "y", "dy", "dx", "dresidual", "weight", "mean", "inv_std", "dweight", "dbias")


def _arrays(data: Data, b: Buffers, block: int) -> dict[str, np.ndarray]:
    """Return a case's arrays by name, the large ones in libxsmm's layout."""
    made = {name: _own(array, block) for name, array in (("x", b.x), ("dy", b.dy))}
    made["y"], made["dx"] = _unwritten(made["x"]), _unwritten(made["x"])
    if data.case.adds:
        made["residual"], made["dresidual"] = _own(b.residual, block), _unwritten(made["x"])
    inv_std = (1 / np.sqrt(data.var.astype(np.float64) + EPS)).astype(np.float32)
    return made | {
        "weight": data.weight, "bias": data.bias, "mean": data.mean.copy(), "inv_std": inv_std,
        "var": data.var.copy(), "dweight": b.sum_dyx, "dbias": b.sum_dy,
    }  # fmt: skip


def _own(array: np.ndarray, block: int) -> np.ndarray:
    source = blocked(array, block)
    made = empty(source.shape, np.float32)
    made[...] = source
    return made


def _unwritten(like: np.ndarray) -> np.ndarray:
    made = empty(like.shape, np.float32)
    made.fill(np.nan)  # what a call does not write is seen
    return made


def _answer(data: Data, arrays: dict[str, np.ndarray], step: str) -> list[np.ndarray]:
    shape = data.case.shape
    if step != "backward":
        return [plain(arrays["y"], shape)]
    added = [plain(arrays["dresidual"], shape)] if data.case.adds else []
    return [plain(arrays["dx"], shape), arrays["dweight"], arrays["dbias"], *added]
