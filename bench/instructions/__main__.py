"""Compare the instructions of small calls with their pinned counts, or pin them.

    make instructions                    # fails if a call takes over 3% more than its pin
    make instructions ARGS=--write       # pins what the calls take now, for this environment
    make instructions ARGS="--torch"     # calls of PyTorch's layers; some minutes
    make instructions-since BASE=HEAD^   # against what another commit takes here, now

The calls are those of harness/small_calls.py, or with --torch those of torch_calls.py that bnfast
takes part in; on one thread, with AVX2's kernels.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.harness.small_calls import calls
from bench.instructions import pins
from bench.instructions.valgrind import check_installed, count
from bench.report.table import table

RUNS = 3  # counts differ a little from run to run; the least of three hardly does


def counted(torch: bool) -> pins.Counts:
    if torch:
        return counted_torch()
    names = list(calls())
    program = ["-m", "bench.instructions.small_calls"]
    counts = count(program, len(names), BNFAST_ISA=pins.ISA)
    return {name: round(value) for name, value in zip(names, counts, strict=True)}


def counted_torch() -> pins.Counts:
    from bench.instructions.torch_calls import counted, names

    counts = counted("1x16x4x4", BNFAST_ISA=pins.ISA)
    found = zip(names(), counts, strict=True)
    return {name: round(value) for name, value in found if not name.startswith("plain")}


def environment(torch: bool) -> pins.Environment:
    if not torch:
        return pins.environment()
    try:
        return pins.environment(torch=version("torch"))
    except PackageNotFoundError:
        raise SystemExit("bnfast: torch is not installed (pip install torch)") from None


def least(one: pins.Counts, other: pins.Counts) -> pins.Counts:
    return {name: min(value, other[name]) for name, value in one.items()}


def write_command(torch: bool) -> str:
    return "make instructions ARGS=" + ("'--torch --write'" if torch else "--write")


def write(torch: bool, file: Path | None) -> None:
    here, counts = environment(torch), counted(torch)
    for _ in range(RUNS - 1):
        counts = least(counts, counted(torch))
    pins.write(counts, here, file)
    show(counts, counts)
    print(f"pinned for {pins.described(here)}: {file or pins.FILE}")
    for entry in pins.load(file)[:-1]:
        print(f"unchanged: the pins for {pins.described(entry['environment'])}")


def compare(torch: bool, file: Path | None) -> int:
    """Print how the counts compare; return 1 if a call fails."""
    here = environment(torch)
    pinned = pins.pinned(entries := pins.load(file), here)
    if pinned is None:
        known = "; ".join(pins.described(entry["environment"]) for entry in entries)
        print(f"SKIPPED: no pins for {pins.described(here)}, only for {known or 'nothing'}")
        print(f"To pin counts here: {write_command(torch)}")
        return 0
    counts = counted(torch)
    for _ in range(RUNS - 1):
        if pins.too_expensive(counts, pinned):
            counts = least(counts, counted(torch))
    show(counts, pinned)
    if file is not None:  # another commit's: calls that only one of them has are no problem
        both = counts.keys() & pinned.keys()
        counts, pinned = ({name: c[name] for name in c if name in both} for c in (counts, pinned))
    problems = pins.problems(counts, pinned)
    for problem in problems:
        print(f"bnfast: {problem}", file=sys.stderr)
    if problems:
        print(f"If this is intended: {write_command(torch)}", file=sys.stderr)
    return int(bool(problems))


def show(counts: pins.Counts, pinned: pins.Counts) -> None:
    rows = [
        [name, f"{value:,}", f"{value / pinned[name] - 1:+.1%}" if name in pinned else ""]
        for name, value in counts.items()
    ]
    print("\n".join(table(["instructions of a call", "counted", "from its pin"], rows, False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="pin what the calls take now")
    parser.add_argument("--torch", action="store_true", help="calls of PyTorch's layers")
    parser.add_argument("--pins", type=Path, help="a file of pins, in place of the committed one")
    options = parser.parse_args()
    check_installed()
    if options.write:
        write(options.torch, options.pins)
    else:
        sys.exit(compare(options.torch, options.pins))


if __name__ == "__main__":
    main()
