"""Pinned instruction counts, and how other counts compare with them.

The pins are in `pins.json`: a list with an entry for each environment in which they were counted.
How much the counts of these calls vary was measured with Python 3.11 and NumPy 2.4:

- from run to run, because objects lie at other addresses: 1% (once 5%, in the first run of an
  environment);
- NumPy 2.0 to 2.4: 1%; NumPy 1.26: 2%;
- bnfast compiled by gcc 11 instead of gcc 12: 1%;
- Debian's build of Python 3.11.2 instead of a plain build of 3.11.7: 8%.

So counts are compared where Python's version and compiler agree, NumPy's first two numbers,
PyTorch's version and the kind of machine.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from bnfast import _core

FILE = Path(__file__).with_name("pins.json")
ISA = "avx2"  # the newest that valgrind knows
ALLOWED = 1.03  # of a pin

Counts = dict[str, int]
Environment = dict[str, str]
Entry = dict[str, Any]


def environment(**packages: str) -> Environment:
    """Return what counts depend on besides bnfast's code; `packages` are versions of others."""
    return {
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "numpy": np.__version__,
        "machine": platform.machine(),
        "compiler": _core.config()["compiler"],
        **packages,
    }


def matches(one: Environment, other: Environment) -> bool:
    """Whether counts of two environments can be compared."""

    def compared(environment: Environment) -> tuple[object, ...]:
        numpy = environment["numpy"].split(".")[:2]
        return environment["python"], environment["machine"], numpy, environment.get("torch")

    return compared(one) == compared(other)


def described(environment: Environment) -> str:
    names = {"python": "Python", "numpy": "NumPy", "torch": "PyTorch"}
    versions = (f"{name} {environment[key]}" for key, name in names.items() if key in environment)
    return ", ".join([*versions, environment["machine"]])


def load(file: Path | None = None) -> list[Entry]:
    file = file or FILE
    return json.loads(file.read_text()) if file.exists() else []


def pinned(entries: list[Entry], here: Environment) -> Counts | None:
    """Return the pins for an environment, None where there are none."""
    found = (entry["calls"] for entry in entries if matches(entry["environment"], here))
    return next(found, None)


def write(counts: Counts, here: Environment, file: Path | None = None) -> None:
    """Pin counts; they replace those of the same environment."""
    kept = [entry for entry in load(file) if not matches(entry["environment"], here)]
    entries = [*kept, {"environment": here, "isa": ISA, "calls": counts}]
    (file or FILE).write_text(json.dumps(entries, indent=1) + "\n")


def too_expensive(counts: Counts, pins: Counts) -> list[str]:
    """Return the calls that take more instructions than their pins allow."""
    return [name for name, pin in pins.items() if counts.get(name, 0) > ALLOWED * pin]


def problems(counts: Counts, pins: Counts) -> list[str]:
    """Return a line for each call that is too expensive, not pinned, or pinned but gone."""
    found = [
        f"{name}: {counts[name]:,} instructions, {counts[name] / pins[name] - 1:+.1%} "
        f"from {pins[name]:,}; at most {ALLOWED - 1:+.0%} is allowed"
        for name in too_expensive(counts, pins)
    ]
    found += [f"{name}: not pinned" for name in counts if name not in pins]
    return found + [f"{name}: pinned, but there is no such call" for name in pins.keys() - counts]
