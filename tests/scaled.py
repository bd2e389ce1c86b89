"""Tables to be standardised, and the limits of what a StandardScaler makes of them."""

import numpy as np
from tolerance import SECOND_ORDER, U, assert_within, gamma, tiny, unit
from wide import wide

ROWS, FEATURES = 500, 7
OFFSETS = [0, 1, -20, 1e3, 1e5, 1e6, -1e6]
FITTED = ("mean_", "var_", "scale_", "n_samples_seen_")


def table(rng, dtype=np.float64, order="C", rows=ROWS):
    """Features whose means are up to a million deviations."""
    return np.array(rng.normal(OFFSETS, 1, (rows, FEATURES)), dtype, order=order)


def with_gaps(rng, x):
    """NaN in some places of some features, which have different numbers of them then."""
    x = x.copy(order="K")
    for feature, share in ((1, 0.1), (4, 0.5), (5, 0.9)):
        x[rng.random(len(x)) < share, feature] = np.nan
    return x


def exact(x, weight=None):
    """Mean and biased variance of each feature, without what is NaN."""
    weight = np.ones(len(x)) if weight is None else weight
    w = wide(weight)[:, None] * ~np.isnan(x)
    values = np.nan_to_num(wide(x))
    mean = (w * values).sum(axis=0) / w.sum(axis=0)
    return mean, (w * (values - mean) ** 2).sum(axis=0) / w.sum(axis=0)


def assert_statistics(scaler, x, weight=None, batches=1):
    """Within the limits of `tolerance.moments_of`, of any values and weights.

    A weight is one more factor. A batch is one more merge, with four more roundings: the variance
    times the count and back, and two sums. The weights of all merges, one after the other, add up
    to those of the values, so that the logarithm of the tree's levels covers them.
    """
    mean, var = exact(x, weight)
    values = np.nan_to_num(wide(x))
    terms = gamma(len(x) + 4 * batches + 5)
    e = terms * 2 * np.abs(values).max(axis=0)
    levels = np.log2(len(x)) + 2
    squares = var + (np.abs(np.where(np.isnan(x), mean, values) - mean) ** 2).max(axis=0)
    var_error = terms * squares + 4 * e * np.sqrt(levels * var) + 4 * e**2 * levels
    assert_within(scaler.mean_, mean, SECOND_ORDER * e, "mean_")
    assert_within(scaler.var_, var, SECOND_ORDER * var_error, "var_")
    np.testing.assert_array_equal(scaler.scale_, np.where(var > 0, np.sqrt(scaler.var_), 1))


def assert_transformed(y, x, scaler):
    """(x - mean_) / scale_: five roundings of the result, and those of the mean's lower part.

    That part is at most u times the mean, and is rounded in the difference, as a product and in a
    sum; the factor 1 / scale_ is one more rounding, in float64.
    """
    mean, scale = (wide(a) for a in (scaler.mean_, scaler.scale_))
    right = (wide(x) - mean) / scale
    u = unit(x.dtype)
    bound = (5 * u + U) * np.abs(right) + 4 * u * u * np.abs(mean) / scale + tiny(x.dtype)
    assert y.dtype == x.dtype
    there = ~np.isnan(right)
    np.testing.assert_array_equal(np.isnan(y), ~there)
    assert_within(y[there], right[there], SECOND_ORDER * bound[there], "transform")


def assert_alike(ours, theirs, rtol=1e-12):
    """The same attributes, of the same types and shapes."""
    assert set(vars(ours)) == set(vars(theirs))
    for name in FITTED:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert np.shape(a) == np.shape(b), name
        if b is not None:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-300, err_msg=name)
