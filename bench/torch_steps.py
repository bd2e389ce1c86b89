"""Whole training and evaluation steps of PyTorch models, plain and converted.

    python bench/torch_steps.py [--quick] [--json FILE] [--threads 2]

Both copies of a network run in turn on the same batch, medians of steps; then each one's step is
profiled for the share of batch norm, ReLU and addition. Batch norm stays a layer in evaluation:
nothing is folded.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from report import table
from timing import Progress
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch_networks import NETWORKS

import bnfast.torch
from bnfast import _core

TARGETS = {"train": 1.10, "eval": 1.08}  # times plain, of a converted ResNet-50
KERNELS = ("forward", "backward", "normalize")
PARTS = {
    "batch norm": re.compile(r"batch_?norm|bnfast", re.IGNORECASE),
    "relu": re.compile(r"relu|threshold|clamp|hardtanh", re.IGNORECASE),
    "add": re.compile(r"^aten::add_?$"),
}


def variants(network: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = NETWORKS[network]()
    return {"plain": plain, "converted": bnfast.torch.convert(copy.deepcopy(plain))}


def step_of(
    model: nn.Module, step: str, x: torch.Tensor, labels: torch.Tensor
) -> Callable[[], Any]:
    if step == "eval":
        return functools.partial(evaluate, model.eval(), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return functools.partial(train, model.train(), optimizer, x, labels)


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def train(model: nn.Module, optimizer: Any, x: torch.Tensor, labels: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def in_turn(steps: dict[str, Callable[[], Any]], rounds: int, budget: float) -> dict[str, list]:
    """Seconds of each step by name, one of each a round, until the rounds or the budget are up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    start = time.perf_counter()
    while len(times["plain"]) < rounds:
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - before)
        if time.perf_counter() - start > budget and len(times["plain"]) >= 3:
            break
    return times


def record_kernels() -> None:
    """Let the profiler see bnfast's calls, which are no operators of PyTorch's in eager mode."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with record_function("bnfast"):
                return function(*args, **options)

        return call

    for name in KERNELS:
        setattr(_core, name, recorded(getattr(_core, name)))


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Each part's share of the time that operators take."""
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        step()
    events = recording.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    return {
        part: sum(e.self_cpu_time_total for e in events if pattern.search(e.key)) / whole
        for part, pattern in PARTS.items()
    }


def prepared(network: str, step: str, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """A step of each variant of a network, on the same batch."""
    models = variants(network)
    x = torch.randn(options.batch, 3, options.size, options.size)
    if options.channels_last:
        x = x.to(memory_format=torch.channels_last)
        models = {n: m.to(memory_format=torch.channels_last) for n, m in models.items()}
    labels = torch.randint(0, 1000, (options.batch,))
    return {name: step_of(model, step, x, labels) for name, model in models.items()}


def measure(network: str, step: str, options: argparse.Namespace) -> dict[str, Any]:
    times = in_turn(prepared(network, step, options), options.rounds, options.budget)
    return {
        "network": network, "step": step, "threads": options.threads, "batch": options.batch,
        "size": options.size, "channels_last": options.channels_last, "times": times,
    }  # fmt: skip


def profiled(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name, step in prepared(row["network"], row["step"], options).items():
        step()
        found[name] = shares(step)
    return found


def lines(rows: list[dict[str, Any]]) -> list[str]:
    header = ["", "ms", "times plain", "target", *PARTS]
    cells = []
    for row in rows:
        medians = {name: statistics.median(t) for name, t in row["times"].items()}
        for name, seconds in medians.items():
            has_target = row["network"] == "resnet50" and name == "converted"
            parts = row["shares"][name].values()
            cells.append([
                f"{row['network']} {row['step']} {name}",
                f"{1e3 * seconds:.0f}",
                f"{medians['plain'] / seconds:.2f}",
                f">= {TARGETS[row['step']]:.2f}" if has_target else "",
                *(f"{100 * share:.1f}%" for share in parts),
            ])  # fmt: skip
    return table(header, cells, markdown=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--steps", nargs="+", choices=TARGETS, default=list(TARGETS))
    add("--batch", type=int, default=8)
    add("--size", type=int, default=224)
    add("--channels-last", action="store_true")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--rounds", type=int, default=30)
    add("--budget", type=float, default=120.0, help="seconds for a network's step")
    add("--quick", action="store_true", help="small images, few rounds")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds, options.batch = 64, 3, 2
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    plan = [(network, step) for network in options.networks for step in options.steps]
    progress = Progress([options.budget] * len(plan))
    rows = []
    for network, step in plan:
        progress.next(f"{network}, {step}")
        rows.append(measure(network, step, options))
    progress.end()
    record_kernels()
    for row in rows:
        row["shares"] = profiled(row, options)
    print("\n".join(lines(rows)))
    if options.json:
        results = {"machine": machine.describe(), "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
