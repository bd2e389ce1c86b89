"""The list of activations, and the smooth ones over the whole range of each data type."""

import typing

import numpy as np
import pytest
import reference
from cases import EVERY_DTYPE, computed_in
from tolerance import finfo

import bnfast
from bnfast import _core, _types

SMOOTH = [name for name, facts in _core.ACTIVATIONS.items() if not facts.from_output]
ONES, ZEROS = np.ones(2), np.zeros(2)


def whole_range(dtype):
    """Values of every size and sign, both infinities, NaN, and neighbours of the kinks."""
    info = finfo(dtype)
    least, most = np.log2(float(info.smallest_subnormal)), np.log2(float(info.max))
    exponents = np.linspace(least, most, 40_000)
    sizes = np.exp2(exponents[:-1])
    near = np.concatenate([np.linspace(k - 0.01, k + 0.01, 2_001) for k in (-3, 0, 3)])
    values = np.concatenate([sizes, -sizes, np.linspace(-8, 8, 20_001), near])
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.0, -3.0]
    values = np.append(values, special).astype(dtype)
    return np.stack([values, values[::-1]], axis=1)


def parameters(dtype):
    return ONES.astype(computed_in(dtype)), ZEROS.astype(computed_in(dtype))


def assert_within_units(found, exact, magnitude, dtype, units):
    """Within so many units in the last place of magnitude; infinities and NaN the same."""
    found = found.astype(np.longdouble)
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype).astype(np.longdouble)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(found[~finite], rounded[~finite])
    unit = np.maximum(
        np.abs(magnitude) * float(finfo(dtype).eps), float(finfo(dtype).smallest_subnormal)
    )
    with np.errstate(invalid="ignore"):
        error = np.abs(found - exact)
    assert np.all(error <= units * unit, where=finite)


def test_names_for_type_checkers():
    assert typing.get_args(_types.ActivationName) == tuple(_core.ACTIVATIONS)
    sloped = {name for name, facts in _core.ACTIVATIONS.items() if facts.slope}
    assert sloped == {"leaky_relu"}  # what the type of ("leaky_relu", slope) says


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_values(name, dtype, isa):
    z = whole_range(dtype)
    y = bnfast.scale_shift(z, *parameters(dtype), activation=name)
    with np.errstate(all="ignore"):
        exact = reference.activate(z.astype(np.longdouble), name)
    exact[np.isneginf(z)] = 0
    assert_within_units(y, exact, exact, dtype, 4)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_derivatives(name, dtype, isa):
    z = whole_range(dtype)
    stats = bnfast.BatchStats(ZEROS, ONES, ONES, 0)
    dx = bnfast.batch_norm_backward(np.ones_like(z), z, stats, activation=name, needs=("x",)).x
    with np.errstate(all="ignore"):
        exact = reference.activation_slope(z.astype(np.longdouble), name)
    exact[np.isnan(z)] = np.nan
    assert_within_units(dx, exact, np.nanmax(np.abs(exact)), dtype, 4)


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
