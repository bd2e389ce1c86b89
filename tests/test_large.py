"""Tensors larger than the last-level cache, whose results may be written around it.

A batch made of copies of a small one has the small one's statistics, outputs and gradients of x. So
its exact answers are those of the small one.
"""

import numpy as np
import pytest
import reference
from cases import DTYPES, at_offset, bits, make_problem, poisoned_like
from tolerance import assert_within, backward_bounds, batch_statistics, forward_bound
from wide import wide

import bnfast

# Planes that start at every alignment, and rows of whole cache lines.
SHAPES = {"planar": (1, 8, 181, 181), "interleaved": (4096, 64)}
# x and y together are larger than 130 MB: the last-level cache of most machines.
BYTES = 65_000_000


@pytest.fixture(scope="module", params=SHAPES)
def problems(request):
    """By type: the small problem, the large one, and the copies in it."""
    found = {}
    for dtype in DTYPES:
        small = make_problem(SHAPES[request.param], dtype)
        copies = -(-BYTES // small.x.nbytes)
        tiles = (copies, *[1] * (small.x.ndim - 1))
        x, dy = (np.tile(a, tiles) for a in (small.x, small.dy))
        found[dtype] = small, small.replace(x=x, dy=dy), copies
    return found


def assert_copies_of(got, exact, bound, copies):
    """Each copy has the same bits, and the first is right."""
    first, *others = np.split(got, copies)
    assert_within(first, exact, bound)
    assert {bits(part) for part in others} == {bits(first)}


def outputs(like):
    """Poisoned outputs at several alignments, one after the other."""
    for offset in (0, like.itemsize, 64 - like.itemsize):
        yield at_offset(offset)(poisoned_like(like))


@pytest.mark.parametrize("dtype", DTYPES)
class TestCopies:
    def test_forward(self, isa, dtype, problems):
        small, large, copies = problems[dtype]
        exact = reference.forward(*small.exact())
        bound = forward_bound(small, batch_statistics(small.x, small.axis, sum_of=large.m))
        for out in outputs(large.x):
            y, _ = bnfast.batch_norm_forward(large.x, large.weight, large.bias, out=out)
            assert y is out
            assert_copies_of(y, exact, bound, copies)

    def test_backward(self, isa, dtype, problems):
        small, large, copies = problems[dtype]
        s = batch_statistics(small.x, small.axis, sum_of=large.m)
        exact = reference.backward(wide(small.dy), *small.exact())
        bound = backward_bounds(small, s, exact, sum_of=large.m).x
        _, stats = bnfast.batch_norm_forward(large.x, large.weight, large.bias)
        for out in outputs(large.x):
            got = bnfast.batch_norm_backward(
                large.dy, large.x, stats, large.weight, large.bias, out=out, needs=("x",)
            )
            assert_copies_of(got.x, exact.x, bound, copies)

    def test_inference(self, isa, dtype, problems):
        small, large, copies = problems[dtype]
        mean, var = small.bias, small.weight**2
        one = bnfast.normalize(small.x, mean, var, small.weight, small.bias)
        for out in outputs(large.x):
            bnfast.normalize(large.x, mean, var, large.weight, large.bias, out=out)
            assert {bits(part) for part in np.split(out, copies)} == {bits(one)}

    def test_in_place(self, dtype, problems):
        _, large, _ = problems[dtype]
        fresh, _ = bnfast.batch_norm_forward(large.x, large.weight, large.bias)
        x = large.x.copy()
        bnfast.batch_norm_forward(x, large.weight, large.bias, out=x)
        assert bits(x) == bits(fresh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(2, 2, 2**29 + 3), (2**30 + 3, 2)], ids=["planar", "interleaved"]
)
def test_more_than_2_to_the_32_values(shape):
    """Zeros that are only read cost no memory: the system maps one page of them
    again and again. Ones at both ends show whether everything was read.
    """
    try:
        x = np.zeros(shape, np.float32)
    except MemoryError:
        pytest.skip("no address space for 8 GB of zeros")
    m = x.size // 2
    assert x.size > 2**31
    x[(0,) * x.ndim] = x[(-1,) * x.ndim] = 1
    got = bnfast.moments(x)
    assert got.count == m
    # A mean of one 1 in m values; M2 = 1 - 1/m, each within a merge's few roundings.
    tree = 64 * 2.0**-53
    assert_within(got.mean, np.full(2, 1 / wide(m)), tree / m)
    assert_within(got.m2, np.full(2, 1 - 1 / wide(m)), tree)

    stats = bnfast.BatchStats.from_population(np.zeros(2), np.ones(2), eps=0)
    sums = bnfast.batch_norm_backward(x, x, stats, needs=("weight", "bias"))
    assert sums.weight.tolist() == sums.bias.tolist() == [1, 1]
