"""Instructions of a call of a PyTorch layer, PyTorch's own and bnfast's, counted by valgrind.

    python -m bench.instructions.torch_calls [--shape 1x16x4x4]
    python -m bench.instructions.torch_calls --times [--shape 1x16x4x4]
    python -m bench.instructions.torch_calls --profile converted "eval, grad"

On small tensors the overhead of a call decides, and instruction counts vary less than seconds. All
calls are counted in one process, on one thread, after calls that warm up. `--times` prints
microseconds instead: each layer in a process of its own, all in turn and several times; the median
counts. "plain", "enabled" and "disabled" are PyTorch's own layer: with bnfast's kernels never
registered, with them on, and with them registered but off. `--profile` shows where the Python code
of one of them spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import bnfast.torch
from bench.harness.shapes import parse
from bench.instructions.valgrind import WARM_UP, check_installed, count, repeat
from bench.report.table import table

ROUNDS, SECONDS = 7, 0.3
LAYERS = ("plain", "enabled", "disabled", "converted")  # plain first: kernels stay registered
MODES = ("eval, no_grad", "eval, grad", "train, no_grad", "train", "train and backward")
PROGRAM = ("-m", "bench.instructions.torch_calls")


def call_of(layer: str, mode: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """Return the call that is counted."""
    norm = (torch.nn.BatchNorm1d if len(shape) < 4 else torch.nn.BatchNorm2d)(shape[1])
    if layer == "converted":
        bnfast.torch.convert(norm)
    if layer == "enabled":
        bnfast.torch.enable()
    if layer == "disabled":
        bnfast.torch.enable()
        bnfast.torch.disable()
    norm.train(mode.startswith("train"))
    x, dy = torch.randn(2, *shape)
    x.requires_grad_("backward" in mode)
    torch.set_grad_enabled("no_grad" not in mode)
    return (lambda: norm(x).backward(dy)) if "backward" in mode else lambda: norm(x)


def run(shape: tuple[int, ...]) -> None:
    """In the counted program: make the calls of each layer in each mode."""
    torch.set_num_threads(1)
    for layer in LAYERS:
        for mode in MODES:
            repeat(call_of(layer, mode, shape))


def names() -> list[str]:
    """Return the calls, in the order of `run`."""
    return [f"{layer}: {mode}" for layer in LAYERS for mode in MODES]


def counted(shape: str, **variables: str) -> list[float]:
    """Return the instructions of a call, in the order of `run`."""
    return count([*PROGRAM, "--run", "--shape", shape], len(LAYERS) * len(MODES), **variables)


def microseconds(layer: str, shape: tuple[int, ...]) -> None:
    """Print the microseconds of a call in each mode, the fastest of five runs."""
    torch.set_num_threads(1)
    gc.disable()
    for mode in MODES:
        call, found = call_of(layer, mode, shape), []
        for _ in range(WARM_UP):
            call()
        for _ in range(5):
            calls, start = 0, time.perf_counter()
            while time.perf_counter() < start + SECONDS / 5:
                for _ in range(20):
                    call()
                calls += 20
            found.append((time.perf_counter() - start) / calls)
        print(min(found) * 1e6)


def timed(shape: str) -> list[float]:
    """Return the microseconds of a call, in the order of `run`."""
    found = [
        [
            [float(line) for line in subprocess.run(
                [sys.executable, *PROGRAM, "--time", layer, "--shape", shape],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, text=True, check=True,
            ).stdout.split()]
            for layer in LAYERS
        ]
        for _ in range(ROUNDS)
    ]  # fmt: skip
    rounds = [[value for layer in layers for value in layer] for layers in found]
    return [statistics.median(values) for values in zip(*rounds, strict=True)]


def profile(layer: str, mode: str, shape: tuple[int, ...]) -> None:
    call = call_of(layer, mode, shape)
    call()
    with cProfile.Profile() as profiler:
        for _ in range(20_000):
            call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1x16x4x4")
    parser.add_argument("--profile", nargs=2, metavar=("LAYER", "MODE"))
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--time", choices=LAYERS, help=argparse.SUPPRESS)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = parse(options.shape)
    if options.run:
        run(shape)
    elif options.time:
        microseconds(options.time, shape)
    elif options.profile:
        profile(*options.profile, shape)
    else:
        if not options.times:
            check_installed()
        found = (timed if options.times else counted)(options.shape)
        columns = [found[i : i + len(MODES)] for i in range(0, len(found), len(MODES))]
        digits = 1 if options.times else 0
        rows = [
            [mode, *(f"{value:,.{digits}f} ({value / values[0]:.2f})" for value in values)]
            for mode, *values in zip(MODES, *columns, strict=True)
        ]
        what = "microseconds" if options.times else "instructions"
        print("\n".join(table([f"{what} a call (times plain)", *LAYERS], rows, markdown=False)))


if __name__ == "__main__":
    main()
