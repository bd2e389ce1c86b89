"""The pictures of the pages, drawn when these are built.

python docs/figures.py [folder]
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import bnfast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import paper_line_by_line  # one of the examples

OURS, READ, WRITE, QUIET = "#D55E00", "#0072B2", "#56B4E9", "#dddddd"
SETTINGS = {
    "svg.hashsalt": "bnfast",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def traffic():
    """How often the bytes of x cross to and from memory in a training step.

    NumPy is counted operation by operation: an elementwise one reads and writes an array, a sum
    reads one. `x.var` is a sum, a difference, a square and a sum; the rest of the forward is
    (x - mean) * scale + bias. The passes of a backward are: sum of dy; sum of dy times the
    normalised x; the gradient.
    """
    rows = [
        ("NumPy, forward", 1 + 4 + 3, 2 + 3),
        ("one pass a statistic, forward", 3, 1),
        ("bnfast, forward", 1, 1),
        ("one pass a sum, backward", 1 + 2 + 2, 1),
        ("bnfast, backward", 2, 1),
    ]
    figure, axis = plt.subplots(figsize=(7.2, 2.6))
    for y, (name, reads, writes) in enumerate(rows):
        axis.barh(y, reads, color=READ, label="read" if y == 0 else None)
        axis.barh(y, writes, left=reads, color=WRITE, label="written" if y == 0 else None)
        weight = "bold" if name.startswith("bnfast") else "normal"
        axis.annotate(
            f"{reads + writes}", (reads + writes, y), (4, 0), textcoords="offset points",
            va="center", weight=weight,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("arrays of x's size through memory")
    axis.legend(frameon=False, loc="lower right")
    return figure


def groups():
    """A group of channels of an NCHW array: one run per image, and small enough for the cache."""
    figure, axis = plt.subplots(figsize=(7.2, 3.0))
    images, channels, first, last = 4, 12, 3, 6
    for n in range(images):
        for c in range(channels):
            colour = OURS if first <= c < last else QUIET
            axis.add_patch(Rectangle((c, -1.15 * n), 0.92, 0.9, facecolor=colour))
        axis.text(-0.25, -1.15 * n + 0.45, f"image {n}", ha="right", va="center")
    axis.text(channels / 2, 1.15, "channels, each a plane of H x W values", ha="center")
    axis.add_patch(
        FancyBboxPatch((14.2, -2.65), 3.2, 2.6, boxstyle="round,pad=0.15", facecolor="#fff3ea",
                       edgecolor=OURS)
    )  # fmt: skip
    axis.text(15.8, -1.35, "a group\nin the cache", ha="center", va="center")
    arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "color": "#444444"}
    axis.add_patch(FancyArrowPatch((last + 0.1, 0.5), (14.1, -0.6), **arrow))
    axis.text(12.4, 0.62, "1. read: sums", ha="left", va="center")
    axis.add_patch(FancyArrowPatch((14.1, -2.3), (last + 0.1, -3.2), **arrow))
    axis.text(12.4, -3.35, "2. normalise, written", ha="left", va="center")
    axis.set_xlim(-2.2, 18)
    axis.set_ylim(-3.9, 1.6)
    axis.set_axis_off()
    return figure


def digits():
    """The correct digits of a variance as the mean moves away, computed here in three ways."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((1 << 14, 1))
    ratios = np.logspace(0, 7, 29)
    errors = {"E[x²] - E[x]², float32": [], "E[x²] - E[x]², float64": [], "about a value of x": []}
    for ratio in ratios:
        x = (ratio + normal).astype(np.float32)
        exact = x.astype(np.longdouble).var()
        wide = x.astype(np.float64)
        for name, var in zip(
            errors,
            (
                (x * x).mean() - x.mean() ** 2,
                (wide * wide).mean() - wide.mean() ** 2,
                bnfast.moments(x).var()[0],
            ),
            strict=True,
        ):
            errors[name].append(max(abs(float((var - exact) / exact)), 1e-17))
    figure, axis = plt.subplots(figsize=(7.2, 3.2))
    for (name, values), colour in zip(errors.items(), ("#000000", "#999999", OURS), strict=True):
        axis.loglog(ratios, values, color=colour, linewidth=1.8)
        axis.annotate(
            name, (ratios[-1], values[-1]), (4, 0), textcoords="offset points",
            va="center", color=colour, annotation_clip=False,
        )  # fmt: skip
    axis.axhline(1, color="#bbbbbb", linewidth=1, linestyle=":")
    axis.set_xlabel("mean over standard deviation")
    axis.set_ylabel("relative error of the variance")
    axis.set_ylim(1e-18, 1e8)
    return figure


def tree():
    """Blocks and the fixed tree that merges them."""
    figure, axis = plt.subplots(figsize=(7.2, 2.9))
    count = 7
    xs = {(0, i): i for i in range(count)}
    for i in range(count):
        axis.add_patch(Rectangle((i - 0.42, -0.32), 0.84, 0.55, facecolor=QUIET))
        axis.text(i, -0.05, f"block {i}", ha="center", va="center", fontsize=9)
    level, width = 0, count
    while width > 1:
        for i in range((width + 1) // 2):
            children = [xs[level, j] for j in (2 * i, 2 * i + 1) if j < width]
            x = xs[level + 1, i] = sum(children) / len(children)
            y = 0.95 * (level + 1)
            for child in children:
                bottom = 0.95 * level + (0.23 if level == 0 else 0.06)
                axis.plot([child, x], [bottom, y - 0.06], color="#777777", linewidth=1)
            axis.plot(x, y, "o", color=OURS if len(children) > 1 else "#bbbbbb", markersize=8)
        level, width = level + 1, (width + 1) // 2
    axis.text(xs[level, 0] + 0.2, 0.95 * level + 0.08, "(count, mean, M2) of the batch")
    axis.text(-0.55, 1.1, "each a merge", ha="right", color=OURS)
    axis.text(-0.55, -0.05, "each by some thread", ha="right", va="center", color="#555555")
    axis.set_xlim(-2.6, count)
    axis.set_ylim(-0.45, 0.95 * level + 0.4)
    axis.set_axis_off()
    return figure


def cells(axis, shares, colours, labels=None):
    """Draw an array's rows, one cell per value; hatched where a share is 0."""
    rows, columns = np.shape(shares)
    for n in range(rows):
        for i in range(columns):
            share = shares[n][i]
            style = {"facecolor": colours[n], "alpha": 0.15 + 0.65 * share, "edgecolor": "none"}
            if share == 0:
                style = {"facecolor": "white", "edgecolor": "#bbbbbb", "hatch": "////", "lw": 0}
            axis.add_patch(Rectangle((i, -n), 0.92, 0.86, **style))
        if labels:
            axis.text(-0.3, -n + 0.43, labels[n], ha="right", va="center")


def brace(axis, x, top, bottom, text, colour):
    """Draw a bracket from one row to another, and what its values have in common."""
    axis.plot([x, x + 0.25, x + 0.25, x], [top, top, bottom, bottom], color=colour, linewidth=1.6)
    axis.text(x + 0.6, (top + bottom) / 2, text, va="center", color=colour)


def plain_axes(height, left, right, rows):
    figure, axis = plt.subplots(figsize=(7.2, height))
    axis.set_xlim(left, right)
    axis.set_ylim(-rows + 0.8, 1.6)
    axis.set_axis_off()
    return figure, axis


def whole_batch():
    """One channel of a batch: all values have the same mean and variance."""
    rows, columns = 6, 10
    figure, axis = plain_axes(2.3, -2.6, 18, rows)
    axis.text(columns / 2, 1.25, "positions", ha="center")
    cells(axis, np.ones((rows, columns)), [READ] * rows, [f"row {n}" for n in range(rows)])
    brace(axis, columns + 0.2, 0.86, -rows + 1, "one mean and variance,\nof every value", READ)
    return figure


def masked_batch():
    """One channel of padded sequences: what the mask leaves out is in no statistic."""
    lengths, columns = (10, 4, 7, 2, 8, 5), 10
    rows = len(lengths)
    figure, axis = plain_axes(2.3, -2.6, 18, rows)
    axis.text(columns / 2, 1.25, "positions", ha="center")
    counted = np.arange(columns) < np.reshape(lengths, (-1, 1))
    cells(axis, counted, [READ] * rows, [f"length {length}" for length in lengths])
    text = "one mean and variance,\nof the values that count;\nthe padding may hold\nanything"
    brace(axis, columns + 0.2, 0.86, -rows + 1, text, READ)
    return figure


def virtual_batches():
    """One channel in runs of rows: each has its own statistics, and moves the running ones."""
    columns, size = 10, 2
    runs = (("run 0", READ), ("run 1", "#009E73"), ("run 2", "#8A5AA8"))
    rows = size * len(runs)
    figure, axis = plain_axes(2.5, -2.6, 18.6, rows)
    axis.text(columns / 2, 1.25, "positions", ha="center")
    axis.text(16.8, 1.25, "running statistics", ha="center")
    colours = [colour for _, colour in runs for _ in range(size)]
    cells(axis, np.ones((rows, columns)), colours, [f"row {n}" for n in range(rows)])
    arrow = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "#444444"}
    for k, (name, colour) in enumerate(runs):
        top, bottom = 0.8 - size * k, 0.06 - size * k - size + 1
        brace(axis, columns + 0.2, top, bottom, f"{name}: its own\nmean and variance", colour)
        middle = (top + bottom) / 2
        axis.plot(16.8, middle, "o", color=OURS, markersize=8)
        axis.add_patch(FancyArrowPatch((15, middle), (16.5, middle), **arrow))
        if k:
            down = (16.8, middle + size - 0.2), (16.8, middle + 0.2)
            axis.add_patch(FancyArrowPatch(*down, **arrow))
    return figure


def renormalisation():
    """Four values that are alike, normalised in three ways; computed by the formulas."""
    x = np.array([0.9, 1.3, 1.6, 2.2])  # by the running statistics, which are 0 and 1 here
    rmax, dmax = 1.5, 0.8
    r = np.clip(x.std(), 1 / rmax, rmax)
    d = np.clip(x.mean(), -dmax, dmax)
    z = (x - x.mean()) / x.std()
    ways = (
        ("by running statistics:\nevaluation, or no limits", x, READ),
        (f"renormalised,\n1/{rmax} ≤ r ≤ {rmax}, |d| ≤ {dmax}", z * r + d, OURS),
        ("by the batch's statistics:\nr = 1, d = 0", z, "#555555"),
    )
    figure, axis = plt.subplots(figsize=(7.2, 2.6))
    values = np.array([values for _, values, _ in ways])
    axis.plot(values, -np.arange(len(ways)), color="#bbbbbb", linewidth=1, zorder=1)
    at = np.linspace(-3, 3, 200)
    for k, (_, values, colour) in enumerate(ways):
        axis.fill_between(at, -k, -k + 0.55 * np.exp(-(at**2) / 2), color=QUIET, zorder=0, lw=0)
        axis.plot(values, [-k] * len(values), "o", color=colour, markersize=8, zorder=2)
    axis.set_yticks(-np.arange(len(ways)), [name for name, _, _ in ways])
    axis.set_xlabel("normalised value (grey: all that training has seen)")
    axis.set_ylim(-len(ways) + 0.7, 0.75)
    axis.spines["left"].set_visible(False)
    axis.tick_params(left=False)
    return figure


def drifting():
    """Three channels over a month, a thousand values a day, beside training data."""
    rng = np.random.default_rng(0)
    training = bnfast.moments(rng.normal(0, 1, (20_000, 3)))
    days, moved = np.arange(31), []
    for day in days:
        x = rng.normal(0, 1, (1000, 3))
        x[:, 1] += max(0, day - 10) / 20
        x[:, 2] *= 1 + (day >= 20)
        moved.append(bnfast.drift(training, bnfast.moments(x)))
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8))
    names = ("as in training", "mean moves from day 10", "twice as wide from day 20")
    for axis, of_day, title in (
        (axes[0], [day.kl_divergence for day in moved], "divergence, nats"),
        (axes[1], [day.mean_difference for day in moved], "difference of means"),
    ):
        for values, name, colour in zip(
            np.array(of_day).T, names, ("#999999", READ, OURS), strict=True
        ):
            axis.plot(days, values, color=colour, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("day")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def counterexample():
    """Section 2 of the paper: a bias that a mean cancels, learned by two gradients."""
    figure, (bias, loss) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    for ignore_mean, name, style in (
        (True, "E[x] taken for a constant", {"color": OURS, "linewidth": 4}),
        (False, "the right gradient", {"color": READ, "linewidth": 1.8}),
    ):
        b, of_b, _ = paper_line_by_line.counterexample(ignore_mean, sigmoid=False)
        bias.plot(b, label=name, **style)
        loss.plot(of_b, **style)
    bias.set_title("b", fontsize=10)
    bias.legend(frameon=False, fontsize=8, loc="upper left")
    loss.set_title("loss", fontsize=10)
    loss.set_ylim(0, 1)
    for axis in (bias, loss):
        axis.set_xlabel("step")
    return figure


DRAWN = (traffic, groups, digits, tree)
DRAWN += (whole_batch, masked_batch, virtual_batches, renormalisation, drifting)
DRAWN += (counterexample,)


def draw_all(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(SETTINGS):
        for draw in DRAWN:
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1] if len(sys.argv) > 1 else "figures"))
