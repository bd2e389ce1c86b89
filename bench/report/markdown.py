"""RESULTS.md: a run's tables, how they were measured, and which rows miss their target."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from bench.harness import machine
from bench.report.sections import (
    busy_line,
    extras_lines,
    groups,
    stalls,
    step_table,
    unjudged_lines,
    verdict_table,
)
from bench.report.table import number
from bench.report.targets import Judge, Row, name

HOW = """\
Each row is measured in one process. Its contestants take turns, forwards and backwards through the
list, for {rounds} rounds; a slow contestant skips some, but takes part in at least {fewest}. Each
runs once untimed before it is timed, so that caches and threads are as its own call leaves them.
Times are medians. Outputs are preallocated, except where a column says "default".
Before timing, outputs are filled with NaN and each answer is compared with float64 NumPy in five
channels.
A ratio is the contestant's time over bnfast's: above 1, bnfast is faster. Channels-last data are
given to bnfast twice, with `axis=-1` and as an NCHW view of the same memory, and the slower of the
two is its time; "view" is the second over the first. "default" is a call without `out=` over the
one with it, and "fused" a call with the activation over the one without, all with `axis=-1`.
GB/s is the bytes that must be moved over bnfast's time; "limit" is bnfast's time over that of a C
loop which only moves these bytes (`limits.c`), measured in the same rounds, with plain or streaming
stores, whichever are faster. The bytes are: a copy for a forward and for inference; two reads and a
write (x, dy -> dx) for a backward; for channels-last, one more read of every input that the
statistics need; and a residual's own.
{stalls} of {calls} timed blocks took more than twice their median, mostly because of the scheduler.
"""

NOT_SHOWN = """\
- Other machines: ratios carry over better than times. Other processes took the share given above.
- Cold data for small shapes: their data are in a cache, as after the layer before. The limit of
  such a shape is the cache's speed, and for the smallest the cost of a call.
- Equal call overhead: oneDNN and the limits are called through ctypes with prepared arguments,
  about half a microsecond; the others through the Python call that a user makes. This decides the
  smallest shapes. oneDNN's forward does not update running statistics.
- The cost of reordering into and out of oneDNN's blocked layouts: it is not timed, as if the whole
  network ran in them. oneDNN prefers nChw16c with AVX-512, nChw8c with AVX2.
- ONNX Runtime in channels-last rows: it normalizes channels on axis 1 only. PyTorch fuses neither
  ReLU nor addition on a CPU: its times include them as separate operations.
- libxsmm in channels-last rows: it has its own blocked layout only, and converting is not timed. It
  updates no running statistics.
- What torch.compile's forward keeps for its backward: it is not written here. Both write into given
  arrays, and JAX into donated ones, which spares them the cost of new memory.
- JAX's backward from what its forward kept, beside one that computes that again ("jax again"): a
  whole training step, which XLA compiles as one, may do either.
- A preallocated residual gradient in bnfast: the backward of add + ReLU always makes a new one.
- The gain of a whole network: convolutions take most of its time.
"""


def miss_lines(judge: Judge) -> list[str]:
    """Return one line for each row that misses a bound."""
    return [
        f"- {target.name}: {name(row)}, {row['step']}, threads {row['threads']}: "
        f"{number(ratio)}, asked {target.bounds[row['step']]:g}"
        for target, row, ratio in judge.misses()
    ]


def markdown(results: dict[str, Any], figures: list[Path], beside: Path) -> str:
    """Return the report; paths of figures are relative to the folder `beside`."""
    judge = Judge(results)
    slow, blocks = stalls(results)
    how = HOW.format(rounds=results["rounds"], fewest=results["fewest"], stalls=slow, calls=blocks)
    tables = [line for title, rows in groups(results) for line in folded(title, rows)]
    sections = {
        "Results": [f"From `{results['command']}`; do not edit."],
        "Targets": [*verdict_table(judge, True), *listed(judge)],
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
    total = f"{len(missed)} of {len(judge.verdicts())} targets are missed."
    rest = "Rows that by themselves miss what is asked of a row or of the mean, by target:"
    return [
        total, rest, "", *counted, "",
        "<details><summary>Each of them</summary>", "", *lines, "", "</details>",
    ]  # fmt: skip


def listed(judge: Judge) -> list[str]:
    """Return the targets that this run cannot judge, as a list below the table."""
    lines = [f"- {line}" for line in unjudged_lines(judge)]
    return ["", *lines] if lines else []


def folded(title: str, rows: list[Row]) -> list[str]:
    shown = " open" if title.endswith("threads 2") and ", plain," in title else ""
    head = f"<details{shown}><summary>{title}</summary>"
    return [head, "", *step_table(rows, True), "", "</details>", ""]
