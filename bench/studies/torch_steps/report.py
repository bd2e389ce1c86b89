"""The tables of the steps of PyTorch networks.

python -m bench.studies.torch_steps.report run.json    again, from a run's JSON
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.harness import machine
from bench.report.table import number, table
from bench.studies.torch_steps.networks import NETWORKS
from bench.studies.torch_steps.variants import VARIANTS

# Targets for plain's time over the backend's in training, NCHW and channels_last; others: 1.
FUSED = {
    "mobilenet_v2": (1.35, 1.2), "efficientnet_b0": (1.2, 1.12),
    "timm_efficientnet_b0": (1.2, 1.12), "densenet121": (1.2, 1.08), "resnet50": (1.12, 1.04),
}  # fmt: skip
# Targets for the operators' own time in training, NCHW and channels_last.
OPERATORS = {"norm": (3.0, 1.4), "norm backward": (2.0, 1.6)}

Row = dict[str, Any]


def gain(row: Row, variant: str) -> float:
    """Return plain's time over the variant's."""
    times = row["times"]
    return statistics.median(a / b for a, b in zip(times["plain"], times[variant], strict=True))


def target(row: Row, variant: str) -> float | None:
    """Return the target for plain's time over the variant's, which must reach it."""
    if variant in ("plain", "fx", "inductor"):
        return None
    if variant == "inductor_enabled":
        return gain(row, "inductor") if "inductor" in row["times"] else None
    if variant == "backend" and row["step"] == "train":
        return FUSED.get(row["network"], (1.0, 1.0))[row["channels_last"]]
    return 1.0


def cell(row: Row, variant: str) -> str:
    """Return the gain, and its target if that is missed."""
    if variant in row["failed"]:
        return "failed"
    if variant not in row["times"]:
        return ""
    found, asked = gain(row, variant), target(row, variant)
    missed = asked is not None and round(found, 2) < round(asked, 2)
    return f"{found:.2f}" + (f" (< {asked:.2f})" if missed else "")


def is_mlp(row: Row) -> bool:
    return NETWORKS[row["network"]].rows > 0


def title(row: Row) -> str:
    form = "" if is_mlp(row) else ", channels_last" if row["channels_last"] else ", NCHW"
    return f"{row['network']}, {row['step']}{form}, {row['threads']} thr."


def asked(row: Row) -> str:
    found = (target(row, variant) for variant in row["times"] if variant != "inductor_enabled")
    return number(max((bound for bound in found if bound is not None), default=None))


def step_table(rows: list[Row]) -> list[str]:
    found = dict.fromkeys(v for row in rows for v in [*row["times"], *row["failed"]])
    others = [variant for variant in VARIANTS if variant in found and variant != "plain"]
    cells = [
        [
            title(row), number(1e3 * statistics.median(row["times"]["plain"])),
            *(cell(row, variant) for variant in others), asked(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["plain's time over", "plain, ms", *others, "target"], cells, markdown=True)


def part_table(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        for variant, found in row["parts"].items():
            ratios = {p: row["parts"]["plain"][p] / t if t else None for p, t in found.items()}
            asked = [number(OPERATORS[p][row["channels_last"]]) for p in OPERATORS]
            shown = variant != "plain" and row["step"] == "train" and not is_mlp(row)
            cells.append([
                f"{title(row)}, {variant}",
                *(f"{1e3 * found[p]:.2f} ({number(ratios[p])})" for p in found),
                ", ".join(asked) if shown else "",
            ])  # fmt: skip
    heads = ["ms (plain's over it)", "batch norm", "its backward", "adds, activations", "target"]
    return table(heads, cells, markdown=True)


def failures(rows: list[Row]) -> list[str]:
    found = (f"- {row['network']}, {v}: {why}" for row in rows for v, why in row["failed"].items())
    return list(dict.fromkeys(found))


def report(results: dict[str, Any]) -> str:
    """Return a run as Markdown."""
    rows = results["rows"]
    lines = [*(part_table(rows) if "parts" in rows[0] else step_table(rows)), "", *failures(rows)]
    batch, size = rows[0]["batch"], rows[0]["size"]
    lines += [f"- batch {batch}, {size} x {size}, float32, PyTorch {results['torch']}"]
    lines += [f"- {name} left out: {package} is not installed" for name, package in left_out()]
    return "\n".join(lines + [f"- {line}" for line in machine.lines(results["machine"])])


def left_out() -> list[tuple[str, str]]:
    return [(n.name, n.package) for n in NETWORKS.values() if not n.there]


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
