"""batch_norm_backward for a part of a batch, given the sums of the whole."""

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, ALL_ORDERS, DTYPES, backward, bits, forward, make_problem
from tolerance import assert_within, backward_bounds, batch_statistics, off_the_kinks

import bnfast

PLANAR, INTERLEAVED = (7, 5, 3, 4), (33, 21)
SHAPES = pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])


def parts_of(p):
    """Three problems along the first axis, one of them empty."""
    cuts = [slice(0, 2), slice(2, 2), slice(2, None)]
    return [
        p.replace(
            x=p.x[cut], dy=p.dy[cut], residual=None if p.residual is None else p.residual[cut]
        )
        for cut in cuts
    ]


def sums_of(p, stats):
    """The sums of the parts, added in order."""
    local = [
        backward(part, stats._replace(count=0), needs=("weight", "bias"), out=None)
        for part in parts_of(p)
    ]
    return sum(g.weight for g in local), sum(g.bias for g in local)


@SHAPES
@RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
class TestParts:
    def test_parts_equal_whole(self, isa, dtype, activation, residual, shape):
        p = make_problem(shape, dtype, activation=activation, residual=residual)
        s = batch_statistics(p.x, p.axis)
        off_the_kinks(p, s)
        exact = reference.backward(p.dy.astype(np.longdouble), *p.exact())
        bounds = backward_bounds(p, s, exact)
        _, stats = forward(p)
        sums = sums_of(p, stats)
        got = [backward(part, stats, sums=sums) for part in parts_of(p)]
        assert all(g.weight is None and g.bias is None for g in got)
        assert_within(np.concatenate([g.x for g in got]), exact.x, bounds.x, "x")
        assert_within(sums[0], exact.gamma, bounds.gamma, "weight")
        assert_within(sums[1], exact.beta, bounds.beta, "bias")
        if residual:
            found = np.concatenate([g.residual for g in got])
            assert_within(found, exact.residual, bounds.residual, "residual")

    def test_single_part_has_bits_of_whole(self, isa, dtype, activation, residual, shape):
        p = make_problem(shape, dtype, activation=activation, residual=residual)
        _, stats = forward(p)
        want = backward(p, stats)
        got = backward(p, stats, sums=(want.weight, want.bias))
        assert bits(got.x) == bits(want.x)
        assert got.residual is want.residual is None or bits(got.residual) == bits(want.residual)


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_every_memory_order(order):
    p = make_problem(PLANAR)
    _, stats = forward(p)
    want = backward(p, stats)
    turned = p.replace(x=ALL_ORDERS[order](p.x), dy=ALL_ORDERS[order](p.dy))
    assert bits(backward(turned, stats, sums=(want.weight, want.bias)).x) == bits(want.x)


def test_needs_without_given_sums():
    p = make_problem(PLANAR, residual=True, activation="relu")
    _, stats = forward(p)
    whole = backward(p, stats)
    sums = (whole.weight, whole.bias)
    for needs in (["x"], ["residual"], ["x", "residual"], []):
        out = {} if "x" in needs else {"out": None}
        got = backward(p, stats, sums=sums, needs=needs, **out)
        assert [got.x is not None, got.residual is not None] == [
            name in needs for name in ("x", "residual")
        ]
        assert got.x is None or bits(got.x) == bits(whole.x)


class TestRefusals:
    @pytest.fixture
    def problem(self):
        p = make_problem(PLANAR)
        _, stats = forward(p)
        g = backward(p, stats)
        return p, stats, (g.weight, g.bias)

    @pytest.mark.parametrize("needs", ["weight", ("x", "bias")])
    def test_needs_given_by_sums(self, problem, needs):
        p, stats, sums = problem
        with pytest.raises(ValueError, match=r"needs names 'weight' or 'bias' beside sums"):
            backward(p, stats, sums=sums, needs=needs, out=None)

    @pytest.mark.parametrize("count", [0, PLANAR[0] * 12 - 1])
    def test_of_a_batch_smaller_than_its_part(self, problem, count):
        p, stats, sums = problem
        with pytest.raises(ValueError, match=rf"stats.count is {count}; expected at least"):
            backward(p, stats._replace(count=count), sums=sums)

    @pytest.mark.parametrize("sums", [3, (np.ones(5),), (np.ones(5), None), np.ones((2, 5))])
    def test_not_two_vectors(self, problem, sums):
        p, stats, _ = problem
        with pytest.raises(
            TypeError, match=r"(?s)sums is .*; expected the gradients of weight and bias"
        ):
            backward(p, stats, sums=sums)

    def test_of_another_number_of_channels(self, problem):
        p, stats, sums = problem
        with pytest.raises(ValueError, match=r"sums\[1\] has shape \(4,\); expected \(5,\)"):
            backward(p, stats, sums=(sums[0], sums[1][:4]))

    @pytest.mark.parametrize("order", ALL_ORDERS)
    def test_out_that_holds_sums(self, order):
        p = make_problem(PLANAR, np.float64, arrange=ALL_ORDERS[order])
        _, stats = forward(p)
        out = ALL_ORDERS[order](np.zeros(PLANAR))
        inside = out[0, 0].reshape(-1)[:5] if order == "C" else out[:5, 0, 0, 0]
        if not np.shares_memory(inside, out):
            pytest.skip("NumPy made a copy of the view")
        with pytest.raises(ValueError, match=r"out overlaps sums\[0\]"):
            bnfast.batch_norm_backward(p.dy, p.x, stats, sums=(inside, np.zeros(5)), out=out)
