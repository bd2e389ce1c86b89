"""bench/RESULTS.md: a run's tables, how they were taken, and what misses its target."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import machine
from report import busy_line, extras_lines, groups, number, stalls, step_table, verdict_table
from targets import Judge, Row, name

HOW = """\
Every row is measured within one process: its contestants take turns, forwards and backwards
through the list, {rounds} rounds (a contestant too slow for that sits rounds out, but has at least
{fewest}), and each runs once untimed before it is timed, so that caches and threads are as its
own call leaves them. Medians. Outputs are preallocated, except where a column says "default".
Before timing, outputs are poisoned with NaN and each answer is compared with float64 NumPy in five
channels.
A ratio is the contestant's time over bnfast's: above 1, bnfast is faster. GB/s is the bytes that
must be moved over bnfast's time; "limit" is bnfast's time over that of a C loop which only moves
these bytes (`limits.c`), measured in the same rounds, in the better of plain and streaming stores.
The bytes are: a copy for a forward and for inference, a triad (x, dy -> dx) for a backward, and for
channels-last one reading more of every input that the statistics need; a residual adds its own.
{stalls} of {calls} timed blocks took more than twice their median: the scheduler's doing, mostly.
"""

NOT_SHOWN = """\
- One machine, whose other processes took what is said above. Ratios travel better than times do.
- Small shapes are measured hot: their data are in a cache, as after the layer before. The limit of
  such a shape is a cache's, and of the smallest that of a call.
- oneDNN and the limits are reached by a bare foreign call with its arguments made beforehand, about
  half a microsecond; the others through the Python call that a user makes. That decides the
  smallest shapes. oneDNN's forward does not update running statistics.
- Reorders into and out of oneDNN's blocked layouts are not timed, as if the whole network ran in
  them. nChw16c is the layout it prefers with AVX-512, nChw8c the one with AVX2.
- ONNX Runtime normalizes channels on axis 1 only and is absent from channels-last rows. PyTorch
  fuses neither ReLU nor addition on a CPU: its times include them as operations of their own.
- No residual gradient can be preallocated in bnfast: the backward of add + ReLU makes a fresh one.
- Nothing here says how a network gains as a whole; convolutions take most of its time.
"""


def miss_lines(judge: Judge) -> list[str]:
    """One line for each row that is beyond a bound."""
    return [
        f"- {target.name}: {name(row)}, {row['step']}, threads {row['threads']}: "
        f"{number(ratio)}, asked {target.bounds[row['step']]:g}"
        for target, row, ratio in judge.misses()
    ]


def markdown(results: dict[str, Any], figures: list[Path], beside: Path) -> str:
    """The report as a file in the folder `beside`, which the figures are named from."""
    judge = Judge(results)
    slow, blocks = stalls(results)
    how = HOW.format(rounds=results["rounds"], fewest=results["fewest"], stalls=slow, calls=blocks)
    tables = [line for title, rows in groups(results) for line in folded(title, rows)]
    sections = {
        "Results": [f"From `{results['command']}`; do not edit."],
        "Targets": verdict_table(judge, True),
        "Figures": [f"![{f.stem}]({os.path.relpath(f, beside)})" for f in figures],
        "The machine": [f"- {line}" for line in machine.lines(results["machine"])],
        "Contestants": [f"- {peer}: {version}" for peer, version in results["peers"].items()],
        "How it was measured": [*how.splitlines(), f"{busy_line(results)}."],
        "What it does not show": NOT_SHOWN.splitlines(),
        "Wrong answers": [f"- {wrong}; left out of the row" for wrong in results["wrong"]]
        or ["None: every contestant computed what float64 NumPy does."],
        "Rows beyond a target": misses_markdown(judge),
        "Small calls": ["```text", *extras_lines(results), "```"],
        "All rows": tables,
    }
    titled = (
        [f"{'#' if title == 'Results' else '##'} {title}", "", *lines, ""]
        for title, lines in sections.items()
        if lines
    )
    return "\n".join(line for section in titled for line in section)


def misses_markdown(judge: Judge) -> list[str]:
    missed = [v for v in judge.verdicts() if not v.met]
    lines = miss_lines(judge)
    by_target = Counter(line.split(":")[0].removeprefix("- ") for line in lines)
    counted = [f"- {title}: {count}" for title, count in by_target.items()]
    said = f"{len(missed)} of {len(judge.verdicts())} targets are missed."
    rest = "Rows that, taken singly, are beyond what is asked of a row or of the mean, by target:"
    return [
        said, rest, "", *counted, "",
        "<details><summary>Each of them</summary>", "", *lines, "", "</details>",
    ]  # fmt: skip


def folded(title: str, rows: list[Row]) -> list[str]:
    shown = " open" if title.endswith("threads 2") and ", plain," in title else ""
    head = f"<details{shown}><summary>{title}</summary>"
    return [head, "", *step_table(rows, True), "", "</details>", ""]
