"""The list of activations, and the smooth ones over the whole range of each data type."""

import functools
import os
import typing

import numpy as np
import pytest
import reference
from cases import EVERY_DTYPE, WITHOUT_FMA, bits, computed_in
from tolerance import finfo
from wide import LEAST, wide

import bnfast
from bnfast import _core, _types

# Those whose derivative the output does not tell; and of them, those made of an exponential.
SMOOTH = [name for name, facts in _core.ACTIVATIONS.items() if not facts.from_output]
CURVED = [name for name in SMOOTH if name != "hardswish"]
AT_MINUS_INFINITY = {"tanh": -1}  # else 0
FUSING = [isa for isa in _core.isas() if isa not in WITHOUT_FMA]
ONES, ZEROS = np.ones(2), np.zeros(2)


def whole_range(dtype):
    """Values of every size and sign, both infinities, NaN, and neighbours of the kinks; many where
    exponentials become denormals and vanish, and where formulas change.
    """
    info = finfo(dtype)
    least, most = np.log2(float(info.smallest_subnormal)), np.log2(float(info.max))
    exponents = np.linspace(least, most, 8_000)
    with np.errstate(over="ignore"):  # Windows' exp2 speaks of it below the largest number, too
        sizes = np.exp2(exponents[:-1])
    near = np.concatenate([np.linspace(k - 0.01, k + 0.01, 401) for k in (-3, -0.7, 0, 0.7, 3)])
    ranges = [np.linspace(-end, end, 4_001) for end in (8, 40, 120, 800)]
    values = np.concatenate([sizes, -sizes, near, *ranges])
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.0, -3.0, 0.7, -0.7]
    values = np.append(values, special)
    values = values[~(np.abs(values) > float(info.max)) | np.isinf(values)].astype(dtype)
    return np.stack([values, values[::-1]], axis=1)


def parameters(dtype):
    return ONES.astype(computed_in(dtype)), ZEROS.astype(computed_in(dtype))


def activated(z, name):
    return bnfast.scale_shift(z, *parameters(z.dtype), activation=name)


def slope_of(z, name):
    stats = bnfast.BatchStats(ZEROS, ONES, ONES, 0)
    return bnfast.batch_norm_backward(np.ones_like(z), z, stats, activation=name, needs=("x",)).x


@functools.cache
def values_of_whole_range(name, dtype):
    return exact_values(whole_range(dtype), name)


@functools.cache
def slopes_of_whole_range(name, dtype):
    return exact_slopes(whole_range(dtype), name)


def exact_values(z, name):
    with np.errstate(all="ignore"):
        exact = reference.activate(wide(z), name)
    exact[np.isneginf(z.astype(float))] = AT_MINUS_INFINITY.get(name, 0)
    return exact


def exact_slopes(z, name):
    """Infinities have the slope of large numbers."""
    with np.errstate(all="ignore"):
        exact = reference.activation_slope(np.clip(wide(z), -1e4, 1e4), name)
    exact[np.isnan(z)] = np.nan
    return exact


def last_place(magnitude, dtype):
    """The unit in the last place of numbers of a type."""
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(np.abs(magnitude).astype(float))
    unit = np.ldexp(wide(finfo(dtype).eps), exponent - 1)
    return np.maximum(unit, float(finfo(dtype).smallest_subnormal))


def assert_within_units(found, exact, magnitude, dtype, units):
    """Within so many units in the last place of magnitude; infinities and NaN the same."""
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype).astype(float)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(found.astype(float)[~finite], rounded[~finite])
    with np.errstate(invalid="ignore"):
        error = np.abs(wide(found) - exact) / last_place(magnitude, dtype)
    # Of z Phi(z) at |z| < 40 in double-doubles, Phi is off by half a denormal.
    allowed = np.where(np.abs(exact) < LEAST, units + 20, units)
    worst = np.argmax(np.where(finite, error - allowed, -units))
    assert error.flat[worst] <= allowed.flat[worst], (
        f"got {found.flat[worst]!r}, expected {exact.flat[worst]!r}: {error.flat[worst]} units"
    )


def test_names_for_type_checkers():
    assert typing.get_args(_types.ActivationName) == tuple(_core.ACTIVATIONS)
    sloped = {name for name, facts in _core.ACTIVATIONS.items() if facts.slope}
    assert sloped == {"leaky_relu"}  # what the type of ("leaky_relu", slope) says


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("name", SMOOTH)
class TestOfTheWholeRange:
    @pytest.mark.smoke
    def test_values(self, name, dtype, isa):
        z = whole_range(dtype)
        exact = values_of_whole_range(name, dtype)
        assert_within_units(activated(z, name), exact, exact, dtype, 4)

    @pytest.mark.smoke
    def test_slopes(self, name, dtype, isa):
        z = whole_range(dtype)
        exact = slopes_of_whole_range(name, dtype)
        assert_within_units(slope_of(z, name), exact, np.nanmax(np.abs(exact)), dtype, 4)

    def test_limits(self, name, dtype, isa):
        """At infinity to the bit, but for the sign of 0."""
        z = np.array([[-np.inf, np.inf]], dtype)
        above = 1 if name in ("sigmoid", "tanh") else np.inf
        want = [[AT_MINUS_INFINITY.get(name, 0), above]]
        np.testing.assert_array_equal(activated(z, name).astype(float), want)
        want = [[0, 0 if name in ("sigmoid", "tanh") else 1]]
        np.testing.assert_array_equal(slope_of(z, name).astype(float), want)

    def test_same_bits_with_fused_multiply_add(self, name, dtype, isa):
        """As the set that was tested before, if both have one; and if neither has."""
        z = whole_range(dtype)
        alike = [other for other in _core.isas() if (other in FUSING) == (isa in FUSING)]
        found = []
        for other in alike:
            _core.set_isa(other)
            found.append((bits(activated(z, name)), bits(slope_of(z, name))))
        assert found == found[:1] * len(alike)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("name", ["tanh", "silu", "gelu"])
def test_sign_of_zero_is_kept(name, dtype, isa):
    z = np.array([[0.0, -0.0]], dtype)
    scale, shift = parameters(dtype)
    assert bits(bnfast.scale_shift(z, scale, -shift, activation=name)) == bits(z)


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVED)
class TestOfEveryFloat32:
    """Of every 251st; of every one with BNFAST_EVERY_FLOAT=1, for some hours.

    The reference is the library's own float64 result: what the tests above allow that is 2^-27 of a
    unit here.
    """

    STEP = 1 if os.environ.get("BNFAST_EVERY_FLOAT") == "1" else 251

    def floats(self):
        """In pieces, each with its float64 twin. (Signalling NaNs warn when they are converted.)"""
        stride = 2**21 * self.STEP
        for start in range(0, 2**32, stride):
            patterns = np.arange(start, min(start + stride, 2**32), self.STEP, dtype=np.uint64)
            z = patterns[: len(patterns) // 2 * 2].astype(np.uint32).view(np.float32)
            with np.errstate(invalid="ignore"):
                yield z.reshape(-1, 2), z.astype(float).reshape(-1, 2)

    @pytest.mark.timeout(3600)
    def test_values(self, name, isa):
        for z, wider in self.floats():
            exact = activated(wider, name)
            assert_near(activated(z, name), exact, np.abs(exact))

    @pytest.mark.timeout(3600)
    def test_slopes(self, name, isa):
        largest = max(slope_of(np.full((1, 2), z), name).max() for z in np.linspace(0, 3, 3001))
        for z, wider in self.floats():
            assert_near(slope_of(z, name), slope_of(wider, name), largest)


def assert_near(found, exact, magnitude):
    """float32 within 4 units in the last place of magnitude; quicker than assert_within_units."""
    with np.errstate(over="ignore", invalid="ignore"):
        exponent = np.frexp(np.clip(magnitude, 2.0**-126, 2.0**127))[1]
        good = np.abs(found - exact) <= np.ldexp(4.0, exponent - 24)
        good |= found == exact.astype(np.float32)  # infinities
    assert np.all(good | (np.isnan(found) & np.isnan(exact)))


class TestTheOutputDoesNotTell:
    """A smooth activation's derivative needs the residual."""

    @pytest.mark.parametrize("name", SMOOTH)
    def test_y_without_residual_is_refused(self, name):
        x = np.ones((4, 2), np.float32)
        y, stats = bnfast.batch_norm_forward(x, activation=name)
        with pytest.raises(ValueError, match=f"derivative of {name} is not told by the output"):
            bnfast.batch_norm_backward(x, x, stats, activation=name, y=y)

    @pytest.mark.parametrize("name", SMOOTH)
    def test_y_beside_residual_is_not_read(self, name):
        rng = np.random.default_rng(0)
        x, r, dy = rng.standard_normal((3, 8, 2), np.float32)
        y, stats = bnfast.batch_norm_forward(x, activation=name, residual=r)
        want = bnfast.batch_norm_backward(dy, x, stats, activation=name, residual=r)
        got = bnfast.batch_norm_backward(dy, x, stats, activation=name, residual=r, y=y * np.nan)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("name", SMOOTH)
    def test_layer_whose_residual_is_overwritten(self, name):
        x, r = np.random.default_rng(0).standard_normal((2, 8, 2), np.float32)
        layer = bnfast.BatchNorm(2, activation=name)
        y = layer(x, r, out=r)
        assert y is r
        with pytest.raises(RuntimeError, match="out=residual"):
            layer.backward(x)
