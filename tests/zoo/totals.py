"""Count the batch norms of each architecture, and what they become; write it to totals.json.

    python tests/zoo/totals.py [NAME ...]
    python tests/zoo/totals.py --sums      of all architectures, from the present table

For "enabled" the calls of PyTorch itself are counted, so that the tests compare bnfast with them.
Ways that this bnfast does not have keep their totals in the table.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from architectures import ARCHITECTURES
from ways import WAYS, Totals, counted, modes, there

TABLE = Path(__file__).with_name("totals.json")


def read() -> dict[str, dict[str, Totals]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write(table: dict[str, dict[str, Totals]]) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def totals(name: str) -> dict[str, Totals]:
    """Return the totals of an architecture in each way, by mode."""
    model, x = ARCHITECTURES[name].model(), ARCHITECTURES[name].input()
    found = {"enabled": counted(model, x)}
    for way in there():
        if way != "enabled":
            found[way] = {m: WAYS[way](model, x, training)[1] for m, training in modes(way).items()}
    return found


def sums(table: dict[str, dict[str, Totals]]) -> list[str]:
    """Lines of totals over all architectures."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for ways in table.values():
        for way, by_mode in ways.items():
            for mode, counts in by_mode.items():
                found.setdefault((way, mode), Counter()).update(counts)
    return [
        f"{way}, {mode}: " + ", ".join(f"{what} {count}" for what, count in counts.most_common())
        for (way, mode), counts in sorted(found.items())
    ]


def count(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = {name: ways for name, ways in read().items() if name in ARCHITECTURES}
    for name in names or ARCHITECTURES:
        print(name, file=sys.stderr, flush=True)
        table[name] = table.get(name, {}) | totals(name)
        write(table)


def main(names: list[str]) -> None:
    if names != ["--sums"]:
        count(names)
    print("\n".join(sums(read())))


if __name__ == "__main__":
    main(sys.argv[1:])
