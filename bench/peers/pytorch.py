"""PyTorch's own operators: with preallocated outputs, and as a user calls them.

On a CPU it fuses neither activation nor residual, so they follow in place, as in a model's code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.harness import compiled
from bench.harness.cases import EPS, Buffers, Data, Run, numpy_type

try:
    import torch
except ImportError as error:
    raise compiled.Missing("torch is not installed") from error


ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu_,
    "silu": lambda y: torch.nn.functional.silu(y, inplace=True),
}


class Torch:
    name = "torch"
    rest = 0.0
    version = torch.__version__

    def __init__(self) -> None:
        torch.set_grad_enabled(False)

    def set_threads(self, n: int) -> None:
        torch.set_num_threads(n)

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        kind = Backward if step == "backward" else BatchNorm
        made = kind(data, buffers, step == "forward")
        return {"torch": Run(made.given, made.answer), "torch default": Run(made.own, made.answer)}


def _tensor(array: np.ndarray) -> Any:
    """Return a tensor on the same memory; PyTorch cannot read ml_dtypes' bfloat16 directly."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_type("bfloat16"))
    return tensor.numpy()


class _Tensors:
    """The arrays of a case as tensors on the same memory: contiguous or channels_last."""

    def __init__(self, data: Data, b: Buffers, training: bool) -> None:
        self.case, self.training = data.case, training
        names = ("x", "dy", "residual", "y", "out", "out2")
        for name in names:
            setattr(self, name, _tensor(getattr(b, name)).movedim(self.case.axis, 1))
        self.sums = [torch.from_numpy(v) for v in (b.sum_dyx, b.sum_dy)]
        vectors = (data.weight, data.bias, data.mean, data.var)
        self.weight, self.bias, self.mean, self.var = (torch.from_numpy(v.copy()) for v in vectors)

    def in_memory_order(self, tensor: Any) -> np.ndarray:
        return _array(tensor.movedim(1, self.case.axis))


class BatchNorm(_Tensors):
    def __init__(self, data: Data, b: Buffers, training: bool) -> None:
        super().__init__(data, b, training)
        size = self.case.channels if training else 0
        self.saved = [torch.empty(size, dtype=self.weight.dtype) for _ in range(2)]

    def _finish(self, y: Any) -> Any:
        if self.case.adds:
            y.add_(self.residual)
        return ACTIVATIONS[self.case.activation](y)

    def given(self) -> Any:
        torch.native_batch_norm(
            self.x, self.weight, self.bias, self.mean, self.var, self.training, 0.1, EPS,
            out=(self.out, *self.saved),
        )  # fmt: skip
        return self._finish(self.out)

    def own(self) -> Any:
        y = torch.nn.functional.batch_norm(
            self.x, self.mean, self.var, self.weight, self.bias, self.training, 0.1, EPS
        )
        return self._finish(y)

    def answer(self, y: Any) -> list[np.ndarray]:
        return [self.in_memory_order(y)]


class Backward(_Tensors):
    def __init__(self, data: Data, b: Buffers, training: bool) -> None:
        super().__init__(data, b, training)
        forward = torch.native_batch_norm(
            self.x, self.weight, self.bias, None, None, True, 0.1, EPS
        )
        self.z, *self.saved = forward

    def _arguments(self, dy: Any) -> tuple[Any, ...]:
        return dy, self.x, self.weight, self.mean, self.var, *self.saved, True, EPS, [True] * 3

    def given(self) -> Any:
        dy, ops = self.dy, torch.ops.aten
        if self.case.activation == "relu":
            dy = ops.threshold_backward.grad_input(dy, self.y, 0, grad_input=self.out2)
        elif self.case.activation == "silu":
            dy = ops.silu_backward.grad_input(dy, self.z, grad_input=self.out2)
        ops.native_batch_norm_backward.out(
            *self._arguments(dy), out0=self.out, out1=self.sums[0], out2=self.sums[1]
        )
        return dy, self.out, *self.sums

    def own(self) -> Any:
        dy, ops = self.dy, torch.ops.aten
        if self.case.activation == "relu":
            dy = ops.threshold_backward(dy, self.y, 0)
        elif self.case.activation == "silu":
            dy = ops.silu_backward(dy, self.z)
        return dy, *ops.native_batch_norm_backward(*self._arguments(dy))

    def answer(self, returned: Any) -> list[np.ndarray]:
        dy, dx, *sums = returned
        tensors = [dx, dy] if self.case.adds else [dx]
        first, *rest = (self.in_memory_order(t) for t in tensors)
        return [first, *(s.numpy() for s in sums), *rest]
