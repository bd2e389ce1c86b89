"""The results of a step of a model, plain and on bnfast, and what its batch norms became."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfast.torch
from bnfast.torch import _aten

FORMATS = {
    "contiguous": None,
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d},
}
MODES = {"training": True, "evaluation": False}
Outcome = dict[str, Tensor]
Totals = dict[str, dict[str, int]]


def laid_out(model: nn.Module, x: Tensor, form: str) -> tuple[nn.Module, Tensor]:
    """Return a copy of the model and the input in a memory format."""
    model, formats = copy.deepcopy(model), FORMATS[form]
    if formats is None:
        return model, x
    return model.to(memory_format=formats[x.dim()]), x.to(memory_format=formats[x.dim()])


# ---- The results of a step


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a forward's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif dataclasses.is_dataclass(output):
        yield from tensors(list(vars(output).values()))
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def weights(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))


def outcome(model: nn.Module, call: Any, x: Tensor) -> Outcome:
    """Outputs, gradients and buffers after a forward by `call`, and a backward."""
    torch.manual_seed(3)  # dropout drops the same values
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    all_ys = list(tensors(call(x)))
    ys = [y for y in all_ys if y.requires_grad]
    wanted = {"input": x} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    given = [weights(y) for y in ys]
    gradients = torch.autograd.grad(ys, list(wanted.values()), given, allow_unused=True)
    found = {f"output {k}": y.detach() for k, y in enumerate(all_ys)}
    found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    pairs = zip(wanted, gradients, strict=True)
    return found | {f"gradient of {name}": g for name, g in pairs if g is not None}


@torch.no_grad()
def outputs(call: Any, x: Tensor) -> Outcome:
    torch.manual_seed(3)
    return {f"output {k}": y for k, y in enumerate(tensors(call(x)))}


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def differences(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Return what differs by more than rounding, relative to the largest value.

    If gradients cancel, as those of a bias before a batch norm do, rounding is relative to the
    cancelling terms. The largest of all gradients stands for these. If there are only outputs, only
    outputs are compared.
    """
    if all(name.startswith("output") for name in found):
        expected = {name: y for name, y in expected.items() if name.startswith("output")}
    if not found or found.keys() != expected.keys():
        return dict.fromkeys(found.keys() ^ expected.keys() or {"everything"}, float("nan"))
    scale = max((largest(g) for name, g in expected.items() if name.startswith("g")), default=0.0)
    apart = {}
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            if not torch.equal(found[name], tensor):
                apart[name] = float("nan")
            continue
        floor = 1e-11 * scale if name.startswith("g") else 0.0
        off = largest(found[name] - tensor)
        if not off <= 1e-9 * largest(tensor) + floor:
            apart[name] = off / (largest(tensor) or 1.0)
    return apart


# ---- Plain PyTorch, and the ways with bnfast


class Counting(TorchDispatchMode):
    """Counts the batch norms that reach PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.native_batch_norm.default:
            self.calls["training" if args[5] else "evaluation"] += 1
        if function is torch.ops.aten.native_batch_norm_backward.default:
            self.calls["backward"] += 1
        return function(*args, **(kwargs or {}))


def counted(model: nn.Module, x: Tensor) -> Totals:
    """The batch norms of plain PyTorch's step, by mode."""
    found = {}
    for mode, training in MODES.items():
        model = copy.deepcopy(model).train(training)
        with Counting() as counting:
            outcome(model, model, x)
        found[mode] = dict(sorted(counting.calls.items()))
    return found


def plain(model: nn.Module, x: Tensor, training: bool) -> tuple[Outcome, None]:
    model = copy.deepcopy(model).train(training)
    return outcome(model, model, x), None


def enabled(model: nn.Module, x: Tensor, training: bool) -> tuple[Outcome, dict[str, int]]:
    """Return also what ran on bnfast; the rest is counted by its reason."""
    model = copy.deepcopy(model).train(training)
    with bnfast.torch.enabled():
        _aten.forget_counts()
        found = outcome(model, model, x)
        ran = bnfast.torch.report()
    return found, dict(sorted(ran.ran.items())) | ran.left


def backend(model: nn.Module, x: Tensor, training: bool) -> tuple[Outcome, dict[str, int]]:
    """Return also what batch norms became in the graphs. Evaluation is without gradients."""
    torch._dynamo.reset()
    model = copy.deepcopy(model).train(training)
    compiled = torch.compile(model, backend=bnfast.torch.backend)
    before = Counter(bnfast.torch.report().compiled)
    found = outcome(model, compiled, x) if training else outputs(compiled, x)
    return found, dict(sorted((Counter(bnfast.torch.report().compiled) - before).items()))


def frozen(model: nn.Module, x: Tensor, training: bool) -> tuple[Outcome, dict[str, int]]:
    """Return also how many batch norms were folded."""
    model = bnfast.torch.freeze(model)
    report = bnfast.torch.report(model)
    return outputs(model, x), {"folded": len(report.folded), "left": len(report.left)}


WAYS = {"enabled": enabled, "backend": backend, "frozen": frozen}
NEEDED = {"backend": "backend", "frozen": "freeze"}  # of bnfast.torch


def there() -> list[str]:
    """Return the ways that this bnfast has."""
    return [way for way in WAYS if hasattr(bnfast.torch, NEEDED.get(way, "enable"))]


def modes(way: str) -> dict[str, bool]:
    """Return the modes that a way is for."""
    return {"evaluation": False} if way == "frozen" else MODES
