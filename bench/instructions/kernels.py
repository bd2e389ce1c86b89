"""Instructions and memory traffic of each kernel, counted by valgrind's cachegrind.

    python -m bench.instructions.kernels [--isa avx2] [--shape 32x128x56x56]

Useful where seconds are too noisy, and to check that each input is read once: a simulated cache of
the machine's size shows how many bytes came from memory. valgrind has no AVX-512. Each count is the
difference between a run with many calls and a run with few, on one thread. The start of Python
differs by some million instructions from run to run, which leaves an error of about 0.02.
"""

from __future__ import annotations

import argparse
import math
import re
import sys

from bench.harness import machine, shapes
from bench.instructions.valgrind import check_installed, run
from bench.report.table import table

SETUP = """
import sys, numpy as np, bnfast
from bench.harness.cases import Case, Data
shape, layout, kernel, repeats = sys.argv[1:]
case = Case(tuple(map(int, shape.split("x"))), layout)
data = Data(case)
b, axis, w, c = data.sets[0], case.axis, data.weight, data.bias
stats = bnfast.batch_norm_forward(b.x, w, c, axis=axis, out=b.out)[1]
call = {
    "moments": lambda: bnfast.moments(b.x, axis=axis),
    "apply": lambda: bnfast.batch_norm(b.x, data.mean, data.var, w, c, axis=axis, out=b.out),
    "forward": lambda: bnfast.batch_norm_forward(b.x, w, c, axis=axis, out=b.out),
    "grad_sums": lambda: bnfast.batch_norm_backward(
        b.dy, b.x, stats, w, c, axis=axis, needs=("weight", "bias")),
    "backward": lambda: bnfast.batch_norm_backward(b.dy, b.x, stats, w, c, axis=axis, out=b.out),
}[kernel]
for _ in range(int(repeats)):
    call()
"""
KERNELS = ("moments", "apply", "forward", "grad_sums", "backward")
LINE = 64
CALLS = (1, 6)
COUNTS = {
    "instructions": r"I +refs: +([\d,]+)",
    "read misses": r"LLd misses: +[\d,]+ +\( *([\d,]+) rd",
    "write misses": r"LLd misses: .*\+ +([\d,]+) wr",
}


def caches() -> list[str]:
    """Return an option for the machine's last cache; its associativity is assumed to be 16."""
    size = machine.last_level_cache(machine.describe())
    return [f"--LL={1 << int(math.log2(size))},16,{LINE}"]


def counted(shape: str, layout: str, kernel: str, repeats: int, isa: str) -> list[int]:
    options = ["--cache-sim=yes", "--cachegrind-out-file=/dev/null", *caches()]
    program = [sys.executable, "-c", SETUP, shape, layout, kernel, str(repeats)]
    printed = run(["--tool=cachegrind", *options, *program], {"BNFAST_ISA": isa})
    found = (re.search(pattern, printed) for pattern in COUNTS.values())
    return [int(match[1].replace(",", "")) for match in found if match]


def per_element(shape: str, layout: str, kernel: str, isa: str) -> list[str]:
    few, many = (counted(shape, layout, kernel, n, isa) for n in CALLS)
    size = math.prod(shapes.parse(shape)) * (CALLS[1] - CALLS[0])
    counts = [(b - a) / size for a, b in zip(few, many, strict=True)]
    scaled = (c * unit for c, unit in zip(counts, (1, LINE, LINE), strict=True))
    return [f"{kernel} {layout}", *(f"{c:.2f}" for c in scaled)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default="avx2")
    parser.add_argument("--shape", default="32x128x56x56")
    options = parser.parse_args()
    check_installed()
    rows = []
    for layout in ("nchw", "nhwc"):
        for kernel in KERNELS:
            print(f"counting {kernel} {layout}", file=sys.stderr, flush=True)
            rows.append(per_element(options.shape, layout, kernel, options.isa))
    header = ["per value", "instructions", "bytes read", "bytes written"]
    print("\n".join(table(header, rows, markdown=False)))


if __name__ == "__main__":
    main()
