"""oneDNN through its C API (onednn.c), in NCHW, channels-last and its own blocked layouts.

On a CPU it adds no residual and fuses ReLU only; here it is used with float32 only. Its training
forward does not update running statistics, which saves it a little work. Converting to and from
blocked layouts is not timed.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.harness import compiled
from bench.harness.blocked import blocked, plain
from bench.harness.cases import EPS, STEPS, Buffers, Case, Data, Run, empty

HINT = "pip install onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0"
# oneDNN's numbers for the arrays of a call (DNNL_ARG_ in its headers).
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 17, 49, 50, 51, 52, 64
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256


class _Given(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("data", ctypes.c_void_p))


def _load() -> ctypes.CDLL:
    root = Path(sys.prefix)
    header, library = root / "include/oneapi/dnnl/dnnl.h", root / "lib/libdnnl.so"
    if not (header.exists() and library.exists()):
        raise compiled.Missing(f"onednn is not installed ({HINT})")
    where = (f"-I{root / 'include'}", f"-L{library.parent}", f"-Wl,-rpath,{library.parent}")
    code = compiled.load(Path(__file__).with_name("onednn.c"), *where, "-ldnnl")
    code.make_plan.restype = ctypes.c_void_p
    code.make_plan.argtypes = [
        ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_float,
        ctypes.c_int, ctypes.POINTER(_Given), ctypes.c_int,
    ]  # fmt: skip
    code.implementation.restype = ctypes.c_char_p
    for function in (code.implementation, code.run_plan, code.destroy_plan):
        function.argtypes = [ctypes.c_void_p]
    return code


class OneDNN:
    name = "onednn"
    rest = 0.0

    def __init__(self) -> None:
        self.code = _load()
        if self.code.start():
            raise compiled.Missing("onednn does not start")
        numbers = [ctypes.c_int() for _ in range(3)]
        self.code.version(*map(ctypes.byref, numbers))
        self.version = ".".join(str(n.value) for n in numbers)

    def set_threads(self, n: int) -> None:
        self.code.set_threads(n)

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        case = data.case
        if case.adds or case.activation not in (None, "relu") or case.dtype != "float32":
            return {}
        made = ((layout, self._run(data, buffers, step, layout)) for layout in _layouts(case))
        return {f"onednn {layout}": run for layout, run in made if run is not None}

    def _run(self, data: Data, b: Buffers, step: str, layout: str) -> Run | None:
        arrays = _Arrays(data, b, layout)
        if step == "backward":  # mean, variance and the activation's mask
            self._plan(data, "forward", layout, arrays).call()
        return self._plan(data, step, layout, arrays)

    def _plan(self, data: Data, step: str, layout: str, arrays: _Arrays) -> Run | None:
        given = arrays.given(step)
        n, c, *space = data.case.shape
        dims = (ctypes.c_int64 * 4)(n, c, *(space or (1, 1)))
        plan = self.code.make_plan(
            STEPS_IN_C[step], layout.encode(), dims, EPS, bool(data.case.activation),
            (_Given * len(given))(*((arg, v.ctypes.data) for arg, v in given)), len(given),
        )  # fmt: skip
        if not plan:
            return None
        call = _Plan(self.code, plan, arrays)
        note = self.code.implementation(plan).decode()
        return Run(call, lambda _: arrays.answer(step), note)


STEPS_IN_C = {step: number for number, step in enumerate(STEPS)}


def _layouts(case: Case) -> Iterator[str]:
    if not case.planar:
        yield "nhwc"
        return
    yield "nchw"
    for block in (8, 16):
        if case.channels % block == 0:
            yield f"nChw{block}c"


class _Plan:
    """A plan in C, and the arrays that it must keep alive; it is destroyed with this object."""

    def __init__(self, code: ctypes.CDLL, plan: int, arrays: _Arrays) -> None:
        self.run, self.plan, self.arrays = code.run_plan, ctypes.c_void_p(plan), arrays
        weakref.finalize(self, code.destroy_plan, ctypes.c_void_p(plan))

    def __call__(self) -> None:
        if self.run(self.plan):
            raise RuntimeError("oneDNN failed")


class _Arrays:
    """A case's arrays in the layout that oneDNN gets."""

    def __init__(self, data: Data, b: Buffers, layout: str) -> None:
        self.case, self.buffers = data.case, b
        self.block = int(layout[4:-1]) if layout.startswith("nChw") else 0
        self.data = data
        self.x, self.dy = self._own(b.x), self._own(b.dy)
        self.out = self._own(b.out, copy=False)
        channels = data.case.channels
        self.mean, self.var = np.empty(channels, np.float32), np.empty(channels, np.float32)
        self.mask = empty(b.x.shape, np.float32) if data.case.activation else None

    def _own(self, array: np.ndarray, copy: bool = True) -> np.ndarray:
        """Return the array itself, or a copy for a blocked layout or where it is not aligned."""
        if not self.block and not self.case.offset:
            return array
        source = blocked(array, self.block) if self.block else array
        made = empty(source.shape, np.float32)
        if copy:
            made[...] = source
        return made

    def given(self, step: str) -> list[tuple[int, np.ndarray]]:
        d, b = self.data, self.buffers
        mask = [] if self.mask is None else [(WORKSPACE, self.mask)]
        if step == "backward":
            return [
                (SRC, self.x), (DIFF_DST, self.dy), (DIFF_SRC, self.out), (SCALE, d.weight),
                (MEAN, self.mean), (VARIANCE, self.var),
                (DIFF_SCALE, b.sum_dyx), (DIFF_SHIFT, b.sum_dy), *mask,
            ]  # fmt: skip
        training = step == "forward"
        mean, var = (self.mean, self.var) if training else (d.mean, d.var)
        return [
            (SRC, self.x), (DST, self.out), (SCALE, d.weight), (SHIFT, d.bias),
            (MEAN, mean), (VARIANCE, var), *(mask if training else []),
        ]  # fmt: skip

    def answer(self, step: str) -> list[np.ndarray]:
        sums = [self.buffers.sum_dyx, self.buffers.sum_dy] if step == "backward" else []
        return [plain(self.out, self.case.shape) if self.block else self.out, *sums]
