"""bnfast itself: calls with `out=`, and calls that make their own result.

Channels-last data are given twice: with `axis=-1`, and as an NCHW view of the same memory, which
is how PyTorch's users hold them. The slower of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import bnfast
from bench.harness.cases import EPS, Buffers, Case, Data, Run

COUNTED = ("bnfast", "bnfast view")


def counted(medians: dict[str, float]) -> float | None:
    """Return the time that counts: of the two forms of channels-last data, the slower one's."""
    return max((medians[name] for name in COUNTED if name in medians), default=None)


class Ours:
    name = "bnfast"
    rest = 0.0
    version = bnfast.__version__

    def set_threads(self, n: int) -> None:
        bnfast.set_num_threads(n)

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        make = _backward if step == "backward" else _batch_norm
        given = _Form(data, data.case, buffers, data.case.axis)
        forms = {"bnfast": given, "bnfast default": replace(given, default=True)}
        if data.case.layout == "nhwc":
            forms["bnfast view"] = replace(given, buffers=_viewed(buffers), axis=1)
        if data.case.activation and not data.case.adds:  # also plain, to show what fusing costs
            forms["bnfast plain"] = replace(given, case=replace(data.case, variant="plain"))
        return {name: make(form, step) for name, form in forms.items()}


@dataclass(frozen=True)
class _Form:
    """How a case is given to bnfast."""

    data: Data
    case: Case
    buffers: Buffers
    axis: int
    default: bool = False

    @property
    def out(self) -> np.ndarray | None:
        return None if self.default else self.buffers.out

    def in_memory_order(self, array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, self.axis, self.data.case.axis) if array.ndim > 1 else array


def _viewed(b: Buffers) -> Buffers:
    """Return NCHW views of channels-last arrays."""
    large = ("x", "dy", "residual", "y", "out", "out2")
    return replace(b, **{name: np.moveaxis(getattr(b, name), -1, 1) for name in large})


def _batch_norm(form: _Form, step: str) -> Run:
    data, case, b, axis, out = form.data, form.case, form.buffers, form.axis, form.out
    running = (data.mean.copy(), data.var.copy())
    residual = b.residual if case.adds else None

    def call() -> Any:
        return bnfast.batch_norm(
            b.x, *running, data.weight, data.bias, step == "forward", 0.1, EPS,
            axis=axis, residual=residual, activation=case.activation, out=out,
        )  # fmt: skip

    return Run(call, lambda y: [form.in_memory_order(y)])


def _backward(form: _Form, _: str) -> Run:
    data, case, b, axis, out = form.data, form.case, form.buffers, form.axis, form.out
    added = {"residual": b.residual, "y": b.y} if case.adds else {}
    stats = bnfast.batch_norm_forward(b.x, eps=EPS, axis=axis)[1]

    def call() -> Any:
        return bnfast.batch_norm_backward(
            b.dy, b.x, stats, data.weight, data.bias, axis=axis,
            activation=case.activation, out=out, **added,
        )  # fmt: skip

    return Run(call, lambda found: [form.in_memory_order(g) for g in found if g is not None])
