"""Forked processes: correct, in time, and on one thread if OpenMP's threads may have been lost."""

import importlib.util
import json
import platform
import shutil
import subprocess

import pytest
from processes import needs_fork, run_python

from bnfast import _config

LARGE = (16, 64, 56, 56)  # enough for several threads

pytestmark = needs_fork
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the extra bnfast[torch]"
)


FORK = """
import ctypes, json, os, signal, zlib
import numpy as np
{before_import}
import bnfast
from bnfast import _core

def compute():
    y, stats = bnfast.batch_norm_forward(x)
    dx = bnfast.batch_norm_backward(y, x, stats, needs=("x",)).x
    return json.dumps([bnfast.get_num_threads(), zlib.crc32(y), zlib.crc32(dx)])

x = np.random.default_rng(0).standard_normal({shape}, dtype=np.float32)
{before_fork}
read, write = os.pipe()
if {fork}() == 0:
    signal.alarm(30)  # a hanging child ends itself, and its parent reads nothing
    bnfast.set_num_threads(2)
    os.write(write, compute().encode())
    os._exit(0)
os.close(write)
print(os.read(read, 1000).decode())
os.wait()
print(compute())
"""


def fork(before_fork="", before_import="", fork="os.fork"):
    """Compute in a forked child and then in its parent; return (threads, y, dx) of both."""
    code = FORK.format(shape=LARGE, before_fork=before_fork, before_import=before_import, fork=fork)
    done = run_python(code, BNFAST_NUM_THREADS="2", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_child_forked_after_a_parallel_call_runs_on_one_thread():
    child, parent = fork("bnfast.batch_norm_forward(x); assert _core.pool_started()")
    assert child == [1, *parent[1:]]
    assert parent[0] == 2


def test_a_child_forked_before_any_parallel_call_uses_its_threads():
    child, parent = fork("assert not _core.pool_started()")
    assert child == parent
    assert parent[0] == 2


def test_a_pool_of_forked_processes_after_a_parallel_call():
    """As `multiprocessing` makes on Linux before 3.14, and servers that fork their workers."""
    code = """
import multiprocessing, zlib
import numpy as np, bnfast

x = np.random.default_rng(0).standard_normal((16, 64, 56, 56), dtype=np.float32)
frozen = bnfast.BatchNorm(64).freeze()

def work(_):
    return bnfast.get_num_threads(), zlib.crc32(frozen(x))

bnfast.set_num_threads(2)
want = zlib.crc32(frozen(x))
with multiprocessing.get_context("fork").Pool(3) as pool:
    print(set(pool.map_async(work, range(12)).get(timeout=60)) == {(1, want)})
"""
    done = run_python(code, timeout=90, PYTHONWARNINGS="ignore")
    assert done.stdout == "True\n", done.stderr


@needs_torch
@pytest.mark.slow
def test_a_child_forked_after_torch_ran_in_parallel_runs_on_one_thread():
    child, parent = fork(
        "torch.set_num_threads(2); torch.relu(torch.from_numpy(x))", before_import="import torch"
    )
    assert child == [1, *parent[1:]]


# ---- other users of the same runtime

OTHER_USER = """
#include <omp.h>
int run(void)
{
    int n = 0;
#pragma omp parallel num_threads(2) reduction(+ : n)
    n += 1;
    return n;
}
"""


@pytest.fixture(scope="module")
def other_user(tmp_path_factory):
    """A library that runs a parallel region of OpenMP."""
    if shutil.which("cc") is None:
        pytest.skip("no cc on this machine")
    if not any("libgomp" in path for path in _config._openmp_runtimes()):
        pytest.skip("another runtime than libgomp")
    folder = tmp_path_factory.mktemp("other")
    (folder / "other.c").write_text(OTHER_USER, "utf-8")
    library = folder / "libother.so"
    command = ["cc", "-fopenmp", "-shared", "-fPIC", folder / "other.c", "-o", library]
    subprocess.run(command, check=True, timeout=60)
    return f"ctypes.CDLL({str(library)!r})"


def test_another_user_of_the_runtime_ran_before_the_fork(other_user):
    child, parent = fork(f"assert {other_user}.run() == 2; assert not _core.pool_started()")
    assert child == [1, *parent[1:]]
    assert parent[0] == 2


def test_other_user_that_did_not_run_has_no_effect(other_user):
    child, parent = fork(f"{other_user}")
    assert child == parent
    assert parent[0] == 2


IMPORT_IN_CHILD = """
import ctypes, os, signal, sys, threading, zlib
import numpy as np

x = np.random.default_rng(0).standard_normal({shape}, dtype=np.float32)
{before_fork}

def work():
    import bnfast
    bnfast.set_num_threads(2)
    y = bnfast.batch_norm(x, training=True)
    return bnfast.get_num_threads(), zlib.crc32(y)

if os.fork() == 0:
    signal.alarm(30)
    {in_child}
    print(*work(), flush=True)
    os._exit(0)
os.wait()
print(*work(), flush=True)
"""


def import_in_child(before_fork, in_child=""):
    """Import bnfast and compute in a child, then in its parent; [threads, y] of both."""
    code = IMPORT_IN_CHILD.format(shape=LARGE, before_fork=before_fork, in_child=in_child)
    done = run_python(code, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    return [list(map(int, line.split())) for line in done.stdout.splitlines()]


def test_child_imports_after_other_user_ran_in_parent(other_user):
    child, parent = import_in_child(f"assert {other_user}.run() == 2")
    assert child == [1, parent[1]]
    assert parent[0] == 2


def test_child_imports_in_another_thread(other_user):
    """The memory of that thread is not that of the thread that lost its pool."""
    there = "t = threading.Thread(target=__import__, args=('bnfast',)); t.start(); t.join()"
    child, parent = import_in_child(f"assert {other_user}.run() == 2", there)
    assert child == [1, parent[1]]


def test_child_imports_after_no_parallel_run_uses_threads():
    child, parent = import_in_child("")
    assert child == parent
    assert parent[0] == 2


# ---- forks that Python does not see


def test_a_fork_from_c():
    child, parent = fork("bnfast.batch_norm_forward(x)", fork="ctypes.PyDLL(None).fork")
    assert child == [1, *parent[1:]]
    assert parent[0] == 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number is x86-64's")
def test_a_fork_by_system_call():
    """It runs no handlers of the C library either."""
    number = 57
    child, parent = fork(
        "bnfast.batch_norm_forward(x)", fork=f"(lambda: ctypes.PyDLL(None).syscall({number}))"
    )
    assert child == [1, *parent[1:]]
    assert parent[0] == 2


# ---- locks that another thread may hold at a fork


def test_calls_import_nothing():
    """If another thread of the parent was in an import, the child would wait for it forever."""
    code = """
import sys
import numpy as np, bnfast
before = set(sys.modules)
x = np.ones((16, 64, 56, 56), np.float32)
layer = bnfast.BatchNorm2d(64, activation="relu")
layer.backward(layer(x, x))
layer.eval()(x)
layer.freeze()(x.transpose(0, 1, 3, 2))
bnfast.moments(x[:, ::2]).update(x[:, ::2])
bnfast.get_num_threads()
bnfast.normalize(memoryview(x), [0.0] * 64, np.ones(64, ">f4"), eps=1)
try:
    bnfast.batch_norm_forward(x, eps=[])
except TypeError:
    pass
print(sorted(set(sys.modules) - before))
"""
    done = run_python(code, BNFAST_NUM_THREADS=None, OMP_NUM_THREADS=None)
    assert done.stdout == "[]\n", done.stderr
