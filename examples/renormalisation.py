"""Batch renormalization: a network that learns from four images at a time.

Ioffe, *Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models*
(2017, arXiv:1702.03275). In training, batch norm normalises an image by the other images of its
batch, in evaluation by the running statistics. In small batches the two differ much, and most where
the images of a batch are alike. Renormalization trains with what evaluation uses, within limits
that a schedule opens step by step.

The network is that of `paper.py`: three layers of 100 sigmoids. It learns scikit-learn's digits
from batches of four, drawn in two ways: any four images, or two images of each of two digits.

    python examples/renormalisation.py         # demo-output/renormalisation.png: half a minute
    python examples/renormalisation.py --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from digits import Data, Floats, Integers, load_data
from paper import HIDDEN, Network, accuracy_of, final, workers

import bnfast

BATCH = 4
RATE = 0.125  # of 0.06 to 1.0, at each of which renormalization was ahead
MOMENTUM = 0.01
TESTS = 50
KINDS = {"any": "any four images", "alike": "two images of each of two digits"}
NORMS = {"batch": "batch norm", "renormalised": "batch renormalization"}


# ------------------------------------------------------------ the training


def limits(step: int, steps: int) -> tuple[float, float]:
    """Return rmax and dmax: 1 and 0, as in batch norm, then opened to 3 and 5, as in the paper."""
    part = step / steps
    rmax = np.interp(part, [0.05, 0.4], [1, 3])
    dmax = np.interp(part, [0.05, 0.25], [0, 5])
    return float(rmax), float(dmax)


def batches(labels: Integers, kind: str, rng: np.random.Generator) -> Iterator[Integers]:
    """Yield batches of indices forever."""
    of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    while True:
        if kind == "any":
            yield rng.choice(len(labels), BATCH, replace=False)
        else:
            two = rng.choice(10, 2, replace=False)
            yield np.concatenate([rng.choice(of_digit[k], 2, replace=False) for k in two])


def made(norm: str, data: Data, seed: int) -> Network:
    """Return the network with either kind of normalization; a seed gives both the same weights."""
    network = Network((data.train.shape[1], *HIDDEN, 10), True, np.random.default_rng([seed, 0]))
    kind = bnfast.BatchNorm if norm == "batch" else bnfast.BatchRenorm
    network.norms = [kind(units, momentum=MOMENTUM) for units in HIDDEN]
    return network


def train(norm: str, kind: str, seed: int, steps: int) -> Floats:
    """Train one network; return its accuracies on the test images, in evaluation mode."""
    data = load_data()
    network = made(norm, data, seed)
    drawn = batches(data.train_labels, kind, np.random.default_rng([seed, 1]))
    accuracies = []
    for step in range(1, steps + 1):
        if norm == "renormalised":
            for layer in network.norms:
                layer.rmax, layer.dmax = limits(step, steps)
        batch = next(drawn)
        network.backward(network.forward(data.train[batch]), data.train_labels[batch])
        network.step(RATE)
        if step % (steps // TESTS) == 0:
            network.train(False)
            accuracies.append(accuracy_of(network.forward(data.test), data.test_labels))
            network.train()
    return np.array(accuracies)


# -------------------------------------------------------------- the report


def report(curves: dict[str, dict[str, Floats]], steps: int) -> None:
    """Print the accuracy at the end, for each seed."""
    seeds = len(next(iter(curves["any"].values())))
    print(f"Test accuracy after {steps:,} steps, in evaluation mode, by seed\n")
    for kind, title in KINDS.items():
        print(f"batches of {title}")
        for norm, name in NORMS.items():
            ends = [final(curve) for curve in curves[kind][norm]]
            cells = "".join(f"{end:>8.1%}" for end in ends)
            mean = f"{np.mean(ends):>10.1%} mean" if seeds > 1 else ""
            print(f"  {name:24}{cells}{mean}")


def draw(curves: dict[str, dict[str, Floats]], steps: int, path: Path) -> None:
    """Draw accuracy against steps, mean and range of the seeds."""
    from paper_figures import COLORS, STYLE, THOUSANDS, plt

    colors = dict(zip(NORMS, COLORS.values(), strict=True))
    tested = steps // TESTS * np.arange(1, TESTS + 1)
    with plt.rc_context(STYLE):
        figure, both = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True)
        for axes, (kind, title) in zip(both, KINDS.items(), strict=True):
            for norm, name in NORMS.items():
                found = 100 * np.array(curves[kind][norm])
                style = {"color": colors[norm], "lw": 1.5, "label": name}
                axes.fill_between(
                    tested, found.min(0), found.max(0), color=colors[norm], alpha=0.2, lw=0
                )
                axes.plot(tested, found.mean(axis=0), **style)
            axes.set(title=f"Batches of {title}", xlabel="training steps", xlim=(0, steps))
            axes.set_xticks(np.linspace(0, steps, 4))
            axes.xaxis.set_major_formatter(THOUSANDS)
        both[0].set(ylabel="test accuracy in evaluation mode (%)", ylim=(60, 100))
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        seeds = len(curves["any"]["batch"])
        figure.suptitle(
            f"Learning digits from four images at a time: {seeds} seeds, mean and range"
        )
        figure.savefig(path)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Train, print and draw; the exit status says whether renormalization helped."""
    parser = argparse.ArgumentParser(description="Batch renormalization at batches of four.")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR")
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    options = parser.parse_args(arguments)
    steps, seeds = (1000, 1) if options.quick else (3000, 4)

    with workers() as pool:
        trained = {
            (kind, norm): [pool.submit(train, norm, kind, seed, steps) for seed in range(seeds)]
            for kind in KINDS
            for norm in NORMS
        }
        curves: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for (kind, norm), runs in trained.items():
            curves[kind][norm] = [run.result() for run in runs]
    report(curves, steps)
    if not options.no_figures:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(curves, steps, options.out / "renormalisation.png")
        print(f"\nwritten: {options.out / 'renormalisation.png'}")

    ends = {norm: np.mean([final(curve) for curve in curves["alike"][norm]]) for norm in NORMS}
    return 0 if ends["renormalised"] > ends["batch"] else 1


if __name__ == "__main__":
    sys.exit(main())
