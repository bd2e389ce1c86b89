"""Compare bnfast with every peer that is installed, and with what memory allows, in one run.

    python -m bench.compare --quick                   some minutes
    python -m bench.compare --json r.json --markdown RESULTS.md --figures figures
    python -m bench.compare --shapes 32x256x56x56 --threads 1 2 --peers torch onednn

All contestants of a row run in turn on the same arrays (see harness/timing.py), with preallocated
outputs. Their answers are compared with float64 NumPy first. Peers: numpy, torch, onednn,
onnxruntime, libxsmm, jax, inductor, which is torch.compile, and limits, which are loops that only
move the bytes. Peers that cannot be had are named and left out, with the reason. With --cold each
call takes another set of arrays; together the sets have more than twice the size of the last cache.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import compiled, extras, limits, machine, scaling, shapes
from bench.harness.cases import DTYPES, STEPS, VARIANTS, Case, Data, Run
from bench.harness.timing import Contestant, Progress, measure
from bench.peers.ours import Ours
from bench.report.markdown import markdown
from bench.report.text import text

PEERS = {
    "limits": ("bench.harness.limits", "Limits"),
    "numpy": ("bench.peers.plain_numpy", "NumPy"),
    "torch": ("bench.peers.pytorch", "Torch"),
    "onednn": ("bench.peers.onednn", "OneDNN"),
    "onnxruntime": ("bench.peers.onnx_runtime", "OnnxRuntime"),
    "libxsmm": ("bench.peers.libxsmm", "Libxsmm"),
    "jax": ("bench.peers.jax_xla", "Jax"),
    "inductor": ("bench.peers.inductor", "Inductor"),
}
RESULTS = Path(__file__).parent / "results"
MOST_SETS = 256  # of a cold row; shapes that need more are left out


def load_peers(wanted: list[str]) -> tuple[list[Any], dict[str, str]]:
    """Return the peers that can be had, bnfast first; and each one's version, or what it lacks."""
    found, versions = [Ours()], {"bnfast": Ours.version}
    for name in wanted:
        module, kind = PEERS[name]
        try:
            found.append(getattr(importlib.import_module(module), kind)())
            versions[name] = found[-1].version
        except compiled.Missing as error:
            versions[name] = f"left out: {error}"
            print(f"left out: {error}", file=sys.stderr)
    return found, versions


def sets_for(case: Case, cold: bool, cache: int) -> int | None:
    """Return how many sets of arrays a row needs; None where it would need too many."""
    sets = math.ceil(2 * cache / case.nbytes) if cold else 1
    return sets if sets <= MOST_SETS else None


class Comparison:
    """All rows of a run."""

    def __init__(self, options: argparse.Namespace, peers: list[Any], cache: int) -> None:
        self.options, self.peers, self.cache = options, peers, cache
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def plan(self) -> list[tuple[Case, bool]]:
        cases = [
            (Case(shape, layout, variant, self.options.dtype, self.options.offset), cold)
            for shape in self.options.shapes
            for layout in shapes.layouts(shape)
            for variant in self.options.variants
            for cold in ([False, True] if self.options.cold else [False])
        ]
        return [(case, cold) for case, cold in cases if sets_for(case, cold, self.cache)]

    def run(self) -> None:
        plan = self.plan()
        each = list(itertools.product(self.options.threads, STEPS))
        # Seconds, about: most of a small row's go to compiling, of a large one's to the slow peers.
        progress = Progress([2.5 + case.nbytes / 1.3e7 for case, _ in plan for _ in each])
        for case, cold in plan:
            data = Data(case, sets_for(case, cold, self.cache) or 1)
            for threads, step in each:
                temperature = " cold" if cold else ""
                progress.next(f"{case}{temperature}, threads {threads}: {step}")
                self.rows.append(self.row(data, threads, step) | {"cold": cold})
        progress.end()

    def row(self, data: Data, threads: int, step: str) -> dict[str, Any]:
        case, contestants, notes = data.case, [], {}
        for peer in self.peers:
            peer.set_threads(threads)
            for name, runs in self.runs_of(peer, data, step).items():
                if runs[0].note:
                    notes[name] = runs[0].note
                contestants.append(Contestant(name, [r.call for r in runs], peer.rest))
        o = self.options
        times, others = machine.when_quiet(
            lambda: measure(contestants, o.rounds, o.budget, o.fewest), o.attempts
        )
        medians = {name: timing.median for name, timing in times.items()}
        return {
            "shape": shapes.label(case.shape), "layout": case.layout, "variant": case.variant,
            "dtype": case.dtype, "step": step, "threads": threads, "nbytes": case.nbytes,
            "traffic": limits.traffic(case, step), "limit": limits.seconds(case, step, medians),
            "times": {name: asdict(timing) for name, timing in times.items()}, "notes": notes,
            "others": others,
        }  # fmt: skip

    def runs_of(self, peer: Any, data: Data, step: str) -> dict[str, list[Run]]:
        """Return a peer's contestants by name, a call for each set of arrays.

        Contestants whose answer is wrong are left out.
        """
        made = [peer.runs(data, buffers, step) for buffers in data.sets]
        right = [name for name, run in made[0].items() if self.answers_right(name, data, step, run)]
        return {name: [runs[name] for runs in made] for name in right}

    def answers_right(self, name: str, data: Data, step: str, run: Run) -> bool:
        if name.startswith(tuple(limits.NAMES.values())) or name == "bnfast plain":
            return True
        error = data.error(step, run)
        if error > data.tolerance(step):
            self.wrong.append(f"{name}, {data.case}, {step}: off by {error:.2g} of the values")
            Progress.say(f"WRONG, left out of the row: {self.wrong[-1]}")
        return error <= data.tolerance(step)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few shapes and rounds, plain only")
    add("--shapes", type=shapes.parse, nargs="+", metavar="NxCxHxW")
    add("--variants", nargs="+", choices=VARIANTS)
    add("--threads", type=int, nargs="+", default=[2, 1])
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--dtype", choices=DTYPES, default="float32")
    add(
        "--offset",
        type=int,
        default=0,
        choices=(0, 16, 32, 48),
        help="of arrays from a cache line, in bytes",
    )
    add(
        "--attempts", type=int, help="at a row, while other processes take over 5%% of the CPU time"
    )
    add("--cold", action="store_true", help="add rows whose arrays are in no cache")
    add("--rounds", type=int)
    add("--budget", type=float, help="seconds that a slow contestant may take for a row")
    add("--fewest", type=int, help="rounds that a slow contestant takes part in at least")
    add("--no-scaling", action="store_true", help="leave out the curve from 1 MB to 1 GB")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    add("--figures", type=Path, metavar="DIR", nargs="?", const=RESULTS / "figures")
    return with_defaults(parser.parse_args())


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    quick = options.quick
    defaults = {
        "shapes": shapes.QUICK if quick else shapes.ALL,
        "variants": ["plain"] if quick else list(VARIANTS),
        "rounds": 10 if quick else 30,
        "budget": 0.1 if quick else 1.0,
        "fewest": 3 if quick else 7,
        "attempts": 1 if quick else 3,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = arguments()
    peers, versions = load_peers(options.peers)
    described, before = machine.describe(), machine.cpu_seconds()
    comparison = Comparison(options, peers, machine.last_level_cache(described))
    comparison.run()
    results = {
        "machine": described,
        "peers": versions,
        "command": " ".join(["python -m bench.compare", *sys.argv[1:]]),
        "rounds": options.rounds,
        "fewest": options.fewest,
        "rows": comparison.rows,
        "wrong": comparison.wrong,
        "extras": extras.measure_all(),
        "scaling": []
        if options.no_scaling
        else scaling.run(options.threads, options.quick, options.attempts),
    }
    described["others"] = machine.share_of_others(before)
    write(results, options)


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    # The JSON first, so that an error in a drawing does not lose the measurements.
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(text(results))
    figures = []
    if options.figures:
        from bench.report.figures import all_figures

        figures = all_figures(results, options.figures)
    if options.markdown:
        options.markdown.write_text(markdown(results, figures, options.markdown.parent))


if __name__ == "__main__":
    main()
