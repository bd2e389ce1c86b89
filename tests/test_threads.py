"""How many threads: who asks for a number, for whom it counts, and what limits it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import needs_openmp, run_python

import bnfast

pytestmark = pytest.mark.usefixtures("own_default")


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(timeout=60)


@pytest.mark.smoke
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
@pytest.mark.smoke
def test_a_bad_number_is_named(call, n, error):
    with pytest.raises(error, match=r"^n is .*expected an integer from 1 to 1024"):
        call(n)
    assert bnfast.get_num_threads() == 5


def test_numpy_integers_are_integers():
    with bnfast.num_threads(np.int64(2)):
        assert bnfast.get_num_threads() == 2
        assert type(bnfast.get_num_threads()) is int


@needs_openmp
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
        print(bnfast.get_num_threads(), bnfast._core.threads()[1])
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
