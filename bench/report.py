"""A run's results as text for a terminal.

python bench/report.py run.json [RESULTS.md [FIGURES]]    from a run's JSON, and the Markdown too
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import machine
from cases import STEPS
from targets import Judge, Row, Verdict, over_limit, over_ours, peers, seconds


def table(header: list[str], rows: Iterable[list[str]], markdown: bool) -> list[str]:
    """Aligned columns, the first to the left."""
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    aligned = [
        [cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(cells)]
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    if not markdown:
        return ["  ".join(line).rstrip() for line in aligned]
    rule = ["-" * w if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    return [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def verdict_cells(v: Verdict) -> list[str]:
    bound = f"{'>=' if v.at_least else '<='} {v.bound:g}"
    worst = f"{number(v.worst)} {v.where}".strip()
    judged = f"{number(v.value)} ({v.judged} of {v.count})"
    return [v.target, v.step, str(v.threads), bound, judged, worst, "met" if v.met else "MISSED"]


def verdict_table(judge: Judge, markdown: bool) -> list[str]:
    header = ["target", "step", "threads", "asked", "found", "worst", ""]
    return table(header, [verdict_cells(v) for v in judge.verdicts()], markdown)


def contestants(rows: list[Row]) -> list[str]:
    """The peers' columns of some rows, and bnfast's default call."""
    found = dict.fromkeys(n for row in rows for n in peers(row))
    return ["bnfast default", *found]


def row_cells(row: Row, columns: list[str]) -> list[str]:
    ours = seconds(row, "bnfast") or 0.0
    return [
        f"{row['shape']} {row['layout']}" + (" cold" if row["cold"] else ""),
        number(ours * 1e3),
        number(row["traffic"] / ours / 1e9),
        number(over_limit(row)),
        *(number(over_ours(column)(row)) for column in columns),
    ]


def step_table(rows: list[Row], markdown: bool) -> list[str]:
    columns = contestants(rows)
    header = ["", "bnfast ms", "GB/s", "limit", *columns]
    return table(header, [row_cells(row, columns) for row in rows], markdown)


def groups(results: dict[str, Any]) -> Iterable[tuple[str, list[Row]]]:
    """The rows of each direction, variant, kind of layout and number of threads."""
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
    """Timed blocks over twice their median, and all."""
    timings = [t for row in results["rows"] for t in row["times"].values()]
    return sum(t["stalls"] for t in timings), sum(t["rounds"] for t in timings)


def busy_line(results: dict[str, Any]) -> str:
    """How many rows, of the tables and of the scaling curve, others disturbed."""
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
    said = f"refused ({half['refused']})" if "refused" in half else number(half["ratio"])
    return [
        *table(["call on 1x16x4x4", "time"], calls, False),
        f"import bnfast after NumPy: {extras['import_seconds'] * 1e3:.1f} ms",
        f"inference in float16 over float32, beyond the cache: {said}",
    ]


def text(results: dict[str, Any]) -> str:
    judge = Judge(results)
    slow, blocks = stalls(results)
    lines = []
    for title, rows in groups(results):
        lines += ["", title, *step_table(rows, False)]
    lines += ["", "other contestants: their time over bnfast's; limit: bnfast's over the limit's"]
    lines += ["", *extras_lines(results), "", *verdict_table(judge, False), ""]
    lines += [*machine.lines(results["machine"])]
    lines += [f"{peer}: {version}" for peer, version in results["peers"].items()]
    lines += [f"wrong answer, left out: {wrong}" for wrong in results["wrong"]]
    lines += [f"{slow} of {blocks} timed blocks took more than twice their median"]
    lines += [busy_line(results)]
    return "\n".join(lines)


def main() -> None:
    source, *rest = map(Path, sys.argv[1:])
    results = json.loads(source.read_text())
    print(text(results))
    if rest:
        import draw
        from report_markdown import markdown

        folder = rest[1] if len(rest) > 1 else rest[0].parent / "figures"
        figures = draw.all_figures(results, folder)
        rest[0].write_text(markdown(results, figures, rest[0].parent))


if __name__ == "__main__":
    main()
