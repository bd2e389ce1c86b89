"""The targets, and whether a run meets them: ratios within the run, of each shape or their mean.

Targets for which a run has no rows are not listed. Nothing is inferred from another machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.harness import machine, shapes
from bench.harness.cases import STEPS

Row = dict[str, Any]
Ratio = Callable[[Row], float | None]
CONVOLUTIONS = {shapes.label(shape) for shape in shapes.CONVOLUTIONS}
NOT_PEERS = ("bnfast", "read", "two reads", "copy", "triad", "3 in")


@dataclass
class Verdict:
    target: str
    step: str
    threads: int
    mean: float  # geometric
    worst: float
    where: str  # the row of the worst ratio
    bound: float
    at_least: bool
    judged: str  # "mean" or "worst"
    count: int

    @property
    def value(self) -> float:
        return self.mean if self.judged == "mean" else self.worst

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def seconds(row: Row, name: str) -> float | None:
    timing = row["times"].get(name)
    return timing and timing["median"]


def over_ours(name: str) -> Ratio:
    """Return a function from a row to the peer's time over ours."""

    def ratio(row: Row) -> float | None:
        theirs, ours = seconds(row, name), seconds(row, "bnfast")
        return theirs / ours if theirs and ours else None

    return ratio


def ours_over(name: str) -> Ratio:
    inverse = over_ours(name)

    def ratio(row: Row) -> float | None:
        found = inverse(row)
        return 1 / found if found else None

    return ratio


def over_limit(row: Row) -> float | None:
    ours = seconds(row, "bnfast")
    return ours / row["limit"] if ours and row["limit"] else None


def default_over_given(row: Row) -> float | None:
    return over_ours("bnfast default")(row)


def peers(row: Row) -> Iterator[str]:
    return (name for name in row["times"] if not name.startswith(NOT_PEERS))


def slowest_pairing(row: Row) -> float | None:
    """Return the fastest peer's time over ours, in the same rounds."""
    return min((row["times"][name]["paired"] for name in peers(row)), default=None)


@dataclass(frozen=True)
class Target:
    name: str
    bounds: dict[str, float]  # by step
    ratio: Ratio
    at_least: bool
    judged: str
    layouts: tuple[str, ...]
    variants: tuple[str, ...] = ("plain",)
    where: str = "anywhere"  # or "convolutions", "beyond" the last cache


ANY = ("nchw", "nhwc", "dense")
LAST = ("nhwc", "dense")
ALL_VARIANTS = ("plain", "relu", "add_relu")


def _bounds(*values: float) -> dict[str, float]:
    return dict(zip(STEPS, values, strict=True))


def _peer(name: str, contestant: str, layout: str, *bounds: float) -> Target:
    return Target(
        name, _bounds(*bounds), over_ours(contestant), True, "mean", (layout,), where="convolutions"
    )


def _machine(
    name: str, layouts: tuple[str, ...], *bounds: float, variants: Any = ("plain",)
) -> Target:
    return Target(
        name, _bounds(*bounds), over_limit, False, "worst", layouts, variants, where="beyond"
    )


TARGETS = (
    _peer("PyTorch NCHW over ours", "torch", "nchw", 6, 3, 1.5),
    _peer("PyTorch channels_last over ours", "torch", "nhwc", 2, 2.5, 1.5),
    _peer("oneDNN nChw8c over our NCHW", "onednn nChw8c", "nchw", 2, 1.4, 1.1),
    _peer("oneDNN nhwc over ours", "onednn nhwc", "nhwc", 3, 1.8, 3),
    Target(
        "fastest peer of each row over ours",
        _bounds(0.95, 0.95, 0.95), slowest_pairing, True, "worst", ANY, ALL_VARIANTS,
    ),
    _machine("ours over the limit, NCHW", ("nchw",), 1.15, 1.25, 1.05),
    _machine("ours over the limit, channels-last", LAST, 1.2, 1.2, 1.05),
    Target(
        "fused ReLU over plain",
        _bounds(1.03, 1.10, 1.03), ours_over("bnfast plain"), False, "mean", ANY, ("relu",),
    ),
    _machine("fused add + ReLU over the limit", ANY, 1.2, 1.25, 1.05, variants=("add_relu",)),
    Target(
        "default call over out=",
        _bounds(1.15, 1.15, 1.15), default_over_given, False, "worst", ANY, ALL_VARIANTS,
    ),
)  # fmt: skip


class Judge:
    """Compares the rows of a run with the targets."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.rows = [row for row in results["rows"] if not row["cold"]]
        self.results = results
        self.cache = machine.last_level_cache(results["machine"])
        self.threads = sorted({row["threads"] for row in self.rows}, reverse=True)

    def concerned(self, target: Target, step: str, threads: int) -> list[Row]:
        return [
            row
            for row in self.rows
            if (row["step"], row["threads"]) == (step, threads)
            and row["layout"] in target.layouts
            and row["variant"] in target.variants
            and (target.where != "convolutions" or row["shape"] in CONVOLUTIONS)
            and (target.where != "beyond" or row["nbytes"] > self.cache)
        ]

    def verdicts(self) -> list[Verdict]:
        found = [
            self.verdict(target, step, threads)
            for target in TARGETS
            for threads in self.threads
            for step in STEPS
        ]
        found += [self.gain(step) for step in STEPS] + list(self.growth()) + list(self.others())
        return [verdict for verdict in found if verdict is not None]

    def verdict(self, target: Target, step: str, threads: int) -> Verdict | None:
        rows = self.concerned(target, step, threads)
        ratios = {name(row): r for row in rows if (r := target.ratio(row)) is not None}
        judged = (target.at_least, target.judged)
        return _verdict(target.name, step, threads, ratios, target.bounds[step], *judged)

    def misses(self) -> Iterator[tuple[Target, Row, float]]:
        """Yield every row that by itself misses what a target asks of the row or of the mean."""
        for target in TARGETS:
            for threads in self.threads:
                for step in STEPS:
                    for row in self.concerned(target, step, threads):
                        ratio, bound = target.ratio(row), target.bounds[step]
                        if ratio and (ratio < bound if target.at_least else ratio > bound):
                            yield target, row, ratio

    def gain(self, step: str) -> Verdict | None:
        """Return the gain of two threads over the limit's gain, for data beyond the last cache."""
        times: dict[str, dict[int, Row]] = {}
        for row in self.rows:
            if row["step"] == step and row["variant"] == "plain" and row["nbytes"] > self.cache:
                times.setdefault(name(row), {})[row["threads"]] = row
        ratios = {
            key: one / two
            for key, by in times.items()
            if 1 in by and 2 in by and (one := over_limit(by[1])) and (two := over_limit(by[2]))
        }
        return _verdict("gain of 2 threads over the limit's", step, 2, ratios, 0.9, True, "worst")

    def growth(self) -> Iterator[Verdict | None]:
        """Yield the largest time per byte over the smallest, from 10 MB up.

        Data in a cache are read faster than from memory, so a second verdict is for data beyond
        the last cache only.
        """
        titles = {9e6: "from 10 MB", self.cache: "beyond the cache"}
        for (least, title), threads, step in itertools.product(titles.items(), self.threads, STEPS):
            ratios = {
                layout: ratio
                for layout in ("nchw", "nhwc")
                if (ratio := self.largest_over_smallest(layout, threads, step, least))
            }
            full = f"time per byte {title}, most over least"
            yield _verdict(full, step, threads, ratios, 1.3, False, "worst")

    def largest_over_smallest(
        self, layout: str, threads: int, step: str, least: float
    ) -> float | None:
        per_byte = [
            p["seconds"] / p["nbytes"]
            for p in self.results["scaling"]
            if (p["layout"], p["threads"], p["step"]) == (layout, threads, step)
            and p["nbytes"] > least
        ]
        return max(per_byte) / min(per_byte) if len(per_byte) > 1 else None

    def others(self) -> Iterator[Verdict | None]:
        """Yield the verdicts on small calls (us), the import (ms) and half types."""
        extras = self.results["extras"]
        bounds = {"FrozenBatchNorm": 1.0, "batch_norm": 2.0}
        for call, bound in bounds.items():
            micros = {"1x16x4x4": extras["small_calls"][call] * 1e6}
            title = f"{call} on 1x16x4x4, microseconds"
            yield _verdict(title, "inference", self.threads[0], micros, bound, False, "worst")
        millis = {"": extras["import_seconds"] * 1e3}
        yield _verdict("import after NumPy's, milliseconds", "", 1, millis, 10, False, "worst")
        half = {key: value for key, value in extras["half"].items() if key == "ratio"}
        yield _verdict("float16 over float32", "inference", 1, half, 0.6, False, "worst")


def name(row: Row) -> str:
    variant = "" if row["variant"] == "plain" else f" {row['variant']}"
    return f"{row['shape']} {row['layout']}{variant}"


def _verdict(
    title: str, step: str, threads: int, ratios: dict[str, float], bound: float,
    at_least: bool, judged: str,
) -> Verdict | None:  # fmt: skip
    if not ratios:
        return None
    where = (min if at_least else max)(ratios, key=lambda key: ratios[key])
    mean = geometric_mean(ratios.values())
    found = (mean, ratios[where], where, bound, at_least, judged, len(ratios))
    return Verdict(title, step, threads, *found)


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
