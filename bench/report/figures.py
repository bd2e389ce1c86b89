"""The figures: each contestant's speed as a share of the limit, and how cost grows with size."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.harness.cases import STEPS
from bench.report.targets import Row, ours, peers, seconds

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

# Colour and label of a contestant, in the order of the bars: Okabe and Ito's colours, which the
# colour-blind can tell apart. One that is not listed gets a spare colour and its own name.
STYLE = {
    "bnfast": ("#D55E00", "bnfast"),
    "onednn nChw16c": ("#0072B2", "oneDNN nChw16c"),
    "onednn nChw8c": ("#56B4E9", "oneDNN nChw8c"),
    "onednn nchw": ("#A6CFE8", "oneDNN nchw"),
    "onednn nhwc": ("#0072B2", "oneDNN nhwc"),
    "torch": ("#009E73", "PyTorch"),
    "torch.compile": ("#66C2A5", "torch.compile"),
    "onnxruntime": ("#CC79A7", "ONNX Runtime"),
    "libxsmm": ("#E69F00", "libxsmm"),
    "jax": ("#F0E442", "JAX"),
    "numpy": ("#BBBBBB", "NumPy"),
}
SPARE_COLOURS = ("#000000", "#888888", "#882255")
STEP_COLOURS = dict(zip(STEPS, ("#D55E00", "#0072B2", "#009E73"), strict=True))
SECOND_WAYS = (" default", " again")
TITLES = {"forward": "Training forward", "backward": "Backward", "inference": "Inference"}
IN_A_LINE = 7  # contestants that a line of the legend holds
CUT = 1.1  # bars end at this share of the limit; more is noise, or data in a cache
SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def all_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    plain = [r for r in results["rows"] if r["variant"] == "plain" and not r["cold"] and r["limit"]]
    threads = max((row["threads"] for row in plain), default=0)
    saved = []
    with plt.rc_context(SETTINGS):
        for step in STEPS:
            rows = [r for r in plain if (r["step"], r["threads"]) == (step, threads)]
            if rows:
                saved.append(save(roofline(step, threads, rows), folder / f"{step}.png"))
        if results["scaling"]:
            saved.append(save(scaling(results["scaling"]), folder / "scaling.png"))
    return saved


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    # A palette is enough for flat colours, and the file has a third of the size.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def roofline(step: str, threads: int, rows: list[Row]) -> Any:
    """Draw the speed of each contestant as a share of the limit's, as bars below its line."""
    panels = [("NCHW", ["nchw"]), ("channels-last and dense", ["nhwc", "dense"])]
    panels = [p for p in panels if any(r["layout"] in p[1] for r in rows)]
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 3.4 * len(panels)), squeeze=False)
    for ax, (title, layouts) in zip(axes[:, 0], panels, strict=True):
        bars(ax, [r for r in rows if r["layout"] in layouts])
        ax.set_title(title, loc="left", fontweight="bold")
    figure.suptitle(
        f"{TITLES[step]}: speed as a share of what memory allows ({threads} threads)", fontsize=11
    )
    return figure


def styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Return colour and label of every contestant that is drawn: all peers, and bnfast.

    A peer's second ways ("torch default", "jax again") are left out.
    """
    found = {name: None for row in rows for name in peers(row) if not name.endswith(SECOND_WAYS)}
    known = {name: style for name, style in STYLE.items() if name == "bnfast" or name in found}
    others = [name for name in found if name not in STYLE]
    spare = itertools.cycle(SPARE_COLOURS)
    return known | {name: (colour, name) for name, colour in zip(others, spare, strict=False)}


def bars(ax: Any, rows: list[Row]) -> None:
    drawn = styles(rows)
    width = 0.84 / len(drawn)
    for k, (name, (colour, label)) in enumerate(drawn.items()):
        places = [j + (k - (len(drawn) - 1) / 2) * width for j in range(len(rows))]
        heights = [share(row, name) for row in rows]
        ax.bar(places, [min(h, CUT) for h in heights], width, color=colour, label=label)
        if name == "bnfast":
            write_values(ax, places, heights)
    ax.axhline(1, color="black", linewidth=0.9, linestyle="--")
    ax.set_xticks(range(len(rows)), [tick(row) for row in rows], fontsize=7.5)
    lines = math.ceil(len(drawn) / IN_A_LINE)
    ax.set_ylim(0, 1.2 + 0.12 * lines)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "limit"])
    ax.grid(axis="y", linewidth=0.3)
    columns = math.ceil(len(drawn) / lines)
    ax.legend(ncols=columns, loc="upper right", fontsize=8, borderaxespad=0)


def share(row: Row, name: str) -> float:
    taken = ours(row) if name == "bnfast" else seconds(row, name)
    return row["limit"] / taken if taken else 0.0


def write_values(ax: Any, places: list[float], heights: list[float]) -> None:
    for x, height in zip(places, heights, strict=True):
        ax.text(x, min(height, CUT) + 0.01, f"{100 * height:.0f}", ha="center", fontsize=7)


def tick(row: Row) -> str:
    n, *rest = row["shape"].split("x")
    kilobytes = row["nbytes"] / 1e3
    size = f"{kilobytes:.3g} KB" if kilobytes < 1e3 else f"{kilobytes / 1e3:.3g} MB"
    return f"{n}x{rest[0]}\n{'x'.join(rest[1:])}\n{size}"


def scaling(points: list[dict[str, Any]]) -> Any:
    """Draw the time per byte by size for two threads, and what the second one gains."""
    layouts = dict.fromkeys(p["layout"] for p in points)
    threads = max(p["threads"] for p in points)
    both = {p["threads"] for p in points} >= {1, 2}
    shape = (1 + both, len(layouts))
    figure, axes = plt.subplots(
        *shape, figsize=(10, 3.3 * shape[0]), squeeze=False, sharex=True, sharey="row"
    )
    for column, layout in enumerate(layouts):
        chosen = [p for p in points if p["layout"] == layout]
        per_byte(axes[0, column], [p for p in chosen if p["threads"] == threads])
        title = {"nchw": "NCHW", "nhwc": "channels-last"}[layout]
        axes[0, column].set_title(title, loc="left", fontweight="bold")
        if both:
            gains(axes[1, column], chosen)
        axes[-1, column].set_xlabel("size of x in MB")
        axes[-1, column].xaxis.set_major_formatter("{x:g}")
    for row in axes:
        row[0].set_ylim(0, roof(row))
    axes[0, 0].set_ylabel(f"ns per KB of x, {threads} threads")
    axes[0, -1].legend(fontsize=8)
    figure.suptitle(
        f"Cost grows as the bytes: (N, {', '.join(map(str, SCALED))}), solid bnfast, "
        "dashed the limit that moves the same bytes", fontsize=11,
    )  # fmt: skip
    return figure


SCALED = (64, 56, 56)


def line(ax: Any, points: dict[float, float], colour: str, style: str, label: str = "") -> None:
    ax.plot(
        list(points), list(points.values()), style, color=colour, label=label, marker="o",
        markersize=3, linewidth=1.4,
    )  # fmt: skip
    ax.set_xscale("log")
    ax.grid(linewidth=0.3)


def roof(axes: Any) -> float:
    """Return the upper limit of some panels; it cuts off outliers that the scheduler caused."""
    heights = [y for ax in axes for curve in ax.get_lines() for y in curve.get_ydata()]
    return min(1.1 * max(heights), 3 * statistics.quantiles(heights, n=10)[-1])


def per_byte(ax: Any, points: list[dict[str, Any]]) -> None:
    for step, colour in STEP_COLOURS.items():
        for key, style in (("seconds", "-"), ("limit", "--")):
            curve = {
                p["nbytes"] / 1e6: p[key] / p["nbytes"] * 1e12
                for p in points
                if p["step"] == step and p[key]
            }
            line(ax, curve, colour, style, TITLES[step] if style == "-" else "")


def gains(ax: Any, points: list[dict[str, Any]]) -> None:
    """Draw what two threads gain over one."""
    for step, colour in STEP_COLOURS.items():
        for key, style in (("seconds", "-"), ("limit", "--")):
            times = {
                (p["threads"], p["nbytes"]): p[key] for p in points if p["step"] == step and p[key]
            }
            curve = {size / 1e6: times[1, size] / t for (n, size), t in times.items() if n == 2}
            line(ax, curve, colour, style)
    ax.axhline(1, color="black", linewidth=0.6)
    ax.set_ylabel("gain of 2 threads over 1")
