"""How much of the kernels ran: `python tools/kernel_coverage.py FOLDER`, after `make coverage`.

Kernels are written once and compiled for each data type and instruction set. A line counts as
covered if any of them ran it. This tool counts them separately: of the basic blocks that gcc made
of a type's functions, including inlined code, how many ran.
"""

import json
import subprocess
import sys
from pathlib import Path

TYPES = ("f32", "f64", "f16", "bf16")


def blocks(counts):
    """Return (blocks that ran, blocks), from the counts of a type's object file."""
    command = ["gcov", "--json-format", "--stdout", str(counts)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    functions = [
        function
        for file in found["files"]
        if file["file"].endswith(".inc.h")
        for function in file["functions"]
    ]
    ran = sum(function["blocks_executed"] for function in functions)
    return ran, sum(function["blocks"] for function in functions)


def lines(objects):
    yield "Blocks of the kernels that ran"
    yield f"{'':<10}" + "".join(f"{name:>22}" for name in TYPES)
    for isa, counts in objects.items():
        cells = (f"{ran} of {made} ({ran / made:.1%})" for ran, made in map(blocks, counts))
        yield f"{isa:<10}" + "".join(f"{cell:>22}" for cell in cells)


def main(folder):
    objects = {}
    for counts in sorted(Path(folder).rglob("kernels_*.gcda")):
        isa = counts.stem.removeprefix("kernels_")
        objects[isa] = [
            next(Path(folder).rglob(f"bnfast_{isa}_{name}/**/*.gcda")) for name in TYPES
        ]
    if not objects:
        sys.exit(f"no counts in {folder}: no kernel ran, or the build has none")
    print("\n".join(lines(objects)))


if __name__ == "__main__":
    main(sys.argv[1])
