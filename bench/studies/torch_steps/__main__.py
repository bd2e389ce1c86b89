"""Whole training and evaluation steps of PyTorch networks: plain, enabled, compiled, frozen.

    python -m bench.studies.torch_steps [--quick] [--minutes 12] [--json FILE] [--markdown FILE]
    python -m bench.studies.torch_steps --threads 1 2 --variants plain enabled converted frozen fx
    python -m bench.studies.torch_steps --variants plain enabled inductor inductor_enabled
    python -m bench.studies.torch_steps --profile

All variants of a network take turns on the same batch, each in its own process. Printed are the
median of a step's time, and the median over the rounds of plain's time over the variant's. Inductor
needs a C++ compiler and takes minutes. `--profile` prints instead the time that PyTorch's profiler
finds for the batch norm operators in such a step, and for additions and activations. Networks come
from torchvision, timm and ultralytics; those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness.timing import Progress
from bench.studies.torch_steps.networks import NETWORKS
from bench.studies.torch_steps.variants import EVALUATION_ONLY, VARIANTS, Job, serve

DEFAULT = ("plain", "enabled", "backend", "frozen")
FORMATS = {"nchw": False, "channels_last": True}
FEWEST, MOST = 5, 40  # rounds
REST = 4e-3  # seconds, until the threads of the process before have gone to sleep
PART_RUNS = 7
Row = dict[str, Any]


class Workers:
    """A process for each variant."""

    def __init__(self, variants: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = {}, []
        for variant in variants:
            self.ends[variant], theirs = context.Pipe()
            process = context.Process(target=serve, args=(variant, theirs), daemon=True)
            process.start()
            self.processes.append(process)
        self.there = [variant for variant in variants if self.answer(variant)]

    def ask(self, variant: str, what: Job | str | None) -> None:
        self.ends[variant].send(what)

    def answer(self, variant: str) -> Any:
        """Return the answer; a str describes an exception."""
        try:
            return self.ends[variant].recv()
        except EOFError:
            raise SystemExit(f"the process of {variant} is gone") from None

    def prepare(self, job: Job, variants: list[str]) -> dict[str, str]:
        """Prepare all variants at the same time; return the ones that failed, and why."""
        for variant in variants:
            self.ask(variant, job)
        answers = {variant: self.answer(variant) for variant in variants}
        return {variant: why for variant, why in answers.items() if isinstance(why, str)}

    def turn(self, variant: str, what: str) -> Any:
        time.sleep(REST)
        self.ask(variant, what)
        if isinstance(found := self.answer(variant), str):
            raise SystemExit(f"{variant}: {found}")
        return found

    def end(self) -> None:
        for variant, process in zip(self.ends, self.processes, strict=True):
            if process.is_alive():
                self.ask(variant, None)
            process.join()


def rounds(workers: Workers, variants: list[str], until: float) -> dict[str, list[float]]:
    """Return the seconds of a step by variant: one of each in a round, forwards and backwards."""
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for k in range(MOST):
        if k >= FEWEST and time.perf_counter() > until:
            break
        for variant in variants if k % 2 else reversed(variants):
            times[variant].append(workers.turn(variant, "step"))
    return times


def profiled(workers: Workers, variants: list[str]) -> dict[str, dict[str, float]]:
    """Return the median seconds of each part of a step, by variant."""
    runs = [{v: workers.turn(v, "parts") for v in variants} for _ in range(PART_RUNS)]
    return {
        v: {part: statistics.median(run[v][part] for run in runs) for part in runs[0][v]}
        for v in variants
    }


def measure(workers: Workers, job: Job, profile: bool, until: float) -> Row:
    variants = [v for v in workers.there if job.step == "eval" or v not in EVALUATION_ONLY]
    failed = workers.prepare(job, variants)
    if "plain" in failed:
        raise SystemExit(f"{job.network}: {failed['plain']}")
    there = [variant for variant in variants if variant not in failed]
    row: Row = asdict(job) | {"failed": failed}
    if profile:
        return row | {"parts": profiled(workers, there)}
    return row | {"times": rounds(workers, there, until)}


def plan(options: argparse.Namespace) -> Iterator[Job]:
    for threads in options.threads:
        for name in options.networks:
            formats = ["nchw"] if NETWORKS[name].rows else options.formats
            for step in options.steps:
                for form in formats:
                    batch, size = (options.batch, options.size)
                    yield Job(name, step, FORMATS[form], threads, batch, size)


def arguments() -> argparse.Namespace:
    there = [network.name for network in NETWORKS.values() if network.there]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=there, default=there, metavar="NAME", help=" ".join(there))
    add("--steps", nargs="+", choices=("train", "eval"), default=["train", "eval"])
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    add("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT), metavar="NAME",
        help=" ".join(VARIANTS))  # fmt: skip
    add("--threads", nargs="+", type=int, default=[1])
    add("--batch", type=int, default=8)
    add("--size", type=int, default=160)
    add("--minutes", type=float, default=12.0, help="for all, but at least five rounds of each")
    add("--profile", action="store_true", help="the operators' own time within a step")
    add("--quick", action="store_true", help="small images, five rounds")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.variants = ["plain", *(v for v in options.variants if v != "plain")]
    if options.quick:
        options.size, options.batch, options.minutes = 64, 2, 0.0
    return options


def run(options: argparse.Namespace) -> list[Row]:
    jobs = list(plan(options))
    progress, rows = Progress([1.0] * len(jobs)), []
    end = time.perf_counter() + 60 * options.minutes
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else each profile prints on stderr
    workers = Workers(options.variants)
    for variant in set(options.variants) - set(workers.there):
        print(f"{variant} left out: bnfast.torch does not have it yet", file=sys.stderr)
    try:
        for k, job in enumerate(jobs):
            now = time.perf_counter()
            progress.next(f"{job.network}, {job.step}")
            until = now + (end - now) / (len(jobs) - k)
            rows.append(measure(workers, job, options.profile, until))
    finally:
        workers.end()
    progress.end()
    return rows


def main() -> None:
    options = arguments()
    # Imported here, since they load bnfast, and the process of plain must not.
    from bench.harness import machine
    from bench.studies.torch_steps.report import report

    before = machine.cpu_seconds()
    rows = run(options)
    described = machine.describe() | {"others": machine.share_of_others(before)}
    results = {"machine": described, "torch": torch.__version__, "rows": rows}
    text = report(results)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text + "\n")
    for file in (options.json, options.markdown):
        if file:
            print(f"written: {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
