"""The limits: loops that move the bytes a batch normalization must, and nothing else.

What is counted is what cannot be avoided once a tensor exceeds the caches. Planar tensors are
normalized a group of channels at a time, so each input is read once. In channels-last order every
row holds all channels, so the statistics need a reading of their own.
"""

from __future__ import annotations

import ctypes

import compiled
import numpy as np
from cases import Buffers, Case, Data, Run

NAMES = {10: "read", 20: "two reads", 11: "copy", 21: "triad", 31: "3 in 1 out", 32: "3 in 2 out"}
# Loops by step, as 10 * arrays read + arrays written: (planar, channels-last).
PLAIN = {"forward": ((11,), (10, 11)), "backward": ((21,), (20, 21)), "inference": ((11,), (11,))}
# The residual is read, too; its gradient, the masked dy, is written. Channels-last, it is best
# written while the sums are taken, and read in place of dy and y when dx is.
ADDING = {
    "forward": ((21,), (10, 21)),
    "backward": ((32,), (31, 21)),
    "inference": ((21,), (21,)),
}


def loops(case: Case, step: str) -> tuple[int, ...]:
    planar, interleaved = (ADDING if case.adds else PLAIN)[step]
    return planar if case.planar else interleaved


def traffic(case: Case, step: str) -> int:
    """The bytes that the limit of a step moves."""
    return case.nbytes * sum(loop // 10 + loop % 10 for loop in loops(case, step))


class _Arrays(ctypes.Structure):
    _fields_ = (("input", ctypes.c_void_p * 3), ("output", ctypes.c_void_p * 2))


def seconds(case: Case, step: str, medians: dict[str, float]) -> float | None:
    """The limit of a step: its loops one after another, each in the better of its forms."""
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
        self.run_loop = compiled.load("limits.c").run
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
