"""Instructions of one call of a PyTorch layer, counted by valgrind: PyTorch's own and bnfast's.

    python bench/torch_calls.py [--shape 1x16x4x4]
    python bench/torch_calls.py --times [--shape 1x16x4x4]
    python bench/torch_calls.py --profile converted "eval, grad"

What a call costs apart from its arithmetic decides on small tensors, and instructions are the
same on every run where seconds are not. All are counted in one process, on one thread, after calls
that warm up. `--times` are microseconds instead: each layer's in a process of its own, all in turn
and that several times, of which the median counts. "enabled" and "disabled" are PyTorch's own layer
where bnfast's kernels are on, and registered but off; "plain" is where they never were. `--profile`
shows where the Python of one of them spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import table
from shapes import parse

import bnfast.torch

WARM_UP, CALLS = 50, 400
ROUNDS, SECONDS = 7, 0.3
LAYERS = ("plain", "enabled", "disabled", "converted")  # plain first: kernels stay registered
MODES = ("eval, no_grad", "eval, grad", "train, no_grad", "train", "train and backward")
# valgrind dumps what it has counted where this function of the C library is entered.
MARK, mark = "getppid", os.getppid


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
    """Make the calls, each layer's in each mode between two marks."""
    torch.set_num_threads(1)
    gc.disable()
    for layer in LAYERS:
        for mode in MODES:
            call = call_of(layer, mode, shape)
            for times in (WARM_UP, CALLS):
                for _ in range(times):
                    call()
                mark()


def counted(shape: str) -> list[float]:
    """Instructions of a call, in the order of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "valgrind", "--tool=callgrind", f"--dump-before={MARK}",
                f"--callgrind-out-file={folder}/counts",
                sys.executable, __file__, "--run", "--shape", shape,
            ],
            env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        dumps = [Path(f"{folder}/counts.{i + 1}") for i in range(2 * len(MODES) * len(LAYERS))]
        totals = [re.search(r"^totals: (\d+)", dump.read_text(), re.M) for dump in dumps]
    return [int(total[1]) / CALLS for total in totals[1::2] if total]


def microseconds(layer: str, shape: tuple[int, ...]) -> None:
    """Print how long a call takes in each mode, the fastest of five runs of it."""
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
    """Microseconds of a call, in the order of `run`."""
    found = [
        [
            [float(line) for line in subprocess.run(
                [sys.executable, __file__, "--time", layer, "--shape", shape],
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
    elif not options.times and not shutil.which("valgrind"):
        raise SystemExit("valgrind is not installed")
    else:
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
