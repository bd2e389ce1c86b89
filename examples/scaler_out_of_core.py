"""Standardise a table that is larger than the allowed memory, with scikit-learn's interface.

The table is a file of 400 MB, of which blocks are mapped into memory (`np.memmap`). Beyond the
memory of the interpreter and its libraries, the operating system allows this process 60 MB more.
The first pass over the file computes mean and deviation of each feature (`partial_fit`). The second
one writes the standardised table to another file (`transform`).

    python examples/scaler_out_of_core.py
    python examples/scaler_out_of_core.py --megabytes 4000 --allowed 60
    python examples/scaler_out_of_core.py --quick

Needs scikit-learn (``pip install "bnfast[sklearn]"``) and Linux, whose /proc shows the memory used.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from own_memory import limit_memory, peak_memory

from bnfast.sklearn import StandardScaler

MB = 10**6
FEATURES = 50
DTYPE = np.dtype(np.float32)
ROW = FEATURES * DTYPE.itemsize  # bytes


def mapped(path, mode, rows):
    """Map some rows of a file, and no others."""
    return np.memmap(path, DTYPE, mode, offset=rows.start * ROW, shape=(len(rows), FEATURES))


def blocks(what, rows, block):
    """Yield the rows of one block after the other, and say how many are done."""
    for start in range(0, rows, block):
        print(f"\r{what}: {100 * start // rows:3d}%", end="", file=sys.stderr, flush=True)
        yield range(start, min(start + block, rows))
    print(f"\r{what}: 100%", file=sys.stderr)


def write_table(path, rows, block):
    """Write features whose means are up to 1000 times their spread."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(rows * ROW)
    rng = np.random.default_rng(0)
    spread = np.logspace(-2, 2, FEATURES)
    for part in blocks("write", rows, block):
        target = mapped(path, "r+", part)
        target[...] = rng.standard_normal((len(part), FEATURES)) * spread + 1000 * spread


def fit(path, rows, block, what):
    """Return a scaler that has seen all rows."""
    scaler = StandardScaler()
    for part in blocks(what, rows, block):
        scaler.partial_fit(mapped(path, "r", part))
    return scaler


def transform(scaler, source, target, rows, block):
    """Write the standardised rows of one file to another."""
    for part in blocks("transform", rows, block):
        mapped(target, "r+", part)[...] = scaler.transform(mapped(source, "r", part))


# ---- Memory


def refused(path):
    """Whether the whole table is too large for the memory."""
    try:
        np.fromfile(path, DTYPE)
    except MemoryError:
        return True
    return False


# ---- The work


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=400, help="the table's size")
    parser.add_argument("--allowed", type=int, default=60, help="MB of memory")
    parser.add_argument("--quick", action="store_true", help="a tenth of both")
    parser.add_argument("--directory", help="where the files go; a temporary one by default")
    args = parser.parse_args()
    size, allowed = (n * MB // (10 if args.quick else 1) for n in (args.megabytes, args.allowed))

    # A block is in memory three times at most: both maps, and the result.
    rows, block = size // ROW, allowed // 6 // ROW
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        source, target = Path(directory, "table"), Path(directory, "standardised")
        write_table(source, rows, block)
        with target.open("wb") as file:
            file.truncate(rows * ROW)

        # Start threads, and load what is loaded at the first call.
        StandardScaler().fit_transform(mapped(source, "r", range(block)))
        before = limit_memory(allowed)
        scaler = fit(source, rows, block, "fit")
        transform(scaler, source, target, rows, block)
        peak = peak_memory() - before
        after = fit(target, rows, block, "check")
        whole = "refused" if refused(source) else "FITS"

    print(f"table       {size / MB:.0f} MB, {rows} rows of {FEATURES} features")
    print(f"memory      {allowed / MB:.0f} MB allowed, {peak / MB:.0f} MB used at most")
    print(f"whole table {whole}")
    print(f"means       {scaler.mean_.min():.4g} to {scaler.mean_.max():.4g} before,", end=" ")
    print(f"at most {np.abs(after.mean_).max():.1e} from 0 after")
    print(f"variances   {scaler.var_.min():.4g} to {scaler.var_.max():.4g} before,", end=" ")
    print(f"at most {np.abs(after.var_ - 1).max():.1e} from 1 after")


if __name__ == "__main__":
    main()
