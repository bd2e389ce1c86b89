"""bnfast against PyTorch and a copy, interleaved in one run, outputs preallocated on both sides.

    pip install torch          # the CPU build; without it only the copy is compared with
    python bench/compare.py [--threads 2] [--rounds 30] [--shapes 32x256x56x56 4096x256]

Every round runs each contestant once, in turn, on warmed arrays; the medians are printed in
milliseconds, with how many times faster bnfast is.  Rounds in which the scheduler took a core
away are hidden by the median; how many took twice as long is printed at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import shapes

import bnfast

Call = Callable[[], Any]


class Arrays:
    """The data of one shape and layout, and outputs to write into."""

    def __init__(self, shape: tuple[int, ...], layout: str) -> None:
        memory, self.axis = shapes.in_layout(shape, layout)
        rng = np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal(memory, np.float32) for _ in range(2))
        channels = memory[self.axis]
        self.weight, self.bias = (rng.random(channels, np.float32) for _ in range(2))
        self.mean, self.var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.out = np.empty_like(self.x)


def ours(a: Arrays) -> dict[str, Call]:
    """Forward, backward and inference by bnfast."""
    parameters = (a.weight, a.bias)
    stats = bnfast.batch_norm_forward(a.x, *parameters, axis=a.axis)[1]

    def run(training: bool) -> Any:
        return bnfast.batch_norm(a.x, a.mean, a.var, *parameters, training, axis=a.axis, out=a.out)

    def backward() -> Any:
        return bnfast.batch_norm_backward(a.dy, a.x, stats, *parameters, axis=a.axis, out=a.out)

    return {"forward": lambda: run(True), "backward": backward, "inference": lambda: run(False)}


def torchs(a: Arrays) -> dict[str, Call]:
    """The same by PyTorch's own operators, in their preallocated forms."""
    import torch

    def tensor(array: Any) -> Any:
        view = torch.from_numpy(array)
        return view.movedim(a.axis, 1) if array.ndim > 1 else view

    x, dy, y, dx = (tensor(v) for v in (a.x, a.dy, np.empty_like(a.x), np.empty_like(a.x)))
    weight, bias, mean, var = (tensor(v.copy()) for v in (a.weight, a.bias, a.mean, a.var))
    saved, vectors = [torch.empty_like(mean) for _ in range(2)], [torch.empty_like(mean)] * 2
    none = torch.empty(0)
    backward_out = torch.ops.aten.native_batch_norm_backward.out

    def run(training: bool) -> Any:
        out = (y, *saved) if training else (y, none, none)
        return torch.native_batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5, out=out)

    def backward() -> Any:
        return backward_out(
            dy, x, weight, mean, var, *saved, True, 1e-5, [True] * 3,
            out0=dx, out1=vectors[0], out2=vectors[1],
        )  # fmt: skip

    return {"forward": lambda: run(True), "backward": backward, "inference": lambda: run(False)}


def interleaved(calls: list[Call], rounds: int) -> tuple[list[float], int]:
    """Median seconds of each call, run in turn, and how many rounds took twice the median."""
    for call in calls:
        call()
    taken = [[clocked(call) for call in calls] for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*taken, strict=True)]
    slow = sum(t > 2 * m for row in taken for t, m in zip(row, medians, strict=True))
    return medians, slow


def clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cell(us: float, peer: float | None) -> str:
    if peer is None:
        return f"{us * 1e3:9.3f}        "
    return f"{us * 1e3:9.3f} {peer / us:6.2f}x"


def compare(shape: tuple[int, ...], layout: str, rounds: int, with_torch: bool) -> tuple[str, int]:
    """One line of the table, and how many slow rounds it hides."""
    a = Arrays(shape, layout)
    contestants = [ours(a)] + ([torchs(a)] if with_torch else [])
    cells, slow = [], 0
    for step in contestants[0]:
        medians, stalls = interleaved([c[step] for c in contestants], rounds)
        cells.append(cell(medians[0], medians[1] if with_torch else None))
        slow += stalls
    copy = interleaved([lambda: np.copyto(a.out, a.x)], rounds)[0][0]
    label = f"{'x'.join(map(str, shape))} {layout}"
    return f"{label:<22}{'  '.join(cells)} {copy * 1e3:9.3f}", slow


def has_torch(threads: int) -> bool:
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed and is left out.", file=sys.stderr)
        return False
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return True


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=bnfast.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=shapes.ALL)
    options = parser.parse_args()
    with_torch = has_torch(options.threads)
    bnfast.set_num_threads(options.threads)
    bnfast.show_config()
    print("\nmilliseconds, and how many times faster than PyTorch; copy: numpy.copyto, one thread")
    steps = "  ".join(f"{step:>9}        " for step in ("forward", "backward", "inference"))
    print(f"{'':<22}{steps} {'copy':>9}")
    slow = 0
    for shape in options.shapes:
        for layout in ("nchw", "nhwc") if len(shape) > 2 else ("dense",):
            line, stalls = compare(shape, layout, options.rounds, with_torch)
            slow += stalls
            print(line, flush=True)
    print(f"{slow} calls took more than twice their median")


if __name__ == "__main__":
    main()
