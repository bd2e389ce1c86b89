"""Numbers and aligned tables, as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: list[str], rows: Iterable[list[str]], markdown: bool) -> list[str]:
    """Return the lines of a table; the first column is aligned to the left, others to the right."""
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
