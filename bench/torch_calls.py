"""Instructions of one call of a PyTorch layer, counted by valgrind: PyTorch's own and bnfast's.

    python bench/torch_calls.py [--shape 1x16x4x4] [--profile converted train]

What a call costs apart from its arithmetic decides on small tensors, and instructions are the
same on every run where seconds are not. Each count is the difference of a run with many calls and
one with few, on one thread. `--profile` shows where the Python of one of them spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from report import table
from shapes import parse

CALLS = (500, 2500)
LAYERS = ("plain", "converted")
MODES = ("eval, no_grad", "eval, grad", "train, no_grad", "train", "train and backward")


def call_of(layer: str, mode: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """Return the call that is counted."""
    norm: torch.nn.Module = torch.nn.BatchNorm2d(shape[1])
    if layer == "converted":
        import bnfast.torch

        norm = bnfast.torch.convert(norm)
    norm.train(mode.startswith("train"))
    x = torch.randn(shape)
    dy = torch.randn(shape)
    torch.set_grad_enabled("no_grad" not in mode)
    return (lambda: norm(x).backward(dy)) if "backward" in mode else lambda: norm(x)


def run(layer: str, mode: str, shape: tuple[int, ...], times: int) -> None:
    torch.set_num_threads(1)
    call = call_of(layer, mode, shape)
    for _ in range(times):
        call()


def instructions(layer: str, mode: str, shape: str, times: int) -> int:
    done = subprocess.run(
        [
            "valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
            sys.executable, __file__, "--run", layer, mode, str(times), "--shape", shape,
        ],
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    counted = re.search(r"I +refs: +([\d,]+)", done.stderr)
    assert counted
    return int(counted[1].replace(",", ""))


def per_call(layer: str, mode: str, shape: str) -> float:
    print(f"counting {layer}, {mode}", file=sys.stderr, flush=True)
    few, many = (instructions(layer, mode, shape, times) for times in CALLS)
    return (many - few) / (CALLS[1] - CALLS[0])


def profile(layer: str, mode: str, shape: tuple[int, ...]) -> None:
    call = call_of(layer, mode, shape)
    call()
    with cProfile.Profile() as profiler:
        for _ in range(20_000):
            call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def compare(modes: list[str], shape: str) -> None:
    rows = []
    for mode in modes:
        plain, converted = (per_call(layer, mode, shape) for layer in LAYERS)
        rows.append([mode, f"{plain:,.0f}", f"{converted:,.0f}", f"{converted / plain:.2f}"])
    print("\n".join(table(["instructions a call", *LAYERS, "ratio"], rows, markdown=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1x16x4x4")
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--profile", nargs=2, metavar=("LAYER", "MODE"))
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = parse(options.shape)
    if options.run:
        layer, mode, times = options.run
        run(layer, mode, shape, int(times))
    elif options.profile:
        profile(*options.profile, shape)
    elif not shutil.which("valgrind"):
        raise SystemExit("valgrind is not installed")
    else:
        compare(options.modes, options.shape)


if __name__ == "__main__":
    main()
