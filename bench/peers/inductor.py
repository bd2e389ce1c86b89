"""torch.compile: Inductor's C++ of batch normalization and what follows it, alone.

It writes into given outputs: a `copy_` at the end of a function is fused into its loops. A forward
does not keep what autograd would (with ReLU a mask, a byte a value), and a backward is given it, so
neither makes arrays. Each row has code of its own, for its shape, strides and number of threads;
it is compiled before the row is timed, in a second or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness import compiled
from bench.harness.cases import EPS, Buffers, Case, Data, Run
from bench.peers.pytorch import Backward, BatchNorm, torch

Function = Callable[..., Any]


class Inductor:
    name = "torch.compile"
    rest = 0.0
    version = f"Inductor of PyTorch {torch.__version__}"

    def __init__(self) -> None:
        torch.set_grad_enabled(False)
        # Processes that compile would wait beside the contestants.
        torch._inductor.config.compile_threads = 1
        self.compiled_for: tuple[Data, str, int] | None = None
        try:
            torch.compile(lambda x: x + 1)(torch.ones(64))
        except Exception as error:  # it needs a C++ compiler and Python's headers
            reason = str(error).strip().splitlines()[0]
            raise compiled.Missing(f"torch.compile does not work: {reason}") from error

    def set_threads(self, n: int) -> None:
        torch.set_num_threads(n)
        self.threads = n

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        row = (data, step, self.threads)
        if self.compiled_for is None or self.compiled_for != row:
            torch._dynamo.reset()  # else a function's code is compiled a few times only
            self.function, self.compiled_for = _compiled(data.case, step), row
        return {"torch.compile": self._run(data, buffers, step)}

    def _run(self, data: Data, b: Buffers, step: str) -> Run:
        function = self.function
        if step == "backward":
            back = Backward(data, b, True)
            arguments = _backward_arguments(back)
            returned = (back.out2 if data.case.adds else back.dy, back.out, *back.sums)

            def backward() -> Any:
                function(*arguments)
                return returned

            return Run(backward, back.answer)
        norm = BatchNorm(data, b, step == "forward")

        def call() -> Any:
            function(norm.x, norm.mean, norm.var, norm.weight, norm.bias, norm.residual, norm.out)
            return norm.out

        return Run(call, norm.answer)


def _compiled(case: Case, step: str) -> Function:
    made = _backward(case) if step == "backward" else _batch_norm(case, step == "forward")
    return torch.compile(made, dynamic=False, fullgraph=True)


def _batch_norm(case: Case, training: bool) -> Function:
    functions = {None: lambda z: z, "relu": torch.relu, "silu": torch.nn.functional.silu}
    activated, adds = functions[case.activation], case.adds

    def batch_norm(
        x: Any, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, out: Any
    ) -> None:
        z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
        out.copy_(activated(z + residual if adds else z))

    return batch_norm


def _backward_arguments(b: Backward) -> tuple[Any, ...]:
    """Return what autograd would give a compiled backward, and its outputs."""
    mean, inv_std = b.saved
    flat = b.y <= 0 if b.case.activation == "relu" else None
    return b.dy, b.x, b.weight, b.bias, mean, inv_std, flat, b.out, b.out2, *b.sums


def _backward(case: Case) -> Function:
    ops, activation, adds = torch.ops.aten, case.activation, case.adds

    def backward(
        dy: Any, x: Any, weight: Any, bias: Any, mean: Any, inv_std: Any, flat: Any,
        out: Any, out2: Any, sum_dyx: Any, sum_dy: Any,
    ) -> None:  # fmt: skip
        if activation == "relu":
            dy = torch.where(flat, 0.0, dy)
        elif activation == "silu":  # autograd's compiler also chooses to compute z again
            shape = (1, -1, *[1] * (x.ndim - 2))
            scale = inv_std * weight
            z = (x - mean.view(shape)) * scale.view(shape) + bias.view(shape)
            dy = ops.silu_backward(dy, z)
        found = ops.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inv_std, True, EPS, [True] * 3
        )
        for given, gradient in zip((out, sum_dyx, sum_dy), found, strict=True):
            given.copy_(gradient)
        if adds:
            out2.copy_(dy)

    return backward
