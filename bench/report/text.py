"""A run's results as text for a terminal."""

from __future__ import annotations

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
from bench.report.targets import Judge


def text(results: dict[str, Any]) -> str:
    judge = Judge(results)
    slow, blocks = stalls(results)
    lines = []
    for title, rows in groups(results):
        lines += ["", title, *step_table(rows, False)]
    lines += ["", "other contestants: their time over bnfast's; limit: bnfast's over the limit's"]
    lines += [
        "",
        *extras_lines(results),
        "",
        *verdict_table(judge, False),
        *unjudged_lines(judge),
        "",
    ]
    lines += [*machine.lines(results["machine"])]
    lines += [f"{peer}: {version}" for peer, version in results["peers"].items()]
    lines += [f"wrong answer, left out: {wrong}" for wrong in results["wrong"]]
    lines += [f"{slow} of {blocks} timed blocks took more than twice their median"]
    lines += [busy_line(results)]
    return "\n".join(lines)
