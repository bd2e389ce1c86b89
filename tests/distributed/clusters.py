"""A Dask array whose blocks take time to read, and a worker that dies while they are read."""

import os
import signal
import time

import numpy as np

ROWS, BLOCK = 64, 1000


def block_of(row, seconds=0.0, pids=None):
    """What a task reads: reproducible, and slow enough to be killed halfway."""
    time.sleep(seconds)
    if pids is not None:
        with open(os.path.join(pids, f"{row}.{time.monotonic_ns()}"), "w") as file:
            file.write(str(os.getpid()))
    return np.random.default_rng(row).normal(row, 1 + row, (BLOCK, 3)).astype(np.float32)


def array_of(seconds=0.0, pids=None):
    import dask.array as da

    rows = da.arange(ROWS, chunks=1)
    return da.map_blocks(
        lambda row: block_of(int(row[0]), seconds, pids),
        rows,
        dtype=np.float32,
        new_axis=1,
        chunks=((BLOCK,) * ROWS, (3,)),
        meta=np.empty((0, 0), np.float32),
    )


def kill_a_worker(directory):
    """One of those that have read the first quarter of the blocks."""
    deadline = time.monotonic() + 60
    while len(pids := [path.read_text() for path in directory.iterdir()]) < ROWS // 4:
        assert time.monotonic() < deadline, "the blocks are not read"
        time.sleep(0.01)
    os.kill(int(max(pids)), signal.SIGKILL)


def assert_some_were_read_twice(directory):
    written = [path.name.split(".")[0] for path in directory.iterdir()]
    assert len(written) > len(set(written)) == ROWS, "nothing had to be done twice"
