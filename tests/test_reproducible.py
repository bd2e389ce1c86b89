"""The same bits for any number of threads, alignment, output array and run."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import EVERY_DTYPE, WITHOUT_FMA, at_offset, bits, make_problem

import bnfast
from bnfast import _core

# Large enough for several threads (worth it from some 200 KB), of odd sizes,
# with many channels, with few, with one.
SHAPES = (
    (13, 67, 29, 29),
    (5, 3, 211, 211),
    (2, 1, 300_001),
    (8191, 67),
    (1237, 515),
    (100_003, 3),
)
THREADS = range(1, 6)
FUSED = {"activation": "relu", "residual": True}


def everything(p):
    """The bits of all results that the library computes for a problem."""
    y, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **p.options)
    g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
    frozen = bnfast.normalize(p.x, p.bias, p.weight**2, p.weight, p.bias, **p.options)
    moments = bnfast.moments(p.x)
    arrays = (y, stats.mean, stats.var, stats.inv_std, *g, frozen, moments.mean, moments.m2)
    return [None if a is None else bits(a) for a in arrays]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestThreads:
    @pytest.mark.smoke
    def test_any_number_gives_the_same_bits(self, isa, dtype, shape):
        p = make_problem(shape, dtype, **FUSED)
        with bnfast.num_threads(1):
            want = everything(p)
        for n in THREADS:
            with bnfast.num_threads(n):
                assert bnfast.get_num_threads() == n
                assert everything(p) == want, f"{n} threads"

    def test_every_run_gives_the_same_bits(self, dtype, shape):
        p = make_problem(shape, dtype, **FUSED)
        want = everything(p)
        assert all(everything(p) == want for _ in range(5))


@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (37, 19), (2, 3, 4097)], ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestAlignment:
    def test_of_the_data(self, isa, dtype, shape):
        p = make_problem(shape, dtype, **FUSED)
        want = everything(p)
        step = np.dtype(dtype).itemsize
        for offset in (*range(0, 64, step), 1, 2, 3):
            move = at_offset(offset)
            q = p.replace(x=move(p.x), dy=move(p.dy), residual=move(p.residual))
            assert q.x.ctypes.data % 64 == offset
            assert everything(q) == want, f"offset {offset}"

    def test_of_the_output(self, isa, dtype, shape):
        p = make_problem(shape, dtype, **FUSED)
        fresh, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **p.options)
        gradients = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
        for offset in range(0, 64, np.dtype(dtype).itemsize):
            y, dx = (at_offset(offset)(np.full(shape, np.nan, dtype)) for _ in range(2))
            bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=y, **p.options)
            bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, out=dx, **p.options)
            assert bits(y) == bits(fresh)
            assert bits(dx) == bits(gradients.x)


class TestConcurrentCalls:
    """From many Python threads at once; each gets the same answer as alone."""

    def test_functions(self):
        problems = [make_problem((7, 19, 30, 30), seed=seed, **FUSED) for seed in range(8)]
        want = [everything(p) for p in problems]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                assert list(pool.map(everything, problems)) == want

    @pytest.mark.parametrize("freeze", [False, True], ids=["eval", "frozen"])
    def test_one_layer_for_inference(self, freeze):
        problems = [make_problem((7, 19, 30, 30), seed=seed) for seed in range(8)]
        layer = bnfast.BatchNorm(19)
        layer(problems[0].x)
        call = layer.freeze() if freeze else layer.eval()
        want = [bits(call(p.x)) for p in problems]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda p: bits(call(p.x)), problems * 3)) == want * 3

    def test_count_every_dispatch(self, dispatches):
        x = make_problem((7, 19, 30, 30)).x
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(bnfast.moments, [x] * 200))
        assert sum(dispatches().values()) == 200


def on_every(isas, p):
    """`everything`, by each of the instruction sets of this processor."""
    start = _core.isa()
    try:
        results = []
        for name in _core.isas():
            if name in isas:
                _core.set_isa(name)
                results.append(everything(p))
        return results
    finally:
        _core.set_isa(start)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestInstructionSets:
    """Eight lanes and sixteen sums for any register width: one order of additions."""

    def test_sets_with_fma_agree(self, dtype, shape):
        results = on_every(set(_core.isas()) - WITHOUT_FMA, make_problem(shape, dtype, **FUSED))
        assert all(result == results[0] for result in results)

    def test_sets_without_fma_agree(self, dtype, shape):
        results = on_every(WITHOUT_FMA, make_problem(shape, dtype, **FUSED))
        assert all(result == results[0] for result in results)
