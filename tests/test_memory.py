"""Fresh outputs: recycled memory, its limit, and arrays that behave and live like any other."""

import copy
import ctypes
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cases import SANITIZED
from numpy._core.multiarray import get_handler_name
from processes import needs_fork

import bnfast
from bnfast import _arrays, _core, _memory, layers

OURS, NUMPYS = "bnfast_pages", "default_allocator"
MiB = 2**20
LEAST = 128 * 1024

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="this system does not tell resident memory"
)


@pytest.fixture(autouse=True)
def _nothing_kept():
    bnfast.release_memory()
    yield
    bnfast.release_memory()


def kept():
    return _core.kept_memory()[0]


def ones(nbytes):
    return np.ones((nbytes // 32, 8), np.float32)


def double(x, out=None):
    return bnfast.scale_shift(x, np.full(8, 2.0), np.zeros(8), out=out)


def address(a):
    return a.__array_interface__["data"][0]


def run_python(code, **environ):
    """Run `code` after this module's helpers, with all of Python's own checks on."""
    prelude = """
        import os, sys, threading
        import numpy as np, bnfast
        from bnfast import _core
        MiB = 2**20
        def kept(): return _core.kept_memory()[0]
        def double(x): return bnfast.scale_shift(x, np.full(8, 2.0), np.zeros(8))
        def ones(nbytes): return np.ones((nbytes // 32, 8), np.float32)
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c",
         textwrap.dedent(prelude) + textwrap.dedent(code)],
        env=os.environ | environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# ---- Recycling


def test_next_output_reuses_memory():
    x = ones(8 * MiB)
    first = double(x)
    at = address(first)
    del first
    assert kept() >= x.nbytes
    second = double(x)
    assert address(second) == at
    assert kept() == 0
    np.testing.assert_array_equal(second, 2 * x)


def test_similar_size_reuses_memory():
    last = double(ones(8 * MiB))
    at = address(last)
    del last
    assert address(double(ones(8 * MiB + 65536))) == at


def test_half_size_does_not_reuse_memory():
    last = double(ones(8 * MiB))
    del last
    small = double(ones(4 * MiB))
    assert kept() >= 8 * MiB
    assert small.nbytes == 4 * MiB


def test_live_outputs_share_no_memory():
    x = ones(MiB)
    outputs = [double(x) for _ in range(10)]
    places = sorted(address(y) for y in outputs)
    assert all(b - a >= x.nbytes for a, b in pairwise(places))


def test_every_function_reuses_memory(rng):
    x = rng.standard_normal((64, 8, 32, 32), np.float32)
    _, stats = bnfast.batch_norm_forward(x)
    layer = bnfast.BatchNorm(8, activation="relu")
    zeros, units = np.zeros(8, np.float32), np.ones(8, np.float32)
    made = [
        bnfast.batch_norm(x, zeros, units),
        bnfast.batch_norm(x, training=True),
        bnfast.normalize(x, zeros, units),
        layer(x, x),
        *layer.backward(x),
        layer.freeze()(x),
        bnfast.batch_norm_backward(x, x, stats).x,
        bnfast.batch_norm(x.transpose(0, 2, 3, 1), training=True, axis=-1),
    ]
    assert [get_handler_name(y) for y in made] == [OURS] * len(made)


@needs_proc
def test_no_new_pages_at_steady_state():
    resource = pytest.importorskip("resource")
    x = ones(32 * MiB)
    double(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        double(x)
    # 80,000 pages were written; Python and the threads may use some of their own.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recycled_memory_changes_no_bit(rng, dtype):
    x = rng.standard_normal((64, 32, 14, 14)).astype(dtype)
    out = np.full_like(x, np.nan)
    bnfast.batch_norm(x, training=True, out=out)
    for _ in range(3):
        y = bnfast.batch_norm(x, training=True)
        assert y.tobytes() == out.tobytes()
        y.fill(np.nan)
        del y


# ---- The limit


def test_kept_memory_within_limit():
    _, bound = _core.kept_memory()
    for size in range(1, 40):
        double(ones(size * MiB))
        assert kept() <= bound


def test_oldest_block_freed_first():
    code = """
        for size in (20, 30, 10):
            double(ones(size * MiB))
        assert 40 * MiB <= kept() < 50 * MiB, kept()   # 30 and 10; 20 was the oldest
        double(ones(70 * MiB))                         # more than the bound by itself
        assert 40 * MiB <= kept() < 50 * MiB, kept()
    """
    run_python(code, BNFAST_CACHE_BYTES=str(60 * MiB))


def test_limit_holds_for_many_small_blocks():
    x = ones(LEAST)
    outputs = [double(x) for _ in range(1000)]
    del outputs
    assert 100 * LEAST < kept() < 1000 * LEAST


@needs_proc
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer's own memory grows too")
def test_resident_memory_within_limit_and_released():
    code = """
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        x = ones(60 * MiB)
        double(x[:4096])                  # threads, and what else comes with a first call
        before = resident()
        for size in range(1, 61):
            double(x[: size * MiB // 32])
            assert resident() - before < (64 + 4) * MiB, (size, resident() - before)
        assert resident() - before > 40 * MiB
        waiting = kept()
        assert bnfast.release_memory() == waiting
        assert kept() == 0
        assert resident() - before < 4 * MiB, resident() - before
    """
    run_python(code, BNFAST_CACHE_BYTES=str(64 * MiB))


def test_nothing_kept_with_limit_zero():
    code = """
        y = double(ones(8 * MiB))
        assert y[0, 0] == 2
        del y
        print(kept(), bnfast.release_memory())
    """
    assert run_python(code, BNFAST_CACHE_BYTES="0").split() == ["0", "0"]


@pytest.mark.parametrize("value", ["-1", "1e9", "64M", "many", str(2**64), "9" * 5000])
def test_invalid_limit_is_named(value):
    with pytest.raises(ImportError, match=r"BNFAST_CACHE_BYTES is '.*expected a number of bytes"):
        _memory._from_environment({"BNFAST_CACHE_BYTES": value})


def test_limit_from_environment():
    assert _memory._from_environment({}) is None
    assert _memory._from_environment({"BNFAST_CACHE_BYTES": " "}) is None
    asked = _memory._from_environment({"BNFAST_CACHE_BYTES": "4096"})
    assert asked == (4096, "BNFAST_CACHE_BYTES")


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": 512 * MiB}, 512 * MiB),
        ("0::/a/b", {"a/memory.max": 256 * MiB, "a/b/memory.high": 512 * MiB}, 256 * MiB),
        ("0::/outside", {"memory.max": 128 * MiB}, 128 * MiB),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": 64 * MiB}, 64 * MiB),
    ],
)
def test_container_memory_limit_counts(tmp_path, groups, files, limit):
    membership = tmp_path / "proc/self/cgroup"
    membership.parent.mkdir(parents=True)
    membership.write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert _memory._from_machine(str(tmp_path)) == (limit // 16, "1/16 of the cgroup's memory")


def test_default_limit_is_small_part_of_memory(tmp_path):
    bound, _ = _memory._from_machine(str(tmp_path))
    assert 0 < bound <= min(_core.physical_memory() / 16, 2**30)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="Python has no other way to ask here")
def test_memory_of_the_machine():
    assert _core.physical_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- Giving back


def test_release_frees_only_kept_memory():
    x = ones(8 * MiB)
    y, z = double(x), double(x)
    del z
    waiting = kept()
    assert waiting >= x.nbytes
    assert bnfast.release_memory() == waiting
    assert bnfast.release_memory() == kept() == 0
    np.testing.assert_array_equal(y, 2 * x)


def test_show_config_prints_kept_memory(capsys):
    double(ones(8 * MiB))
    bnfast.show_config()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "kept memory" in line]
    assert f"{kept() / MiB:g} MiB of " in line
    assert _memory.bound()[1] in line


# ---- An array like any other


def test_output_is_an_ordinary_array():
    y = double(ones(MiB))
    assert type(y) is np.ndarray
    assert y.base is None
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.flags.carray
    assert address(y) % 64 == 0
    for twin in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y), y.copy()):
        np.testing.assert_array_equal(twin, y)
        assert get_handler_name(twin) != OURS


def test_small_outputs_use_numpy_memory():
    assert get_handler_name(double(ones(LEAST - 32))) == NUMPYS
    assert get_handler_name(double(ones(LEAST))) == OURS
    assert get_handler_name(np.empty(MiB)) == NUMPYS
    assert get_handler_name(np.zeros(MiB)) == NUMPYS


@pytest.mark.parametrize("factor", [0.001, 0.5, 0.99, 1.01, 2, 20])
def test_an_output_can_be_resized(factor):
    y = double(np.arange(MiB, dtype=np.float32).reshape(-1, 8))
    before = y.ravel().copy()
    rows = int(len(y) * factor)
    y.resize((rows, 8), refcheck=False)
    common = min(len(before), y.size)
    np.testing.assert_array_equal(y.ravel()[:common], before[:common])
    assert not y.ravel()[common:].any()
    assert get_handler_name(y) == OURS


def test_absurd_size_raises_memory_error():
    y = double(ones(MiB))
    for size in (2**50, 2**60):
        with pytest.raises(MemoryError):
            y.resize(size, refcheck=False)
    np.testing.assert_array_equal(y, 2 * ones(MiB))


def test_tracemalloc_sees_outputs():
    x = ones(8 * MiB)
    double(x)
    tracemalloc.start()
    try:
        y = double(x)
        with_output, _ = tracemalloc.get_traced_memory()
        del y
        without, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert with_output - without >= x.nbytes


def test_own_memory_handler_is_respected():
    """NumPy's API through ctypes: a handler with another name and NumPy's own functions."""
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = ctypes.cast(
        api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None),
        ctypes.POINTER(ctypes.c_void_p),
    )
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])
    get_handler = ctypes.PYFUNCTYPE(ctypes.py_object)(table[305])

    name = b"mem_handler"
    default = api.PyCapsule_GetPointer(get_handler(), name)
    theirs = ctypes.create_string_buffer(ctypes.string_at(default, 128 + 5 * 8))
    theirs[:7] = b"theirs\0"
    previous = set_handler(api.PyCapsule_New(ctypes.addressof(theirs), name, None))
    try:
        y = double(ones(MiB))
        assert get_handler_name(y) == get_handler_name(np.empty(3)) == "theirs"
        del y
    finally:
        set_handler(previous)
    assert get_handler_name(double(ones(MiB))) == OURS


def test_memory_that_runs_out():
    """Kept memory is freed first; then there is a MemoryError, and nothing else has changed."""
    pytest.importorskip("resource")
    code = """
        import resource
        from numpy._core.multiarray import get_handler_name
        bnfast.set_num_threads(1)
        x = ones(96 * MiB)
        double(x[: len(x) // 2])
        assert kept() >= 48 * MiB
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MiB, resource.RLIM_INFINITY))
        y = double(x)                     # fits in what is free and what waits together
        assert kept() == 0
        mean, var = np.zeros(8, np.float32), np.ones(8, np.float32)
        try:
            bnfast.batch_norm(x, mean, var, training=True)
        except MemoryError as error:
            print(type(error).__name__)
        assert not mean.any() and (var == 1).all()
        assert get_handler_name(np.empty(3)) == "default_allocator"
        del y
        assert double(x)[-1, -1] == 2
    """
    assert "MemoryError" in run_python(code, BNFAST_CACHE_BYTES=str(1024 * MiB))


def test_statistics_unchanged_if_any_allocation_fails():
    """Each of Python's allocations fails in turn; all updates are made last, together.

    Only on the common path: elsewhere NumPy, or Python itself, does not always survive that.
    """
    pytest.importorskip("_testcapi")
    code = """
        import _testcapi
        bnfast.set_num_threads(1)
        x = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)
        mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
        layer = bnfast.BatchNorm(4, activation="relu")
        running = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
        calls = [
            (lambda: bnfast.batch_norm(x, mean, var, training=True), [mean, var]),
            (lambda: layer(x), running),
        ]
        for call, targets in calls:
            call()
            failed = 0
            for n in range(100):
                for a in targets:
                    a[...] = 7
                _testcapi.set_nomemory(n, n + 1)
                try:
                    call()
                    continue
                except MemoryError as error:
                    caught = error
                finally:
                    _testcapi.remove_mem_hooks()
                failed += 1
                moved = {not (a == 7).all() for a in targets}
                # A layer keeps what its backward needs once it has counted the batch.
                assert moved == {False} or (targets is running and moved == {True}), n
            assert failed > 3
        print("done")
    """
    assert run_python(code) == "done\n"


@pytest.mark.parametrize("way", ["strided", "strided statistics", "layer"])
def test_statistics_unchanged_if_result_cannot_be_returned(way, monkeypatch):
    """With a copy, whose last step may also run out of memory."""

    def fail(self, result):
        raise MemoryError

    monkeypatch.setattr(_arrays.Canonical, "write_back", fail)
    x = np.random.default_rng(0).standard_normal((6, 4, 10)).astype(np.float32)[..., ::2]
    layer = bnfast.BatchNorm(4)
    if way == "strided statistics":
        mean, var = np.zeros((2, 8), np.float32)[:, ::2]
    else:
        mean, var = layer.running_mean, layer.running_var
    mean[...], var[...] = 7, 7
    with pytest.raises(MemoryError):
        layer(x) if way == "layer" else bnfast.batch_norm(x, mean, var, training=True)
    assert (mean == 7).all()
    assert (var == 7).all()
    assert layer.num_batches_tracked == 0


def test_gradients_unchanged_if_one_cannot_be_added(monkeypatch):
    x = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)
    layer = bnfast.BatchNorm(4)
    layer(x)
    sums = iter([layer.weight_grad + 1])

    def runs_out(total, new):
        try:
            return next(sums)
        except StopIteration:
            raise MemoryError from None

    monkeypatch.setattr(layers, "_sum", runs_out)
    with pytest.raises(MemoryError):
        layer.backward(x)
    assert not layer.weight_grad.any()
    assert not layer.bias_grad.any()


# ---- Threads, forks, the end


def test_freed_in_another_thread():
    x = ones(8 * MiB)
    outputs = [double(x)]
    at = address(outputs[0])
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    assert kept() >= x.nbytes
    assert address(double(x)) == at


def test_eight_threads():
    sizes = [LEAST, 2 * LEAST, MiB, 3 * MiB]

    def hammer(seed):
        mine = np.random.default_rng(seed)
        held = []
        for _ in range(60):
            x = np.full((sizes[mine.integers(len(sizes))] // 32, 8), seed, np.float32)
            held.append(double(x))
            if len(held) > 4:
                assert (held.pop(int(mine.integers(4))) == 2 * seed).all()
            if mine.random() < 0.05:
                bnfast.release_memory()
        return all((y == 2 * seed).all() for y in held)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(hammer, range(1, 9)))


@needs_fork
def test_a_forked_child_has_a_pool_of_its_own():
    code = """
        x = ones(8 * MiB)
        y, z = double(x), double(x)
        del z
        waiting = kept()
        pid = os.fork()
        if pid == 0:
            good = kept() == 0 and (y == 2).all()
            del y
            good = good and kept() > 0 and (double(x) == 2).all()
            os._exit(0 if good else 1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
        assert kept() == waiting
        assert (y == 2).all() and (double(x) == 2).all()
    """
    run_python(code, BNFAST_NUM_THREADS="1")


@needs_fork
def test_fork_during_allocations_does_not_hang():
    code = """
        x = ones(MiB)
        done = threading.Event()
        def work():
            while not done.is_set():
                double(x)
                bnfast.release_memory()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if (double(x) == 2).all() else 1)
            assert os.waitpid(pid, 0)[1] == 0
        done.set()
        for thread in threads:
            thread.join()
    """
    run_python(code, BNFAST_NUM_THREADS="1")


def test_outputs_outlive_the_module_and_the_interpreter():
    code = """
        import atexit, builtins, gc
        x = ones(8 * MiB)
        y = double(x)
        builtins.last = double(x)         # freed when the builtins are, after all modules
        class AtTheEnd:
            def __init__(self): self.y = double(x)
            def __del__(self): assert self.y[-1, -1] == 2
        cycle = AtTheEnd()
        cycle.self = cycle
        thread_local = threading.local()
        thread_local.y = double(x)
        atexit.register(lambda held: held.resize(2**22, refcheck=False), double(x))
        release = bnfast.release_memory
        for name in [name for name in sys.modules if name.partition(".")[0] == "bnfast"]:
            del sys.modules[name]
        del bnfast, _core, double, kept
        gc.collect()
        assert (y == 2).all()
        y = None
        assert release() > 0
    """
    run_python(code)
