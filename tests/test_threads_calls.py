"""Calls from many Python threads, and calls at the same time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import needs_fork, run_python

import bnfast
from bnfast import _config, _core

pytestmark = pytest.mark.usefixtures("own_default")

# Large enough that every driver uses several threads if it may.
LARGE = (16, 64, 56, 56)


@pytest.mark.smoke
def test_eight_threads_share_a_frozen_layer():
    rng = np.random.default_rng(8)
    layer = bnfast.BatchNorm2d(64)
    layer(rng.standard_normal(LARGE, dtype=np.float32))
    frozen = layer.freeze()
    inputs = [rng.standard_normal((4, *LARGE[1:]), dtype=np.float32) for _ in range(8)]
    expected = [frozen(x).tobytes() for x in inputs]
    barrier = threading.Barrier(8, timeout=30)

    def work(i):
        barrier.wait()
        with bnfast.num_threads(1 + i % 3):
            return all(frozen(inputs[i]).tobytes() == expected[i] for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8), timeout=120))


def test_two_layers_train_side_by_side():
    rng = np.random.default_rng(2)
    batches = [rng.standard_normal(LARGE, dtype=np.float32) for _ in range(3)]

    def train(_):
        layer = bnfast.BatchNorm2d(64, activation="relu")
        for x in batches * 2:
            layer.backward(layer(x))
        return [a.tobytes() for a in (*layer.state_dict().values(), layer.weight_grad)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, range(2), timeout=120)
    assert first == second == train(0)


def hammer(n, until, threads=None, shape=LARGE):
    """Call from n Python threads without a pause until `until` accepts `_core.at_work()`."""
    x = np.ones(shape, np.float32)
    done = threading.Event()

    def work(out):
        while not done.is_set():
            bnfast.scale_shift(x, None, None, out=out)

    def watch():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if until(*_core.at_work()):
                return True
            time.sleep(0.001)  # without the GIL: the next check sees other calls
        return False

    if threads is not None:
        bnfast.set_num_threads(threads)
    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(work, np.empty_like(x)) for _ in range(n)]
        try:
            return watch()
        finally:
            done.set()
            for future in futures:
                future.result(timeout=60)


def test_no_threads_counted_between_calls():
    hammer(2, lambda calls, threads: calls == 2, threads=2)
    assert _core.at_work() == (0, 0)


def test_a_call_alone_has_all_threads():
    assert hammer(1, lambda calls, threads: (calls, threads) == (1, 4), threads=4)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_calls_at_the_same_time_share_the_threads(n, most):
    """Each has at least its own thread; the others are never more than one call may have."""
    seen = []

    def enough(calls, threads):
        if calls >= 2:
            seen.append((calls, threads))
        return len(seen) >= 100

    assert hammer(n, enough, threads=most)
    assert all(calls <= threads <= most + calls - 1 for calls, threads in seen), max(seen)


@needs_fork
def test_child_forked_during_calls_counts_no_calls():
    """Otherwise it would share its threads forever with calls that are in its parent."""
    code = """
import os, threading
import numpy as np, bnfast
from bnfast import _core

x = np.ones((16, 64, 56, 56), np.float32)
done = threading.Event()

def work():
    out = np.empty_like(x)
    while not done.is_set():
        bnfast.scale_shift(x, None, None, out=out)

threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
amid = 0
for _ in range(50):
    amid += _core.at_work()[0] > 0
    pid = os.fork()
    if pid == 0:
        os._exit(_core.at_work() != (0, 0))
    assert os.waitpid(pid, 0)[1] == 0
done.set()
for thread in threads:
    thread.join()
print(amid > 0, _core.at_work())
"""
    done = run_python(code, BNFAST_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    assert done.stdout == "True (0, 0)\n", done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no threads to count")
def test_no_nested_openmp_region():
    """By OpenMP's own rule: a region within a region has one thread, unless requested otherwise."""
    code = """
import ctypes, os
import numpy as np, bnfast

bnfast.set_num_threads(4)
x = np.ones((16, 64, 56, 56), np.float32)
want = bnfast.moments(x)          # libgomp is here
native, right = [], []
runtime = ctypes.CDLL("libgomp.so.1")

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    right.append(bnfast.moments(x) == want)
    native.append(len(os.listdir("/proc/self/task")))

before = len(os.listdir("/proc/self/task"))
runtime.GOMP_parallel(body, None, 3, 0)
print(len(right), all(right), max(native) <= before)
"""
    if not any("libgomp" in path for path in _config._openmp_runtimes()):
        pytest.skip("another runtime than libgomp")
    done = run_python(code)
    assert done.stdout == "3 True True\n", done.stdout + done.stderr


def test_thread_limit_affects_only_its_thread():
    """In a pool with one Python thread per core, each call may be told to use one thread."""

    def work(i):
        with bnfast.num_threads(1):
            x = np.ones(LARGE, np.float32)
            return bnfast.get_num_threads(), float(bnfast.moments(x).mean[0])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4), timeout=60)) == [(1, 1.0)] * 4
