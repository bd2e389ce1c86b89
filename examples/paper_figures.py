"""The figures of `paper.py`, drawn from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = {"plain": "#c8500a", "normalized": "#0b6aa8"}
LABELS = {"plain": "plain", "normalized": "batch normalized"}
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")


def trained_on(results: dict[str, Any]) -> str:
    """Half a title: the data and the network."""
    return f"{results['data']}, three layers of 100 sigmoids, batches of 60"


def seeds(results: dict[str, Any]) -> str:
    """The number of seeds, in words."""
    return "one seed" if results["seeds"] == 1 else f"{results['seeds']} seeds, mean and range"


def accuracy(results: dict[str, Any]) -> Figure:
    """Test accuracy against steps: the whole curve, and a close view of its last part."""
    figure, (whole, close) = plt.subplots(1, 2, figsize=(11, 5.2))
    steps = results["every"] * np.arange(1, 1 + len(results["best"]["plain"]["curves"][0]))
    for name, color in COLORS.items():
        best = results["best"][name]
        curves = 100 * np.array(best["curves"])
        label = f"{LABELS[name]}, at its best learning rate, {best['rate']:g}"
        for axes in (whole, close):
            axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.2, lw=0)
            axes.plot(steps, curves.mean(axis=0), color=color, lw=1.2, label=label)
    for row in results["speedup"]:
        target = 100 * row["target"]
        close.plot([row["normalized"], row["plain"]], [target, target], "k:", lw=1.2, zorder=3)
        for name, color in COLORS.items():
            close.plot(
                row[name], target, "o", color=color, mec="white", ms=9, zorder=4, clip_on=False
            )
    whole.set(title="The whole training", ylabel="test accuracy (%)", ylim=(0, 100))
    close.set(
        title="Close up. Dots: first test at the plain network's best,\n"
        f"a seed each; normalized in {results['median_ratio']:.0%} of the steps (median)",
        ylim=(100 * results["milestone"] - 5, 100),
    )
    for axes in (whole, close):
        axes.set(xscale="log", xlabel="training steps (log scale)", xlim=(steps[0], steps[-1]))
        axes.xaxis.set_major_formatter(THOUSANDS)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Test accuracy of {seeds(results)}\n{trained_on(results)}")
    return figure


def percentiles(results: dict[str, Any]) -> Figure:
    """The paper's figure 1 (b, c): the distribution of one sigmoid's input."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for axes, (name, color) in zip(both, COLORS.items(), strict=True):
        watched = results["percentiles"][name]
        values = np.array(watched["values"])
        steps = results["every"] * np.arange(1, 1 + len(values))
        axes.fill_between(steps, values[:, 0], values[:, 2], color=color, alpha=0.12, lw=0)
        for column, label in enumerate(("15th", "50th", "85th")):
            axes.plot(steps, values[:, column], color=color, lw=2 if column == 1 else 1)
            axes.annotate(
                label,
                (steps[-1], values[-len(values) // 20 :, column].mean()),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=color,
                annotation_clip=False,
            )
        axes.set(
            title=f"{LABELS[name]} (unit {watched['unit']} of layer 3, the median spread)",
            xlabel="training steps",
            xlim=(0, steps[-1]),
        )
        axes.xaxis.set_major_formatter(THOUSANDS)
    both[0].set_ylabel("input of the sigmoid")
    figure.suptitle(
        "15th, 50th and 85th percentile of a typical hidden unit's input over the test images\n"
        f"{trained_on(results)}, seed {results['watched_seed']}"
    )
    return figure


def learning_rates(results: dict[str, Any]) -> Figure:
    """The grid: how accurate and how fast each network is at each rate."""
    figure, (well, soon) = plt.subplots(1, 2, figsize=(11, 5.2))
    for name, color in COLORS.items():
        rows = [row for row in results["grid"] if row["network"] == name]
        best = results["best"][name]
        for axes, key, scale in ((well, "mean", 100), (soon, "milestone", 1)):
            # Not a number if some seed never reached the target, so that no point is drawn.
            points = {r["rate"]: scale * r[key] if np.isfinite(r[key]) else np.nan for r in rows}
            axes.plot(list(points), list(points.values()), "o-", color=color, label=LABELS[name])
            axes.plot(
                best["rate"], points[best["rate"]], "*", color=color, ms=17, mec="white", zorder=3
            )
    well.set(
        title="How well: accuracy averaged over the run\n(star: the network's best rate)",
        ylabel="test accuracy (%)",
        ylim=(0, 100),
    )
    soon.set(
        title=f"How soon: steps to {results['milestone']:.0%} accuracy\n"
        "(no point: not every seed got there)",
        ylabel="training steps (log scale)",
        yscale="log",
    )
    soon.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    soon.yaxis.set_major_formatter(THOUSANDS)
    soon.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*well.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axes in (well, soon):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate (log scale)")
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    figure.suptitle(
        f"The grid of learning rates: {results['steps']:,} steps, mean over the seeds\n"
        f"{trained_on(results)}"
    )
    return figure


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Write every figure and return the files."""
    paths = []
    with plt.rc_context(STYLE):
        for function in (accuracy, percentiles, learning_rates):
            figure = function(results)
            paths.append(out / f"{function.__name__}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths
