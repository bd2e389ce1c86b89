"""The parts of a report, as text or Markdown: tables of rows and verdicts, and single lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.harness import machine
from bench.harness.cases import STEPS
from bench.report.table import number, table
from bench.report.targets import (
    HALF_TYPES,
    Judge,
    Ratio,
    Row,
    Verdict,
    of,
    ours,
    over_limit,
    over_ours,
    peers,
)


def verdict_cells(v: Verdict) -> list[str]:
    bound = f"{'>=' if v.at_least else '<='} {v.bound:g}"
    worst = f"{number(v.worst)} {v.where}".strip()
    judged = f"{number(v.value)} ({v.judged} of {v.count})"
    return [v.target, v.step, str(v.threads), bound, judged, worst, "met" if v.met else "MISSED"]


def verdict_table(judge: Judge, markdown: bool) -> list[str]:
    header = ["target", "step", "threads", "asked", "found", "worst", ""]
    return table(header, [verdict_cells(v) for v in judge.verdicts()], markdown)


def unjudged_lines(judge: Judge) -> list[str]:
    return [f"No rows in this run for: {name}." for name in judge.unjudged()]


# Columns of bnfast's own ways, by title; only those that some row has are shown.
OWN_WAYS = {
    "default": of("bnfast default", "bnfast"),
    "view": of("bnfast view", "bnfast"),
    "fused": of("bnfast", "bnfast plain"),
}


def columns(rows: list[Row]) -> dict[str, Ratio]:
    """Return the columns of some rows that are ratios, by title."""
    own = {title: ratio for title, ratio in OWN_WAYS.items() if any(map(ratio, rows))}
    return own | {name: over_ours(name) for row in rows for name in peers(row)}


def row_cells(row: Row, ratios: dict[str, Ratio]) -> list[str]:
    mine = ours(row) or 0.0
    return [
        f"{row['shape']} {row['layout']}" + (" cold" if row["cold"] else ""),
        number(mine * 1e3),
        number(row["traffic"] / mine / 1e9),
        number(over_limit(row)),
        *(number(ratio(row)) for ratio in ratios.values()),
    ]


def step_table(rows: list[Row], markdown: bool) -> list[str]:
    ratios = columns(rows)
    header = ["", "bnfast ms", "GB/s", "limit", *ratios]
    return table(header, [row_cells(row, ratios) for row in rows], markdown)


def groups(results: dict[str, Any]) -> Iterable[tuple[str, list[Row]]]:
    """Yield a title and rows for each number of threads, variant, step and kind of layout."""
    rows = results["rows"]
    for threads in dict.fromkeys(row["threads"] for row in rows):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            for step in STEPS:
                for planar in (True, False):
                    chosen = [
                        r for r in rows
                        if (r["threads"], r["variant"], r["step"]) == (threads, variant, step)
                        and (r["layout"] == "nchw") == planar
                    ]  # fmt: skip
                    if chosen:
                        kind = "NCHW" if planar else "channels-last"
                        yield f"{step}, {variant}, {kind}, threads {threads}", chosen


def stalls(results: dict[str, Any]) -> tuple[int, int]:
    """Return how many timed blocks took over twice their median, and how many there are."""
    timings = [t for row in results["rows"] for t in row["times"].values()]
    return sum(t["stalls"] for t in timings), sum(t["rounds"] for t in timings)


def busy_line(results: dict[str, Any]) -> str:
    """Say how many rows, of the tables and the scaling curve, other processes disturbed."""
    rows = [*results["rows"], *results["scaling"]]
    busy = sum(row["others"] > machine.BUSY for row in rows)
    return (
        f"{busy} of {len(rows)} rows were measured while other processes took more than "
        f"{100 * machine.BUSY:.0f}% of the CPU time used"
    )


def extras_lines(results: dict[str, Any]) -> list[str]:
    extras = results["extras"]
    calls = [[call, f"{s * 1e6:.2f} us"] for call, s in extras["small_calls"].items()]
    half = extras["half"]
    halves = [
        f"inference in {name} over float32: "
        + (f"refused ({half['refused']})" if "refused" in half else number(half[key]))
        for key, (name, _) in HALF_TYPES.items()
        if key in half or "refused" in half
    ]
    return [
        *table(["call on 1x16x4x4", "time"], calls, False),
        f"import bnfast after NumPy: {extras['import_seconds'] * 1e3:.1f} ms",
        *halves,
    ]
