"""The allowed distance of a correct result from the exact one, derived.

Notation. u is the unit roundoff of the type that is computed in (half its eps):
the data's, or float32 for halves. U is that of float64. One operation returns
the exact result times (1 + e), |e| <= u. A sum of n terms in any order is off
by at most gamma(n) times the sum of the terms' magnitudes (Higham, "Accuracy
and Stability of Numerical Algorithms", 2002, section 4.2). First-order terms
are added below. SECOND_ORDER covers the products of two of them, and the
oracle's own error, which is UNIT of wide.py for one operation, at most 2^-11 of U.

The limits are for the arithmetic that the library documents:
statistics and sums in float64, but those of a training call and its backward, on float32 data and
halves, in trees of float32 that are then added in float64 (batch_moments.inc.h); in the type of u
    d  = x - mean_hi
    y  = d * scale + (bias - mean_lo * scale)   (one rounding with FMA, two without)
    dx = b * d + (a * dy + (c - b * mean_lo))   (all but d and dy rounded once from float64)
and halves are rounded once more, when they are written: see `written`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import reference
from cases import computed_in
from wide import is_wide, wide

U = np.finfo(np.float64).eps / 2
SECOND_ORDER = 1 + 2.0**-9
# Roundings of a value and of a product in a tree of eight vectors: three levels of additions, and
# the product.
TREE, TREE_OF_PRODUCTS = 3, 4
# The relative error of a training call's variance, in u of float32 (proven in batch_moments.inc.h).
BATCH_VARIANCE = 16.05
# Of a block's pivot, in deviations: (mean - pivot)^2 is at most half of the variance.
FROM_PIVOT = np.sqrt(1.5)


def finfo(dtype):
    if np.dtype(dtype).kind == "f":
        return np.finfo(dtype)
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def unit(dtype):
    return float(finfo(dtype).eps) / 2


def tiny(dtype):
    return float(finfo(dtype).smallest_subnormal)


def written(error, magnitude, dtype):
    """The error of a number after it is stored, and its magnitude.

    A half is rounded to nearest from float32. The error is at most half a unit in the last place of
    a number off by `error`, or half of the smallest denormal if that is larger.
    """
    if computed_in(dtype) == dtype:
        return error
    return error + np.maximum(unit(dtype) * (magnitude + error), tiny(dtype) / 2)


def gamma(n, u=U):
    return n * u / (1 - n * u)


def assert_within(got, want, bound, what=""):
    """|got - want| <= bound everywhere; a NaN on either side fails."""
    got, want = (a if is_wide(a) else np.asarray(a) for a in (got, want))
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    error = np.abs(wide(got) - want)
    bound = np.broadcast_to(bound, error.shape)
    good = error <= bound
    if good.all():
        return
    at = np.unravel_index(np.argmin(good), good.shape)
    raise AssertionError(
        f"{what}: {np.count_nonzero(~good)} of {good.size} beyond their bound, the first at "
        f"{tuple(int(i) for i in at)}: got {got[at]!r}, expected {want[at]!r}, "
        f"error {float(error[at]):.3g}, bound {float(bound[at]):.3g}"
    )


@dataclass(frozen=True)
class Statistics:
    """Exact mean and variance per channel, and the error limits of float64 ones."""

    mean: np.ndarray
    var: np.ndarray
    mean_error: np.ndarray
    var_error: np.ndarray


def constants(mean, var):
    """Given statistics are exact."""
    zero = np.zeros(np.shape(mean))
    return Statistics(wide(mean), wide(var), zero, zero)


def moments_of(x, axis, sum_of=None):
    """Of `bnfast.moments`: sums of m terms in float64, in blocks merged by Chan, Golub and LeVeque.

    m is `sum_of` if x stands for an array of that many copies of its values.

    The mean is a sum of m terms, a division and a merge's few operations:
    e = gamma(m + 4) mean|x|. The squares are a sum of m terms of one sign:
    gamma(m + 4) var. float32 data and halves are read once, around one of a block's own
    values p, whose terms |x - p| are at most |x| + max|x|, and whose squares
    add up to m var + m (p - mean)^2, the latter at most m max d^2.

    A merge adds w delta^2, where delta is a difference of two means and hence
    off by up to 2 e. This shifts the sum of all w delta^2 by at most
    2 sum w |delta| 2e + sum w 4 e^2. With sum w <= m (log2 m + 1) =: m L
    (a tree has log2 m levels and the weights of a level add up to less than
    m) and sum w delta^2 <= m var, by Cauchy and Schwarz the variance shifts by
    4 e sqrt(L var) + 4 e^2 L.
    """
    single = computed_in(x.dtype) == np.float32
    x = wide(x)
    m = sum_of or reference.values_per_channel(x, axis)
    mean, var = reference.batch_mean(x, axis), reference.batch_variance(x, axis)
    magnitude = reference.over_channel(np.mean, np.abs(x), axis)
    squares = var
    if single:
        d = np.abs(x - reference.to_shape(mean, x, axis))
        magnitude = magnitude + reference.over_channel(np.max, np.abs(x), axis)
        squares = var + reference.over_channel(np.max, d, axis) ** 2
    e = gamma(m + 4) * magnitude
    levels = np.log2(m) + 1
    var_error = gamma(m + 4) * squares + 4 * e * np.sqrt(levels * var) + 4 * e**2 * levels
    return Statistics(mean, var, SECOND_ORDER * e, SECOND_ORDER * var_error)


def batch_statistics(x, axis, sum_of=None):
    """Of a training call. A block's sum of x - pivot is off by one rounding of each term and
    by its tree, relative to the terms' sizes, whose mean is at most the root of their squares'.
    """
    s = moments_of(x, axis, sum_of)
    if computed_in(x.dtype) != np.float32:
        return s
    u = unit(np.float32)
    mean_error = s.mean_error + (TREE + 1) * u * FROM_PIVOT * np.sqrt(s.var)
    return Statistics(s.mean, s.var, mean_error, s.var_error + BATCH_VARIANCE * u * s.var)


def weighted_moments_of(x, axis, weights):
    """Of what a mask counts, by weights shaped like x; all calls sum these in float64.

    Terms are w (x - p), where the pivot p is a value that counts or, for float64 data, their mean:
    two roundings each, and w (x - p)^2 has three. The sum of weights W is a sum of m terms, too.
    So the mean is off by e = gamma(2 m + 8) sum w |x - p| / W, with |x - p| <= |x| + |p|. The sum
    of squares S is off by gamma(m + 4) S. From it s^2 / W is subtracted, which is at most S, and
    whose s is off by gamma(m + 3) sum w |x - p|: twice as much, and gamma(m) for W. The division by
    W adds another gamma(m): gamma(5 m + 20) S / W in all. S / W is var + (p - mean)^2. Merging is
    as above.
    """
    if (weights == 1).all():  # as without a mask
        return batch_statistics(x, axis)
    single = computed_in(x.dtype) == np.float32
    x = reference.counted(wide(x), weights)
    m = reference.values_per_channel(x, axis)
    mean = reference.weighted_mean(x, weights, axis)
    var = reference.weighted_variance(x, weights, axis)
    magnitude = reference.weighted_mean(np.abs(x), weights, axis)
    farthest, squares = magnitude, var
    if single:
        d = np.where(weights > 0, np.abs(x - reference.to_shape(mean, x, axis)), 0)
        farthest = reference.over_channel(np.max, np.abs(x), axis)
        squares = var + reference.over_channel(np.max, d, axis) ** 2
    e = gamma(2 * m + 8) * (magnitude + farthest)
    levels = np.log2(m) + 1
    var_error = gamma(5 * m + 20) * squares + 4 * e * np.sqrt(levels * var) + 4 * e**2 * levels
    return Statistics(mean, var, SECOND_ORDER * e, SECOND_ORDER * var_error)


def inv_std_relative(s, eps):
    """1 / sqrt(var + eps): half the relative error of var + eps, and of three
    operations and the product with the weight one rounding each, in float64."""
    return s.var_error / (2 * (s.var + eps)) + 4 * U


class Activation(NamedTuple):
    """What bounds need to know of an activation."""

    kinks: tuple[float, ...] = ()
    steepest: float = 1  # slope
    curvature: float = 0  # at most, between kinks
    roundings: int = 0  # of its own, relative to the larger of z and y
    slope_roundings: int = 0  # of its derivative and its product with dy, relative to dy


def smooth(steepest, curvature):
    return Activation((), steepest, curvature, 8, math.ceil(8 * steepest) + 1)


ACTIVATIONS = {
    None: Activation(),
    "relu": Activation((0,)),
    "relu6": Activation((0, 6)),
    # the slope's and the product's
    "leaky_relu": Activation((0,), roundings=2, slope_roundings=2),
    # +3, /6 and two products; of the slope, 1/3, 0.5, their sum and product, all below 1.5
    "hardswish": Activation((-3, 3), 1.5, 1 / 3, roundings=4, slope_roundings=4),
    # 4 units in the last place (test_activations.py), of two roundings each, and of the steepest
    # slope one more for the product. Steepest where the second derivative is 0: at 0, 0, 2.3994 and
    # sqrt(2). Most curved where the third one is: at log(2 + sqrt(3)), its half, 0 and 0.
    "sigmoid": smooth(0.25, 0.0963),
    "tanh": smooth(1, 0.7699),
    "silu": smooth(1.0999, 0.5),
    "gelu": smooth(1.129, 0.7979),
}


class Terms:
    """The terms that forward and backward limits share, shaped like x."""

    def __init__(self, p, s):
        x, self.weight, self.bias, eps, _, residual, _ = p.exact()
        self.p, self.s, self.u = p, s, unit(computed_in(p.x.dtype))
        self.relative = self.shaped(inv_std_relative(s, eps))
        self.inv_std = self.shaped(1 / np.sqrt(s.var + eps))
        self.scale = np.abs(self.shaped(self.weight)) * self.inv_std
        self.d = np.abs(x - self.shaped(s.mean))
        self.mean_lo = self.u * np.abs(self.shaped(s.mean))  # at most
        # x - mean_hi: u (|d| + |mean_lo|)
        self.d_error = self.u * (self.d + self.mean_lo) + self.shaped(s.mean_error)
        self.residual = 0 if residual is None else np.abs(residual)
        self.activation = ACTIVATIONS[reference.name_and_slope(p.activation)[0]]

    def shaped(self, per_channel):
        return reference.to_shape(per_channel, self.p.x, self.p.axis)

    def total(self, a):
        return reference.over_channel(np.sum, a, self.p.axis)

    def pre_activation(self):
        """d * scale + bias (+ residual), before the activation."""
        product = self.d * self.scale
        sum_ = product + np.abs(self.shaped(self.bias))
        return (
            self.scale * self.d_error
            + product * self.relative
            # scale rounded to the data's type, and the product, without FMA
            + 2 * self.u * (product + self.scale * self.mean_lo)
            # bias - mean_lo * scale, rounded
            + self.u * (np.abs(self.shaped(self.bias)) + self.scale * self.mean_lo)
            + self.u * sum_  # + bias
            + (self.u * (sum_ + self.residual) if self.p.residual is not None else 0)
        )


def forward_bound(p, s):
    """An error before the activation grows by its steepest slope at most; the
    activation adds its own roundings."""
    t = Terms(p, s)
    mean, var = s.mean, s.var
    x, weight, bias, eps, axis, residual, activation = p.exact()
    z = reference.before_activation(x, mean, var, weight, bias, eps, axis, residual)
    magnitude = np.maximum(np.abs(z), np.abs(reference.activate(z, activation)))
    steepest, roundings = t.activation.steepest, t.activation.roundings
    bound = steepest * t.pre_activation() + roundings * t.u * magnitude
    bound = SECOND_ORDER * bound + tiny(computed_in(p.x.dtype))
    return written(bound, magnitude, p.x.dtype)


def off_the_kinks(p, s):
    """Set dy to 0 wherever rounding may decide the side of a kink. In place,
    since a copy would have another memory order.
    """
    if p.activation is None:
        return
    x, weight, bias, eps, axis, residual, _ = p.exact()
    z = reference.before_activation(x, s.mean, s.var, weight, bias, eps, axis, residual)
    width = written(SECOND_ORDER * Terms(p, s).pre_activation(), np.abs(z), p.x.dtype)
    writeable = p.dy.flags.writeable
    p.dy.flags.writeable = True
    for kink in ACTIVATIONS[reference.name_and_slope(p.activation)[0]].kinks:
        p.dy[np.abs(z - kink) <= width] = 0
    p.dy.flags.writeable = writeable


def backward_bounds(p, s, exact, through_statistics=True, sum_of=None, weights=None):
    """Return a reference.Gradients of limits; `exact` is the reference's answer.

    g is dy times the activation's slope (its gradient is the residual's), which
    changes with the pre-activation's error where it is curved. Both sums are formed in trees of
    the data's type, and sum g (x - mean_hi) is corrected by mean_lo sum g. A mask's weights, shaped
    like x, multiply what comes through the statistics, and their sum takes the place of m.
    """
    t = Terms(p, s)
    u = t.u
    summing = gamma((sum_of or p.m) + 2)
    g = np.abs(exact.residual)
    dy = np.abs(wide(p.dy))
    g_error = (
        t.activation.slope_roundings * u * dy + t.activation.curvature * dy * t.pre_activation()
    )
    sum_g_error = t.total((TREE * u + summing) * g + g_error)
    size = t.d + t.mean_lo  # of x - mean_hi
    sum_gd_error = t.total(g * t.d_error + (g_error + (TREE_OF_PRODUCTS * u + summing) * g) * size)
    sum_gd_error = sum_gd_error + u * np.abs(s.mean) * sum_g_error
    inv_std = 1 / np.sqrt(s.var + p.eps)
    relative = inv_std_relative(s, p.eps)
    weight = inv_std * sum_gd_error + np.abs(exact.gamma) * (relative + 3 * U)
    bias = sum_g_error + np.abs(exact.beta) * U

    # a g: the coefficient's two errors, g's, the product's without FMA
    a_g = t.scale * g
    x = a_g * (t.relative + u) + t.scale * g_error + u * a_g
    if through_statistics:
        # b = -scale inv_std^2 sum(g d) / m,  c = -scale sum(g) / m
        m = p.m if weights is None else t.shaped(t.total(weights))
        m_error = 0 if weights is None else gamma(p.m)
        b = t.scale * t.inv_std * np.abs(t.shaped(exact.gamma)) / m
        b_error = t.scale * t.inv_std**2 * t.shaped(sum_gd_error) / m
        b_error = b_error + b * (3 * t.relative + u + 6 * U + m_error)
        c = t.scale * np.abs(t.shaped(exact.beta)) / m
        c_error = t.scale * t.shaped(sum_g_error) / m + c * (t.relative + u + 3 * U + m_error)
        through = b_error * t.d + b * t.d_error + c_error
        # b rounded, and b * d without FMA; the constant rounded
        through = through + 2 * u * b * size + u * (c + b * t.mean_lo)
        if weights is None:
            # the sums
            x = x + through + u * (a_g + c) + u * (a_g + c + b * size)
        else:
            # the sum, its product with the weight, and the sum with a g
            rest = weights * (c + b * size)
            x = x + weights * through + 2 * u * rest + u * (a_g + rest)
    least = tiny(computed_in(p.x.dtype))
    x, weight, bias, g_error = (SECOND_ORDER * e + least for e in (x, weight, bias, g_error))
    x, g_error = (written(e, a, p.x.dtype) for e, a in ((x, np.abs(exact.x)), (g_error, g)))
    return reference.Gradients(x, weight, bias, g_error)


def running_bound(old, new, new_error, momentum, dtype):
    """(1 - momentum) * old + momentum * new. The batch's value has its own error. In the
    running array's type at worst it is rounded once, and so
    are 1 - momentum, momentum, the two products and the sum.
    """
    magnitude = np.abs((1 - momentum) * old) + np.abs(momentum * new)
    return SECOND_ORDER * (4 * unit(dtype) * magnitude + momentum * new_error)
