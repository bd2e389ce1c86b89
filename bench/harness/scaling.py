"""Time per byte from 1 MB to 1 GB, beside the limit's: does the cost grow in proportion?"""

from __future__ import annotations

from typing import Any

from bench.harness import limits, machine
from bench.harness.cases import STEPS, Case, Data
from bench.harness.compiled import Missing
from bench.harness.timing import Contestant, Progress, measure
from bench.peers.ours import Ours, counted

PLANE = (64, 56, 56)
IMAGE = 4 * 64 * 56 * 56
MEGABYTES = (1, 3, 10, 30, 100, 300, 1000)
QUICK = (1, 10, 100)


def run(threads: list[int], quick: bool, attempts: int) -> list[dict[str, Any]]:
    sizes = QUICK if quick else MEGABYTES
    try:
        contestants = [Ours(), limits.Limits()]
    except Missing:
        contestants = [Ours()]
    progress = Progress([float(mb) for mb in sizes for _ in ("nchw", "nhwc")])
    points = []
    for mb in sizes:
        for layout in ("nchw", "nhwc"):
            progress.next(f"scaling: {mb} MB {layout}")
            how = (10 if quick else 30, attempts)
            points += _points(mb, layout, threads, contestants, how)
    progress.end()
    return points


def _points(
    mb: int, layout: str, threads: list[int], peers: list[Any], how: tuple[int, int]
) -> list[dict[str, Any]]:
    images = max(1, round(mb * 1e6 / IMAGE))
    data = Data(Case((images, *PLANE), layout))
    return [_point(data, n, step, peers, how) for n in threads for step in STEPS]


def _point(
    data: Data, threads: int, step: str, peers: list[Any], how: tuple[int, int]
) -> dict[str, Any]:
    runs = {}
    for peer in peers:
        peer.set_threads(threads)
        runs |= peer.runs(data, data.sets[0], step)
    del runs["bnfast default"]
    rounds, attempts = how
    contestants = [Contestant(name, [run.call]) for name, run in runs.items()]
    times, others = machine.when_quiet(lambda: measure(contestants, rounds), attempts)
    medians = {name: timing.median for name, timing in times.items()}
    return {
        "layout": data.case.layout, "nbytes": data.case.nbytes, "threads": threads, "step": step,
        "seconds": counted(medians), "limit": limits.seconds(data.case, step, medians),
        "others": others,
    }  # fmt: skip
