"""Normalise features that are larger than the allowed memory: exactly, in two passes over a file.

An .npy file of 400 MB is processed with 100 MB of memory. Beyond the memory of the interpreter and
its libraries, the operating system refuses any more bytes to this process. The population mean and
variance are computed block by block on Dask (`dask_moments`). Then a second file with mean 0 and
variance 1 for every feature is written in the same way (`dask_normalize`).

    python examples/out_of_core.py
    python examples/out_of_core.py --megabytes 4000 --allowed 100
    python examples/out_of_core.py --processes 2       # on a cluster of processes, each limited

Needs Dask (``pip install "bnfast[distributed]"``) and Linux, whose /proc shows the memory used.
"""

import argparse
import tempfile
from contextlib import contextmanager
from pathlib import Path

import dask
import dask.array as da
import numpy as np
from dask.diagnostics import ProgressBar
from own_memory import limit_memory, peak_memory

from bnfast import Moments
from bnfast.distributed import dask_moments, dask_normalize

MB = 10**6
FEATURES = 64


class Rows:
    """The rows of an .npy file of float32, read and written by slices, never mapped as a whole."""

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, path, rows=None):
        self.path = path
        if rows is not None:  # a new file
            np.lib.format.open_memmap(path, "w+", self.dtype, (rows, FEATURES))
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, _ = np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()

    def _place(self, rows):
        return self.start + rows.start * FEATURES * self.dtype.itemsize

    def __getitem__(self, key):
        rows = range(*key[0].indices(self.shape[0]))
        count = len(rows) * FEATURES
        block = np.fromfile(self.path, self.dtype, count, offset=self._place(rows))
        return block.reshape(-1, FEATURES)[:, key[1]]

    def __setitem__(self, key, block):
        with open(self.path, "r+b") as file:
            file.seek(self._place(range(*key[0].indices(self.shape[0]))))
            block.tofile(file)


def write_features(path, rows, block):
    """Write features whose means are up to 1000 times their spread."""
    rng = np.random.default_rng(0)
    target = Rows(path, rows)
    spread = np.logspace(-2, 2, FEATURES)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        values = rng.standard_normal((stop - start, FEATURES)) * spread + 1000 * spread
        target[start:stop, :] = values.astype(np.float32)
    return target


# ---- Memory


def refused(path):
    """Whether the whole file is too large for the memory."""
    try:
        np.load(path)
    except MemoryError:
        return True
    return False


# ---- The work


def normalize_file(source, target, block, compute):
    """Write source's features to target, each with mean 0 and variance 1."""
    x = da.from_array(source, chunks=(block, FEATURES), name=False, asarray=False)
    moments = compute(dask_moments(x, axis=1))
    y = dask_normalize(x, moments.mean, moments.var(), axis=1, eps=0)
    compute(da.store(y, target, lock=False, compute=False))
    written = da.from_array(target, chunks=(block, FEATURES), name=False, asarray=False)
    return moments, compute(dask_moments(written, axis=1))


def with_progress(lazy):
    with ProgressBar():
        return lazy.compute()


@contextmanager
def threads(allowed):
    """Compute on this process' threads; return how, and how much memory it took."""
    warm_up = da.zeros((8, FEATURES), chunks=(1, FEATURES), dtype=np.float32)
    dask.compute(dask_moments(warm_up))  # start threads and load libraries before the limit
    before = limit_memory(allowed)
    yield with_progress, lambda: [peak_memory() - before]


@contextmanager
def processes(allowed, number):
    """Compute on a cluster of processes, each with its share of the memory."""
    from distributed import Client, LocalCluster, progress

    def compute(lazy):
        future = client.compute(lazy)
        progress(future)
        return future.result()

    with (
        LocalCluster(
            n_workers=number,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        warm_up = da.zeros((8, FEATURES), chunks=(1, FEATURES), dtype=np.float32)
        client.compute(dask_moments(warm_up)).result()
        before = client.run(limit_memory, allowed // number)

        def peaks():
            return [peak - before[worker] for worker, peak in client.run(peak_memory).items()]

        yield compute, peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=400, help="the file's size")
    parser.add_argument("--allowed", type=int, default=100, help="MB of memory, all together")
    parser.add_argument("--processes", type=int, default=0, help="a cluster of as many")
    parser.add_argument("--directory", help="where the files go; a temporary one by default")
    args = parser.parse_args()

    # On every core a block is read, copied and normalised: 16 blocks have to fit.
    block = args.allowed * MB // 16 // (FEATURES * 4)
    rows = args.megabytes * MB // (FEATURES * 4)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = Path(directory, "features.npy")
        source = write_features(path, rows, block)
        target = Rows(Path(directory, "normalized.npy"), rows)
        engine = (
            processes(args.allowed * MB, args.processes)
            if args.processes
            else threads(args.allowed * MB)
        )
        with engine as (compute, peaks):
            before, after = normalize_file(source, target, block, compute)
            used = peaks()
            if not args.processes:
                print(f"np.load of the whole file: {'refused' if refused(path) else 'FITS'}")

    report(args, rows, before, after, used)


def report(args, rows, before: Moments, after: Moments, used):
    print(f"file       {rows * FEATURES * 4 / MB:.0f} MB, {rows} rows of {FEATURES} features")
    where = f"{args.processes} processes" if args.processes else "threads"
    peaks = " + ".join(f"{peak / MB:.0f}" for peak in used)
    print(f"memory     {args.allowed} MB allowed, at most {peaks} MB used, on {where}")
    print(f"means      {before.mean.min():.4g} to {before.mean.max():.4g} before,", end=" ")
    print(f"at most {np.abs(after.mean).max():.1e} from 0 after")
    print(f"variances  {before.var().min():.4g} to {before.var().max():.4g} before,", end=" ")
    print(f"at most {np.abs(after.var() - 1).max():.1e} from 1 after")


if __name__ == "__main__":
    main()
