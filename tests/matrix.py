"""Count the tests of each kernel: the plugin for `pytest --matrix FILE`.

A cell is what the dispatch counters distinguish: direction, type, layout, instruction set, variant.
A test counts once in each cell that it ran, for any number of calls. Only tests that passed count.
Cases of the C program (tests/kernels) have no counters, and are counted by `count`.
"""

import shlex
import sys
from collections import Counter
from datetime import date
from functools import wraps
from itertools import product

import pytest

from bnfast import _core

VARIANTS = [
    name + added if name != "plain" or not added else "residual"
    for added, name in product(_core.RESIDUAL_NAMES, _core.VARIANT_NAMES)
]
KERNELS = {
    "moments": ["plain"],
    "forward": VARIANTS,
    "backward": VARIANTS,
    "inference": VARIANTS,
}
# By the place where it ran: Counters of (type, layout, variant).
programs = {}


def count(cases, where):
    """Count cases of the C program that passed on an instruction set, such as "neon (qemu)"."""
    programs[where] = Counter(
        (
            case.problem.x.dtype.name,
            _core.LAYOUT_NAMES[case.problem.x.shape[2] == 1],
            variant_of(case.problem),
        )
        for case in cases
    )


def variant_of(problem):
    added = "+residual" if problem.residual is not None else ""
    return f"{problem.activation or 'plain'}{added}".removeprefix("plain+")


class Matrix:
    """Counts the dispatches of each test, including those between a test's own resets."""

    def __init__(self, path):
        self.path = path
        self.cells = Counter()
        self.calls = Counter()
        self.seen = Counter()
        self.reset = _core.reset_dispatches

        @wraps(self.reset)  # test_stubs.py compares the module's names
        def reset_dispatches():
            self.harvest()

        _core.reset_dispatches = reset_dispatches

    def harvest(self):
        self.seen.update(_core.dispatches())
        self.reset()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.reset()
        self.seen.clear()
        result = yield  # a failing test raises here
        self.harvest()
        self.cells.update(self.seen.keys())
        self.calls.update(self.seen)
        return result

    def pytest_terminal_summary(self, terminalreporter):
        text = "".join(self.lines())
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(text)
        terminalreporter.section("matrix")
        terminalreporter.write(text)

    def lines(self):
        yield f"By `pytest {shlex.join(sys.argv[1:])}` on {date.today().isoformat()}.\n"
        empty = 0
        for direction, variants in KERNELS.items():
            yield f"\n{direction.capitalize()}, tests:\n\n"
            rows = list(product(_core.isas(), _core.TYPE_NAMES, _core.LAYOUT_NAMES))
            found = [[self.cells[direction, t, y, i, v] for v in variants] for i, t, y in rows]
            yield from table(rows, variants, found)
            empty += sum(row.count(0) for row in found)
        for cells, where in by_cells(programs):
            yield f"\nThe C program, cases of all kernels, on {where}:\n\n"
            rows = list(product(_core.TYPE_NAMES, _core.LAYOUT_NAMES))
            found = [[cells[t, y, v] for v in VARIANTS] for t, y in rows]
            yield from table(rows, VARIANTS, found)
            empty += sum(row.count(0) for row in found)
        calls = sum(self.calls.values())
        yield f"\nCalls in all: {calls}. Cells without a test: {empty}.\n"


def by_cells(found):
    """Merge equal counts: (cells, places)."""
    places = {}
    for where, cells in found.items():
        places.setdefault(frozenset(cells.items()), []).append(where)
    return [(Counter(dict(cells)), "; ".join(where)) for cells, where in places.items()]


def table(rows, columns, cells):
    heads = ["set", "type", "layout"][-len(rows[0]) :]
    yield "| " + " | ".join([*heads, *columns]) + " |\n"
    yield "|" + " --- |" * len(heads) + " ---: |" * len(columns) + "\n"
    for row, numbers in zip(rows, cells, strict=True):
        yield "| " + " | ".join([*row, *map(str, numbers)]) + " |\n"
