"""What moments over several processes cost, by ranks and channels, and a model of the cost.

    python -m bench.studies.distributed_cost            # gloo and MPI, if they are installed
    python -m bench.studies.distributed_cost --transports gloo --ranks 1 2 3 4 --repeats 200

Three things are timed on every rank, between barriers: `all_reduce` of moments, which the forward
of a `SyncBatchNorm` adds to a plain one; the sum of gradients, which its backward adds; and the
merge of P moments of C channels, which is arithmetic only.

The model has P ranks, and C channels of 8 bytes a number. A gather passes every rank's n bytes
round a ring in P - 1 steps, each with latency a and n / b seconds:

    gather(n)    = f + (P - 1) (a + n / b)
    merge        = (P - 1) (m + C c)
    all_reduce   = gather(16) + gather(16 C) + merge
    sum          = gather(16 C + 8)

f is the cost of a call on one rank: Python and the library. m and c are fitted to the times of the
merge, f, a and b to the other times, by least squares of relative errors. For more ranks than were
measured only a, 1 / b and the merge matter, each times P - 1. For a real network give its latency
and bandwidth instead (--latency and --bandwidth, in microseconds and GB/s). Ranks that share a
core wait for the scheduler, which is not a property of the method: they are measured, marked with
an asterisk, and left out of the fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHANNELS = (16, 64, 256, 1024, 4096, 16384)
BEYOND = (8, 32, 128, 512)
SECONDS = 600


class Point(NamedTuple):
    """Median seconds of the slowest rank, for P ranks and C channels."""

    ranks: int
    channels: int
    all_reduce: float
    total: float
    merge: float


# ---- One rank


def rank_main(transport: str, size: int, rank: int, directory: str, repeats: int) -> None:
    group, barrier, gather, end = join(transport, size, rank, directory)
    from bnfast import Moments
    from bnfast.distributed import Summing, all_reduce, ranks_of

    ranks = ranks_of(group)
    points = []
    for channels in CHANNELS:
        mine = Moments(1000, np.full(channels, float(rank)), np.ones(channels))
        everyone = [mine] * size
        times = [
            median(lambda mine=mine: all_reduce(mine, group), barrier, repeats),
            median(
                lambda mine=mine: Summing(ranks, len(mine.mean)).summed(mine.mean, mine.m2),
                barrier,
                repeats,
            ),
            median(lambda all_=everyone: Moments.merge_all(all_), barrier, repeats),
        ]
        points.append(gather(times).max(axis=0).tolist())
    if rank == 0:
        Path(directory, "points.json").write_text(json.dumps(points))
    end()


def median(call, barrier, repeats):
    times = []
    for _ in range(repeats + 3):
        barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def join(transport, size, rank, directory):
    """Return the group and three functions: barrier, gather of small lists, and end."""
    if transport == "mpi":
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        return world, world.Barrier, lambda x: np.array(world.allgather(x)), lambda: None

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", world_size=size, rank=rank
    )

    def gather(x):
        found = [None] * size
        dist.all_gather_object(found, x)
        return np.array(found)

    return None, dist.barrier, gather, dist.destroy_process_group


# ---- Launching them


def run(transport: str, size: int, repeats: int) -> list[Point]:
    with tempfile.TemporaryDirectory() as directory:
        one = [sys.executable, __file__, "--rank", directory, transport, str(size), str(repeats)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if transport == "mpi":
            options = ["-n", str(size), "--allow-run-as-root", "--oversubscribe"]
            commands = [["mpiexec", *options, *one]]
        else:
            commands = [[*one, str(rank)] for rank in range(size)]
        running = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            for process in running:
                if process.wait(SECONDS):
                    raise SystemExit(f"{' '.join(process.args)} ended with {process.returncode}")
        finally:
            for process in running:
                process.kill()
        found = json.loads(Path(directory, "points.json").read_text())
    return [Point(size, c, *times) for c, times in zip(CHANNELS, found, strict=True)]


def missing(transport: str) -> str | None:
    module = {"gloo": "torch", "mpi": "mpi4py"}[transport]
    if find_spec(module) is None:
        return f"{module} is not installed"
    if transport == "mpi" and shutil.which("mpiexec") is None:
        return "there is no mpiexec"
    return None


# ---- The model


class Model(NamedTuple):
    """Seconds: of a call, of a gather's step and byte, of a merge and of each of its channels."""

    call: float
    latency: float
    byte: float
    merge: float
    channel: float

    def gathered(self, ranks: int, nbytes: int) -> float:
        return self.call + (ranks - 1) * (self.latency + nbytes * self.byte)

    def merged(self, ranks: int, channels: int) -> float:
        return (ranks - 1) * (self.merge + channels * self.channel)

    def all_reduce(self, ranks: int, channels: int) -> float:
        gathers = self.gathered(ranks, 16) + self.gathered(ranks, 16 * channels)
        return gathers + self.merged(ranks, channels)

    def total(self, ranks: int, channels: int) -> float:
        return self.gathered(ranks, 16 * channels + 8)


def share_cores(ranks: int) -> bool:
    return ranks > max(len(os.sched_getaffinity(0)), 2)


def fit(points: list[Point]) -> Model:
    points = [p for p in points if not share_cores(p.ranks)]
    several = [p for p in points if p.ranks > 1]
    merge = least_squares([[p.ranks - 1, (p.ranks - 1) * p.channels] for p in several],
                          [p.merge for p in several])  # fmt: skip
    rows, seconds = [], []
    for p in points:
        steps = p.ranks - 1
        rows.append([2, 2 * steps, steps * (16 + 16 * p.channels)])
        seconds.append(p.all_reduce - steps * (merge[0] + p.channels * merge[1]))
        rows.append([1, steps, steps * (16 * p.channels + 8)])
        seconds.append(p.total)
    return Model(*least_squares(rows, seconds), *merge)


def least_squares(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Return coefficients, none negative, by least squares of relative errors."""
    weights = 1 / np.maximum(seconds, 1e-7)
    matrix = np.asarray(rows, float) * weights[:, None]
    kept = list(range(matrix.shape[1]))
    while kept:
        found = np.linalg.lstsq(matrix[:, kept], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.remove(kept[int(np.argmin(found))])
    solution = np.zeros(matrix.shape[1])
    solution[kept] = found
    return solution.tolist()


# ---- The report


def report(transport: str, points: list[Point], model: Model) -> None:
    print(f"\n{transport}: microseconds, measured (by the model)")
    row("ranks x channels", "all_reduce", "sum", "merge of it")
    for p in points:
        times = (
            (p.all_reduce, model.all_reduce(p.ranks, p.channels)),
            (p.total, model.total(p.ranks, p.channels)),
            (p.merge, model.merged(p.ranks, p.channels)),
        )
        cells = [f"{measured * 1e6:8.0f} ({by_model * 1e6:.0f})" for measured, by_model in times]
        row(f"{'*' * share_cores(p.ranks)}{p.ranks} x {p.channels}", *cells)
    fitted = [p for p in points if not share_cores(p.ranks)]
    pairs = [(p.all_reduce, model.all_reduce(p.ranks, p.channels)) for p in fitted]
    off = statistics.median(abs(by_model / measured - 1) for measured, by_model in pairs)
    print(
        f"model: a call {model.call * 1e6:.0f} us, a step {model.latency * 1e6:.1f} us and "
        f"{1e-9 / model.byte if model.byte else float('inf'):.2f} GB/s, a merge "
        f"{model.merge * 1e6:.1f} us and {model.channel * 1e9:.2f} ns per channel; "
        f"median error {off:.0%}"
    )


def row(first: str, *others: str) -> None:
    print(f"{first:>18}", *(f"{cell:>20}" for cell in others))


def report_beyond(model: Model, where: str) -> None:
    print(f"\nmore ranks, by the model, on {where}: microseconds of all_reduce (and of the sum)")
    row("ranks", *(f"{channels} channels" for channels in CHANNELS[1::2]))
    for ranks in BEYOND:
        cells = [
            f"{model.all_reduce(ranks, c) * 1e6:.0f} ({model.total(ranks, c) * 1e6:.0f})"
            for c in CHANNELS[1::2]
        ]
        row(str(ranks), *cells)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        directory, transport, size, repeats, *given = sys.argv[2:]
        rank = int(given[0]) if given else int(os.environ["OMPI_COMM_WORLD_RANK"])
        rank_main(transport, int(size), rank, directory, int(repeats))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--transports", nargs="+", choices=["gloo", "mpi"], default=["gloo", "mpi"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--latency", type=float, help="of a network to model, in microseconds")
    parser.add_argument("--bandwidth", type=float, default=1.25, help="of that network, in GB/s")
    parser.add_argument("--json", type=Path, help="also write the points there")
    args = parser.parse_args()

    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; medians of {args.repeats} calls, of the slowest rank")
    measured = {}
    for transport in args.transports:
        if reason := missing(transport):
            print(f"{transport}: left out, {reason}")
            continue
        points = [p for size in args.ranks for p in run(transport, size, args.repeats)]
        measured[transport] = [p._asdict() for p in points]
        model = fit(points)
        report(transport, points, model)
        where = "this machine, if it had the cores"
        if args.latency is not None:
            model = model._replace(latency=args.latency * 1e-6, byte=1e-9 / args.bandwidth)
            where = f"a network of {args.latency:g} us and {args.bandwidth:g} GB/s"
        report_beyond(model, where)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
