"""The limits: C loops that move the bytes which a batch normalization must move, and do no more.

The bytes are those that cannot be avoided when a tensor is larger than the caches. Planar (NCHW)
tensors are normalized one group of channels at a time, so each input is read once. With channels
last every row holds all channels, so the statistics need to read the inputs once more.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from bench.harness import compiled
from bench.harness.cases import Buffers, Case, Data, Run

NAMES = {10: "read", 20: "two reads", 11: "copy", 21: "triad", 31: "3 in 1 out", 32: "3 in 2 out"}
# By step: the loops for planar and for channels-last data. A loop's number is
# 10 * (arrays it reads) + (arrays it writes).
PLAIN = {"forward": ((11,), (10, 11)), "backward": ((21,), (20, 21)), "inference": ((11,), (11,))}
# With a residual: the forward also reads it, and the backward writes its gradient, the masked dy.
# With channels last the first loop (the sums) writes the masked dy, and the second (dx) reads it
# in place of dy and y.
ADDING = {
    "forward": ((21,), (10, 21)),
    "backward": ((32,), (31, 21)),
    "inference": ((21,), (21,)),
}


def loops(case: Case, step: str) -> tuple[int, ...]:
    planar, interleaved = (ADDING if case.adds else PLAIN)[step]
    return planar if case.planar else interleaved


def traffic(case: Case, step: str) -> int:
    """Return how many bytes the limit of a step moves."""
    return case.nbytes * sum(loop // 10 + loop % 10 for loop in loops(case, step))


class _Arrays(ctypes.Structure):
    _fields_ = (("input", ctypes.c_void_p * 3), ("output", ctypes.c_void_p * 2))


def seconds(case: Case, step: str, medians: dict[str, float]) -> float | None:
    """Return the limit of a step: the times of its loops, each in its faster form, added."""
    total = 0.0
    for loop in loops(case, step):
        forms = [medians[f"{NAMES[loop]}{form}"] for form in FORMS if NAMES[loop] + form in medians]
        if not forms:
            return None
        total += min(forms)
    return total


FORMS = ("", ", streaming")


class Limits:
    name = "limits"
    rest = 0.0

    def __init__(self) -> None:
        self.run_loop = compiled.load(Path(__file__).with_name("limits.c")).run
        self.run_loop.argtypes = [
            ctypes.POINTER(_Arrays), ctypes.c_ssize_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        self.run_loop.restype = None
        self.version = "C loops, plain and streaming stores"
        self.threads = 1

    def set_threads(self, n: int) -> None:
        self.threads = n

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        found = {}
        for loop in loops(data.case, step):
            for form in FORMS if loop % 10 else FORMS[:1]:
                found[NAMES[loop] + form] = self._run(buffers, loop, form)
        return found

    def _run(self, b: Buffers, loop: int, form: str) -> Run:
        inputs = [a.ctypes.data for a in (b.x, b.dy, b.residual)][: loop // 10]
        outputs = [a.ctypes.data for a in (b.out, b.out2)][: loop % 10]
        arrays = ctypes.pointer(_Arrays(tuple(inputs), tuple(outputs)))
        arguments = (arrays, b.x.nbytes // 4, loop, int(bool(form)), self.threads)

        def answer(_: None) -> list[np.ndarray]:
            return [b.out] if loop % 10 else []

        return Run(lambda: self.run_loop(*arguments), answer)
