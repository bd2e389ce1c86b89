"""Properties of batch normalization for any numbers (hypothesis)."""

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, bits, make_problem
from hypothesis import given
from tolerance import (
    SECOND_ORDER,
    assert_within,
    backward_bounds,
    batch_statistics,
    constants,
    forward_bound,
)
from wide import wide

import bnfast
from bnfast import Moments

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])
activations = st.sampled_from(ACTIVATIONS)
powers = st.integers(-20, 20).map(lambda k: 2.0**k)
batches = st.integers(2, 40)
channels = st.integers(1, 40)
planes = st.lists(st.integers(1, 9), max_size=2)


@st.composite
def problems(draw, shape=None, **options):
    shape = shape or (draw(batches), draw(channels), *draw(planes))
    options.setdefault("dtype", draw(dtypes))
    options.setdefault("activation", draw(activations))
    options.setdefault("residual", draw(st.booleans()))
    return make_problem(shape, seed=draw(seeds), **options)


def forward(p):
    return bnfast.batch_norm_forward(p.x, p.weight, p.bias, eps=p.eps, **p.options)


def gradients(p, stats):
    return bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)


@given(problems(), powers)
def test_affine_invariance_to_the_bit(p, a):
    """BN(a x) with a^2 eps is BN(x). A power of two scales every float in between without rounding,
    so no bit may differ. The gradient with respect to x is 1/a of the former one.
    """
    y, stats = forward(p)
    scaled = p.replace(x=(a * p.x).astype(p.x.dtype), eps=a * a * p.eps)
    scaled_y, scaled_stats = forward(scaled)
    assert bits(scaled_y) == bits(y)
    assert bits(scaled_stats.mean) == bits(a * stats.mean)
    assert bits(scaled_stats.var) == bits(a * a * stats.var)
    g, scaled_g = gradients(p, stats), gradients(scaled, scaled_stats)
    assert bits(scaled_g.x * p.x.dtype.type(a)) == bits(g.x)
    assert bits(scaled_g.weight) == bits(g.weight)
    assert bits(scaled_g.bias) == bits(g.bias)


def on_a_grid(p):
    """x in sixteenths and eps a power of two: times an integer below 2^8 plus
    another they stay exact in float32, and only the arithmetic differs.
    """
    return p.replace(x=np.round(p.x * 16) / 16, eps=2.0**-17)


integers = st.integers(-255, 255).filter(bool)


@given(problems(residual=False, activation=None), integers, st.integers(-255, 255))
def test_affine_invariance(p, a, b):
    """BN(a x + b) with a^2 eps is BN(x), for a < 0 with the other sign."""
    p = on_a_grid(p.replace(bias=0 * p.bias))
    moved = p.replace(x=a * p.x + b, eps=a * a * p.eps)
    y, _ = forward(p)
    moved_y, _ = forward(moved)
    bound = sum(forward_bound(q, batch_statistics(q.x, 1)) for q in (p, moved))
    assert_within(moved_y, np.sign(a) * wide(y), bound)


@given(seeds, st.integers(2, 50), st.integers(1, 20), powers)
def test_scale_invariance_of_section_3_3(seed, batch, units, a):
    """BN((aW)u) = BN(Wu), dBN((aW)u)/du = dBN(Wu)/du and
    dBN((aW)u)/d(aW) = 1/a dBN(Wu)/dW. A power of two makes them exact, with
    an eps that is negligible for any variance here (the paper omits it).
    """
    rng = np.random.default_rng(seed)
    u, weights = rng.standard_normal((batch, 7)), rng.standard_normal((7, units))
    dy = rng.standard_normal((batch, units))
    y, du, dw = through_layer(u, weights, dy)
    scaled_y, scaled_du, scaled_dw = through_layer(u, a * weights, dy)
    assert bits(scaled_y) == bits(y)
    assert bits(scaled_du) == bits(du)
    assert bits(scaled_dw) == bits(dw / a)


def through_layer(u, weights, dy):
    x = u @ weights
    y, stats = bnfast.batch_norm_forward(x, eps=1e-80)
    dx = bnfast.batch_norm_backward(dy, x, stats).x
    return y, dx @ weights.T, u.T @ dx


@given(problems(activation=None, residual=False), integers)
def test_larger_weights_lead_to_smaller_gradients(p, a):
    """Section 3.3 for any factor, with eps in proportion: dl/d(ax) = 1/|a| dl/dx."""
    p = on_a_grid(p)
    scaled = p.replace(x=a * p.x, eps=a * a * p.eps)
    g, bound = gradient_of_x(p)
    scaled_g, scaled_bound = gradient_of_x(scaled)
    # For a < 0 the output changes its sign as well, and the two cancel.
    assert_within(abs(a) * scaled_g, g, bound + abs(a) * scaled_bound)


def gradient_of_x(p):
    """The library's dx, and the limit of its error."""
    s = batch_statistics(p.x, 1)
    exact = reference.backward(wide(p.dy), *p.exact())
    got = wide(gradients(p, forward(p)[1]).x)
    return got, backward_bounds(p, s, exact).x


@given(problems(), st.data())
def test_batch_independence_in_inference(p, data):
    """Every example gets the same answer, to the bit, as alone."""
    mean, var = p.bias, p.weight**2
    rows = data.draw(st.lists(st.integers(0, len(p.x) - 1), min_size=1, max_size=5))
    whole = bnfast.normalize(p.x, mean, var, p.weight, p.bias, **p.options)
    residual = None if p.residual is None else p.residual[rows]
    part = bnfast.normalize(
        p.x[rows], mean, var, p.weight, p.bias, activation=p.activation, residual=residual
    )
    assert bits(part) == bits(whole[rows])


@given(problems(), st.randoms())
def test_order_of_the_batch_does_not_matter(p, random):
    """Training: the examples' answers move with them, up to the sums' rounding."""
    order = list(range(len(p.x)))
    random.shuffle(order)
    residual = None if p.residual is None else p.residual[order]
    shuffled = p.replace(x=p.x[order], residual=residual)
    bound = forward_bound(p, batch_statistics(p.x, 1))
    y, _ = forward(p)
    assert_within(forward(shuffled)[0], wide(y[order]), 2 * bound[order])


@given(problems(activation=None, residual=False))
def test_output_has_the_moments_asked_for(p):
    """Mean bias, variance weight^2 var / (var + eps) (section 3)."""
    y, _ = forward(p)
    s = batch_statistics(p.x, 1)
    got = batch_statistics(y, 1)
    off = forward_bound(p, s).max()
    want = wide(p.weight) ** 2 * s.var / (s.var + p.eps)
    assert_within(got.mean, wide(p.bias), off)
    # Each deviation is off by 2 off: the variance by 4 off std + 4 off^2.
    assert_within(got.var, want, 4 * off * np.sqrt(want) + 4 * off**2)


@given(problems(activation=None, residual=False))
def test_gradient_is_orthogonal_to_what_cancels(p):
    """Adding a constant to x changes nothing, so dx sums to 0. Scaling x changes
    nothing except for eps: sum dx (x - mean) is the part of dl/dgamma
    that eps keeps from cancelling, gamma dl/dgamma eps / (var + eps).
    """
    dx, bound = gradient_of_x(p)
    s = batch_statistics(p.x, 1)
    d = p.x - reference.to_shape(s.mean, p.x, 1)
    exact = reference.backward(wide(p.dy), *p.exact())
    kept = p.weight * exact.gamma * p.eps / (s.var + p.eps)
    # SECOND_ORDER covers the roundings of the sums here.
    for got, want, off in ((dx, 0 * kept, bound), (dx * d, kept, bound * np.abs(d))):
        off = SECOND_ORDER * reference.over_channel(np.sum, off, 1)
        assert_within(reference.over_channel(np.sum, got, 1), want, off)


@given(problems(residual=False))
def test_layouts_agree(p):
    """A channels-last copy has another memory order and the same values."""
    y, _ = forward(p)
    last = p.replace(x=np.ascontiguousarray(np.moveaxis(p.x, 1, -1)), axis=-1)
    bound = forward_bound(p, batch_statistics(p.x, 1))
    got = np.moveaxis(forward(last)[0], -1, 1)
    assert_within(got, wide(y), 2 * bound)


@given(problems(activation=None), activations)
def test_activation_is_applied_to_the_plain_output(p, activation):
    """Fused or afterwards: the same bits, since all kernels compute the same z."""
    z, _ = forward(p)
    y, _ = forward(p.replace(activation=activation))
    name, slope = activation if isinstance(activation, tuple) else (activation, 0.01)
    slope = p.x.dtype.type(slope)
    formulas = {
        None: lambda: z,
        "relu": lambda: np.where(z > 0, z, 0),
        "relu6": lambda: np.clip(z, 0, 6),
        "leaky_relu": lambda: np.where(z > 0, z, slope * z),
    }
    if name in formulas:
        assert np.array_equal(y, formulas[name]())
    assert np.array_equal(y, bnfast.scale_shift(z, None, None, activation=activation))


class TestMoments:
    """A monoid: neutral element, associativity, and commutativity up to rounding."""

    @staticmethod
    def parts(x, cuts):
        return [bnfast.moments(part) for part in np.split(x, sorted(cuts))]

    @given(problems(), st.lists(st.integers(0, 40), min_size=2, max_size=2))
    def test_associativity(self, p, cuts):
        a, b, c = self.parts(p.x, [min(cut, len(p.x)) for cut in cuts])
        s = batch_statistics(p.x, 1)
        for got in ((a + b) + c, a + (b + c), (c + a) + b, Moments.merge_all([a, b, c])):
            assert got.count == p.m
            assert_within(got.mean, s.mean, s.mean_error)
            assert_within(got.var(), s.var, s.var_error)

    @given(problems(), st.integers(0, 40))
    def test_commutativity(self, p, cut):
        a, b = self.parts(p.x, [min(cut, len(p.x))])
        s = batch_statistics(p.x, 1)
        assert (a + b).count == (b + a).count
        assert_within((a + b).mean, wide((b + a).mean), 2 * s.mean_error)
        assert_within((a + b).var(), wide((b + a).var()), 2 * s.var_error)

    @given(problems(), powers)
    def test_scale_to_the_bit(self, p, a):
        m, scaled = bnfast.moments(p.x), bnfast.moments((a * p.x).astype(p.x.dtype))
        assert bits(scaled.mean) == bits(a * m.mean)
        assert bits(scaled.m2) == bits(a * a * m.m2)

    @given(problems())
    def test_variance_is_never_negative(self, p):
        assert np.all(bnfast.moments(p.x).m2 >= 0)


@given(problems(), st.floats(0, 1), st.integers(1, 4))
def test_running_statistics_converge_to_those_of_a_repeated_batch(p, momentum, steps):
    """After n equal batches the first value's share is (1 - momentum)^n."""
    mean, var = np.zeros(p.channels), np.ones(p.channels)
    x = p.x.astype(np.float64)
    for _ in range(steps):
        bnfast.batch_norm(x, mean, var, training=True, momentum=momentum, ddof=0)
    s = batch_statistics(x, 1)
    kept = (1 - wide(momentum)) ** steps
    for got, first, exact, error in (
        (mean, 0, s.mean, s.mean_error),
        (var, 1, s.var, s.var_error),
    ):
        want = kept * first + (1 - kept) * exact
        # Five roundings per step of values between the first and the last.
        bound = 8 * steps * 2.0**-53 * (np.abs(exact) + first) + error
        assert_within(got, want, bound)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
@given(problems())
def test_eps_is_added_to_the_variance(eps, p):
    p = p.replace(eps=eps)
    stats = bnfast.batch_norm_forward(p.x, eps=eps)[1]
    assert_within(
        stats.inv_std,
        1 / np.sqrt(wide(stats.var) + eps),
        4 * 2.0**-53 * stats.inv_std,
    )


@given(problems())
def test_fixed_statistics_of_the_batch_give_the_training_output(p):
    """The two modes differ only in the source of the statistics."""
    y, stats = forward(p)
    again = bnfast.normalize(p.x, stats.mean, stats.var, p.weight, p.bias, eps=p.eps, **p.options)
    bound = forward_bound(p, constants(stats.mean, stats.var))
    assert_within(again, wide(y), 2 * bound)
