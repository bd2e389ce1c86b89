"""How much of each kernel ran: `python tools/kernel_coverage.py FOLDER`, after `make coverage`.

Kernels are written once and compiled for each data type and instruction set, and a line counts as
covered where any of these ran it. Here they are told apart: for each of the functions that the
tables point to, how many of the basic blocks that gcc made of it ran, everything inlined included.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

KERNELS = [
    f"{kernel}_{layout}"
    for kernel, layout in product(
        ("moments", "apply", "grad_sums", "grad_input"), ("planar", "interleaved")
    )
]
TYPES = ("f32", "f64", "f16", "bf16")


def functions(counts):
    """{name: (blocks that ran, blocks)} of an object file's counts."""
    command = ["gcov", "--json-format", "--stdout", str(counts)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {
        function["name"]: (function["blocks_executed"], function["blocks"])
        for file in found["files"]
        for function in file["functions"]
    }


def lines(objects):
    """Of the report, one section for each instruction set."""
    for counts in objects:
        found = functions(counts)
        yield f"\n{counts.stem.removeprefix('kernels_')}: blocks that ran, of how many"
        yield f"{'':<24}" + "".join(f"{name:>14}" for name in TYPES)
        for kernel in KERNELS:
            cells = (f"{ran} of {all_}" for ran, all_ in (found[f"{kernel}_{t}"] for t in TYPES))
            yield f"{kernel:<24}" + "".join(f"{cell:>14}" for cell in cells)


def main(folder):
    objects = sorted(Path(folder).rglob("kernels_*.gcda"))
    if not objects:
        sys.exit(f"no counts in {folder}: no kernel ran, or the build has none")
    print("\n".join(lines(objects)))


if __name__ == "__main__":
    main(sys.argv[1])
