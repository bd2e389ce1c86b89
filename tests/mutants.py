"""Breaks each formula in turn and asks the tests: `python tests/mutants.py [number or word ...]`.

A test suite is worth what it notices. Every entry of MUTANTS is one small mistake; it is made in a
copy of the sources, built for the best instruction set of this machine, and given to the tests of
the functions. Each must be caught; the exit status says whether all were.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bnfast import _core

ROOT = Path(__file__).parents[1]
ISA = _core.isas()[-1]
OTHERS = [name for name in _core.config()["isas_built"] if name != ISA]
TESTS = [
    f"tests/test_{name}.py"
    for name in ("moments", "functional_forward", "functional_backward", "numerics", "layers")
]

# file, what stands there (once), what it becomes
MUTANTS = [
    # the statistics
    ("src/moments.inc.h", "*sum = add(*sum, d);", "*sum = d;"),
    ("src/moments.inc.h", "*square = fmadd(d, d, *square);", "*square = fmadd(d, x, *square);"),
    ("src/moments.inc.h", "return pivot + sum / n;", "return sum / n;"),
    ("src/moments.inc.h", "square - sum * (sum / n)", "square"),
    (
        "src/moments.inc.h",
        "widen(load_part(x, n, set1(pivot)))",
        "widen(load_part(x, n, set1(0.0)))",
    ),
    ("src/lanes.h", "a - a == 0 ? a : 0.0", "a"),
    ("src/moments.h", "mean_a[c] += delta * share;", "mean_a[c] += delta / 2;"),
    ("src/moments.h", "m2_b[c] + delta * delta * weight", "m2_b[c]"),
    ("src/moments.h", "m2 / (count - ddof)", "m2 / count"),
    ("src/moments.h", "1 / sqrt(var[c] + eps)", "1 / sqrt(var[c])"),
    ("src/moments.h", "scale[c] = weight[c] * inv_std[c];", "scale[c] = inv_std[c];"),
    ("src/moments.h", "sum[a * shape.channels + c] +=", "sum[a * shape.channels + c] ="),
    # the map
    ("src/kernels.inc.h", "sub(sub(x, a.high), a.low)", "sub(x, a.high)"),
    ("src/apply.inc.h", "fmadd(d, a.scale, a.shift)", "mul(d, a.scale)"),
    ("src/apply.inc.h", "if (v.residual)", "if (false)"),
    ("src/kernels.inc.h", "return max(set1(0.0), z);", "return max(z, set1(0.0));"),
    ("src/kernels.inc.h", "min(set1(6.0), max(set1(0.0), z))", "max(set1(0.0), z)"),
    ("src/kernels.inc.h", "return max(mul(slope, z), z);", "return mul(slope, z);"),
    # the gradients
    ("src/kernels.inc.h", "return select_le(z, zero, zero, dy);", "return dy;"),
    (
        "src/kernels.inc.h",
        "select_le(z, zero, zero, select_le(set1(6.0), z, zero, dy))",
        "select_le(z, zero, zero, dy)",
    ),
    ("src/kernels.inc.h", "select_le(z, zero, mul(slope, dy), dy)", "select_le(z, zero, zero, dy)"),
    ("src/grad_sums.inc.h", "*sum = add(*sum, g);", "*sum = g;"),
    ("src/grad_sums.inc.h", "fmadd(g, sub(wide_x, mean), *dot)", "fmadd(g, wide_x, *dot)"),
    ("src/moments.h", "dweight[c] = inv_std[c] * dot[c];", "dweight[c] = dot[c];"),
    ("src/moments.h", "-scale[c] * inv_std[c] * (dweight[c] / count)", "0"),
    ("src/moments.h", "constant[c] = -scale[c] * (dbias[c] / count);", "constant[c] = 0;"),
    (
        "src/grad_input.inc.h",
        "fmadd(s.x_factor, d, fmadd(s.dy_factor, g, s.constant))",
        "fmadd(s.dy_factor, g, s.constant)",
    ),
    ("src/grad_input.inc.h", "vec dx = mul(s.dy_factor, g);", "vec dx = g;"),
    # what drives them
    ("bnfast/_core.pyx", "(1 - momentum) * single[i] + momentum", "momentum"),
    ("bnfast/_core.pyx", "(1 - momentum) * twice[i] + momentum", "momentum"),
    ("bnfast/moments.py", "self.count * share", "share"),
]


def built(folder):
    """Build in a copy; only the chosen instruction set's kernels are compiled again."""
    for other in OTHERS:
        for kernel in folder.glob(f"build/**/*{other}*"):
            kernel.touch()
    command = [sys.executable, "setup.py", "-q", "build_clib", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the build failed:\n{done.stderr}")


def first_failure(folder):
    """The first test that fails, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    others = " and ".join(f"not {name}" for name in OTHERS) or "True"
    done = subprocess.run(
        [*command, "-k", others, "--timeout", "300"],
        cwd=folder, env={"PATH": "/usr/bin:/bin", "BNFAST_ISA": ISA}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"


def survives(folder, file, old, new):
    path = folder / file
    source = path.read_text("utf-8")
    if source.count(old) != 1:
        sys.exit(f"{file} has {old!r} {source.count(old)} times; expected once")
    path.write_text(source.replace(old, new), "utf-8")
    try:
        built(folder)
        caught = first_failure(folder)
    finally:
        path.write_text(source, "utf-8")
    print(
        f"{'caught' if caught else 'SURVIVED'}  {file}: {old}  ->  {new}\n    {caught}", flush=True
    )
    return caught is None


def chosen(words):
    return [
        mutant
        for i, mutant in enumerate(MUTANTS)
        if not words
        or str(i) in words
        or any(word in mutant[0] for word in words if not word.isdigit())
    ]


def main(words):
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bnfast"
        skip = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "bench", "examples")
        shutil.copytree(ROOT, folder, ignore=skip)
        setup = folder / "setup.py"
        setup.write_text(
            setup.read_text("utf-8").replace('"-O2"', '"-O1"'), "utf-8"
        )  # in half the time
        built(folder)
        unbroken = first_failure(folder)
        if unbroken:
            sys.exit(f"the tests fail without a mistake: {unbroken}")
        mutants = chosen(words)
        survivors = sum(survives(folder, *mutant) for mutant in mutants)
    print(
        f"{len(mutants) - survivors} of {len(mutants)} caught in {time.monotonic() - start:.0f} s"
    )
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
