"""Why the gradient has to go through the mean: the counterexample of the paper's section 2.

A layer adds a learned bias b to its input u. The result, x = u + b, is normalized by
its batch. No b changes the output, because the mean removes it again. A gradient that
treats the mean as a constant does not know this. It moves b by the same amount in each
step, forever, while output and loss do not change.

    python examples/moving_target.py           # demo-output/moving_target.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import bnfast

STEPS = 1000
RATE = 1.0
SHOWN = (0, 1, 10, 100, 1000)


def descend(u: np.ndarray, target: np.ndarray, through_statistics: bool) -> dict[str, np.ndarray]:
    """Descend on b alone; return b, the loss and the output's largest change at every step."""
    b, first = 0.0, None
    history = []
    for _ in range(STEPS + 1):
        x = u + b
        y, stats = bnfast.batch_norm_forward(x)
        first = y if first is None else first
        error = y - target
        history.append((b, np.mean(error**2) / 2, np.max(abs(y - first))))
        if not through_statistics:
            stats = bnfast.BatchStats.from_population(stats.mean, stats.var)
        gradient = bnfast.batch_norm_backward(error / len(u), x, stats, needs=("x",)).x
        b -= RATE * float(gradient.sum())
    return dict(zip(("b", "loss", "change"), np.array(history).T, strict=True))


def draw(ways: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draw the bias and the loss over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (bias, loss) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", dpi=150)
    styles = ({"color": "#c8500a", "lw": 4}, {"color": "#0b6aa8", "lw": 2})
    for (name, way), style in zip(ways.items(), styles, strict=True):
        bias.plot(way["b"], label=f"the gradient {name}", **style)
        loss.plot(way["loss"], **style)
    bias.set(title="The bias", ylabel="b")
    bias.yaxis.set_major_formatter("{x:,.0f}")
    loss.set(title="The loss: the same, and still", ylabel="mean squared error / 2")
    loss.set_ylim(0, 1.5 * ways[next(iter(ways))]["loss"].max())
    for axes in (bias, loss):
        axes.set(xlabel="training steps", xlim=(0, STEPS))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color="#e3e3e3")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("A bias before batch normalization, learned by gradient descent")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Print and draw both descents; the exit status says whether they behave as in the paper."""
    parser = argparse.ArgumentParser(description="The counterexample of the paper's section 2.")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR")
    parser.add_argument("--no-figures", action="store_true")
    options = parser.parse_args(arguments)

    rng = np.random.default_rng(0)
    u = rng.normal(size=(60, 1))
    target = u + 1
    ways = {
        "that ignores the mean": descend(u, target, through_statistics=False),
        "through the statistics": descend(u, target, through_statistics=True),
    }
    for name, way in ways.items():
        print(f"\nThe gradient {name}")
        print(f"{'step':>8}{'b':>14}{'loss':>12}{'change of the output':>24}")
        for step in SHOWN:
            print(
                f"{step:>8,}{way['b'][step]:>14.4g}{way['loss'][step]:>12.6f}"
                f"{way['change'][step]:>24.1e}"
            )
    if not options.no_figures:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(ways, options.out / "moving_target.png")
        print(f"\nwritten: {options.out / 'moving_target.png'}")

    ignoring, through = ways.values()
    grows = abs(ignoring["b"][-1]) > 0.99 * STEPS * abs(ignoring["b"][1]) > 1
    still = max(way["change"].max() for way in ways.values()) < 1e-9
    return 0 if grows and still and abs(through["b"]).max() < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())
