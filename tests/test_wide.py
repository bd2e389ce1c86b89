"""Double-doubles compared with exact fractions, and with longdouble where that is wider."""

import math
from fractions import Fraction

import numpy as np
import pytest
import reference
from cases import make_problem
from tolerance import assert_within, constants, forward_bound
from wide import NARROW, PI, Wide, as_wide, rounded_to_odd

import bnfast

UNIT, UNIT_OF_FUNCTIONS = 2.0**-102, 2.0**-94
N = 300


def numbers(rng, size=N):
    """Of both signs and of sizes from 2**-60 to 2**60, with and without a second part."""
    high = np.ldexp(rng.uniform(0.5, 1, size), rng.integers(-60, 60, size))
    high *= rng.choice([-1, 1], size)
    low = rng.uniform(-0.5, 0.5, size) * np.spacing(high) * rng.choice([0, 1, 1], size)
    return Wide(high, low)


def fractions(a):
    return [Fraction(float(x.high)) + Fraction(float(x.low)) for x in a.ravel()]


def assert_close(got, want, unit):
    for found, exact in zip(fractions(got), want, strict=True):
        assert abs(found - exact) <= Fraction(unit) * abs(exact)


def assert_normal(a):
    """The second part is at most half a unit in the first one's last place."""
    assert np.array_equal(a.high + a.low, a.high)


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide"])
def test_operation_has_its_unit(name, rng):
    a, b = numbers(rng), numbers(rng)
    exact = {
        "add": Fraction.__add__,
        "subtract": Fraction.__sub__,
        "multiply": Fraction.__mul__,
        "divide": Fraction.__truediv__,
    }[name]
    got = getattr(np, name)(a, b)
    assert_normal(got)
    assert_close(got, map(exact, fractions(a), fractions(b)), UNIT)


def test_nearly_equal_numbers_are_subtracted_exactly(rng):
    a = numbers(rng)
    b = a * (1 + Wide(rng.uniform(-(2.0**-30), 2.0**-30, N)))
    assert_close(a - b, map(Fraction.__sub__, fractions(a), fractions(b)), UNIT)


def test_square_root_has_its_unit(rng):
    """The square of (1 + e) r is (1 + 2 e) of the exact one."""
    a = abs(numbers(rng))
    roots = np.sqrt(a)
    assert_close(a, [r * r for r in fractions(roots)], 2.01 * UNIT)
    assert np.sqrt(as_wide(0.0)).high == 0


@pytest.mark.parametrize("n", [-3, -2, 0, 1, 2, 3, 10])
def test_powers(n, rng):
    a = numbers(rng, 50)
    assert_close(a**n, [x**n for x in fractions(a)], 12 * UNIT)


def exact_exp(x):
    """By the series of x / 2^k, whose rest is below 2^-140."""
    k = max(0, math.frexp(float(x))[1]) + 8
    t, term, total = x / 2**k, Fraction(1), Fraction(1)
    for n in range(1, 18):
        term = term * t / n
        total += term
    for _ in range(k):
        total = total**2
        # Fewer digits, far more than are tested.
        shift = 200 - total.numerator.bit_length() + total.denominator.bit_length()
        total = Fraction(round(total * Fraction(2) ** shift)) / Fraction(2) ** shift
    return total


def arguments(rng):
    """Of all sizes that a test may meet, and near 0."""
    small = np.ldexp(rng.uniform(-1, 1, 20), rng.integers(-80, 0, 20))
    return Wide(np.concatenate([small, rng.uniform(-1, 1, 20), rng.uniform(-30, 30, 20)]))


@pytest.mark.parametrize("name", ["exp", "expm1", "tanh", "cosh"])
def test_functions_have_their_unit(name, rng):
    a = arguments(rng)
    exps = [exact_exp(x) for x in fractions(a)]
    if name in ("expm1", "tanh"):  # these lose digits of exact_exp
        keep = abs(a.high) > 2.0**-20
        a, exps = a[keep], [e for e, kept in zip(exps, keep, strict=True) if kept]
    want = {
        "exp": lambda e: e,
        "expm1": lambda e: e - 1,
        "tanh": lambda e: (e - 1 / e) / (e + 1 / e),
        "cosh": lambda e: (e + 1 / e) / 2,
    }[name]
    assert_close(getattr(np, name)(a), map(want, exps), UNIT_OF_FUNCTIONS)


@pytest.mark.parametrize(("name", "c2", "c3"), [("expm1", 1 / 2, 1 / 6), ("tanh", 0, -1 / 3)])
def test_functions_near_zero(name, c2, c3, rng):
    """x + c2 x^2 + c3 x^3, of which c3 is rounded: 2^-53 x^2 of x."""
    a = Wide(np.ldexp(rng.uniform(0.5, 1, 50), rng.integers(-80, -30, 50)))
    want = [x + Fraction(c2) * x**2 + Fraction(c3) * x**3 for x in fractions(a)]
    assert_close(getattr(np, name)(a), want, UNIT_OF_FUNCTIONS)


def test_exponentials_out_of_range():
    a = Wide([-np.inf, -1e308, -800.0, 800.0, 1e308, np.inf, np.nan])
    np.testing.assert_array_equal(np.exp(a).high, [0, 0, 0, np.inf, np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(np.tanh(a).high, [-1, -1, -1, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(np.exp(a).low, 0)


def test_in_place():
    a = b = Wide([1.0, 2.0])
    a += 2.0**-80
    a *= 3
    assert a is b
    assert fractions(b) == [3 * (n + Fraction(2.0**-80)) for n in (1, 2)]


def test_pi():
    """Machin's formula: pi/4 = 4 atan(1/5) - atan(1/239)."""

    def atan_of(n):
        return sum(Fraction((-1) ** k, (2 * k + 1) * n ** (2 * k + 1)) for k in range(60))

    pi = 16 * atan_of(5) - 4 * atan_of(239)
    assert abs(sum(map(Fraction, PI)) - pi) < UNIT * pi


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_sums_over_axes(axis, keepdims, rng):
    a = numbers(rng, (3, 5, 7))
    got = a.sum(axis, keepdims=keepdims)
    exact = np.sum(np.reshape(fractions(a), a.shape), axis, keepdims=keepdims)
    sizes = np.sum(np.abs(np.reshape(fractions(a), a.shape)), axis, keepdims=keepdims)
    assert got.shape == np.shape(exact)
    for found, want, size in zip(fractions(got), np.ravel(exact), np.ravel(sizes), strict=True):
        assert abs(found - want) <= 8 * Fraction(UNIT) * size  # of its levels


def test_mean_and_variance(rng):
    a = numbers(rng, (4, 50))
    for row, mean, var in zip(a, a.mean(1), a.var(1, ddof=1), strict=True):
        values = fractions(row)
        exact = sum(values) / 50
        squares = sum((x - exact) ** 2 for x in values)
        size = sum(map(abs, values)) / 50
        assert abs(fractions(mean)[0] - exact) <= 8 * Fraction(UNIT) * size
        assert abs(fractions(var)[0] - squares / 49) <= 50 * Fraction(UNIT) * squares / 49


def test_order_is_that_of_both_parts(rng):
    a = numbers(rng, 40)
    b = np.concatenate([Wide(a.high[:20], -a.low[:20]), a[20:]])
    pairs = list(zip(fractions(a), fractions(b), strict=True))
    for got, operator in (
        (a < b, Fraction.__lt__),
        (a <= b, Fraction.__le__),
        (a > b, Fraction.__gt__),
        (a >= b, Fraction.__ge__),
        (a == b, Fraction.__eq__),
    ):
        assert got.tolist() == [operator(x, y) for x, y in pairs]
    assert fractions(np.maximum(a, b)) == [max(pair) for pair in pairs]
    assert fractions(np.minimum(a, b)) == [min(pair) for pair in pairs]
    assert fractions(abs(a)) == [abs(x) for x, _ in pairs]
    assert fractions(a.max()) == [max(fractions(a))]
    assert fractions(a.min()) == [min(fractions(a))]


def test_nan_is_kept_and_never_smaller():
    a = Wide([1.0, np.nan, np.inf])
    assert np.isnan(np.maximum(a, 0).high).tolist() == [False, True, False]
    assert np.isnan((a + a).high).tolist() == [False, True, False]
    assert (a <= 2).tolist() == [True, False, False]
    assert np.isnan(a.max().high)
    assert (a - a).low.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounded_once(dtype, rng):
    """In the middle of two numbers, where the second part decides."""
    below = np.abs(rng.standard_normal(200)).astype(dtype)
    above = np.nextafter(below, dtype(np.inf))
    middle = (below.astype(float) + above) / 2
    for sign in (1, -1):
        for low, want in ((2.0**-80, above), (-(2.0**-80), below)):
            got = Wide(sign * middle, sign * low).astype(dtype)
            np.testing.assert_array_equal(got, sign * want)


def test_odd_digit_stands_for_the_second_part():
    one = np.float64(1)
    assert rounded_to_odd(one, 0.0) == 1
    assert rounded_to_odd(one, 2.0**-60) == 1 + 2.0**-52
    assert rounded_to_odd(one, -(2.0**-60)) == 1 - 2.0**-53


def test_whole_numbers_have_all_their_digits():
    n = 2**62 + 1
    assert fractions(as_wide([n, -n])) == [n, -n]
    assert fractions(as_wide(np.int64(n))) == [n]


@pytest.mark.skipif(NARROW, reason="longdouble is float64 here")
def test_longdouble_is_the_same(rng):
    x = np.float64(rng.standard_normal(100) * 3)
    unit = max(float(np.finfo(np.longdouble).eps), UNIT_OF_FUNCTIONS)
    for function in (np.exp, np.tanh, np.cosh, np.sqrt, lambda a: a**-3 + a / 3):
        with np.errstate(invalid="ignore"):
            want = function(np.abs(x).astype(np.longdouble))
        got = function(Wide(np.abs(x)))
        error = np.abs(as_wide(want) - got)
        assert (error <= 2 * unit * abs(got)).all()


def test_a_wide_array_is_not_rounded_unasked():
    with pytest.raises(TypeError, match="not rounded unasked"):
        np.asarray(Wide([1.0]))


def test_rounding_to_float64_is_all_the_error_that_is_seen(rng):
    """A result that is rounded once is within its half unit, to 2^-40 of that; twice is not."""
    x = Wide(rng.standard_normal(50))
    exact = np.tanh(x) / 3 + x
    got = exact.astype(float)
    half = np.spacing(np.abs(got)) / 2
    assert_within(got, exact, half * (1 + 2.0**-40))
    with pytest.raises(AssertionError, match="beyond their bound"):
        assert_within(np.nextafter(got, np.inf), exact, half * (1 + 2.0**-40))


def test_error_of_eight_units_is_seen_in_a_float64_result(rng):
    """The library's, multiplied by 1 + 2^-50, by the limits of the tests of the library."""
    p = make_problem((4, 5, 3, 7), np.float64)
    mean, var = rng.standard_normal(5), rng.uniform(0.5, 4, 5)
    want = reference.inference(p.exact()[0], mean, var, *p.exact()[1:])
    bound = forward_bound(p, constants(mean, var))
    y = bnfast.normalize(p.x, mean, var, p.weight, p.bias)
    assert_within(y, want, bound)
    with pytest.raises(AssertionError, match="beyond their bound"):
        assert_within(y * (1 + 2.0**-50), want, bound)
