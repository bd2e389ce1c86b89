"""float16 and bfloat16 data: read exactly, computed in float32, summed in float64, rounded once.

The other tests use halves together with float32 and float64 wherever a dtype is a parameter, with
the tolerances of `tolerance.written`. Here are the properties that only halves have: every one of
their 65536 values, every place where rounding decides, and arrays of two-byte items that are not
halves.
"""

import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import reference
from cases import (
    ALL_ORDERS,
    CONTIGUOUS_ORDERS,
    HALVES,
    bits,
    forward,
    make_problem,
    with_memory_order,
)
from tolerance import assert_within, batch_statistics, finfo, moments_of, tiny, unit

import bnfast

pytestmark = pytest.mark.filterwarnings("error")
HALF = pytest.mark.parametrize("dtype", HALVES)
needs_bfloat16 = HALVES[1].marks[0]
WIDTHS = range(2, 17)  # whole vectors, tails of every length, both
# How many values are along the lanes: positions of one channel, or channels side by side.
LAYOUTS = {"planar": lambda n: (-1, 2, n), "interleaved": lambda n: (-1, n)}


def every_value(dtype):
    return np.arange(65536, dtype=np.uint16).view(dtype)


def in_runs(values, layout, width):
    """All values, laid out in runs of this width; the first ones again to fill the last run."""
    missing = -len(values) % (2 * width)
    return np.append(values, values[:missing]).reshape(LAYOUTS[layout](width))


def patterns(a):
    return np.ascontiguousarray(a).view(np.uint16)


def is_nan(dtype, pattern):
    """By the format's definition: all ones in the exponent, and a nonzero fraction."""
    infinity = 0x7C00 if dtype == np.float16 else 0x7F80
    return (pattern & 0x7FFF) > infinity


def mapped(x, scale=1.0, shift=-0.0, **options):
    """x * scale + shift; adding -0 changes nothing, not even -0, as adding +0 would."""
    channels = x.shape[1]
    numbers = (np.full(channels, a, np.float32) for a in (scale, shift))
    return bnfast.scale_shift(x, *numbers, **options)


class TestEveryValue:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @HALF
    def test_goes_through_unchanged(self, isa, dtype, layout):
        """Denormals, infinities, both zeros; NaN as quiet NaN, its sign and payload kept."""
        for width in WIDTHS:
            x = in_runs(every_value(dtype), layout, width)
            want = patterns(x).copy()
            want[is_nan(dtype, want)] |= 0x0200 if dtype == np.float16 else 0x0040
            assert np.array_equal(patterns(mapped(x)), want), f"runs of {width}"

    @pytest.mark.parametrize("layout", LAYOUTS)
    @HALF
    def test_is_summed_exactly(self, isa, dtype, layout):
        """The mean of a channel of one value is that value in float64."""
        values = every_value(dtype)[None]
        x = values[..., None] if layout == "interleaved" else np.stack([values, values], axis=2)
        got = bnfast.moments(x).mean
        with np.errstate(invalid="ignore"):  # signalling NaN
            want = values[0].astype(np.float64)
        assert np.array_equal(got, want, equal_nan=True)

    @HALF
    def test_adding_zero_to_minus_zero(self, isa, dtype):
        zeros = np.array([[0.0], [-0.0]], dtype)
        assert patterns(mapped(zeros)).ravel().tolist() == [0, 0x8000]
        assert patterns(mapped(zeros, shift=0.0)).ravel().tolist() == [0, 0]

    @pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
    @HALF
    def test_through_an_activation(self, isa, dtype, activation):
        x = every_value(dtype).reshape(1, 1, -1)
        y = mapped(x, activation=activation)
        slope = np.float32(0.01)
        with np.errstate(invalid="ignore", under="ignore"):
            # Of a signalling NaN, some processors' conversion is invalid.
            wide = x.astype(np.float32)
            want = {
                "relu": np.where(wide > 0, wide, np.float32(0)),
                "relu6": np.clip(wide, 0, 6),
                "leaky_relu": np.where(wide > 0, wide, slope * wide),
            }[activation]
            want = np.where(np.isnan(wide), wide, want).astype(dtype)
        nan = is_nan(dtype, patterns(x))
        assert is_nan(dtype, patterns(y))[nan].all()
        assert np.array_equal(y[~nan], want[~nan])

    @HALF
    def test_stays_in_its_channel(self, isa, dtype):
        """Statistics of a channel with NaN or an infinity are not finite; those of others are."""
        for bad in (np.nan, np.inf, -np.inf):
            for shape in ((5, 9, 11), (40, 9)):
                x = make_problem(shape, dtype).x
                clean = bnfast.moments(x)
                x[3, 4] = bad
                got = bnfast.moments(x)
                others = np.arange(9) != 4
                assert not np.isfinite(got.m2[4])
                assert bits(got.mean[others]) == bits(clean.mean[others])
                assert bits(got.m2[others]) == bits(clean.m2[others])


def around_the_midpoints(dtype):
    """(float32 numbers, correct results): below, on and above all midpoints of neighbours.

    By the definition of rounding to nearest even alone. The largest finite half would have another
    neighbour if its exponent had one more value; rounding to that neighbour gives an infinity.
    """
    patterns_of = np.arange(0, 0x7C00 if dtype == np.float16 else 0x7F80, dtype=np.uint16)
    lower = patterns_of.view(dtype).astype(np.float64)
    upper = np.append(lower[1:], 2 * lower[-1] - lower[-2])
    middle = ((lower + upper) / 2).astype(np.float32)
    assert np.array_equal(middle.astype(np.float64), (lower + upper) / 2), (
        "a float32 has the digits"
    )
    even = patterns_of + (patterns_of & 1)
    numbers = [
        np.nextafter(middle, np.float32(0)),
        middle,
        np.nextafter(middle, np.float32(np.inf)),
    ]
    rounded = [patterns_of, even, patterns_of + 1]
    numbers, rounded = np.concatenate(numbers), np.concatenate(rounded).astype(np.uint16)
    return np.concatenate([numbers, -numbers]), np.concatenate([rounded, rounded | 0x8000])


class TestRounding:
    @pytest.mark.parametrize("shape", [(2, -1), (1, -1, 11)], ids=["interleaved", "planar"])
    @HALF
    def test_at_every_midpoint(self, isa, dtype, shape):
        """x is 1, so a channel's result is its scale, rounded."""
        numbers, want = around_the_midpoints(dtype)
        x = np.ones([len(numbers) if n == -1 else n for n in shape], dtype)
        y = bnfast.scale_shift(x, numbers, np.full(len(numbers), -0.0, np.float32))
        got = np.moveaxis(patterns(y), 1, -1)
        assert np.array_equal(got, np.broadcast_to(want, got.shape))

    @HALF
    def test_any_float32_rounds_as_numpy(self, isa, dtype, rng):
        """Of all exponents and signs, NaN and infinities included."""
        numbers = rng.integers(0, 2**32, 300_000, np.uint32).view(np.float32)
        numbers[:4] = [np.inf, -np.inf, np.nan, 65520]
        x = np.ones((2, len(numbers)), dtype)
        with np.errstate(all="ignore"):
            want = np.tile(numbers.astype(dtype), (2, 1))
        y = bnfast.scale_shift(x, numbers, np.full(len(numbers), -0.0, np.float32))
        nan = np.isnan(numbers)
        assert np.isnan(y[:, nan]).all()
        assert np.array_equal(patterns(y[:, ~nan]), patterns(want[:, ~nan]))

    @HALF
    def test_values_past_largest_become_infinity(self, isa, dtype):
        largest = finfo(dtype).max
        x = np.array([[largest, -largest]], dtype)
        half_a_place = largest * unit(dtype) / 2
        assert np.array_equal(mapped(x, shift=float(half_a_place) / 4), x)
        assert np.isinf(mapped(x, scale=1.5)).all()
        assert np.array_equal(np.sign(mapped(x, scale=1.5)), np.sign(x))

    @HALF
    def test_result_rounded_once(self, isa, dtype):
        """The sum with the residual is rounded, not its terms: each alone would vanish."""
        ulp = 2 * unit(dtype)
        x, residual = (np.full((8, 3, 5), ulp / 4, dtype) for _ in range(2))
        y = mapped(x, shift=1.0, residual=residual)
        assert np.array_equal(y, np.full_like(x, 1)), "half a place: to even"
        y = mapped(x, scale=1.5, shift=1.0, residual=residual)
        assert np.array_equal(y, np.full_like(x, 1 + ulp))


class TestStatistics:
    """Neither sums nor means are halves: both need more digits and range."""

    @HALF
    def test_of_more_values_than_a_half_counts(self, isa, dtype):
        for shape in ((3, 2, 200_000), (600_000, 2)):
            x = np.ones(shape, dtype)
            x[..., ::2, :] = 3
            got = bnfast.moments(x)
            want = reference.batch_mean(x.astype(np.float64))
            assert got.count == 600_000
            assert got.mean.tolist() == want.tolist()
            assert got.m2.tolist() == (reference.batch_variance(x.astype(float)) * 600_000).tolist()

    @HALF
    def test_of_the_largest_values(self, isa, dtype):
        """Their squares are beyond float16, or beyond float32 for bfloat16."""
        large = float(finfo(dtype).max) / 2  # so that the distance to the mean is a float32
        x = np.full((9, 4, 17), large, dtype)
        x[::2] *= -1
        y, stats = bnfast.batch_norm_forward(x)
        s = batch_statistics(x, 1)
        assert_within(stats.mean, s.mean, s.mean_error)
        assert_within(stats.var, s.var, s.var_error)
        assert np.isfinite(y).all()

    @HALF
    def test_of_denormals(self, isa, dtype):
        x = (np.arange(-60, 60).reshape(10, 4, 3) * tiny(dtype)).astype(dtype)
        got, s = bnfast.moments(x), moments_of(x, 1)
        assert np.count_nonzero(x) == x.size - 1
        assert_within(got.mean, s.mean, s.mean_error)
        assert_within(got.m2 / got.count, s.var, s.var_error)
        assert (got.m2 > 0).all()

    @HALF
    def test_constant_channel_is_exactly_its_bias(self, isa, dtype):
        """The bias as a half, since it is the output."""
        value = np.array([0.1, 1000, -3e4, 1e-6], dtype)
        bias = np.array([0.3, -7.7, 0, 5], np.float32)
        for shape in ((33, 4), (5, 4, 23)):
            x = np.empty(shape, dtype)
            np.moveaxis(x, 1, -1)[...] = value
            y, _ = bnfast.batch_norm_forward(x, None, bias)
            want = np.broadcast_to(bias.astype(dtype), np.moveaxis(y, 1, -1).shape)
            assert np.array_equal(np.moveaxis(y, 1, -1), want)

    @HALF
    def test_are_those_of_the_same_float32(self, dtype):
        """A half is a float32: the same sums, to the bit, and the same result before rounding."""
        p = make_problem((7, 9, 29), dtype)
        wide = p.replace(x=p.x.astype(np.float32))
        y, stats = forward(p)
        wide_y, wide_stats = forward(wide)
        assert all(bits(a) == bits(b) for a, b in zip(stats, wide_stats, strict=True))
        assert bits(y) == bits(wide_y.astype(dtype))


class TestParameters:
    """float32 with halves; other types are converted or refused."""

    @pytest.mark.parametrize("other", [np.float64, *HALVES])
    @HALF
    def test_of_any_type(self, dtype, other):
        p = make_problem((6, 5, 4), dtype)
        p = p.replace(weight=np.round(p.weight), bias=np.round(p.bias))
        want, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        same, _ = bnfast.batch_norm_forward(p.x, p.weight.astype(other), p.bias.astype(other))
        assert bits(same) == bits(want)

    @HALF
    def test_keep_their_own_digits(self, isa, dtype):
        """A weight that no half can hold, times a value for which the product is a half."""
        weight = np.float32(1 + 2.0**-13)
        x = np.full((2, 1), 2.0, dtype)
        y = bnfast.scale_shift(x, weight[None], np.float32([-2]))
        assert y.tolist() == [[2.0**-12]] * 2

    @HALF
    def test_running_statistics_are_updated_in_float32(self, dtype):
        p = make_problem((6, 5, 4), dtype)
        mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
        bnfast.batch_norm(p.x, mean, var, training=True, momentum=1.0)
        stats = bnfast.moments(p.x)
        assert np.array_equal(mean, stats.mean.astype(np.float32))
        assert np.array_equal(var, stats.var(1).astype(np.float32))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("other", [np.float64, *HALVES])
    @HALF
    def test_running_statistics_of_another_type(self, dtype, other, training, dispatches):
        x = make_problem((6, 5, 4), dtype).x
        single, wrong = np.ones(5, np.float32), np.ones(5, other)
        for name, given in (("mean", (wrong, single)), ("var", (single, wrong))):
            with pytest.raises(
                TypeError, match=f"running_{name} has dtype {np.dtype(other)}.*float32"
            ):
                bnfast.batch_norm(x, *given, training=training)
        assert (wrong == 1).all()
        assert (single == 1).all()
        assert dispatches() == {}

    @HALF
    def test_a_layers_own_type(self, dtype):
        with pytest.raises(TypeError, match=f"dtype is {np.dtype(dtype)}; expected float32"):
            bnfast.BatchNorm(3, dtype=dtype)


class TestMemory:
    @pytest.mark.parametrize("order", ALL_ORDERS)
    @HALF
    def test_results_keep_memory_order(self, dtype, order):
        p = make_problem((4, 5, 3, 7), dtype, arrange=ALL_ORDERS[order], residual=True)
        y, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **p.options)
        g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
        assert y.dtype == g.x.dtype == g.residual.dtype == np.dtype(dtype)
        if order in CONTIGUOUS_ORDERS:
            assert y.strides == g.x.strides == g.residual.strides == p.x.strides

    @HALF
    def test_fresh_results_take_one_array(self, dtype):
        x = make_problem((16, 32, 32, 32), dtype, arrange=with_memory_order(0, 2, 3, 1)).x
        tracemalloc.start()
        try:
            y = bnfast.scale_shift(x, None, None)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert y.nbytes == x.nbytes
        assert x.nbytes <= peak < x.nbytes + 100_000

    @HALF
    def test_of_the_other_byte_order(self, dtype):
        p = make_problem((4, 5, 3, 7), dtype, residual=True)
        swapped = p.x.dtype.newbyteorder()
        y, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, residual=p.residual)
        given = p.x.astype(swapped), p.residual.astype(swapped)
        if dtype == np.float16:
            assert bits(given[0]) != bits(p.x)
        same, _ = bnfast.batch_norm_forward(given[0], p.weight, p.bias, residual=given[1])
        assert bits(same) == bits(y)
        dx = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight).x
        got = bnfast.batch_norm_backward(p.dy.astype(swapped), given[0], stats, p.weight).x
        assert bits(got) == bits(dx)


class TestObjects:
    @HALF
    def test_layer_through_its_life(self, dtype, dispatches):
        p = make_problem((8, 5, 4, 4), dtype)
        layer = bnfast.BatchNorm2d(5)
        y = layer(p.x)
        dx = layer.backward(p.dy)
        assert y.dtype == dx.dtype == np.dtype(dtype)
        assert layer.weight_grad.dtype == layer.running_mean.dtype == np.float32
        frozen = pickle.loads(pickle.dumps(layer.freeze()))
        evaluated = layer.eval()(p.x)
        assert bits(frozen(p.x)) == bits(evaluated)
        names = {(direction, name) for direction, name, *_ in dispatches()}
        assert names == {(d, np.dtype(dtype).name) for d in ("forward", "backward", "inference")}

    @HALF
    def test_population_statistics_of_batches(self, dtype):
        batches = np.split(make_problem((40, 5, 6), dtype).x, [7, 8, 20])
        layer = bnfast.BatchNorm(5)
        bnfast.recompute_statistics(layer, batches, [layer])
        want_mean, want_var = reference.population([b.astype(np.float64) for b in batches])
        assert_within(layer.running_mean, want_mean, 2**-23 * (np.abs(want_mean) + 1e-3))
        assert_within(layer.running_var, want_var, 2**-23 * want_var)

    @HALF
    def test_moments_merge_across_types(self, dtype):
        x = make_problem((20, 5, 6), dtype).x
        halves = bnfast.moments(x[:9]).update(x[9:].astype(np.float32))
        assert halves == bnfast.moments(x[:9].astype(np.float32)).update(x[9:])

    @HALF
    def test_moments_of_halves_given(self, dtype):
        """A state may be given in halves, as in integers."""
        mean, m2 = np.array([0.5, -3], dtype), np.array([2, 0], dtype)
        made = bnfast.Moments(3, mean, m2)
        assert made == bnfast.Moments(3, [0.5, -3], [2, 0])
        assert made.mean.dtype == made.m2.dtype == np.float64


class TestNotHalf:
    EXPECTED = "expected float32, float64, float16 or bfloat16"

    @pytest.mark.parametrize(
        "dtype",
        [
            np.uint16,
            np.int16,
            np.dtype([("bits", np.uint16)]),
            np.dtype("V2"),
            np.dtype("S2"),
        ],
        ids=str,
    )
    def test_other_two_byte_items(self, dtype, dispatches):
        x = np.zeros((6, 5, 4), dtype)
        for call in (bnfast.moments, bnfast.batch_norm_forward, bnfast.BatchNorm(5)):
            with pytest.raises(TypeError, match=self.EXPECTED):
                call(x)
        assert dispatches() == {}

    @needs_bfloat16
    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
    def test_other_types_of_ml_dtypes(self, name):
        import ml_dtypes

        x = np.ones((6, 5, 4), getattr(ml_dtypes, name))
        with pytest.raises(TypeError, match=f"x has dtype {name}; {self.EXPECTED}"):
            bnfast.moments(x)

    @needs_bfloat16
    @pytest.mark.parametrize("other", [np.uint16, np.float16, np.float32])
    def test_beside_bfloat16(self, other):
        x = make_problem((6, 5, 4), HALVES[1].values[0]).x
        for name in ("residual", "out"):
            given = np.zeros(x.shape, other)
            with pytest.raises(TypeError, match=f"{name} has dtype {np.dtype(other)}.*bfloat16"):
                bnfast.batch_norm_forward(x, **{name: given})
            assert not given.any()

    def test_class_named_bfloat16(self, monkeypatch):
        """By name, size and the module that it states, it is bfloat16."""
        from bnfast import _arrays

        class bfloat16(np.void):
            pass

        dtype = np.dtype((bfloat16, np.dtype([("bits", np.uint16)])))
        assert (dtype.type.__name__, dtype.itemsize) == ("bfloat16", 2)
        assert not _arrays.is_bfloat16(dtype)
        with pytest.raises(TypeError, match=self.EXPECTED):
            bnfast.moments(np.zeros((6, 5), dtype))


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


class TestOptionalDependency:
    def test_is_not_imported(self):
        code = """
import sys, bnfast, numpy as np
bnfast.BatchNorm(5)(np.ones((6, 5, 4), np.float16) * np.arange(4, dtype=np.float16))
try:
    bnfast.moments(np.ones((6, 5), np.uint16))
except TypeError:
    print("refused")
print("ml_dtypes" in sys.modules)
"""
        assert run_python(code) == ["refused", "False"]

    def test_may_be_missing(self):
        code = """
import sys
sys.modules["ml_dtypes"] = None
import bnfast, numpy as np
print(bnfast.moments(np.ones((6, 5), np.float16)).count)
try:
    bnfast.moments(np.ones((6, 5), "V2"))
except TypeError as error:
    print("bfloat16" in str(error))
"""
        assert run_python(code) == ["6", "True"]

    @needs_bfloat16
    def test_may_come_later(self):
        code = """
import bnfast, numpy as np
bnfast.moments(np.ones((6, 5), np.float16))
from ml_dtypes import bfloat16
x = np.ones((6, 5), bfloat16)
print(bnfast.moments(x).count, bnfast.scale_shift(x[::-1], x[0], None).dtype)
print(*(key[1] for key in bnfast._core.dispatches()))
"""
        assert run_python(code) == ["6", "bfloat16", "float16", "bfloat16", "bfloat16"]
