"""Groups of channels that are written while the next ones are summed: the bits of other calls."""

import numpy as np
import pytest
from cases import bits, make_problem, poisoned_like
from test_streaming import surrounded

import bnfast
from bnfast import _core, get_num_threads, set_num_threads

# Planes of whole vectors and others, of one image and several, in one block and several.
SHAPES = ((3, 7, 128), (5, 6, 15, 13), (2, 9, 28, 28), (40, 5, 37, 30), (1, 11, 2500), (33, 4, 501))


@pytest.fixture(params=SHAPES, ids=str)
def problem(request):
    return make_problem(request.param, np.float32)


def planned(problem, l2, threads):
    n, channels, *axes = problem.x.shape
    return _core.plan((n, channels, int(np.prod(axes))), 4, True, 1, 1, l2, 0, threads)


def groups(found):
    return len({channel0 for _, _, channel0, *_ in found["sums"]})


@pytest.fixture
def in_turn(problem):
    """Make a call with a cache that holds two channels, so that there are several groups."""
    caches, threads = _core.config()["caches"], get_num_threads()
    l2 = problem.x[:, :2].nbytes

    def call(threads, function, *args, **options):
        set_num_threads(threads)
        _core.set_caches(l2, 0)
        return function(*args, **options)

    yield call
    _core.set_caches(caches["l2"], caches["l3"])
    set_num_threads(threads)


def results(p, out=None):
    y, stats = bnfast.batch_norm_forward(
        p.x,
        p.weight,
        p.bias,
        eps=p.eps,
        out=poisoned_like(p.x) if out is None else out,
        **p.options,
    )
    return [bits(a) for a in (y, *stats[:3])]


def test_these_shapes_are_written_in_turn(problem):
    found = planned(problem, problem.x[:, :2].nbytes, 1)
    assert found["fused"]
    assert found["chains"] == 1 < groups(found)
    found = planned(problem, 2**30, 1)
    assert found["chains"] == groups(found)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_bits(isa, problem, in_turn, activation, residual):
    p = make_problem(problem.x.shape, np.float32, activation=activation, residual=residual)
    want = results(p)
    for threads in (1, 2, 3):
        assert in_turn(threads, results, p) == want


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_types(isa, problem, in_turn, kind):
    p = make_problem(problem.x.shape, kind)
    assert in_turn(1, results, p) == results(p)


def test_in_place(isa, problem, in_turn):
    want = results(problem)
    p = problem.replace(x=problem.x.copy())
    assert in_turn(1, results, p, out=p.x) == want


def test_writes_only_its_own_bytes(isa, problem, in_turn):
    want = results(problem)
    for offset in range(0, 64, 4):
        out, untouched = surrounded(problem.x, offset)
        assert in_turn(1, results, problem, out=out) == want, offset
        assert untouched()


def test_bad_pivots_and_nan(isa, problem, in_turn):
    """Channels that are summed again, and one whose statistics are NaN."""
    x = problem.x.copy()
    x[:, 1] = 7.0
    x[0, 2].flat[0] = 1e6
    x[0, 3].flat[5] = np.nan
    p = problem.replace(x=x)
    assert in_turn(1, results, p) == results(p)
