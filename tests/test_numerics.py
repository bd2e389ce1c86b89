"""Accuracy where naive batch normalization loses it, and special values."""

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, DTYPES, bits, forward, make_problem
from tolerance import Statistics, assert_within, batch_statistics, forward_bound, moments_of, unit
from wide import wide

import bnfast

LAYOUTS = pytest.mark.parametrize("layout", ["planar", "interleaved"])
# The relative error of the variance of float32 data, as stored: of moments, of a training call.
CONTRACT, BATCH_CONTRACT = 1e-7, 1e-6


def as_layout(values, layout):
    """One channel's values, beside another channel, in either layout."""
    values = np.asarray(values)
    both = np.stack([values, values[::-1] * 2], axis=1)  # (m, 2)
    if layout == "interleaved":
        return np.ascontiguousarray(both)
    outer = next(n for n in (32, 7, 3, 1) if values.size % n == 0)
    planes = both.reshape(outer, -1, 2).transpose(0, 2, 1)
    return np.ascontiguousarray(planes)


# --- NIST ------------------------------------------------------------------------

# Statistical Reference Datasets, univariate summary statistics, by their
# published definitions: https://www.itl.nist.gov/div898/strd/univ/homepage.html
# name: (data, certified mean, certified standard deviation of n - 1).
NIST = {
    "NumAcc1": ([10000001, 10000003, 10000002], 10000002, 1),
    "NumAcc2": ([1.2] + [1.1, 1.3] * 500, 1.2, 0.1),
    "NumAcc3": ([1000000.2] + [1000000.1, 1000000.3] * 500, 1000000.2, 0.1),
    "NumAcc4": ([10000000.2] + [10000000.1, 10000000.3] * 500, 10000000.2, 0.1),
}


def certified_digits(got, certified):
    """NIST's log relative error: 15 for all digits that float64 can show."""
    error = abs(got - certified) / abs(certified)
    return 15 if error < 1e-15 else int(-np.log10(error))


@LAYOUTS
@pytest.mark.parametrize("name", NIST)
class TestNIST:
    def test_as_many_digits_as_two_passes(self, isa, layout, name):
        """Compared with NumPy's two passes, over the same array."""
        values, mean, deviation = NIST[name]
        x = as_layout(np.array(values, np.float64), layout)
        others = (0, *range(2, x.ndim))
        got = bnfast.moments(x)
        for ours, numpys, certified in (
            (got.mean[0], x.mean(axis=others)[0], mean),
            (got.std(ddof=1)[0], x.std(axis=others, ddof=1)[0], deviation),
        ):
            assert certified_digits(ours, certified) >= certified_digits(numpys, certified)

    def test_all_digits_of_the_stored_data(self, isa, layout, name):
        """float64 does not store the decimal data exactly. Of the stored data the deviation is
        right to 1e-13 (u kappa with kappa = 1e8 would be 1e-8).
        """
        values = np.array(NIST[name][0], np.float64)
        exact = np.sqrt(wide(values).var() * values.size / (values.size - 1))
        got = bnfast.moments(as_layout(values, layout)).std(ddof=1)[0]
        # A naive E[x^2] - E[x]^2 has no digits here; two passes with their correction are off by n
        # u in the variance, n = 1001.
        assert_within(got, exact, exact * values.size * unit(np.float64), name)


@LAYOUTS
def test_float64_is_read_twice(isa, layout):
    """The first of 16384 values differs from all others by d. Summed around it, their squares are
    16384 times the remaining M2, and each lane's 1024 additions of the same d^2 round in the
    same way: 1e-9 of the variance, 500 times the limit.
    """
    x = as_layout(np.r_[1.3, np.zeros(16383)], layout)
    s = moments_of(x, 1)
    got = bnfast.moments(x)
    assert_within(got.mean, s.mean, s.mean_error, "mean")
    assert_within(got.var(), s.var, s.var_error, "variance")


# --- Ill-conditioned float32 data --------------------------------------------------

M = 32 * 56 * 56


def ill_conditioned():
    rng = np.random.default_rng(42)
    normal = rng.standard_normal(M)
    small = normal[: M // 7]
    return {
        "mean 1e4 deviations": 1000 + 0.1 * normal,
        "mean 1e6 deviations": 1e6 + normal,
        "mean -1e6 deviations": -1e6 + normal,
        "outlier first": np.r_[1e6, normal[1:]],
        "outlier last": np.r_[normal[1:], 1e6],
        "outlier first of a large mean": np.r_[0, 1000 + 0.1 * normal[1:]],
        "zeros first": np.r_[np.zeros(M // 2), 1000 + normal[M // 2 :]],
        "64 zeros first": np.r_[np.zeros(64), 1000 + normal[64:]],
        "zeros last": np.r_[1000 + normal[M // 2 :], np.zeros(M // 2)],
        "sorted": np.sort(1000 + normal),
        "sorted downwards": -np.sort(1000 + normal),
        "two values": np.where(rng.random(M) < 0.5, 1000.1, 1000.2),
        "two values in turn": np.tile([1000.1, 1000.2], M // 2),
        "one value but one": np.r_[np.full(M - 1, 1000.1), 1000.2],
        "ramp": np.linspace(1e4, 1e4 + 1, M),
        "huge": 1e30 * (10 + normal),
        "tiny": 1e-30 * (10 + normal),
        "denormal": 1e-41 * (10 + normal),
        "mixed magnitudes": normal * 10.0 ** rng.integers(-15, 15, M),
        "few": 1e6 + small[:49],
        "one plane of 14x14": 1e6 + small[:196],
    }


DATA = ill_conditioned()


@pytest.fixture(scope="module")
def exact_statistics():
    """Mean and variance of the stored float32 values, computed once per data set: the values, the
    limits of moments, those of a training call.
    """
    found = {}

    def of(name, layout):
        if (name, layout) not in found:
            x = as_layout(DATA[name].astype(np.float32), layout)
            s, t = moments_of(x, 1), batch_statistics(x, 1)
            found[name, layout] = (
                x,
                Statistics(s.mean, s.var, s.mean_error, CONTRACT * s.var),
                Statistics(t.mean, t.var, t.mean_error, BATCH_CONTRACT * t.var),
            )
        return found[name, layout]

    return of


@LAYOUTS
@pytest.mark.parametrize("name", DATA)
class TestIllConditioned:
    def test_variance(self, isa, layout, name, exact_statistics):
        x, s, _ = exact_statistics(name, layout)
        got = bnfast.moments(x)
        assert_within(got.mean, s.mean, s.mean_error, "mean")
        assert_within(got.var(), s.var, s.var_error, "variance")

    def test_output(self, isa, layout, name, exact_statistics):
        x, _, s = exact_statistics(name, layout)
        p = make_problem((1, 2)).replace(x=x)
        scale = p.weight / np.sqrt(s.var + p.eps)
        if scale.min() < np.finfo(np.float32).tiny and s.var.max() > 1e38:
            p = p.replace(weight=np.float32([1e10, 1e10]))  # a scale of normal size
        y, stats = forward(p)
        assert_within(stats.var, s.var, s.var_error, "variance")
        exact = p.exact()
        want = reference.inference(exact[0], s.mean, s.var, *exact[1:])
        assert_within(y, want, forward_bound(p, s), "output")


@pytest.mark.parametrize("ratio", [1e4, 1e6])
@LAYOUTS
def test_gradient_at_a_large_mean(isa, layout, ratio):
    """A mean rounded to float32 is off by up to 0.03 deviations at 1e6, and so
    would be every x - mean. Shifting x by a power of two times a float32 that
    keeps all its bits must not change the gradient, except for rounding.
    """
    rng = np.random.default_rng(5)
    base = np.round(rng.standard_normal(4096) * 8) / 8  # still exact with 2^20
    shift = 2.0 ** np.round(np.log2(ratio))
    near, far = (as_layout((base + s).astype(np.float32), layout) for s in (0, shift))
    assert np.array_equal(near[:, 0] + np.float32(shift), far[:, 0])
    dy = np.random.default_rng(6).standard_normal(near.shape).astype(np.float32)
    got = []
    for x in (near[:, :1], far[:, :1]):
        _, stats = bnfast.batch_norm_forward(x)
        got.append(bnfast.batch_norm_backward(dy[:, :1], x, stats, needs=("x",)).x)
    # Per term of b d + (a dy + c): d is off by 2 u |d| and u^2 shift, the rest
    # by 5 roundings of magnitudes below 2 (|d| + |dy|) / std each.
    size = np.abs(near[:, :1]).max() + np.abs(dy).max()
    u = unit(np.float32)
    bound = 2 * (12 * u * size + 2 * u**2 * shift) / base.std()
    assert_within(got[1], wide(got[0]), bound)


@pytest.mark.parametrize(
    ("x_scale", "dy_scale", "eps"),
    [(1e-18, 1e-29, 1e-37), (1e-10, 1e-34, 1e-22), (1e-3, 1e-38, 1e-5), (1e18, 1e30, 1e-5)],
)
@LAYOUTS
def test_gradients_whose_products_leave_float32(isa, layout, x_scale, dy_scale, eps):
    """Products of gradients and differences that are denormal, or overflow, in float32."""
    rng = np.random.default_rng(8)
    x, dy = (
        as_layout((rng.standard_normal(4096) * scale).astype(np.float32), layout)
        for scale in (x_scale, dy_scale)
    )
    _, stats = bnfast.batch_norm_forward(x, eps=eps)
    got = bnfast.batch_norm_backward(dy, x, stats)
    others = (0, *range(2, x.ndim))
    d = x.astype(float) - x.mean(others, float, keepdims=True)
    normal = d / np.sqrt((d * d).mean(others, keepdims=True) + eps)
    for found, terms in ((got.bias, dy.astype(float)), (got.weight, dy * normal)):
        limit = 1e-6 * np.abs(terms).sum(others)
        assert (np.abs(found - terms.sum(others)) <= limit).all()


@LAYOUTS
def test_nan_gradients_leave_other_channels_alone(isa, layout):
    rng = np.random.default_rng(9)
    shape = (512, 40) if layout == "interleaved" else (8, 40, 64)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    _, stats = bnfast.batch_norm_forward(x)
    clean = bnfast.batch_norm_backward(dy, x, stats)
    dy[3, 17] = np.nan
    got = bnfast.batch_norm_backward(dy, x, stats)
    for a, b in ((got.weight, clean.weight), (got.bias, clean.bias)):
        assert np.isnan(a[17])
        assert bits(np.delete(a, 17)) == bits(np.delete(b, 17))


# --- A constant channel ---------------------------------------------------------

CONSTANTS = {
    np.float32: (
        0.0,
        1.0,
        0.1,
        1000.1,
        -1000.1,
        16777217,
        1e-45,
        -3e-42,
        1e-38,
        1e30,
        -1e30,
        3.4e38,
    ),
    np.float64: (0.0, 0.1, 1000.1, 1 / 3, -1e15 / 3, 5e-324, 1e-310, 1e30, 1.7e308, -1.7e308),
}
COUNTS = (
    (2, 3),
    (3, 3),
    (7, 3),
    (1001, 3),
    (100_003, 3),
    (2, 3, 5),
    (3, 3, 49),
    (10, 3, 196),
    (4, 3, 12_544),
    (1, 3, 100_003),
)


@pytest.mark.parametrize("shape", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
class TestConstantChannel:
    def test_gives_the_bias_exactly(self, isa, dtype, shape):
        bias = np.array([0.3, -7.1, 0], dtype)
        weight = np.array([1.7, -0.9, 3], dtype)
        for value in CONSTANTS[dtype]:
            x = np.full(shape, value, dtype)
            y, stats = bnfast.batch_norm_forward(x, weight, bias)
            assert stats.mean.tolist() == [float(dtype(value))] * 3, value
            assert stats.var.tolist() == [0, 0, 0], value
            assert np.array_equal(y, np.broadcast_to(reference.to_shape(bias, x, 1), shape)), value

    def test_m2_is_zero(self, isa, dtype, shape):
        for value in CONSTANTS[dtype]:
            got = bnfast.moments(np.full(shape, value, dtype))
            assert got.mean.tolist() == [float(dtype(value))] * 3
            assert got.m2.tolist() == [0, 0, 0]

    def test_beside_others(self, isa, dtype, shape, rng):
        x = rng.standard_normal(shape).astype(dtype)
        x[:, 1] = 1000.1
        y, _ = bnfast.batch_norm_forward(x)
        assert np.all(y[:, 1] == 0)
        assert np.any(y[:, 0] != 0)


# --- Special values ---------------------------------------------------------------


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(6, 9, 5, 5), (37, 19), (6, 3, 40, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
class TestSpecialValues:
    def test_stay_in_their_channel(self, isa, dtype, shape, special):
        """A channel with infinity in it gives NaN, as inf - inf does."""
        p = make_problem(shape, dtype, activation="relu", residual=True)
        clean = training_step(p)
        x = p.x.copy()
        x[2, 1, ...].flat[-1] = special
        dirty = training_step(p.replace(x=x))
        for was, now in zip(clean, dirty, strict=True):
            channels = 1 if now.ndim > 1 else 0
            now, was = np.moveaxis(now, channels, 0), np.moveaxis(was, channels, 0)
            assert bits(np.delete(now, 1, 0)) == bits(np.delete(was, 1, 0))
        y, *_, var = dirty
        assert np.isnan(y[:, 1]).all()
        assert np.isnan(var[1])

    def test_in_dy_stay_in_their_channel(self, isa, dtype, shape, special):
        p = make_problem(shape, dtype)
        _, stats = forward(p)
        clean = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias)
        dy = p.dy.copy()
        dy[2, 1, ...].flat[-1] = special
        dirty = bnfast.batch_norm_backward(dy, p.x, stats, p.weight, p.bias)
        assert bits(np.delete(dirty.x, 1, 1)) == bits(np.delete(clean.x, 1, 1))
        assert bits(np.delete(dirty.weight, 1)) == bits(np.delete(clean.weight, 1))
        assert not np.isfinite(dirty.x[:, 1]).any()
        assert not np.isfinite(dirty.weight[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stay_in_channel_with_few_channels(isa, dtype):
    """For any copy of the channel that their row is added to, and for the remaining rows."""
    p = make_problem((77, 3), dtype, activation="leaky_relu")
    clean = training_step(p)
    for row in (0, 1, 31, 32, 63, 64, 76):
        x = p.x.copy()
        x[row, 1] = np.nan
        y, dx, *others, var = training_step(p.replace(x=x))
        for was, now in zip(clean, (y, dx, *others, var), strict=True):
            assert bits(now[..., ::2]) == bits(was[..., ::2])
        assert all(np.isnan(a[..., 1]).all() for a in (y, dx, var))


def training_step(p):
    """All results of a training step that have a channel axis."""
    mean, var = np.zeros(p.channels, p.x.dtype), np.ones(p.channels, p.x.dtype)
    y = bnfast.batch_norm(p.x, mean, var, p.weight, p.bias, True, **p.options)
    _, stats = forward(p)
    g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
    return y, g.x, g.weight, g.bias, mean, var


@pytest.mark.parametrize("shape", [(21, 2), (1, 2, 21)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
class TestInferenceOfSpecialValues:
    """Elementwise, at every position of a vector and its tail."""

    @pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_nan_passes_every_activation(self, isa, dtype, shape, activation, residual):
        for i in range(21):
            x = np.ones((21, 2), dtype)
            x[i] = np.nan
            x = x if len(shape) == 2 else np.ascontiguousarray(x.T)[None]
            options = {"activation": activation, "residual": x if residual else None}
            y = bnfast.scale_shift(x * 0 + 1 if residual else x, *np.ones((2, 2), dtype), **options)
            assert np.array_equal(np.isnan(y), np.isnan(x))

    @pytest.mark.parametrize(
        ("activation", "low", "high"),
        [
            (None, -np.inf, np.inf),
            ("relu", 0, np.inf),
            ("relu6", 0, 6),
            ("leaky_relu", -np.inf, np.inf),
        ],
    )
    def test_infinity(self, isa, dtype, shape, activation, low, high):
        mean, var = np.ones((2, 2), dtype)
        for value, want in ((-np.inf, low), (np.inf, high)):
            x = np.full(shape, value, dtype)
            assert np.all(bnfast.normalize(x, mean, var, activation=activation) == want)

    def test_denormals_are_not_flushed(self, isa, dtype, shape):
        smallest = np.finfo(dtype).smallest_subnormal
        x = np.full(shape, 3 * smallest, dtype)
        one, zero = np.ones(2, dtype), np.zeros(2, dtype)
        assert bits(bnfast.scale_shift(x, one, zero)) == bits(x)
        assert bits(bnfast.scale_shift(x, one, zero, residual=x)) == bits(2 * x)
        assert bits(bnfast.scale_shift(x, -one, zero, activation=("leaky_relu", 1.0))) == bits(-x)

    def test_minus_zero(self, isa, dtype, shape):
        """-0 * 1 + -0 is -0, and so is any activation of it, as in PyTorch."""
        x = np.full(shape, -0.0, dtype)
        one, minus_zero = np.ones(2, dtype), np.full(2, -0.0, dtype)
        for activation in (None, "relu", "relu6", "leaky_relu"):
            y = bnfast.scale_shift(x, one, minus_zero, activation=activation)
            assert bits(y) == bits(x)

    def test_negative_weight_flips_infinity(self, isa, dtype, shape):
        x = np.full(shape, np.inf, dtype)
        y = bnfast.scale_shift(x, np.array([-1, 1], dtype), np.zeros(2, dtype))
        assert np.all(y[:, 0] == -np.inf)
        assert np.all(y[:, 1] == np.inf)


def test_floating_point_flags_unchanged():
    """The calling thread must not be left with flush-to-zero."""
    bnfast.batch_norm_forward(make_problem((64, 8, 40, 40)).x)
    assert np.float32(1e-40) * np.float32(0.5) != 0
