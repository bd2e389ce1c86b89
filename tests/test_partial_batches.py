"""batch_norm_backward for a part of a batch, given the sums of the whole."""

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, ALL_ORDERS, DTYPES, backward, bits, forward, make_problem
from tolerance import (
    assert_within,
    backward_bounds,
    batch_statistics,
    forward_bound,
    off_the_kinks,
)
from wide import wide

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
        exact = reference.backward(wide(p.dy), *p.exact())
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


class TestForward:
    """`moments=`: the twin of the backward's `sums=`."""

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("order", ALL_ORDERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_parts_are_the_whole(self, dtype, order, activation):
        """Outputs and statistics of the whole batch with these moments, to the bit, of parts of any
        size. Of float64 data they are those of a training call, which sums as `moments` does.
        """
        p = make_problem(
            (7, 5, 4, 3), dtype, activation=activation, residual=True, arrange=ALL_ORDERS[order]
        )
        total = bnfast.moments(p.x)
        y, stats = forward(p, moments=total)
        if dtype == np.float64:
            assert bits(y) == bits(forward(p)[0])
        exact = reference.forward(*p.exact())
        assert_within(y, exact, forward_bound(p, batch_statistics(p.x, p.axis)), "y")
        for part in (slice(0, 1), slice(1, 1), slice(1, 7)):
            mine = p.replace(x=p.x[part], residual=p.residual[part])
            got, found = forward(mine, moments=total)
            assert bits(got) == bits(y[part])
            assert found.count == stats.count
            for a, b in zip(found[:3], stats[:3], strict=True):
                assert bits(a) == bits(b)

    @pytest.mark.parametrize("count", [8, 2**53 + 1, 2**63 - 1])
    def test_the_count_is_kept_exactly(self, count):
        total = bnfast.Moments(count, np.zeros(3), np.ones(3))
        _, stats = bnfast.batch_norm_forward(np.ones((8, 3), np.float32), moments=total)
        assert stats.count == count

    def test_nothing_is_summed(self):
        x = np.ones((8, 3), np.float32)
        total = bnfast.Moments(8, np.zeros(3), np.ones(3))
        y, stats = bnfast.batch_norm_forward(x, moments=total)
        assert np.allclose(y, 1 / np.sqrt(1 / 8 + 1e-5))
        assert bits(stats.var) == bits(np.full(3, 1 / 8))

    @pytest.mark.parametrize(
        ("moments", "error", "words"),
        [
            (bnfast.Moments(7, np.zeros(3), np.zeros(3)), ValueError, "moments.count is 7"),
            (bnfast.Moments(1, np.zeros(3), np.zeros(3)), ValueError, "more than 1 value"),
            (bnfast.Moments(9, np.zeros(4), np.zeros(4)), ValueError, "moments.mean has shape"),
            ((9, np.zeros(3), np.zeros(3)), TypeError, "expected Moments"),
        ],
    )
    def test_refusals(self, moments, error, words):
        out = np.full((8, 3), 5, np.float32)
        with pytest.raises(error, match=words):
            bnfast.batch_norm_forward(np.ones((8, 3), np.float32), out=out, moments=moments)
        assert (out == 5).all()

    def test_out_over_the_moments(self):
        x = np.ones((8, 3), np.float32)
        total = bnfast.Moments(8, np.zeros(3), np.ones(3))
        memory = total.mean.view(np.float32)
        with pytest.raises(ValueError, match=r"out overlaps moments\.mean"):
            bnfast.batch_norm_forward(x[:1], out=memory[:3].reshape(1, 3), moments=total)

    def test_the_backward_of_parts(self):
        """Both halves together: the gradients of the whole batch."""
        p = make_problem((7, 5, 4, 3), np.float64, activation="hardswish", residual=True)
        _, stats = forward(p)
        want = backward(p, stats)
        total, parts = bnfast.moments(p.x), (slice(0, 2), slice(2, 7))
        mine = [p.replace(x=p.x[i], dy=p.dy[i], residual=p.residual[i]) for i in parts]
        kept = [forward(part, moments=total)[1] for part in mine]
        sums = [
            backward(part, s._replace(count=0), needs=("weight", "bias"), out=None)
            for part, s in zip(mine, kept, strict=True)
        ]
        whole = (sum(g.weight for g in sums), sum(g.bias for g in sums))
        for part, s, i in zip(mine, kept, parts, strict=True):
            got = backward(part, s, sums=whole)
            np.testing.assert_allclose(got.x, want.x[i], rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(got.residual, want.residual[i], rtol=1e-12)
        np.testing.assert_allclose(whole[0], want.weight, rtol=1e-11)
