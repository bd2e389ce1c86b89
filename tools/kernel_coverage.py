"""How much of the kernels ran: `python tools/kernel_coverage.py FOLDER`, after `make coverage`.

Kernels are written once and compiled for each data type and instruction set. A line counts as
covered if any of them ran it. This tool counts them separately: of the basic blocks that gcc made
of a type's functions, including inlined code, how many ran.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

TYPES = ("f32", "f64", "f16", "bf16")


def blocks(counts):
    """Return (blocks that ran, blocks) by type, from an object file's counts."""
    command = ["gcov", "--json-format", "--stdout", str(counts)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ran, made = Counter(), Counter()
    for file in found["files"]:
        if not file["file"].endswith(".inc.h"):
            continue
        for function in file["functions"]:
            name = function["name"].rpartition("_")[2].partition(".")[0]  # f.part.0 is a part of f
            ran[name] += function["blocks_executed"]
            made[name] += function["blocks"]
    return [(ran[name], made[name]) for name in TYPES]


def lines(objects):
    yield "Blocks of the kernels that ran"
    yield f"{'':<10}" + "".join(f"{name:>22}" for name in TYPES)
    for counts in objects:
        cells = (f"{ran} of {made} ({ran / made:.1%})" for ran, made in blocks(counts))
        yield f"{counts.stem.removeprefix('kernels_'):<10}" + "".join(
            f"{cell:>22}" for cell in cells
        )


def main(folder):
    objects = sorted(Path(folder).rglob("kernels_*.gcda"))
    if not objects:
        sys.exit(f"no counts in {folder}: no kernel ran, or the build has none")
    print("\n".join(lines(objects)))


if __name__ == "__main__":
    main(sys.argv[1])
