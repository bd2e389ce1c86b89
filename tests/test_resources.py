"""What calls need and leave: stacks, threads that cannot be had, memory, interrupts."""

from pathlib import Path

import pytest
from cases import SANITIZED
from processes import run_python

from bnfast import _core

EVERY_KERNEL = """
import threading
import numpy as np, bnfast

def work():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for shape in ((64, 4096), (8, 4096, 3, 3), (4, 64, 40, 40), (2, 3, 30000)):
            x = rng.standard_normal(shape).astype(dtype)
            y, stats = bnfast.batch_norm_forward(x, activation="relu", residual=x)
            bnfast.batch_norm_backward(x, x, stats, activation="relu", residual=x)
            bnfast.batch_norm_backward(x, x, stats)
            bnfast.scale_shift(x, None, None)
            bnfast.moments(x)
    print("done")
"""


@pytest.mark.skipif(SANITIZED, reason="frames are larger under AddressSanitizer")
@pytest.mark.parametrize("isa", _core.isas())
def test_documented_stack_size_suffices(isa):
    """Half of the stated stack: kernels keep 112 KiB of rounded parameters there."""
    code = EVERY_KERNEL + (
        "threading.stack_size(128 * 1024)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()"
    )
    done = run_python(code, BNFAST_ISA=isa, BNFAST_NUM_THREADS="2", OMP_STACKSIZE="128k")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no size to read")
def test_call_runs_on_fewer_threads_if_none_available():
    """libgomp would end the process. The address space is so full that no thread's stack fits."""
    code = """
import os, resource, numpy as np, bnfast

x = np.random.default_rng(0).standard_normal((16, 64, 56, 56), dtype=np.float32)
out, want = np.empty_like(x), np.empty_like(x)
with bnfast.num_threads(1):
    bnfast.scale_shift(x, None, None, out=want)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + 4_000_000, resource.RLIM_INFINITY))
for _ in range(3):
    bnfast.scale_shift(x, None, None, out=out)
assert not bnfast._core.pool_started()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print((out == want).all())
bnfast.scale_shift(x, None, None, out=out)
print((out == want).all(), bnfast._core.pool_started())
"""
    done = run_python(code, BNFAST_NUM_THREADS="2")
    assert (done.returncode, done.stdout) == (0, "True\nTrue True\n"), done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no resident memory to read")
def test_no_memory_growth_in_many_calls():
    code = """
import os, numpy as np, bnfast

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

x = np.random.default_rng(0).standard_normal((8, 4, 3)).astype(np.float32)
layer, frozen = bnfast.BatchNorm(4, activation="relu"), bnfast.BatchNorm(4).freeze()
strided, bad, half = x[::-1], x[:, :3], x.astype(np.float16)
gaps = np.zeros((8, 4, 6), np.float32)[..., ::2]
state, parts = layer.state_dict(), bnfast.Moments.empty(4)

def calls():
    for _ in range(6_000):
        layer(x)
        layer.backward(x)
        frozen(strided, strided, gaps)
        parts.update(half)
        layer.load_state_dict(state)
        bnfast.fold(half[0], None, frozen)
        try:
            layer(bad)
        except ValueError:
            pass

calls()
before = resident()
calls()
calls()
assert resident() - before < 1_000_000, resident() - before
print("done")
"""
    assert run_python(code).stdout == "done\n"


def test_interrupt_between_calls():
    code = """
import signal, threading, numpy as np, bnfast
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
x = np.ones((16, 64, 28, 28), np.float32)
layer = bnfast.BatchNorm(64)
try:
    layer(x)
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    while True:
        layer(x)
except KeyboardInterrupt:
    # Between calls: the statistics are those of as many batches as were counted.
    again = bnfast.BatchNorm(64)
    for _ in range(int(layer.num_batches_tracked)):
        again(x)
    print(again.running_var.tobytes() == layer.running_var.tobytes())
"""
    done = run_python(code, BNFAST_NUM_THREADS="1")  # as fast the second time as the first
    assert done.stdout == "True\n", done.stderr
