"""Ghost batches: the rows of a large batch, normalised a few hundred at a time.

A batch norm regularises by the noise of its batch's statistics, and large batches have little of
it. Ghost batches (Hoffer, Hubara and Soudry 2017, *Train longer, generalize better*) bring it back:
runs of rows are normalised each by their own statistics. TabNet (Arik and Pfister 2019) does so in
all of its layers, by a loop over slices. `virtual_batch_size=` is the same in one call.

    python examples/ghost_batches.py
    python examples/ghost_batches.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

import bnfast

ROWS, FEATURES = 16384, 64
SIZES = (128, 256, 1024)
ROUNDS = 15

Results = dict[str, np.ndarray]


def one_call(layer: bnfast.BatchNorm, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """Forward and backward of a layer with a `virtual_batch_size`."""
    return layer(x), layer.backward(dy)


def move_running(layer: bnfast.BatchNorm, stats: bnfast.BatchStats) -> None:
    """Move a layer's running statistics towards those of a batch."""
    unbiased = stats.var * (stats.count / (stats.count - 1))
    layer.running_mean += layer.momentum * (stats.mean - layer.running_mean)
    layer.running_var += layer.momentum * (unbiased - layer.running_var)
    layer.num_batches_tracked += 1


def python_loop(
    layer: bnfast.BatchNorm, x: np.ndarray, dy: np.ndarray, size: int
) -> tuple[np.ndarray, ...]:
    """The same by a loop over slices, each a batch of its own."""
    y, dx, kept = np.empty_like(x), np.empty_like(x), []
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        _, stats = bnfast.batch_norm_forward(x[rows], layer.weight, layer.bias, out=y[rows])
        move_running(layer, stats)
        kept.append((rows, stats))
    for rows, stats in kept:
        gradients = bnfast.batch_norm_backward(
            dy[rows], x[rows], stats, layer.weight, layer.bias, out=dx[rows]
        )
        layer.weight_grad += gradients.weight
        layer.bias_grad += gradients.bias
    return y, dx


def results(layer: bnfast.BatchNorm, y: np.ndarray, dx: np.ndarray) -> Results:
    """All that a training step leaves behind."""
    names = ("weight_grad", "bias_grad", "running_mean", "running_var", "num_batches_tracked")
    return {"y": y, "dx": dx, **{name: getattr(layer, name).copy() for name in names}}


def difference(one: Results, other: Results) -> float:
    """The largest difference of two steps' results, each as a part of the largest value."""
    return max(float(np.max(abs(one[name] - a)) / np.max(abs(a))) for name, a in other.items())


def seconds(ways: dict[str, object], rounds: int) -> dict[str, float]:
    """The median time of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main(arguments: list[str] | None = None) -> int:
    """Compare results and times; the exit status says whether the results are the same."""
    parser = argparse.ArgumentParser(description="Ghost batches in one call, beside a loop.")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    options = parser.parse_args(arguments)
    rows, rounds = (2048, 3) if options.quick else (ROWS, ROUNDS)

    rng = np.random.default_rng(0)
    # Rows that drift, so that no run has the statistics of another.
    x = rng.normal(np.linspace(0, 3, rows)[:, None], 1, (rows, FEATURES)).astype(np.float32)
    dy = rng.standard_normal((rows, FEATURES), np.float32)
    whole = bnfast.BatchNorm1d(FEATURES)
    print(f"A batch of {rows:,} rows of {FEATURES} features, forward and backward, milliseconds;")
    print("largest difference of outputs, gradients, running statistics: relative to the largest\n")
    titles = ("rows a run", "runs", "one call", "a loop", "loop/call", "difference")
    print("".join(f"{title:>12}" for title in titles))
    worst = 0.0
    for size in SIZES:
        layer = bnfast.BatchNorm1d(FEATURES, momentum=0.02, virtual_batch_size=size)
        other = bnfast.BatchNorm1d(FEATURES, momentum=0.02)
        found = difference(
            results(layer, *one_call(layer, x, dy)),
            results(other, *python_loop(other, x, dy, size)),
        )
        worst = max(worst, found)
        ways = {
            "call": lambda layer=layer: one_call(layer, x, dy),
            "loop": lambda other=other, size=size: python_loop(other, x, dy, size),
        }
        took = seconds(ways, rounds)
        runs = -(-rows // size)
        print(
            f"{size:>12}{runs:>12}{1e3 * took['call']:>12.2f}{1e3 * took['loop']:>12.2f}"
            f"{took['loop'] / took['call']:>12.1f}{found:>12.1e}"
        )
    took = seconds({"call": lambda: one_call(whole, x, dy)}, rounds)
    print(f"{'all':>12}{1:>12}{1e3 * took['call']:>12.2f}")

    # Running statistics are float32, and rounded once for each run.
    return 0 if worst < 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
