"""batch_norm_backward compared with the paper's equations and finite differences."""

from itertools import combinations

import numpy as np
import pytest
import reference
from cases import (
    ACTIVATIONS,
    ALL_ORDERS,
    CONTIGUOUS_ORDERS,
    DTYPES,
    EVERY_DTYPE,
    FROM_OUTPUT,
    NAMES,
    SIZES,
    backward,
    bits,
    computed_in,
    forward,
    make_problem,
    poisoned_like,
)
from tolerance import (
    assert_within,
    backward_bounds,
    batch_statistics,
    constants,
    forward_bound,
    off_the_kinks,
)
from wide import wide

import bnfast

PLANAR, INTERLEAVED = (4, 5, 3, 7), (33, 21)
SHAPES = pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])


def check_gradients(got, p, exact, bounds):
    assert isinstance(got, bnfast.Gradients)
    assert got.x.dtype == p.x.dtype
    assert got.weight.dtype == got.bias.dtype == np.float64
    for name, g, want, bound in zip(NAMES, got, exact, bounds, strict=True):
        if name == "residual" and p.residual is None:
            assert g is None
        else:
            assert_within(g, want, bound, f"{name} of {p.x.shape} {p.x.dtype}")


def check_backward(p, **more):
    s = batch_statistics(p.x, p.axis)
    off_the_kinks(p, s)
    exact = reference.backward(wide(p.dy), *p.exact())
    _, stats = forward(p)
    check_gradients(backward(p, stats, **more), p, exact, backward_bounds(p, s, exact))


def check_constants(p, rng):
    mean = rng.standard_normal(p.channels) + 0.5
    var = rng.uniform(0.5, 4, p.channels)
    s = constants(mean, var)
    off_the_kinks(p, s)
    dy = wide(p.dy)
    exact = reference.inference_backward(dy, p.exact()[0], mean, var, *p.exact()[1:])
    stats = bnfast.BatchStats.from_population(mean, var, p.eps)
    assert stats.count == 0
    bounds = backward_bounds(p, s, exact, through_statistics=False)
    check_gradients(backward(p, stats), p, exact, bounds)


@SHAPES
@RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestEveryVariant:
    @pytest.mark.smoke
    def test_through_the_statistics(self, isa, dtype, activation, residual, shape):
        check_backward(make_problem(shape, dtype, activation=activation, residual=residual))

    @pytest.mark.smoke
    def test_with_constant_statistics(self, isa, dtype, activation, residual, shape, rng):
        check_constants(make_problem(shape, dtype, activation=activation, residual=residual), rng)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_sizes_around_every_edge(isa, dtype):
    for shape in SIZES:
        check_backward(make_problem(shape, dtype))


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_fused_sizes_around_every_edge(isa, dtype):
    for shape in SIZES[::3]:
        check_backward(make_problem(shape, dtype, activation="relu", residual=True))


@SHAPES
@pytest.mark.parametrize("activation", FROM_OUTPUT, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestMask:
    def test_from_y_is_that_from_the_residual(self, isa, dtype, activation, shape):
        """The forward's output and the recomputed one are the same bits, and so are the two masks,
        even directly at a kink.
        """
        p = make_problem(shape, dtype, activation=activation, residual=True)
        y, stats = forward(p)
        recomputed = backward(p, stats)
        needs = NAMES
        from_y = backward(p.replace(residual=None), stats, y=y, needs=needs)
        from_both = backward(p, stats, y=y)
        for a, b, c in zip(recomputed, from_y, from_both, strict=True):
            assert bits(a) == bits(b) == bits(c)

    def test_follows_the_forward(self, isa, dtype, activation, shape):
        """Without tolerance at kinks: g' is 1 exactly where the forward's own pre-activation was
        between them.
        """
        p = make_problem(shape, dtype, activation=activation, residual=True)
        z, stats = forward(p.replace(activation=None))
        slope = reference.activation_slope(z.astype(np.float64), activation)
        inside = computed_in(dtype)
        want = (p.dy.astype(inside) * slope.astype(inside)).astype(dtype)
        assert bits(backward(p, stats).residual) == bits(want + 0)


@SHAPES
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_recomputed_where_rounding_decides(isa, dtype, activation, shape):
    """A bias that cancels one of x's few values leaves the product's rounding error as the
    pre-activation, of either sign or 0. Forward and backward must compute the same one. Sums of
    small integers are exact, so they count the sides.
    """
    p = make_problem(shape, dtype)
    p = p.replace(x=np.round(2 * p.x) / 2, bias=0 * p.bias, dy=np.ones_like(p.dy))
    z, stats = forward(p)
    p = p.replace(bias=-np.moveaxis(z, 1, 0).reshape(p.channels, -1)[:, 0])
    z, _ = forward(p)
    assert np.count_nonzero(np.abs(z) < 1e-6) > 2 * p.channels, "few ties: the test has no teeth"
    slope = {"relu": 0, "relu6": 0, "leaky_relu": 0.25}[activation]
    between = (z > 0) & ((z < 6) | (activation != "relu6"))
    want = reference.over_channel(np.sum, np.where(between, 1, slope), 1)
    given = ("leaky_relu", slope) if slope else activation
    assert backward(p.replace(activation=given), stats).bias.tolist() == want.tolist()


class TestKinks:
    """PyTorch's choice: 0 for relu (at 0) and relu6 (at 0 and 6), the slope for leaky_relu."""

    @pytest.mark.parametrize("fused", [False, True], ids=["", "residual"])
    @pytest.mark.parametrize(
        ("activation", "want"),
        [
            ("relu", [0, 0, 0, 1, 1, 1, 1]),
            ("relu6", [0, 0, 0, 1, 1, 0, 0]),
            (("leaky_relu", 0.25), [0.25, 0.25, 0.25, 1, 1, 1, 1]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(7, 2), (1, 2, 7)])
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_gradient_at(self, isa, dtype, shape, activation, want, fused):
        z = np.array([-1, -0.0, 0, 0.5, 5.5, 6, 7], dtype)
        x = np.repeat(z, 2).reshape(7, 2) if len(shape) == 2 else np.tile(z, 2).reshape(shape)
        p = make_problem(shape, dtype, activation=activation, residual=fused)
        p = p.replace(x=x, dy=np.ones_like(x), weight=p.weight * 0 + 1, bias=p.bias * 0)
        if fused:
            p = p.replace(x=np.zeros_like(x), residual=x)
        stats = bnfast.BatchStats.from_population(np.zeros(2), np.ones(2), 0.0)
        got = backward(p, stats)
        gradient = got.residual if fused else got.x
        assert np.moveaxis(gradient, 1, 0)[0].ravel().tolist() == want


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestMemoryOrders:
    def test_every_order(self, isa, dtype, order):
        arrange = ALL_ORDERS[order]
        check_backward(
            make_problem(PLANAR, dtype, arrange=arrange, activation="relu", residual=True)
        )

    def test_read_only(self, dtype, order):
        arrange = ALL_ORDERS[order]
        p = make_problem(PLANAR, dtype, arrange=arrange, activation="relu", residual=True)
        for a in (p.x, p.dy, p.residual, p.weight, p.bias):
            a.flags.writeable = False
        check_backward(p)

    @pytest.mark.parametrize("name", ["dy", "residual", "x"])
    def test_one_array_in_another_order(self, dtype, order, name):
        p = make_problem(PLANAR, dtype, activation="relu", residual=True)
        check_backward(p.replace(**{name: ALL_ORDERS[order](getattr(p, name))}))

    def test_out_in_another_order(self, dtype, order):
        p = make_problem(PLANAR, dtype)
        _, stats = forward(p)
        out = ALL_ORDERS[order](poisoned_like(p.x))
        got = backward(p, stats, out=out)
        assert got.x is out
        assert bits(out) == bits(backward(p, stats).x)


@pytest.mark.parametrize("order", CONTIGUOUS_ORDERS)
def test_fresh_gradients_keep_the_memory_order(order):
    p = make_problem(PLANAR, arrange=CONTIGUOUS_ORDERS[order][0], residual=True)
    _, stats = forward(p)
    got = backward(p, stats, out=None)
    assert got.x.strides == got.residual.strides == p.x.strides


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_any_axis(axis):
    check_backward(make_problem((3, 4, 5, 6), axis=axis, activation="relu", residual=True))


@SHAPES
@RESIDUAL
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("of_batch", [True, False], ids=["batch", "constants"])
def test_every_combination_of_needs(shape, residual, activation, of_batch):
    """A requested gradient has the same bits alone and with others; the rest is None."""
    p = make_problem(shape, activation=activation, residual=residual)
    _, stats = forward(p)
    if not of_batch:
        stats = bnfast.BatchStats.from_population(stats.mean, stats.var, p.eps)
    everything = backward(p, stats)
    available = NAMES if residual else NAMES[:3]
    for count in range(1, len(available) + 1):
        for needs in combinations(available, count):
            more = {} if "x" in needs else {"out": None}
            got = backward(p, stats, needs=needs, **more)
            for name, g, all_g in zip(NAMES, got, everything, strict=True):
                assert (g is not None) == (name in needs), f"{name} with needs={needs}"
                assert g is None or bits(g) == bits(all_g)


def test_needs_may_be_any_collection():
    p = make_problem(PLANAR)
    _, stats = forward(p)
    want = backward(p, stats).weight
    for needs in (["weight"], ("weight",), {"weight"}, frozenset({"weight"})):
        got = backward(p, stats, needs=needs, out=None)
        assert bits(got.weight) == bits(want)
        assert got.x is got.bias is got.residual is None


class TestResidualGradient:
    def test_is_a_fresh_array(self):
        p = make_problem(PLANAR, residual=True)
        _, stats = forward(p)
        got = backward(p, stats)
        assert bits(got.residual) == bits(p.dy)
        assert not any(np.shares_memory(got.residual, a) for a in (p.dy, p.residual, got.x))

    def test_needs_no_weight(self):
        p = make_problem(PLANAR, residual=True, activation="relu")
        _, stats = bnfast.batch_norm_forward(p.x, **p.options)
        got = bnfast.batch_norm_backward(p.dy, p.x, stats, **p.options)
        ones, zeros = np.ones_like(p.weight), np.zeros_like(p.bias)
        want = backward(p.replace(weight=ones, bias=zeros), stats)
        assert bits(got.x) == bits(want.x)
        assert bits(got.residual) == bits(want.residual)


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
class TestAliasing:
    @pytest.mark.parametrize("name", ["dy", "x"])
    @pytest.mark.parametrize("fused", [False, True], ids=["", "relu+residual"])
    def test_out_may_be(self, isa, dtype, shape, name, fused):
        fusion = {"activation": "relu", "residual": True} if fused else {}
        p = make_problem(shape, dtype, **fusion)
        _, stats = forward(p)
        fresh = backward(p, stats)
        p = p.replace(**{name: getattr(p, name).copy()})
        got = backward(p, stats, out=getattr(p, name))
        assert got.x is getattr(p, name)
        for a, b in zip(got, fresh, strict=True):
            assert a is b is None or bits(a) == bits(b)

    def test_dy_may_be_x(self, dtype, shape):
        p = make_problem(shape, dtype)
        check_backward(p.replace(dy=p.x))


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 0), (3, 0, 2), (0, 4)])
def test_empty_batches(shape, dispatches):
    """The sums over no values are 0."""
    x = np.empty(shape, np.float32)
    weight = np.ones(shape[1], np.float32)
    _, stats = bnfast.batch_norm_forward(x, weight, weight)
    got = bnfast.batch_norm_backward(x, x, stats, weight, weight, residual=x)
    assert got.x.shape == got.residual.shape == shape
    assert got.weight.tolist() == got.bias.tolist() == [0] * shape[1]
    assert dispatches() == {}


@SHAPES
@RESIDUAL
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("of_batch", [True, False], ids=["batch", "constants"])
class TestFiniteDifferences:
    """The library's own forward is the function; float64."""

    def test_of_the_loss(self, isa, activation, shape, residual, of_batch, rng):
        p = make_problem(shape, np.float64, activation=activation, residual=residual, seed=5)
        _, stats = forward(p)
        if not of_batch:
            stats = bnfast.BatchStats.from_population(stats.mean, stats.var, p.eps)
        gradients = backward(p, stats)
        for name, gradient in zip(NAMES, gradients, strict=True):
            if gradient is not None:
                check_derivative(p, stats, name, gradient, of_batch, rng)


def loss(p, stats, of_batch):
    if of_batch:
        y, _ = forward(p)
    else:
        y = bnfast.normalize(p.x, stats.mean, stats.var, p.weight, p.bias, eps=p.eps, **p.options)
    return np.sum(p.dy * y)


def check_derivative(p, stats, name, gradient, of_batch, rng, h=2.0**-17):
    """Compare along a random direction. Truncation is c h^2, and the difference between
    steps h and 2 h is 3 c h^2. Rounding is that of two losses over 2 h, where
    the sum of n terms adds gamma(n) of their magnitudes to the forward's error.
    """
    direction = rng.standard_normal(gradient.shape)

    def difference(step):
        sides = (p.replace(**{name: getattr(p, name) + s * step * direction}) for s in (1, -1))
        return np.subtract(*(loss(side, stats, of_batch) for side in sides)) / (2 * step)

    s = batch_statistics(p.x, p.axis) if of_batch else constants(stats.mean, stats.var)
    per_loss = np.sum(np.abs(p.dy) * forward_bound(p, s))
    per_loss += p.x.size * np.finfo(np.float64).eps * np.sum(np.abs(p.dy) * 10)
    fine = difference(h)
    truncation = abs(difference(2 * h) - fine)
    bound = truncation + 1.1 * per_loss / h
    want = np.sum(gradient * direction)
    assert bound < 1e-4 * np.sum(np.abs(gradient * direction)), "the test has no teeth"
    assert abs(fine - want) <= bound, name
