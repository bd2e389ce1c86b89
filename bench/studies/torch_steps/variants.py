"""Steps of a network in each variant, every variant in a process of its own.

Registered kernels stay registered, so "plain" needs a process in which bnfast's never were. The
processes live as long as the benchmark and take turns: only one of them computes at any time.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.studies.torch_steps.networks import NETWORKS

Step = Callable[[], Any]
Made = Callable[[nn.Module, Tensor], nn.Module]
# Operators only, not the nodes of autograd and graphs around them.
NORM = re.compile(r"^(aten|bnfast\w*)::.*(batch_?norm|bn_)|^bnfast", re.IGNORECASE)
POINTWISE = re.compile(
    r"^aten::(add_?|relu|sigmoid|tanh|silu|gelu|clamp|threshold|hardtanh|hardswish|leaky_relu)"
)
WARM = 2  # steps before any is timed
LONG = 20e-3  # seconds; a longer step is not run once untimed before each block
BLOCK = 5e-3  # seconds of a timed block, at least


@dataclass(frozen=True)
class Job:
    """What all variants do next."""

    network: str
    step: str
    channels_last: bool
    threads: int
    batch: int
    size: int


# ---- Variants


def plain(model: nn.Module, _: Tensor) -> nn.Module:
    return model


def converted(model: nn.Module, _: Tensor) -> nn.Module:
    import bnfast.torch

    return bnfast.torch.convert(model)


def backend(model: nn.Module, _: Tensor) -> nn.Module:
    import bnfast.torch

    return torch.compile(model, backend=bnfast.torch.backend)


def frozen(model: nn.Module, x: Tensor) -> nn.Module:
    import bnfast.torch

    return bnfast.torch.freeze(model, example=x)


def folded(model: nn.Module, _: Tensor) -> nn.Module:
    """What torch.fx folds, without bnfast."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def inductor(model: nn.Module, _: Tensor) -> nn.Module:
    return torch.compile(model)


# By name: how the model is made, and whether bnfast is enabled.
VARIANTS: dict[str, tuple[Made, bool]] = {
    "plain": (plain, False),
    "enabled": (plain, True),
    "converted": (converted, False),
    "backend": (backend, True),
    "frozen": (frozen, True),
    "fx": (folded, False),
    "inductor": (inductor, False),
    "inductor_enabled": (inductor, True),
}
EVALUATION_ONLY = ("frozen", "fx")
NEEDED = {"backend": "backend", "frozen": "freeze"}  # of bnfast.torch


# ---- Steps


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """Return the cross entropy; for outputs without classes (a detector's maps) the mean square."""
    if isinstance(output, Tensor):
        return nn.functional.cross_entropy(output, labels)
    return torch.stack([part.square().mean() for part in tensors(output)]).sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = loss_of(model(x), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def step_of(variant: str, job: Job) -> Step:
    network = NETWORKS[job.network]
    model, x = network.build(), network.input(job.batch, job.size)
    if job.channels_last:
        x = x.to(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    model.train(job.step == "train")
    model = VARIANTS[variant][0](model, x)
    if job.step == "eval":
        return functools.partial(evaluate, model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return functools.partial(train, model, optimizer, x, torch.randint(0, 10, (len(x),)))


# ---- What a process does


def block(step: Step, once: float) -> float:
    """Return the mean seconds of a step in one timed block."""
    if once < LONG:
        step()
    repeats = max(1, round(BLOCK / once))
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def parts(step: Step) -> dict[str, float]:
    """Return the operators' own seconds in a step: batch norm, additions and activations."""
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        step()
    found = dict.fromkeys(("norm", "norm backward", "pointwise"), 0.0)
    for event in recording.key_averages():
        seconds = event.self_cpu_time_total * 1e-6
        if NORM.search(event.key):
            found["norm backward" if "backward" in event.key else "norm"] += seconds
        elif POINTWISE.search(event.key):
            found["pointwise"] += seconds
    return found


def prepared(variant: str, job: Job) -> tuple[Step, float]:
    """Return a step that has run before, and its seconds."""
    torch._dynamo.reset()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    step = step_of(variant, job)
    for _ in range(WARM):
        step()
    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


class Worker:
    """Runs jobs for one variant."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.step: Step | None = None
        self.once = 0.0

    def do(self, what: Job | str) -> Any:
        if isinstance(what, Job):
            self.step = None  # free its memory first
            self.step, self.once = prepared(self.variant, what)
            return self.once
        if self.step is None:
            raise RuntimeError("there is no step")
        return parts(self.step) if what == "parts" else block(self.step, self.once)

    def answer(self, what: Job | str) -> Any:
        """Return the result, or a description of the exception."""
        try:
            return self.do(what)
        except Exception as error:  # noqa: BLE001 - reported to the parent
            message = str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {message:.150}"


def ready(variant: str) -> bool:
    """Enable bnfast if the variant wants it, and say whether what it needs is there."""
    name = NEEDED.get(variant)
    if name is None and not VARIANTS[variant][1]:
        return True
    import bnfast.torch

    if VARIANTS[variant][1]:
        bnfast.torch.enable()
    return name is None or hasattr(bnfast.torch, name)


def serve(variant: str, connection: Connection) -> None:
    worker = Worker(variant)
    connection.send(ready(variant))
    while (asked := connection.recv()) is not None:
        connection.send(worker.answer(asked))
