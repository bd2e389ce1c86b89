"""The calling thread's floating-point environment changes no bit of a result, and is restored."""

import ctypes
import ctypes.util
import platform

import pytest
from processes import run_python

# fenv.h's numbers, which depend on the processor.
UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())

needs_fenv = pytest.mark.skipif(
    UPWARD is None or ctypes.util.find_library("m") is None, reason="no numbers for fesetround here"
)

CALLS = """
import ctypes, ctypes.util
import numpy as np, bnfast

rng = np.random.default_rng(0)
x = rng.standard_normal((16, 64, 56, 56), dtype=np.float32)
x[:, ::7] *= 1e-39                                   # denormals
small = x[:2, :, :2, :2].copy()                      # a call that keeps the GIL
weight, bias = rng.standard_normal((2, 64), dtype=np.float32)

def everything():
    found = []
    for threads in (1, 2):
        with bnfast.num_threads(threads):
            for data in (x, small):
                mean, var = np.zeros(64, np.float32), np.ones(64, np.float32)
                found.append(bnfast.batch_norm(data, mean, var, weight, bias, True, eps=1e-3))
                y, stats = bnfast.batch_norm_forward(data, weight, bias, eps=1e-3)
                grads = bnfast.batch_norm_backward(data, data, stats, weight, bias)
                m = bnfast.moments(data)
                found += [mean, var, y, *stats[:3], *grads[:3], m.mean, m.m2]
                found += [bnfast.batch_norm(data, mean, var, weight, bias),
                          bnfast.scale_shift(data, weight, bias)]
    return [a.tobytes() for a in found]

want = everything()                                  # and the pool's threads are born
assert want[:len(want) // 2] == want[len(want) // 2:]
"""


@needs_fenv
def test_rounding():
    code = (
        CALLS
        + f"""
libm = ctypes.CDLL(ctypes.util.find_library("m"))
assert libm.fesetround({UPWARD}) == 0
found = everything()
mode = libm.fegetround()
libm.fesetround(0)
print(found == want, mode == {UPWARD})
"""
    )
    done = run_python(code)
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.slow
def test_flushing_denormals():
    pytest.importorskip("torch")
    code = (
        CALLS
        + """
import torch
assert torch.set_flush_denormal(True)
found = everything()
flushes = float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0
torch.set_flush_denormal(False)
print(found == want, flushes)
"""
    )
    done = run_python(code)
    assert done.stdout == "True True\n", done.stderr


@needs_fenv
def test_openmp_threads_keep_their_environment():
    """The threads of the pool that OpenMP's other users share."""
    code = (
        CALLS
        + f"""
libm = ctypes.CDLL(ctypes.util.find_library("m"))
libgomp = ctypes.CDLL("libgomp.so.1")
modes = []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def look(_):
    modes.append(libm.fegetround())

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def turn(_):
    libm.fesetround({UPWARD})

libgomp.GOMP_parallel(turn, None, 2, 0)
found = everything()
libgomp.GOMP_parallel(look, None, 2, 0)
print(found == want, modes == [{UPWARD}] * 2)
"""
    )
    done = run_python(code)
    if "libgomp" in done.stderr:
        pytest.skip("another runtime than libgomp")
    assert done.stdout == "True True\n", done.stderr
