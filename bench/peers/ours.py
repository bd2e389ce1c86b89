"""bnfast itself: calls with `out=`, and calls that make their own result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bnfast
from bench.harness.cases import EPS, Buffers, Case, Data, Run


class Ours:
    name = "bnfast"
    rest = 0.0
    version = bnfast.__version__

    def set_threads(self, n: int) -> None:
        bnfast.set_num_threads(n)

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        make = self._backward if step == "backward" else self._batch_norm
        found = {
            "bnfast": make(data, data.case, buffers, step, buffers.out),
            "bnfast default": make(data, data.case, buffers, step, None),
        }
        if data.case.variant == "relu":  # also the plain form, to show what fusing costs
            plain = replace(data.case, variant="plain")
            found["bnfast plain"] = make(data, plain, buffers, step, buffers.out)
        return found

    def _batch_norm(self, data: Data, case: Case, b: Buffers, step: str, out: Any) -> Run:
        running = (data.mean.copy(), data.var.copy())
        residual = b.residual if case.adds else None

        def call() -> Any:
            return bnfast.batch_norm(
                b.x, *running, data.weight, data.bias, step == "forward", 0.1, EPS,
                axis=case.axis, residual=residual, activation=case.activation, out=out,
            )  # fmt: skip

        return Run(call, lambda y: [y])

    def _backward(self, data: Data, case: Case, b: Buffers, step: str, out: Any) -> Run:
        added = {"residual": b.residual, "y": b.y} if case.adds else {}
        stats = bnfast.batch_norm_forward(b.x, eps=EPS, axis=case.axis)[1]

        def call() -> Any:
            return bnfast.batch_norm_backward(
                b.dy, b.x, stats, data.weight, data.bias, axis=case.axis,
                activation=case.activation, out=out, **added,
            )  # fmt: skip

        return Run(call, lambda gradients: [g for g in gradients if g is not None])
