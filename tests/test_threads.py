"""The number of threads: requests, limits of the machine; calls from many threads."""

import importlib.util
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import SANITIZED
from processes import needs_fork, run_python

import bnfast
from bnfast import _config, _core, _threads

# Large enough that every driver uses several threads if it may.
LARGE = (16, 64, 56, 56)

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the extra bnfast[torch]"
)


@pytest.fixture(autouse=True)
def _own_default(monkeypatch):
    """Give each test its own process default, and no number set in this thread."""
    monkeypatch.setattr(_threads, "_default", 5)
    monkeypatch.setattr(_threads, "_default_source", "a test")
    token = _threads._asked_here.set(None)
    yield
    _threads._asked_here.reset(token)


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(timeout=60)


# ---- setting a number


def test_block_sets_and_restores():
    assert bnfast.get_num_threads() == 5
    with bnfast.num_threads(3):
        assert bnfast.get_num_threads() == 3
        with bnfast.num_threads(1):
            assert bnfast.get_num_threads() == 1
        assert bnfast.get_num_threads() == 3
    assert bnfast.get_num_threads() == 5


def test_a_block_restores_after_an_exception():
    with pytest.raises(KeyError), bnfast.num_threads(3):
        raise KeyError
    assert bnfast.get_num_threads() == 5


def test_block_does_not_affect_other_threads():
    with bnfast.num_threads(3):
        assert in_thread(bnfast.get_num_threads) in (5, 3)  # 3 where threads inherit contexts
    assert in_thread(bnfast.get_num_threads) == 5


def test_set_in_the_main_thread_is_the_default_of_all():
    bnfast.set_num_threads(7)
    assert bnfast.get_num_threads() == 7
    assert in_thread(bnfast.get_num_threads) == 7


def test_set_in_another_thread_stays_there():
    def work():
        bnfast.set_num_threads(2)
        return bnfast.get_num_threads()

    assert in_thread(work) == 2
    assert bnfast.get_num_threads() == 5


def test_overlapping_blocks_in_threads_do_not_disturb_each_other():
    barrier = threading.Barrier(2, timeout=30)
    seen = {}

    def work(n, leaves_first):
        barrier.wait()
        with bnfast.num_threads(n):
            barrier.wait()  # both are inside
            seen[n, "both inside"] = bnfast.get_num_threads()
            if not leaves_first:
                barrier.wait()  # the other one is outside
                seen[n, "alone inside"] = bnfast.get_num_threads()
        seen[n, "outside"] = bnfast.get_num_threads()
        if leaves_first:
            barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, 2, True), pool.submit(work, 3, False)]:
            future.result(timeout=60)
    assert seen == {
        (2, "both inside"): 2,
        (3, "both inside"): 3,
        (3, "alone inside"): 3,
        (2, "outside"): 5,
        (3, "outside"): 5,
    }


@pytest.mark.parametrize("call", [bnfast.set_num_threads, bnfast.num_threads])
@pytest.mark.parametrize(
    ("n", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1025, ValueError),
        (2**70, ValueError),
        (True, TypeError),
        (2.0, TypeError),
        ("2", TypeError),
        (None, TypeError),
        (np.bool_(True), TypeError),
    ],
)
def test_a_bad_number_is_named(call, n, error):
    with pytest.raises(error, match=r"^n is .*expected an integer from 1 to 1024"):
        call(n)
    assert bnfast.get_num_threads() == 5


def test_numpy_integers_are_integers():
    with bnfast.num_threads(np.int64(2)):
        assert bnfast.get_num_threads() == 2
        assert type(bnfast.get_num_threads()) is int


# ---- the process default


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, (3, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "4,2,1"}, (4, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": " 2 "}, (2, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "-2"}, None),
        ({"OMP_NUM_THREADS": ""}, None),
        ({"OMP_NUM_THREADS": "99999"}, (1024, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "9" * 5000}, None),  # more digits than Python converts to a number
        ({"BNFAST_NUM_THREADS": "6", "OMP_NUM_THREADS": "3"}, (6, "BNFAST_NUM_THREADS")),
        ({"BNFAST_NUM_THREADS": "", "OMP_NUM_THREADS": "3"}, (3, "OMP_NUM_THREADS")),
    ],
)
def test_environment(environ, expected):
    assert _threads._from_environment(environ) == expected


@pytest.mark.parametrize("value", ["many", "0", "-1", "2.5", "2,1", "1025", "9" * 5000, "\u0663"])
def test_bad_environment_variable_is_import_error(value):
    with pytest.raises(ImportError, match=rf"BNFAST_NUM_THREADS is '?{value[:50]}.*; expected"):
        _threads._from_environment({"BNFAST_NUM_THREADS": value})


def test_the_environment_counts_at_import():
    code = "import bnfast; print(bnfast.get_num_threads())"
    assert run_python(code, BNFAST_NUM_THREADS="3").stdout == "3\n"
    failed = run_python(code, BNFAST_NUM_THREADS="three")
    assert failed.returncode == 1
    assert "ImportError: BNFAST_NUM_THREADS is 'three'" in failed.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity cannot be set here")
def test_affinity_limits_the_default():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import bnfast; print(bnfast.get_num_threads())"
    )
    done = run_python(code, BNFAST_NUM_THREADS=None, OMP_NUM_THREADS=None)
    assert done.stdout == "1\n", done.stderr


def fake_machine(root, groups, **files):
    """Write a tree with `groups` as /proc/self/cgroup and `files` under /sys/fs/cgroup."""
    membership = root / "proc/self/cgroup"
    membership.parent.mkdir(parents=True)
    membership.write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V2 = {"nested": "0::/user.slice/job.scope\n", "namespace": "0::/\n"}
V1 = "5:memory:/docker/1a2b\n4:cpu,cpuacct:/docker/1a2b\n1:name=systemd:/docker/1a2b\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param(V2["namespace"], {"cpu.max": "200000 100000\n"}, 2, id="v2"),
        pytest.param(V2["namespace"], {"cpu.max": "250000 100000\n"}, 3, id="v2 rounds up"),
        pytest.param(V2["namespace"], {"cpu.max": "1000 100000\n"}, 1, id="v2 at least one"),
        pytest.param(V2["namespace"], {"cpu.max": "max 100000\n"}, None, id="v2 no limit"),
        pytest.param(V2["namespace"], {"cpu.max": "12 0\n"}, None, id="v2 no period"),
        pytest.param(V2["namespace"], {"cpu.max": "rubbish"}, None, id="v2 rubbish"),
        pytest.param(V2["namespace"], {}, None, id="v2 no file"),
        pytest.param(
            V2["nested"], {"user.slice/job.scope/cpu.max": "300000 100000"}, 3, id="v2 nested"
        ),
        pytest.param(
            V2["nested"],
            {
                "user.slice/job.scope/cpu.max": "max 100000",
                "user.slice/cpu.max": "150000 100000",
            },
            2,
            id="v2 the group around limits",
        ),
        pytest.param(
            "0::/../../other\n", {"cpu.max": "400000 100000"}, 4, id="v2 outside of the namespace"
        ),
        pytest.param(
            "1:cpu:/a\n0::/\n", {"unified/cpu.max": "200000 100000"}, 2, id="v2 beside v1"
        ),
        pytest.param(
            V1,
            {
                "cpu,cpuacct/docker/1a2b/cpu.cfs_quota_us": "350000\n",
                "cpu,cpuacct/docker/1a2b/cpu.cfs_period_us": "100000\n",
            },
            4,
            id="v1",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            1,
            id="v1 own group mounted as the root",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1 no limit",
        ),
        pytest.param("", {}, None, id="no groups"),
        pytest.param("nonsense\n\n:::\n", {}, None, id="nonsense"),
    ],
)
def test_cgroup_quota(tmp_path, groups, files, cores):
    assert _threads.cgroup_cores(fake_machine(tmp_path, groups, **files)) == cores


def test_cgroup_quota_without_proc(tmp_path):
    assert _threads.cgroup_cores(str(tmp_path)) is None


def test_the_smaller_of_affinity_and_quota(tmp_path, monkeypatch):
    root = fake_machine(tmp_path, V2["namespace"], **{"cpu.max": "200000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert _threads._from_machine(root) == (2, "cgroup CPU quota")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert _threads._from_machine(root) == (1, "cores in this process's affinity")


# ---- calls from many threads


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


# ---- show_config


def test_show_config_says_what_a_bug_report_needs(capsys):
    with bnfast.num_threads(3):
        bnfast.show_config()
    lines = capsys.readouterr().out.splitlines()
    shown = {line[:16].strip(): line[16:] for line in lines}
    assert shown["bnfast"] == bnfast.__version__
    assert np.__version__ in shown["numpy"]
    assert shown["kernels"].split()[0] in shown["runnable here"].split(", ")
    assert set(shown["runnable here"].split(", ")) <= set(shown["built"].split(", "))
    assert shown["threads"] == "3 (asked for in this thread)"
    assert shown["caches"].startswith("L1d ")
    if Path("/proc/self/maps").exists():
        assert "omp" in shown["OpenMP"]


def test_threads_are_explained(capsys):
    bnfast.show_config()
    assert "5 (a test)" in capsys.readouterr().out
    bnfast.set_num_threads(2)
    bnfast.show_config()
    assert "2 (set_num_threads)" in capsys.readouterr().out


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "bnfast"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bnfast")


def test_openmp_runtimes_are_found_in_the_map(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fd:01 12  /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f01-7f02 r--p 00001000 fd:01 12  /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f03-7f04 r-xp 00000000 fd:01 13  /v/scikit_learn.libs/libgomp-a34b3233.so.1.0.0\n"
        "7f05-7f06 r-xp 00000000 fd:01 14  /usr/lib/llvm-14/lib/libomp.so.5\n"
        "7f07-7f08 r-xp 00000000 fd:01 15  /usr/lib/libcompare.so\n"
        "7f09-7f0a rw-p 00000000 00:00 0\n"
    )
    assert _config._openmp_runtimes(str(maps)) == [
        "/usr/lib/llvm-14/lib/libomp.so.5",
        "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
        "/v/scikit_learn.libs/libgomp-a34b3233.so.1.0.0",
    ]
    assert _config._openmp_runtimes(str(tmp_path / "none")) == []


def test_a_bad_isa_names_what_the_processor_has():
    failed = run_python("import bnfast", BNFAST_ISA="mmx")
    assert failed.returncode == 1
    message = failed.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert "mmx" in message
    runnable = run_python(
        "import bnfast; print(*bnfast._core.config()['isas_runnable'])", BNFAST_ISA=None
    )
    for isa in runnable.stdout.split():
        assert isa in message


def test_every_runnable_isa_can_be_pinned():
    from bnfast import _core

    for isa in _core.config()["isas_runnable"]:
        done = run_python("import bnfast; bnfast.show_config()", BNFAST_ISA=isa)
        assert f"{isa} (pinned by BNFAST_ISA)" in done.stdout, done.stderr


# ---- stacks, interrupts, growth, other interpreters, other pools


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
import os, signal, threading, numpy as np, bnfast
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
x = np.ones((16, 64, 28, 28), np.float32)
layer = bnfast.BatchNorm(64)
try:
    layer(x)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
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


INTERPRETERS = (
    """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

KIND = sys.argv[1]
COMPUTE = """
    + repr("""
who = "NumPy"
try:
    import numpy as np
    who = "bnfast"
    import bnfast
except (ImportError, RuntimeError) as error:  # NumPy has both
    print(f"{who} refused" if str(error) else "no reason given")
else:
    with bnfast.num_threads(2):
        x = np.arange(2.0**20).reshape(4, 4, 256, 256)
        print(bnfast.moments(x).mean.tolist() == x.mean((0, 2, 3)).tolist(), end=" ")
        y = bnfast.batch_norm(x[:1, :, :2, :2], training=True)
    print(abs(y.mean()) < 1e-15)
sys.stdout.flush()
""")
    + """
def another():
    if sys.version_info >= (3, 13):
        return interpreters.create(KIND)
    return interpreters.create(isolated=KIND == "isolated")

def there(interpreter, code):
    failed = interpreters.run_string(interpreter, "import sys" + code)
    assert failed is None, failed
"""
)


REFUSALS = {"NumPy refused", "bnfast refused"}


def have_interpreters():
    return any(map(importlib.util.find_spec, ("_interpreters", "_xxsubinterpreters")))


@pytest.mark.skipif(not have_interpreters(), reason="Python was built without interpreters")
@pytest.mark.parametrize("kind", ["isolated", "legacy"])  # with a GIL of its own (3.12), or not
class TestOtherInterpreters:
    """One interpreter of a process can use bnfast; the others are refused, by NumPy or by us."""

    @staticmethod
    def run(kind, code):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INTERPRETERS + code, kind],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    def test_with_an_idle_interpreter(self, kind):
        """A process that has ever made one, as mod_wsgi does."""
        code = 'i = another(); there(i, "\\nimport json"); exec(COMPUTE); interpreters.destroy(i)'
        assert self.run(kind, code) == ["True True"]
        assert self.run(kind, f"exec(COMPUTE); {code}") == ["True True"] * 2

    def test_after_the_main_one(self, kind):
        lines = self.run(kind, "exec(COMPUTE); there(another(), COMPUTE); exec(COMPUTE)")
        assert lines[::2] == ["True True"] * 2
        assert lines[1] in REFUSALS

    def test_before_the_main_one(self, kind):
        code = "i = another(); there(i, COMPUTE); there(i, COMPUTE); exec(COMPUTE); exec(COMPUTE)"
        lines = self.run(kind, code)
        assert set(lines) <= {"True True", *REFUSALS}
        # NumPy 2.3 under free-threaded Python then refuses the main interpreter, too.
        assert "True True" in lines or set(lines) == {"NumPy refused"}
        assert lines[0] == lines[1]
        assert lines[2] == lines[3]
        assert lines.count("True True") <= 2


def test_threadpoolctl_sees_and_limits_the_runtime():
    pytest.importorskip("threadpoolctl")
    code = """
import numpy as np, bnfast, threadpoolctl
bnfast.set_num_threads(2)
bnfast.moments(np.ones((16, 64, 56, 56), np.float32))
pools = [p for p in threadpoolctl.threadpool_info() if p["user_api"] == "openmp"]
print(len(pools), pools[0]["internal_api"])
with threadpoolctl.threadpool_limits(1, user_api="openmp"):
    print(bnfast.get_num_threads())
    with bnfast.num_threads(2):
        print(bnfast.get_num_threads(), bnfast._threads.describe()[1])
print(bnfast.get_num_threads())
"""
    done = run_python(code, OMP_NUM_THREADS="2", BNFAST_NUM_THREADS=None)
    limited = "limited by way of OpenMP, as by threadpoolctl"
    assert done.stdout == f"1 openmp\n1\n1 {limited}\n2\n", done.stdout + done.stderr


def test_openmp_number_is_a_limit_only_if_lowered():
    code = "import bnfast; bnfast.set_num_threads(7); print(bnfast.get_num_threads())"
    assert run_python(code, OMP_NUM_THREADS="1").stdout == "7\n"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (bnfast.num_threads, "n"),
        (bnfast.set_num_threads, "n"),
        (lambda n: bnfast.moments(np.ones((2, 3)), axis=n), "axis"),
        (bnfast.BatchNorm, "num_features"),
        (lambda n: bnfast.BatchNorm(2, ddof=n), "ddof"),
        (lambda n: bnfast.BatchNorm(2, eps=n), "eps"),
        (lambda n: bnfast.Moments(-n, [0.0], [0.0]), "count"),
        (lambda n: bnfast.fold(np.ones((2, 2)), None, bnfast.BatchNorm(2), out_axis=n), "out_axis"),
        (lambda n: bnfast.fold(np.ones((2, 2)), None, bnfast.BatchNorm(2), groups=n), "groups"),
    ],
)
def test_huge_numbers_refused_by_name(call, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name} is .*expected"):
        call(10**5000)


# ---- calls at the same time


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
