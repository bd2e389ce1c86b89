"""The targets, and whether a run meets them: ratios within the run, of each row or their mean.

A mean is over the plain convolutions; each row is one of these, of the dense ones, or one with
ReLU or addition and ReLU. Targets for which a run has no rows are named. Nothing is inferred from
another machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.harness import machine, shapes
from bench.harness.cases import STEPS
from bench.peers.ours import counted

Row = dict[str, Any]
Ratio = Callable[[Row], float | None]
CONVOLUTIONS = {shapes.label(shape) for shape in shapes.CONVOLUTIONS}
TINY = {shapes.label(shape) for shape in shapes.TINY}
NOT_PEERS = ("bnfast", "read", "two reads", "copy", "triad", "3 in")
TORCH = ("torch",)
BLOCKED = ("onednn nChw8c", "onednn nChw16c")
NHWC = ("onednn nhwc",)


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


def ours(row: Row) -> float | None:
    """Return bnfast's time: of the two forms of channels-last data, the slower one's."""
    return counted({name: timing["median"] for name, timing in row["times"].items()})


def over_ours(*names: str) -> Ratio:
    """Return a function from a row to a peer's time over ours; of several, the fastest one's."""

    def ratio(row: Row) -> float | None:
        theirs, mine = fastest(row, names), ours(row)
        return theirs / mine if theirs and mine else None

    return ratio


def fastest(row: Row, names: Iterable[str]) -> float | None:
    return min((found for name in names if (found := seconds(row, name))), default=None)


def of(name: str, other: str) -> Ratio:
    """Return a function from a row to one contestant's time over another's."""

    def ratio(row: Row) -> float | None:
        one, two = seconds(row, name), seconds(row, other)
        return one / two if one and two else None

    return ratio


def over_limit(row: Row) -> float | None:
    mine = ours(row)
    return mine / row["limit"] if mine and row["limit"] else None


def peers(row: Row) -> Iterator[str]:
    return (name for name in row["times"] if not name.startswith(NOT_PEERS))


def slowest_pairing(row: Row) -> float | None:
    """Return the fastest peer's time over ours, in the same rounds."""
    paired = {name: timing["paired"] for name, timing in row["times"].items()}
    mine = counted(paired)
    return min((paired[name] / mine for name in peers(row)), default=None) if mine else None


@dataclass(frozen=True)
class Target:
    name: str
    bounds: dict[str, float]  # by step; a step without one is not judged
    ratio: Ratio
    at_least: bool
    judged: str
    layouts: tuple[str, ...]
    variants: tuple[str, ...] = ("plain",)
    where: str = "anywhere"  # a name in `Judge.is_there`
    each: bool = True  # whether rows that by themselves miss the bound are listed


ANY = ("nchw", "nhwc", "dense")
LAST = ("nhwc", "dense")  # a dense array (N, C) has its channels last
ALL_VARIANTS = ("plain", "relu", "add_relu", "silu")
WORST_VARIANTS = ("plain", "relu", "add_relu")


def _bounds(*values: float | None) -> dict[str, float]:
    return {step: v for step, v in zip(STEPS, values, strict=True) if v is not None}


Pair = tuple[float, float]


def _peer(name: str, contestants: tuple[str, ...], layouts: tuple[str, ...], *asked: Pair) -> Any:
    """Return what is asked of the geometric mean, and of each row."""
    ratio, means, rows = over_ours(*contestants), *(_bounds(*b) for b in zip(*asked, strict=True))
    variants = WORST_VARIANTS
    return (
        Target(name, means, ratio, True, "mean", layouts, where="convolutions", each=False),
        Target(name, rows, ratio, True, "worst", layouts, variants, where="not tiny"),
    )


def _never_slower(name: str, *contestants: str) -> Target:
    ratio, bounds = over_ours(*contestants), _bounds(1, 1, 1)
    return Target(name, bounds, ratio, True, "worst", ANY, ALL_VARIANTS, where="not tiny")


def _machine(
    name: str,
    layouts: tuple[str, ...],
    where: str,
    *bounds: float | None,
    variants: tuple[str, ...] = ("plain",),
) -> Target:
    return Target(
        name, _bounds(*bounds), over_limit, False, "worst", layouts, variants, where=where
    )


def _fused(name: str, variant: str, where: str, *bounds: float) -> Target:
    ratio = of("bnfast", "bnfast plain")
    return Target(name, _bounds(*bounds), ratio, False, "mean", ANY, (variant,), where=where)


TARGETS: tuple[Target, ...] = (
    *_peer("PyTorch NCHW over ours", TORCH, ("nchw",), (7.5, 4), (3.7, 1.6), (1.6, 1.2)),
    *_peer("PyTorch channels_last over ours", TORCH, LAST, (2, 1.5), (2.8, 1.5), (1.6, 1.2)),
    *_peer(
        "oneDNN's faster blocked layout over our NCHW", BLOCKED, ("nchw",),
        (1.3, 0.95), (1.05, 0.95), (1.2, 1),
    ),
    *_peer("oneDNN nhwc over ours", NHWC, LAST, (1.35, 1.1), (1, 0.95), (1.2, 1)),
    _never_slower("ONNX Runtime over ours", "onnxruntime"),
    _never_slower("libxsmm over ours", "libxsmm"),
    _never_slower("JAX over ours", "jax", "jax again"),
    _never_slower("torch.compile over ours", "torch.compile"),
    Target(
        "fastest peer of each row over ours",
        _bounds(0.95, 0.95, 0.95), slowest_pairing, True, "worst", ANY, ALL_VARIANTS,
    ),
    _machine("limit: NCHW beyond the cache", ("nchw",), "beyond", 1.45, 1.55, 1.05),
    _machine("limit: NCHW 14x14 beyond the cache", ("nchw",), "beyond, 14x14", 1.1, None, None),
    _machine("limit: channels-last beyond the cache", LAST, "beyond", 1.2, 1.25, 1.05),
    _machine("limit: channels-last in the cache", LAST, "in", 1.15, 1.3, 1.05),
    _fused("fused ReLU over plain", "relu", "anywhere", 1.02, 1.10, 1.03),
    _machine(
        "limit: fused add + ReLU", ANY, "not in L2", 1.3, 1.4, 1.05, variants=("add_relu",)
    ),
    _fused("fused SiLU over plain, beyond the cache", "silu", "beyond", 1.15, 1.3, 1.10),
    Target(
        "default call over out=, beyond 1 MB",
        _bounds(1.15, 1.15, 1.15), of("bnfast default", "bnfast"), False, "worst", ANY,
        ALL_VARIANTS, where="beyond 1 MB",
    ),
)  # fmt: skip


SMALL_CALLS = {
    "FrozenBatchNorm": 1.0,
    "batch_norm": 1.3,
    "batch_norm, channels-last view": 1.3,
    "batch_norm, training": 2.0,
}
HALF_TYPES = {"ratio": ("float16", 0.6), "bfloat16": ("bfloat16", 0.75)}


class Judge:
    """Compares the rows of a run with the targets."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.rows = [row for row in results["rows"] if not row["cold"]]
        self.results = results
        self.cache = machine.last_level_cache(results["machine"])
        self.l2 = results["machine"]["caches"]["l2"]
        self.threads = sorted({row["threads"] for row in self.rows}, reverse=True)

    def concerned(self, target: Target, step: str, threads: int) -> list[Row]:
        return [
            row
            for row in self.rows
            if (row["step"], row["threads"]) == (step, threads)
            and row["layout"] in target.layouts
            and row["variant"] in target.variants
            and step in target.bounds
            and self.is_there(row, target.where)
        ]

    def is_there(self, row: Row, where: str) -> bool:
        """Return whether a row is where a target looks. `nbytes` are those of x alone."""
        nbytes, shape = row["nbytes"], row["shape"]
        return {
            "anywhere": True,
            "convolutions": shape in CONVOLUTIONS,
            "not tiny": shape not in TINY,
            "beyond": nbytes > self.cache,
            "beyond, 14x14": nbytes > self.cache and shape.endswith("x14x14"),
            "in": self.l2 < nbytes <= self.cache / 2,  # x and y together are in the last cache
            "not in L2": nbytes > self.l2,
            "beyond 1 MB": nbytes > 1e6,
        }[where]

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
        return _verdict(target.name, step, threads, ratios, target.bounds.get(step, 0), *judged)

    def unjudged(self) -> list[str]:
        """Return the names of targets for which this run has no rows."""
        judged = {verdict.target for verdict in self.verdicts()}
        return [name for name in dict.fromkeys(t.name for t in TARGETS) if name not in judged]

    def misses(self) -> Iterator[tuple[Target, Row, float]]:
        """Yield every row that by itself misses what a target asks of the row or of the mean."""
        for target in (target for target in TARGETS if target.each):
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
        for call, bound in SMALL_CALLS.items():
            taken = extras["small_calls"].get(call)
            micros = {"1x16x4x4": taken * 1e6} if taken else {}
            step = "forward" if "training" in call else "inference"
            title = f"{call} on 1x16x4x4, microseconds"
            yield _verdict(title, step, self.threads[0], micros, bound, False, "worst")
        millis = {"": extras["import_seconds"] * 1e3}
        yield _verdict("import after NumPy's, milliseconds", "", 1, millis, 10, False, "worst")
        for key, (half, bound) in HALF_TYPES.items():
            ratios = {"32x256x56x56": extras["half"][key]} if key in extras["half"] else {}
            yield _verdict(f"{half} over float32", "inference", 1, ratios, bound, False, "worst")


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
