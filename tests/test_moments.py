"""moments() and the class Moments."""

import copy
import pickle
from functools import reduce

import numpy as np
import pytest
import reference
from cases import ALL_ORDERS, EVERY_DTYPE, SIZES, make_problem
from tolerance import SECOND_ORDER, U, assert_within, gamma, moments_of
from wide import UNIT

import bnfast
from bnfast import Moments


def assert_moments_of(got, x, axis=1):
    s = moments_of(x, axis)
    m = reference.values_per_channel(x, axis)
    assert type(got.count) is int
    assert got.count == m
    assert got.mean.dtype == got.m2.dtype == np.float64
    what = f"{x.shape} {x.dtype}"
    assert_within(got.mean, s.mean, s.mean_error, f"mean of {what}")
    assert_within(got.m2, m * s.var, m * s.var_error, f"m2 of {what}")


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestOnePass:
    def test_sizes_around_every_edge(self, isa, dtype):
        for shape in SIZES:
            x = make_problem(shape, dtype).x
            assert_moments_of(bnfast.moments(x), x)

    @pytest.mark.parametrize("order", ALL_ORDERS)
    @pytest.mark.smoke
    def test_memory_orders(self, isa, dtype, order):
        x = make_problem((4, 5, 3, 7), dtype, arrange=ALL_ORDERS[order]).x
        assert_moments_of(bnfast.moments(x), x)

    @pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
    def test_axes(self, dtype, axis):
        x = make_problem((4, 5, 3), dtype).x
        assert_moments_of(bnfast.moments(x, axis=axis), x, axis)

    def test_larger_than_the_caches_of_a_core(self, dtype):
        for shape in ((32, 3, 90, 90), (6000, 130), (1, 2, 400_000)):
            x = make_problem(shape, dtype).x
            assert_moments_of(bnfast.moments(x), x)

    def test_agree_with_welfords_recurrence(self, dtype):
        """Two methods, each within n u kappa (Chan, Golub and LeVeque 1983)."""
        x = make_problem((50, 3, 4), dtype).x
        got = bnfast.moments(x)
        for c in range(3):
            values = x[:, c].ravel().astype(np.float64)
            count, mean, m2 = reference.welford(values)
            kappa = np.hypot(1, mean / values.std())
            assert got.count == count
            bound = gamma(2 * count) * np.abs(values).mean()
            assert_within(got.mean[c], mean, bound)
            assert_within(got.m2[c], m2, 2 * gamma(2 * count) * kappa * m2)

    def test_one_value_per_channel(self, dtype):
        x = make_problem((1, 5), dtype).x
        got = bnfast.moments(x)
        assert got == Moments(1, x[0].astype(np.float64), np.zeros(5))


def test_do_not_overflow():
    x = np.float32([[3e38, 3e38], [-3e38, 3e38]])
    got = bnfast.moments(x)
    top = float(np.float32(3e38))
    assert got.mean.tolist() == [0, top]
    assert got.m2.tolist() == [2 * top * top, 0]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0)])
def test_of_nothing(shape):
    got = bnfast.moments(np.empty(shape, np.float32))
    assert got == Moments.empty(3)
    assert got.count == 0
    assert got.mean.tolist() == got.m2.tolist() == [0, 0, 0]


def parts_of(x, cuts):
    return [bnfast.moments(part) for part in np.split(x, cuts)]


class TestMerge:
    """The limits are those of one pass, which merges in the same way."""

    @pytest.fixture
    def x(self):
        return make_problem((40, 4, 3)).x + np.linspace(0, 5, 40, dtype=np.float32)[:, None, None]

    @pytest.mark.parametrize("cuts", [[20], [1], [39], [3, 4, 30], [0, 0, 40], range(1, 40)])
    @pytest.mark.smoke
    def test_gives_the_moments_of_all(self, x, cuts):
        parts = parts_of(x, cuts)
        assert_moments_of(Moments.merge_all(parts), x)
        assert_moments_of(sum(parts), x)
        assert_moments_of(reduce(Moments.merge, parts), x)

    def test_plus_is_merge(self, x):
        a, b = parts_of(x, [17])
        assert a + b == a.merge(b)

    def test_leaves_its_operands_alone(self, x):
        a, b = parts_of(x, [17])
        before = copy.deepcopy((a, b))
        merged = a + b
        assert (a, b) == before
        merged.mean[:] = merged.m2[:] = 0
        assert (a, b) == before

    def test_empty_is_neutral_to_the_bit(self, x):
        a = bnfast.moments(x)
        assert a + Moments.empty(4) == a
        assert Moments.empty(4) + a == a
        assert Moments.empty(4) + Moments.empty(4) == Moments.empty(4)

    def test_merge_all_takes_any_iterable(self, x):
        parts = parts_of(x, [5, 11])
        assert Moments.merge_all(iter(parts)) == Moments.merge_all(parts)
        assert Moments.merge_all(parts[:1]) == parts[0]

    def test_merge_all_is_pairwise(self):
        """2^20 equal means in one chain would lose 2^20 u; a tree loses 20 u."""
        n = 2**12
        one = Moments(3, np.array([0.1]), np.array([0.7]))
        got = Moments.merge_all([one] * n)
        assert got.count == 3 * n
        assert got.mean == pytest.approx([0.1], rel=2 * gamma(12), abs=0)
        assert got.m2 == pytest.approx([0.7 * n], rel=2 * gamma(12 + 1), abs=0)

    def test_counts_past_32_bits(self):
        a = Moments(2**40, np.array([1.0]), np.array([2.0**40]))
        b = a + Moments(2**40, np.array([3.0]), np.array([2.0**40]))
        assert b.count == 2**41
        assert b.mean.tolist() == [2]
        assert b.var().tolist() == [2]

    def test_equal_means_stay(self):
        """A constant channel has m2 == 0 and exactly its value as the mean."""
        got = Moments.merge_all(bnfast.moments(np.full((n, 1), 0.1)) for n in range(2, 50))
        assert got.mean.tolist() == [0.1]
        assert got.m2.tolist() == [0]

    def test_merge_of_nothing_refused(self):
        with pytest.raises(ValueError, match=r"(?i)empty|at least one|no moments"):
            Moments.merge_all([])

    def test_of_other_channels_is_refused(self):
        a, b = Moments.empty(3), Moments.empty(4)
        with pytest.raises(ValueError, match=r"3(.|\n)*4|4(.|\n)*3"):
            a.merge(b)
        with pytest.raises(ValueError, match=r"3(.|\n)*4|4(.|\n)*3"):
            Moments.merge_all([a, b])

    @pytest.mark.parametrize("other", [1, "x", None, np.zeros(3)])
    def test_merge_with_other_type_raises(self, other):
        with pytest.raises(TypeError):
            Moments.empty(3).merge(other)

    def test_plus_other_type_raises(self):
        with pytest.raises(TypeError):
            Moments.empty(3) + "x"


class TestUpdate:
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_in_place_and_returns_self(self, isa, dtype):
        x = make_problem((40, 4, 3), dtype).x
        m = Moments.empty(4)
        for part in np.split(x, [7, 8, 8, 31]):
            assert m.update(part) is m
        assert_moments_of(m, x)

    def test_along_another_axis(self):
        x = make_problem((5, 6, 4), axis=2).x
        assert_moments_of(Moments.empty(4).update(x, axis=2), x, axis=2)
        assert Moments.empty(4).update(x, axis=-1) == bnfast.moments(x, axis=2)

    def test_is_merge(self):
        a, b = np.split(make_problem((40, 4, 3)).x, [13])
        assert bnfast.moments(a).update(b) == bnfast.moments(a) + bnfast.moments(b)

    def test_of_other_channels_changes_nothing(self):
        m = bnfast.moments(make_problem((5, 4)).x)
        before = copy.deepcopy(m)
        with pytest.raises(ValueError, match=r"4(.|\n)*3|3(.|\n)*4"):
            m.update(np.zeros((5, 3), np.float32))
        assert m == before


class TestVariance:
    @pytest.mark.parametrize("ddof", [0, 1, 2])
    def test_divides_by_count_less_ddof(self, ddof):
        m = Moments(7, np.array([1.0, 2.0]), np.array([14.0, 3.0]))
        assert m.var(ddof=ddof).tolist() == [14 / (7 - ddof), 3 / (7 - ddof)]
        assert_within(m.std(ddof=ddof), np.sqrt(np.array([14, 3]) / (7 - ddof)), 4 * U)
        assert m.var().tolist() == m.var(ddof=0).tolist()

    @pytest.mark.parametrize(("count", "ddof"), [(0, 0), (1, 1), (1, 2), (0, 1), (2, 2)])
    def test_nan_if_count_not_above_ddof(self, count, ddof):
        m = Moments(count, np.zeros(2), np.zeros(2))
        assert np.isnan(m.var(ddof=ddof)).tolist() == [True, True]
        assert np.isnan(m.std(ddof=ddof)).tolist() == [True, True]


class TestEquality:
    def test_is_exact(self):
        a = Moments(3, np.array([1.0]), np.array([2.0]))
        assert a == Moments(3, np.array([1.0]), np.array([2.0]))
        assert a != Moments(4, np.array([1.0]), np.array([2.0]))
        assert a != Moments(3, np.array([1 + 2**-52]), np.array([2.0]))
        assert a != Moments(3, np.array([1.0]), np.array([2 + 2**-51]))
        assert a != Moments(3, np.ones(2), np.full(2, 2.0))
        assert a != (3, 1.0, 2.0)
        assert isinstance(a == Moments.empty(1), bool)

    def test_nan_equals_nan(self):
        a = bnfast.moments(np.float32([[np.nan], [1]]))
        assert a == copy.deepcopy(a)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling(protocol):
    m = bnfast.moments(make_problem((5, 4)).x)
    again = pickle.loads(pickle.dumps(m, protocol))
    assert again == m
    assert type(again.count) is int
    assert again.update(np.ones((1, 4))).count == 6


def test_copies_are_independent():
    m = bnfast.moments(make_problem((5, 4)).x)
    again = copy.deepcopy(m)
    again.update(np.ones((1, 4)))
    assert m.count == 5
    assert m == bnfast.moments(make_problem((5, 4)).x)


class TestConstructor:
    def test_copies_its_arguments(self):
        mean, m2 = np.ones(2), np.ones(2)
        m = Moments(3, mean, m2)
        mean[:] = m2[:] = -1
        assert m == Moments(3, [1, 1], [1.0, 1.0])

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"count": -1}, ValueError, "count is -1; expected 0 or more"),
            ({"count": -0.5}, ValueError, "count is -0.5; expected 0 or more"),
            ({"count": np.nan}, ValueError, "count is nan; expected a finite number"),
            ({"count": float("inf")}, ValueError, "count is inf; expected a finite number"),
            ({"count": True}, TypeError, "count is True.*expected an integer"),
            ({"count": "3"}, TypeError, "count is '3'.*expected an integer"),
            ({"count": np.array([1, 2])}, TypeError, "count is an array of int64; expected an int"),
            ({"mean": ["1", "2"]}, TypeError, "mean has dtype <U1; expected numbers"),
            ({"mean": "one"}, TypeError, "mean has dtype <U3; expected numbers"),
            ({"mean": None}, TypeError, "mean has dtype object; expected numbers"),
            ({"mean": [1j, 1]}, TypeError, "mean has dtype complex128; expected numbers"),
            ({"mean": [True, False]}, TypeError, "mean has dtype bool; expected numbers"),
            ({"mean": [[1, 2], [3]]}, TypeError, "mean is .*cannot read as an array"),
            ({"mean": np.ma.masked_array([1.0, 2.0], [0, 1])}, TypeError, "mean is a masked array"),
            ({"m2": np.ma.masked_array([1.0, 2.0], [0, 1])}, TypeError, "m2 is a masked array"),
            ({"mean": [[1, 2]]}, ValueError, r"mean has shape \(1, 2\); expected \(channels,\)"),
            ({"m2": [1]}, ValueError, r"m2 has shape \(1,\); expected that of mean, \(2,\)"),
            ({"m2": [1, -2e-300]}, ValueError, "m2 is -2e-300 in channel 1; expected 0 or more"),
            ({"m2": [-np.inf, 1]}, ValueError, "m2 is -inf in channel 0; expected 0 or more"),
        ],
        ids=str,
    )
    def test_error_names_argument(self, changes, error, message):
        with pytest.raises(error, match=message):
            Moments(**{"count": 3, "mean": [1, 2], "m2": [0, 0]} | changes)

    def test_takes_nan_and_infinity(self):
        assert np.isnan(Moments(3, [np.nan, 1], [np.inf, np.nan]).var()).tolist() == [False, True]

    @pytest.mark.parametrize(
        ("channels", "error"),
        [(-1, ValueError), (2.5, TypeError), ("2", TypeError), (2**62, ValueError)],
    )
    def test_empty(self, channels, error):
        with pytest.raises(error, match=f"channels is .?{channels}"):
            Moments.empty(channels)

    def test_merging(self):
        m = Moments.empty(2)
        with pytest.raises(TypeError, match="other is 3 of type int; expected Moments"):
            m.merge(3)
        with pytest.raises(ValueError, match="3 channels; expected 2"):
            m.merge(Moments.empty(3))
        with pytest.raises(TypeError, match=r"parts\[1\] is None .*; expected Moments"):
            Moments.merge_all([m, None])
        with pytest.raises(TypeError, match="parts is of type int; expected an iterable"):
            Moments.merge_all(3)
        with pytest.raises(ValueError, match="parts is empty; expected at least one Moments"):
            Moments.merge_all([])
        with pytest.raises(TypeError, match="ddof is '1'"):
            m.var("1")

    def test_refused_update_changes_nothing(self):
        m = bnfast.moments(make_problem((5, 4)).x)
        before = copy.deepcopy(m)
        for x in (np.ones((2, 3)), np.ones(4), np.ones((2, 4), int), None):
            with pytest.raises((TypeError, ValueError)):
                m.update(x)
        assert m == before


def test_repr_names_the_count():
    assert "7" in repr(Moments(7, np.zeros(1), np.zeros(1)))


def test_nan_and_infinity_stay_in_their_channel():
    x = make_problem((9, 4, 3)).x
    clean = bnfast.moments(x)
    x[3, 1, 2], x[5, 2, 0] = np.nan, np.inf
    got = bnfast.moments(x)
    assert np.isnan(got.mean[1])
    assert np.isinf(got.mean[2]) or np.isnan(got.mean[2])
    assert np.isnan(got.m2[1:3]).all()
    assert got.mean[[0, 3]].tolist() == clean.mean[[0, 3]].tolist()
    assert got.m2[[0, 3]].tolist() == clean.m2[[0, 3]].tolist()


@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 5)], ids=["interleaved", "planar"])
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.smoke
def test_infinity_in_first_value(isa, dtype, shape):
    """The pivot of the sums is taken from there: no infinity may be subtracted from itself."""
    x = make_problem(shape, dtype).x
    x[0, 1] = np.inf
    assert bnfast.moments(x).mean[1] == np.inf


def test_error_of_oracle_is_small():
    """SECOND_ORDER covers the oracle's own error, so its type must be wider."""
    assert UNIT < U * (SECOND_ORDER - 1)
