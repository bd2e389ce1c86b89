"""mask=: which values of a batch count, compared with the weighted formulas of the reference."""

import copy
import pickle
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from bad_calls import (
    DATA_TYPES,
    OUT,
    X,
    backward,
    each,
    forward,
    inference,
    mentions,
    moments,
    training,
)
from cases import (
    ACTIVATIONS,
    ALL_ORDERS,
    DTYPES,
    EVERY_DTYPE,
    FROM_OUTPUT,
    MASKS,
    NAMES,
    SIZES,
    WITHOUT_FMA,
    at_offset,
    bits,
    computed_in,
    first_of_each,
    long_gaps,
    make_problem,
    mask_of,
    poisoned_like,
    read_only,
    scattered,
    weights_and_zeros,
    with_gaps,
)
from cases import backward as run_backward
from cases import forward as run_forward
from hypothesis import assume, given
from layer_cases import layer_of, state_bits
from tolerance import (
    SECOND_ORDER,
    assert_within,
    backward_bounds,
    batch_statistics,
    constants,
    finfo,
    forward_bound,
    gamma,
    inv_std_relative,
    off_the_kinks,
    running_bound,
    weighted_moments_of,
)
from wide import wide

import bnfast
from bnfast import Moments, _core, lengths_mask

PLANAR, INTERLEAVED = (4, 5, 3, 7), (33, 21)
SHAPES = pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
EACH_MASK = pytest.mark.parametrize("make", MASKS, ids=lambda make: make.__name__)
# Blocks end after 16384 values of a plane or several, and after 512 rows of 257 channels, 16384 of
# two.
BLOCKS = ((1, 2, 16_400), (34, 2, 500), (2, 1, 17_001), (16_400, 2), (520, 257))
SHORT = ((9, 4, 2), (65, 3, 4), (5, 1), (7, 1, 3), (2, 3), (1, 2, 3), (3, 2, 1), (1, 1, 2))


def weights_read(mask, p):
    """A mask's weights as the library reads them, shaped like x."""
    return reference.weights_of(np.asarray(mask).astype(computed_in(p.x.dtype)), p.x, p.axis)


def check(p, mask):
    """Forward, statistics, backward and moments of a problem."""
    weights = weights_read(mask, p)
    s = weighted_moments_of(p.x, p.axis, weights)
    y, stats = run_forward(p, mask=mask)
    x, *rest = p.exact()
    want = reference.weighted_forward(x, weights, *rest)
    assert_within(y, want, forward_bound(p, s), f"y of {p.x.shape} {p.x.dtype}")
    check_stats(stats, p, s, mask, weights)
    check_gradients(p, s, mask, weights, stats)
    found = bnfast.moments(p.x, axis=p.axis, mask=mask)
    assert found.count == stats.count
    assert type(found.count) is type(stats.count)
    assert_within(found.mean, s.mean, s.mean_error, "mean of moments")
    assert_within(found.var(), s.var, s.var_error, "variance of moments")


def check_stats(stats, p, s, mask, weights):
    check_count(stats.count, mask, weights, p)
    assert {a.dtype for a in stats[:3]} == {np.dtype(np.float64)}
    assert_within(stats.mean, s.mean, s.mean_error, "mean")
    assert_within(stats.var, s.var, s.var_error, "var")
    inv_std = 1 / np.sqrt(s.var + p.eps)
    assert_within(stats.inv_std, inv_std, inv_std * inv_std_relative(s, p.eps), "inv_std")


def check_count(count, mask, weights, p):
    """The sum of the weights: an int of a bool mask, otherwise a float."""
    total = wide(weights).sum() / p.channels
    if np.asarray(mask).dtype == bool:
        assert type(count) is int
        assert count == total
    else:
        assert type(count) is float
        assert_within(count, total, gamma(p.m) * total, "count")


def check_gradients(p, s, mask, weights, stats):
    off_the_kinks(p, s)
    x, *rest = p.exact()
    exact = reference.weighted_backward(wide(p.dy), x, weights, *rest)
    bounds = backward_bounds(p, s, exact, weights=weights)
    got = run_backward(p, stats, mask=mask)
    assert got.x.dtype == p.x.dtype
    for name, g, want, bound in zip(NAMES, got, exact, bounds, strict=True):
        if name == "residual" and p.residual is None:
            assert g is None
        else:
            assert_within(g, want, bound, f"{name} of {p.x.shape} {p.x.dtype}")


@pytest.mark.parametrize("make", [first_of_each, weights_and_zeros], ids=["bool", "weights"])
@SHAPES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_every_variant(isa, dtype, activation, residual, shape, make):
    p = make_problem(shape, dtype, activation=activation, residual=residual)
    check(p, mask_of(p, make))


@EACH_MASK
@SHAPES
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.smoke
def test_every_mask(isa, dtype, shape, make):
    for seed in range(3):
        p = make_problem(shape, dtype, seed=seed)
        check(p, mask_of(p, make, seed))


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestSizes:
    def test_around_the_edges_of_vectors(self, isa, dtype):
        small = [shape for shape in SIZES if np.prod(shape) < 20_000]
        for i, shape in enumerate((*small[::6], *SHORT)):
            p = make_problem(shape, dtype)
            check(p, mask_of(p, MASKS[i % len(MASKS)]))

    def test_around_the_edges_of_blocks(self, isa, dtype):
        """`long_gaps` leaves out whole blocks, `first_of_each` of one channel the last ones."""
        for i, shape in enumerate(BLOCKS if dtype == np.float32 else BLOCKS[:-1]):
            p = make_problem(shape, dtype)
            check(p, mask_of(p, (long_gaps, first_of_each, weights_and_zeros)[i % 3]))

    def test_first_blocks_left_out(self, isa, dtype):
        for shape in ((1, 1, 34_000), (17_000, 2)):
            p = make_problem(shape, dtype)
            mask = np.zeros(p.x[:, 0].shape, bool)
            mask.reshape(-1)[-3:] = True
            s = weighted_moments_of(p.x, 1, weights_read(mask, p))
            _, stats = run_forward(p, mask=mask)
            check_stats(stats, p, s, mask, weights_read(mask, p))


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestMemoryOrders:
    def test_of_x(self, dtype, order):
        """The mask's axes are those of x, whatever lies where in memory."""
        for make in (scattered, weights_and_zeros):
            p = make_problem(
                PLANAR, dtype, arrange=ALL_ORDERS[order], activation="relu", residual=True
            )
            check(p, mask_of(p, make))

    def test_axes_of_length_one(self, dtype, order):
        for shape in ((4, 5, 1, 7), (1, 5, 3, 7), (4, 1, 3, 7), (4, 5, 1, 1)):
            p = make_problem(shape, dtype, arrange=ALL_ORDERS[order])
            check(p, mask_of(p, weights_and_zeros))

    def test_of_out(self, dtype, order):
        p = make_problem(PLANAR, dtype)
        mask = mask_of(p, scattered)
        fresh, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, mask=mask)
        gradient = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, mask=mask).x
        y, dx = (ALL_ORDERS[order](poisoned_like(p.x)) for _ in range(2))
        bnfast.batch_norm_forward(p.x, p.weight, p.bias, mask=mask, out=y)
        bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, mask=mask, out=dx)
        assert bits(y) == bits(fresh)
        assert bits(dx) == bits(gradient)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -4, np.int64(2)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, np.asfortranarray, with_gaps])
def test_any_axis(axis, arrange):
    p = make_problem((3, 4, 5, 6), axis=axis, arrange=arrange)
    for make in (scattered, weights_and_zeros):
        mask = mask_of(p, make)
        check(p, mask)
        check(p, np.expand_dims(mask, axis % 4))


def everything(p, mask, **more):
    """The bits of all results of a problem with a mask."""
    y, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, mask=mask, **p.options)
    g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, mask=mask, **p.options)
    found = bnfast.moments(p.x, axis=p.axis, mask=mask)
    arrays = (y, *stats[:3], *g, found.mean, found.m2)
    return [None if a is None else bits(a) for a in arrays], stats.count


class TestForms:
    """Of one mask: all give the same bits."""

    def both(self, dtype=np.float32, make=weights_and_zeros, axis=1):
        p = make_problem(PLANAR, dtype, axis=axis, activation="relu", residual=True)
        return p, mask_of(p, make)

    @pytest.mark.parametrize("axis", [0, 1, -1])
    @pytest.mark.parametrize("make", [scattered, weights_and_zeros])
    def test_with_and_without_the_channel_axis(self, make, axis):
        p, mask = self.both(make=make, axis=axis)
        assert everything(p, np.expand_dims(mask, axis)) == everything(p, mask)

    @pytest.mark.parametrize("layout", ["planar", "interleaved"])
    @pytest.mark.parametrize("whole", [(4, 1, 1), (1, 3, 7), (1, 1, 7), (1, 3, 1), (4, 3, 1)])
    def test_axes_of_length_one_are_broadcast(self, whole, layout):
        p, mask = self.both()
        if layout == "interleaved":
            p = make_problem((4, 3, 7, 5), axis=-1)
        part = mask[tuple(slice(n) for n in whole)] + 0.5
        want = everything(p, np.ascontiguousarray(np.broadcast_to(part, mask.shape)))
        assert everything(p, part) == want
        assert everything(p, np.expand_dims(part, p.axis % 4)) == want
        assert everything(p, np.broadcast_to(part, mask.shape)) == want

    @pytest.mark.parametrize(
        "convert",
        [
            np.asfortranarray, with_gaps, read_only, at_offset(1), np.ndarray.tolist, memoryview,
            lambda a: np.ascontiguousarray(a[::-1])[::-1],
            lambda a: a.astype(a.dtype.newbyteorder()),
            lambda a: a.view(np.recarray),
        ],
        ids=[
            "fortran", "gaps", "read-only", "misaligned", "list", "memoryview", "backwards",
            "byte order", "subclass",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("make", [scattered, weights_and_zeros])
    def test_of_other_arrays(self, make, convert):
        p, mask = self.both(np.float64, make)
        assert everything(p, convert(mask)) == everything(p, mask)

    @pytest.mark.parametrize("other", EVERY_DTYPE)
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_of_any_type(self, dtype, other):
        """Weights are of any type of data; quarters are exact in all of them."""
        p, mask = self.both(dtype)
        mask = np.round(4 * mask) / 4
        assert everything(p, mask.astype(other)) == everything(p, mask)

    def test_of_float64_is_rounded_beside_float32(self):
        p, mask = self.both()
        assert everything(p, mask) == everything(p, mask.astype(np.float32))
        p, mask = self.both(np.float64)
        assert everything(p, mask) != everything(p, mask.astype(np.float32))

    def test_bool_is_weights_of_one_and_zero(self):
        p, mask = self.both(make=scattered)
        (found, count), (same, weight) = everything(p, mask), everything(p, mask.astype(float))
        assert found == same
        assert (count, type(count)) == (mask.sum(), int)
        assert (weight, type(weight)) == (mask.sum(), float)

    def test_the_mask_is_only_read(self):
        for make in (scattered, weights_and_zeros):
            p, mask = self.both(make=make)
            before = bits(mask)
            everything(p, read_only(mask))
            everything(p, mask)
            assert bits(mask) == before


@pytest.mark.parametrize("kind", [bool, np.float32])
@pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED, (1, 2, 16_400), (300, 1)], ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_ones_are_no_mask_to_the_bit(isa, dtype, shape, kind):
    p = make_problem(shape, dtype, activation="silu", residual=True)
    found, count = everything(p, np.ones(np.delete(shape, 1), kind))
    want, m = everything(p, None)
    assert found == want
    assert (count, type(count)) == (m, int if kind is bool else float)
    rows = [np.zeros(shape[1], computed_in(dtype)) for _ in range(4)]
    bnfast.batch_norm(p.x, *rows[:2], training=True, mask=np.ones(np.delete(shape, 1), kind))
    bnfast.batch_norm(p.x, *rows[2:], training=True)
    assert bits(rows[0]) == bits(rows[2])
    assert bits(rows[1]) == bits(rows[3])


# --- What is under the mask --------------------------------------------------------------


def garbage(dtype, rng, shape):
    top = float(finfo(dtype).max)
    return rng.choice([np.nan, np.inf, -np.inf, top, -top, 0.0, -0.0, 1e4], shape).astype(dtype)


@EACH_MASK
@pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED, (2, 3, 257), (300, 3), (7, 1, 40)], ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestUnderTheMask:
    def two(self, dtype, shape, make, **options):
        """A problem without gradients under the mask, and one with garbage there."""
        p = make_problem(shape, dtype, **options)
        mask = mask_of(p, make)
        if make is MASKS[3]:  # of weights, all positive
            mask[..., -1] = 0
        left_out = np.broadcast_to(~np.expand_dims(mask > 0, 1), shape)
        p.dy[left_out] = 0
        rng = np.random.default_rng(5)
        q = p.replace(x=p.x.copy(), residual=None if p.residual is None else p.residual.copy())
        for a in (q.x, q.residual):
            if a is not None:
                a[left_out] = garbage(dtype, rng, left_out.sum())
        return p, q, mask, left_out

    def test_nothing_changes_what_counts(self, dtype, shape, make):
        for activation in (None, "relu", "gelu"):
            p, q, mask, left_out = self.two(
                dtype, shape, make, activation=activation, residual=activation is not None
            )
            y, stats = run_forward(p, mask=mask)
            got_y, got = run_forward(q, mask=mask)
            assert bits(got_y[~left_out]) == bits(y[~left_out])
            assert got.count == stats.count
            for a, b in zip(got[:3], stats[:3], strict=True):
                assert bits(a) == bits(b)
            want, found = run_backward(p, stats, mask=mask), run_backward(q, got, mask=mask)
            for name, a, b in zip(NAMES, found, want, strict=True):
                assert a is b is None or bits(a) == bits(b), name
            assert (found.x[left_out].astype(np.float64) == 0).all()
            found, want = (bnfast.moments(r.x, mask=mask) for r in (q, p))
            assert found == want

    def test_derivatives_from_the_output(self, dtype, shape, make):
        """Where y is given, it is NaN under the mask."""
        for activation in FROM_OUTPUT[1:]:
            p, q, mask, _ = self.two(dtype, shape, make, activation=activation, residual=True)
            results = []
            for r in (p, q):
                y, stats = run_forward(r, mask=mask)
                results.append(
                    run_backward(r.replace(residual=None), stats, mask=mask, y=y, needs=NAMES)
                )
            for a, b in zip(*results, strict=True):
                assert bits(a) == bits(b)

    def test_running_statistics(self, dtype, shape, make):
        p, q, mask, _ = self.two(dtype, shape, make)
        mask = mask * (100 if mask.dtype != bool else True)  # more than ddof in all
        running = []
        for r in (p, q):
            pair = np.zeros((2, shape[1]), computed_in(dtype))
            bnfast.batch_norm(r.x, *pair, training=True, mask=mask)
            running.append(bits(pair))
        assert running[0] == running[1]

    def test_large_values(self, dtype, shape, make):
        """They are normalised like the rest, and their gradients go on."""
        p, _, mask, left_out = self.two(dtype, shape, make, activation="relu")
        factor = dtype(4 if dtype == np.float16 else 1000)  # float16 must hold the gradients
        p.x[left_out] = make_problem(shape, dtype, seed=9).x[left_out] * factor
        p.dy[left_out] = make_problem(shape, dtype, seed=9).dy[left_out]
        check(p, mask)


def test_a_gradient_that_arrives_under_the_mask_goes_on():
    """To weight and bias, and through the statistics to what counts; what does not count has the
    direct path alone.
    """
    p = make_problem((6, 2), np.float64)
    mask = np.array([True, True, True, True, False, False])
    dy = np.zeros((6, 2))
    dy[4] = 1.0
    _, stats = run_forward(p, mask=mask)
    g = run_backward(p.replace(dy=dy), stats, mask=mask)
    x_hat = (p.x[4] - stats.mean) * stats.inv_std
    np.testing.assert_allclose(g.bias, [1, 1])
    np.testing.assert_allclose(g.weight, x_hat)
    np.testing.assert_allclose(g.x[4], p.weight * stats.inv_std)
    assert g.x[5].tolist() == [0, 0]
    inner = (p.x[:4] - stats.mean) * stats.inv_std
    np.testing.assert_allclose(g.x[:4], p.weight * stats.inv_std * -(1 + inner * x_hat) / 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@SHAPES
def test_nan_that_counts_stays_in_its_channel(shape, value):
    p = make_problem(shape)
    mask = mask_of(p, scattered)
    at = tuple(np.argwhere(mask)[0])
    q = p.replace(x=p.x.copy())
    q.x[(at[0], 2, *at[1:])] = value
    with np.errstate(all="ignore"):
        (y, stats), (want, _) = run_forward(q, mask=mask), run_forward(p, mask=mask)
        dx = run_backward(q, stats, mask=mask).x
    others = np.arange(shape[1]) != 2
    assert bits(y[:, others]) == bits(want[:, others])
    assert np.isfinite(dx[:, others]).all()
    assert np.isnan(stats.var).tolist() == (~others).tolist()


# --- The statistics ---------------------------------------------------------------------


class TestRunningStatistics:
    @SHAPES
    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("make", [scattered, weights_and_zeros])
    @pytest.mark.parametrize("data", EVERY_DTYPE)
    def test_follow_what_counts(self, data, make, ddof, shape):
        """The variance over W - ddof."""
        p = make_problem(shape, data)
        mask = mask_of(p, make)
        kind = computed_in(data)
        old = np.full(p.channels, 3, kind), np.full(p.channels, 5, kind)
        mean, var = (a.copy() for a in old)
        y = bnfast.batch_norm(
            p.x, mean, var, p.weight, p.bias, True, 0.25, p.eps, ddof=ddof, mask=mask
        )
        assert bits(y) == bits(run_forward(p, mask=mask)[0])
        weights = weights_read(mask, p)
        s = weighted_moments_of(p.x, 1, weights)
        total = wide(weights).sum() / p.channels
        k = total / (total - ddof)
        # W is in M2 and in W - ddof.
        var_error = k * s.var_error + k * (1 + k) * gamma(p.m) * s.var
        bound = running_bound(old[0], s.mean, s.mean_error, 0.25, kind)
        assert_within(mean, reference.running_average(old[0], s.mean, 0.25), bound)
        bound = running_bound(old[1], k * s.var, var_error, 0.25, kind)
        assert_within(var, reference.running_average(old[1], k * s.var, 0.25), bound)

    @pytest.mark.parametrize("ddof", [0, 1])
    def test_light_weights_are_refused_where_they_move(self, ddof):
        """Over W - ddof there is no variance; over W there is."""
        x = np.array([[1.0, 2.0], [3.0, 5.0], [9.0, 9.0]])
        for mask in ([0.25, 0.25, 0.0], [0.5, 0.5, 0.0]):
            _, stats = bnfast.batch_norm_forward(x, mask=mask)
            assert stats.count == sum(mask)
            assert stats.var.tolist() == [1, 2.25]
            y = bnfast.batch_norm(x, training=True, mask=mask, ddof=ddof)
            running = np.zeros(2), np.ones(2)
            out = poisoned_like(x)
            arguments = {"training": True, "mask": mask, "ddof": ddof, "out": out}
            if ddof == 0:
                bnfast.batch_norm(x, *running, **arguments)
                assert bits(out) == bits(y)
                assert running[0].tolist() == pytest.approx([0.2, 0.35], rel=1e-15)
                continue
            words = ("mask", "sum", f"{sum(mask):g}", "ddof", 1)
            with pytest.raises(ValueError, match=mentions(*words)):
                bnfast.batch_norm(x, *running, **arguments)
            assert np.isnan(out).all()
            assert (running[0].tolist(), running[1].tolist()) == ([0, 0], [1, 1])


ILL_CONDITIONED = {
    "mean 1e4 deviations": lambda normal: 1000 + 0.1 * normal,
    "mean 1e6 deviations": lambda normal: 1e6 + normal,
    "outlier first": lambda normal: np.r_[1e6, normal[1:]],
    "outlier last": lambda normal: np.r_[normal[1:], 1e6],
    "sorted": lambda normal: np.sort(1000 + normal),
    "zeros first": lambda normal: np.r_[0 * normal[:20_000], 1000 + normal[20_000:]],
}


@cache
def ill_conditioned(name, layout):
    """x, masks and their exact statistics."""
    rng = np.random.default_rng(7)
    values = ILL_CONDITIONED[name](rng.standard_normal(30_000)).astype(np.float32)
    positions = (30_000,) if layout == "interleaved" else (5, 6000)
    x = values.reshape(*positions[:1], 1, *positions[1:])
    x = np.concatenate([x, -2 * x], axis=1)
    masks = [
        rng.random(positions) < 0.5,
        rng.uniform(0.25, 3, positions).astype(np.float32),
        rng.choice([0.0, 1e-6, 1.0, 1e6], positions).astype(np.float32),
    ]
    for mask in masks:
        mask.reshape(-1)[[0, -1]] = 1  # the outliers
    return x, [(m, weighted_moments_of(x, 1, reference.weights_of(m, x))) for m in masks]


class TestAccuracy:
    """The limits of `moments`, proven for any data: 1e-7 of the variance."""

    @pytest.mark.parametrize("layout", ["planar", "interleaved"])
    @pytest.mark.parametrize("name", ILL_CONDITIONED)
    def test_variance(self, isa, layout, name):
        x, both = ill_conditioned(name, layout)
        for mask, s in both:
            got = bnfast.moments(x, mask=mask)
            assert_within(got.mean, s.mean, s.mean_error, "mean")
            assert_within(got.var(), s.var, 1e-7 * s.var, "variance")
            _, stats = bnfast.batch_norm_forward(x, mask=mask)
            assert bits(stats.mean) == bits(got.mean)
            assert bits(stats.var) == bits(got.var())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_constant_channel_gives_the_bias(self, dtype):
        x = np.full((9, 1, 5), 0.1, dtype)
        mask = np.arange(45).reshape(9, 5) % 3 > 0
        y, stats = bnfast.batch_norm_forward(x, bias=[0.3], mask=mask)
        assert stats.var.tolist() == [0]
        assert np.unique(y).tolist() == [dtype(0.3)]

    def test_huge_values_after_blocks_without_any(self):
        """Squares of differences from a mean of nothing would overflow float64."""
        x = np.full((1, 2, 40_000), 1e200)
        mask = np.arange(40_000) >= 39_000
        got = bnfast.moments(x, mask=mask[None])
        assert got.mean.tolist() == [1e200, 1e200]
        assert got.m2.tolist() == [0, 0]


def test_gradient_is_the_derivative_of_the_output(rng):
    """Central differences of bnfast's own forward in float64, along random directions: with dy
    everywhere, also under the mask.
    """
    for make in (scattered, weights_and_zeros):
        p = make_problem((4, 3, 5), np.float64, activation="tanh", residual=True)
        mask = mask_of(p, make)
        _, stats = run_forward(p, mask=mask)
        g = run_backward(p, stats, mask=mask)
        for name, gradient in zip(NAMES, g, strict=True):
            direction = rng.standard_normal(gradient.shape)

            def loss(step, name=name, p=p, mask=mask, direction=direction):
                moved = p.replace(**{name: getattr(p, name) + step * direction})
                return np.sum(p.dy * run_forward(moved, mask=mask)[0])

            h = 2.0**-14
            fine, coarse = ((loss(s) - loss(-s)) / (2 * s) for s in (h, 2 * h))
            want = np.sum(gradient * direction)
            # Truncation is c h^2, and `coarse` is off by four times as much. Each of two losses is
            # a sum of 60 terms of size 3, of some 20 roundings each.
            bound = abs(coarse - fine) + 60 * 3 * 20 * np.finfo(float).eps / h
            assert bound < 1e-4 * np.sum(np.abs(gradient * direction)), "the test has no teeth"
            assert abs(fine - want) <= bound, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [-100, -60, 62, 100])
def test_weights_may_be_of_any_size(dtype, k):
    """A power of two rounds nothing, so that no bit of a result may differ."""
    p = make_problem(PLANAR, dtype, activation="relu", residual=True)
    mask = mask_of(p, weights_and_zeros)
    (found, count), (scaled, total) = everything(p, mask), everything(p, mask * 2.0**k)
    assert total == count * 2.0**k
    assert scaled[:-1] == found[:-1]


def test_another_memory_order_in_the_backward():
    """The sum of the weights is the same, up to its rounding in another order."""
    for seed in range(8):
        p = make_problem((7, 5, 6, 3), np.float64, seed=seed)
        mask = mask_of(p, weights_and_zeros, seed)
        _, stats = run_forward(p, mask=mask)
        want = run_backward(p, stats, mask=mask)
        for order in ("fortran", "channels_last"):
            q = p.replace(x=ALL_ORDERS[order](p.x))
            got = run_backward(q, stats, mask=mask)
            np.testing.assert_allclose(got.x, want.x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias",), ("residual",), ()], ids=str)
def test_needs(needs):
    p = make_problem(PLANAR, activation="relu", residual=True)
    mask = mask_of(p, weights_and_zeros)
    _, stats = run_forward(p, mask=mask)
    whole = run_backward(p, stats, mask=mask)
    got = run_backward(p, stats, mask=mask, needs=needs, out=None)
    for name, a, b in zip(NAMES, got, whole, strict=True):
        assert a is None if name not in needs else bits(a) == bits(b)


@pytest.mark.parametrize("make", [scattered, weights_and_zeros])
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestConstantStatistics:
    def test_the_mask_changes_nothing(self, dtype, make):
        """Nothing flows through constants."""
        p = make_problem(PLANAR, dtype, activation="silu")
        fixed = bnfast.BatchStats.from_population(p.bias, p.weight**2, p.eps)
        s = constants(p.bias, p.weight**2)
        got = run_backward(p, fixed, mask=mask_of(p, make))
        assert bits(got.x) == bits(run_backward(p, fixed).x)
        dy, x, *rest = wide(p.dy), *p.exact()
        exact = reference.inference_backward(dy, x, s.mean, s.var, *rest)
        bounds = backward_bounds(p, s, exact, through_statistics=False)
        for a, want, bound in zip(got[:3], exact, bounds, strict=False):
            assert_within(a, want, bound)


class TestParts:
    """Of a masked batch: `moments=` and `sums=` are those of the whole."""

    @pytest.mark.parametrize("make", [scattered, weights_and_zeros, MASKS[3]])
    def test_two_parts_are_the_whole(self, make):
        p = make_problem((7, 5, 4, 3), np.float64, activation="hardswish", residual=True)
        mask = mask_of(p, make)
        y, stats = run_forward(p, mask=mask)
        want = run_backward(p, stats, mask=mask)
        cuts = slice(0, 2), slice(2, 7)
        total = sum(bnfast.moments(p.x[i], mask=mask[i]) for i in cuts)
        assert total.count == pytest.approx(stats.count, rel=1e-15)
        parts = [p.replace(x=p.x[i], dy=p.dy[i], residual=p.residual[i]) for i in cuts]
        kept = []
        for part, i in zip(parts, cuts, strict=True):
            got, found = run_forward(part, moments=total, mask=mask[i])
            assert found.count == total.count
            np.testing.assert_allclose(got, y[i], rtol=1e-11, atol=1e-12)
            kept.append(found)
        sums = [
            run_backward(
                part, s._replace(count=0), needs=("weight", "bias"), out=None, mask=mask[i]
            )
            for part, s, i in zip(parts, kept, cuts, strict=True)
        ]
        whole = (sum(g.weight for g in sums), sum(g.bias for g in sums))
        np.testing.assert_allclose(whole[0], want.weight, rtol=1e-11)
        for part, s, i in zip(parts, kept, cuts, strict=True):
            got = run_backward(part, s, sums=whole, mask=mask[i])
            np.testing.assert_allclose(got.x, want.x[i], rtol=1e-10, atol=1e-12)

    def test_a_part_may_count_nothing(self):
        p = make_problem((4, 3), np.float64)
        total = bnfast.moments(p.x)
        y, _ = run_forward(p, moments=total, mask=np.zeros(4, bool))
        assert bits(y) == bits(run_forward(p, moments=total)[0])


# --- Reproducible ------------------------------------------------------------------------


LARGE = ((5, 13, 61, 61), (2, 1, 150_001), (3001, 67), (40_003, 3))


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestReproducible:
    def both(self, dtype, shape):
        p = make_problem(shape, dtype, activation="relu", residual=True)
        return p, mask_of(p, first_of_each if len(shape) > 2 else weights_and_zeros)

    def test_any_number_of_threads_gives_the_same_bits(self, dtype, shape):
        p, mask = self.both(dtype, shape)
        with bnfast.num_threads(1):
            want = everything(p, mask)
        for n in (2, 4):
            with bnfast.num_threads(n):
                assert everything(p, mask) == want, f"{n} threads"

    def test_instruction_sets_with_fma_agree(self, dtype, shape):
        p, mask = self.both(dtype, shape)
        start, results = _core.isa(), []
        try:
            for name in _core.isas():
                if name not in WITHOUT_FMA:
                    _core.set_isa(name)
                    results.append(everything(p, mask))
        finally:
            _core.set_isa(start)
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (37, 19), (2, 3, 4097)], ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_alignment_changes_no_bit(isa, dtype, shape):
    p = make_problem(shape, dtype, activation="relu", residual=True)
    mask = mask_of(p, weights_and_zeros)
    want = everything(p, mask)
    for offset in (np.dtype(dtype).itemsize, 24, 56, 1):
        move = at_offset(offset)
        q = p.replace(x=move(p.x), dy=move(p.dy), residual=move(p.residual))
        assert everything(q, move(mask)) == want, f"offset {offset}"


@SHAPES
def test_in_place(shape):
    p = make_problem(shape, activation="relu", residual=True)
    mask = mask_of(p, weights_and_zeros)
    y, stats = run_forward(p, mask=mask)
    dx = run_backward(p, stats, mask=mask).x
    for name in ("x", "residual"):
        q = p.replace(**{name: getattr(p, name).copy()})
        target = getattr(q, name)
        options = {**q.options, "mask": mask, "out": target}
        assert bnfast.batch_norm_forward(q.x, q.weight, q.bias, **options)[0] is target
        assert bits(target) == bits(y)
    for name in ("dy", "x"):
        q = p.replace(**{name: getattr(p, name).copy()})
        target = getattr(q, name)
        assert run_backward(q, stats, mask=mask, out=target).x is target
        assert bits(target) == bits(dx)


# --- Empty batches, and bad masks ------------------------------------------------------------


@pytest.mark.parametrize("kind", [bool, np.float32])
@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 0), (3, 0, 2), (0, 4), (3, 0)], ids=str)
def test_empty_batches(shape, kind, dispatches):
    x = np.empty(shape, np.float32)
    mask = np.ones(np.delete(shape, 1), kind)
    mean, var = (np.full(shape[1], value, np.float32) for value in (3, 5))
    for training_ in (True, False):
        assert bnfast.batch_norm(x, mean, var, training=training_, mask=mask).shape == shape
    y, stats = bnfast.batch_norm_forward(x, mask=mask)
    assert y.shape == shape
    assert stats.mean.shape == (shape[1],)
    g = bnfast.batch_norm_backward(y, x, stats, mask=mask)
    assert g.x.shape == shape
    assert not g.weight.any()
    assert not g.bias.any()
    assert (mean == 3).all()
    assert (var == 5).all()
    assert bnfast.moments(x, mask=mask) == bnfast.moments(x)
    assert dispatches() == {}


MASKED = each(forward, training, backward, moments)


class TestRefused:
    """With nothing written; X has the shape (6, 4, 5)."""

    def test_good_masks_are_accepted(self):
        """Otherwise the refusals below would prove nothing."""
        arguments = dict(forward.named, out=OUT.copy())
        x = arguments.pop("x")
        bnfast.batch_norm_forward(x, mask=np.ones((6, 5), bool), **arguments)

    @MASKED
    @pytest.mark.parametrize(
        "shape",
        [(5,), (6,), (6, 4, 5), (6, 4), (5, 6), (7, 5), (6, 1, 4), (6, 2, 5), (1, 6, 1, 5)],
        ids=str,
    )
    def test_shape(self, call, shape):
        call.refuses(
            ValueError,
            ("mask", shape, (6, 1, 5), (6, 5), X.shape),
            mask=np.ones(shape, bool),
        )

    @MASKED
    def test_scalar(self, call):
        call.refuses(ValueError, ("mask", "()"), mask=np.True_)

    @MASKED
    @pytest.mark.parametrize("dtype", ["int64", "uint8", "complex64", "longdouble", "O", "S1"])
    def test_dtype(self, call, dtype):
        mask = np.ones((6, 5)).astype(dtype)
        call.refuses(TypeError, ("mask", mask.dtype, "bool", *DATA_TYPES), mask=mask)

    @MASKED
    @pytest.mark.parametrize("value", ["text", object(), [[1, 0], [1, 1]], 1, [["a"]]])
    def test_no_array_of_bools_or_floats(self, call, value):
        call.refuses((TypeError, ValueError), ("mask",), mask=value)

    @MASKED
    def test_masked_array(self, call):
        masked = np.ma.masked_array(np.ones((6, 5), bool), False)
        call.refuses(TypeError, ("mask", "masked array"), mask=masked)

    @MASKED
    @pytest.mark.parametrize("value", [-1.0, -0.125, np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("kind", DTYPES)
    def test_weights(self, call, kind, value):
        mask = np.ones((6, 5), kind)
        mask[3, 2] = value
        call.refuses(ValueError, ("mask", "weight", f"{kind(value)}", "0 or more"), mask=mask)

    @MASKED
    def test_weights_past_float32_beside_float32(self, call):
        mask = np.ones((6, 5))
        mask[3, 2] = 1e39
        call.refuses(ValueError, ("mask", "weight", "inf"), mask=mask)

    def test_weights_whose_sum_is_infinite(self):
        """There is no mean by them."""
        x = X.astype(np.float64)
        for call in (bnfast.moments, bnfast.batch_norm_forward):
            with pytest.raises(ValueError, match=mentions("mask")):
                call(x, mask=np.full((6, 5), 1e308))

    @each(forward, training)
    @pytest.mark.parametrize("kind", [bool, np.float32, np.float64])
    @pytest.mark.parametrize("counted", [0, 1])
    def test_fewer_than_two(self, call, counted, kind):
        mask = np.zeros((6, 5), kind)
        mask.reshape(-1)[7 : 7 + counted] = 1
        if kind is not bool:
            mask *= 50
        call.refuses(
            ValueError,
            (
                "Expected more than 1 value per channel when training, got a mask that counts",
                f"{counted} of input size", X.shape,
            ),
            mask=mask,
        )  # fmt: skip

    @each(forward, training)
    def test_weights_that_round_to_nothing(self, call):
        """Beside float32 they are float32."""
        call.refuses(ValueError, ("more than 1 value", "counts 0"), mask=np.full((6, 5), 1e-60))

    def test_backward_of_another_mask(self):
        """W divides the sums."""
        stats = backward.named["stats"]
        backward.refuses(ValueError, ("stats.count", 30, 29), mask=np.arange(30).reshape(6, 5) > 0)
        masked = bnfast.batch_norm_forward(X, mask=np.full((6, 5), 0.5))[1]
        backward.refuses(ValueError, ("stats.count", 15, 30), stats=masked)
        assert stats.count == 30

    def test_in_inference(self):
        """A mask is checked, though nothing is summed there."""
        for mask in (np.ones((6, 5), int), "text", np.ma.masked_array(np.ones((6, 5)), False)):
            inference.refuses(TypeError, ("mask",), mask=mask)

    def test_shape_in_inference(self):
        inference.refuses(ValueError, ("mask", (6, 4)), mask=np.ones((6, 4), bool))

    def test_update(self):
        found = Moments(2, np.ones(4), np.ones(4))
        before = copy.deepcopy(found)
        for mask in (np.ones((6, 4)), np.full((6, 5), -1.0), np.ones((6, 5), int)):
            with pytest.raises((TypeError, ValueError), match="mask"):
                found.update(X, mask=mask)
        assert found == before


@pytest.mark.parametrize("make", [scattered, weights_and_zeros])
def test_inference_does_not_use_it(make):
    p = make_problem(PLANAR, activation="relu", residual=True)
    given = (p.x, p.bias, p.weight**2, p.weight, p.bias)
    want = bnfast.batch_norm(*given, **p.options)
    assert bits(bnfast.batch_norm(*given, mask=mask_of(p, make), **p.options)) == bits(want)


# --- Moments --------------------------------------------------------------------------------


class TestMoments:
    @SHAPES
    @pytest.mark.parametrize("kind", [bool, np.float32])
    def test_of_what_no_mask_counts(self, shape, kind):
        """Fewer than two values have moments, unlike a training batch."""
        p = make_problem(shape)
        mask = np.zeros(np.delete(shape, 1), kind)
        found = bnfast.moments(p.x, mask=mask)
        assert found == Moments.empty(p.channels)
        assert type(found.count) is (int if kind is bool else float)
        mask.reshape(-1)[3] = 2
        found = bnfast.moments(p.x, mask=mask)
        assert found.count == (1 if kind is bool else 2)
        at = np.argwhere(mask)[0]
        value = p.x[(at[0], slice(None), *at[1:])]
        assert bits(found.mean) == bits(value.astype(np.float64))
        assert not found.m2.any()

    def test_update(self):
        p = make_problem(PLANAR)
        found, total = Moments.empty(5), 0
        for make in MASKS:
            mask = mask_of(p, make)
            assert found.update(p.x, mask=mask) is found
            total = total + bnfast.moments(p.x, mask=mask)
        assert found == total
        last = np.moveaxis(p.x, 1, -1)
        mask = mask_of(p, scattered)
        got = Moments.empty(5).update(last, axis=-1, mask=mask)
        want = bnfast.moments(last, axis=-1, mask=mask)
        assert got == want

    def test_counts_of_weights(self):
        """They are floats from then on, and no rounding to integers happens."""
        a = Moments(0.5, [1.0], [0.0])
        b = Moments(2, [3.0], [1.0])
        assert (a + b).count == 2.5
        assert (a + b).mean.tolist() == pytest.approx([2.6])
        assert (a + b).m2.tolist() == pytest.approx([1 + 4 * 0.4])
        assert (a + b).var(1).tolist() == pytest.approx([2.6 / 1.5])
        assert a.var(0.25).tolist() == [0]
        assert np.isnan(a.var(1)).all()
        for made in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            assert made == a
            assert made.count == 0.5
        assert "count=0.5" in repr(a)
        assert a != b
        assert Moments(2.0, [3.0], [1.0]) == b

    @pytest.mark.parametrize("count", [-0.5, np.nan, np.inf, -np.inf])
    def test_no_weight(self, count):
        with pytest.raises(ValueError, match=mentions("count", count)):
            Moments(count, [1.0], [0.0])

    @pytest.mark.parametrize("count", ["1.5", None, True, 1j, [1.5], np.array([1.5])], ids=str)
    def test_no_number(self, count):
        with pytest.raises(TypeError, match=mentions("count")):
            Moments(count, [1.0], [0.0])


# --- Layers -----------------------------------------------------------------------------------


@EACH_MASK
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_a_layer_is_the_functions(dtype, make):
    p = make_problem((6, 5, 3, 4), dtype, activation="relu", residual=True)
    mask = mask_of(p, make)
    layer = layer_of(p)
    y = layer(p.x, p.residual, mask=mask)
    kind = computed_in(dtype)
    mean, var = np.zeros(5, kind), np.ones(5, kind)
    want = bnfast.batch_norm(
        p.x, mean, var, p.weight, p.bias, True, 0.1, p.eps, mask=mask, **p.options
    )
    assert bits(y) == bits(want)
    assert bits(layer.running_mean) == bits(mean)
    assert bits(layer.running_var) == bits(var)
    assert int(layer.num_batches_tracked) == 1
    _, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, mask=mask, **p.options)
    g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, mask=mask, **p.options)
    dx, dresidual = layer.backward(p.dy)
    assert bits(dx) == bits(g.x)
    assert bits(dresidual) == bits(g.residual)
    assert bits(layer.weight_grad) == bits(g.weight.astype(kind))
    assert bits(layer.bias_grad) == bits(g.bias.astype(kind))


class TestLayers:
    def test_evaluation_does_not_use_it(self):
        p = make_problem(PLANAR)
        layer = layer_of(p)
        layer(p.x)
        layer.eval()
        before = state_bits(layer)
        assert bits(layer(p.x, mask=mask_of(p, scattered))) == bits(layer(p.x))
        for mask in (np.ones((4, 3, 7), int), "text"):
            with pytest.raises(TypeError, match="mask"):
                layer(p.x, mask=mask)
        assert state_bits(layer) == before

    def test_evaluation_without_running_statistics_does(self):
        p = make_problem(PLANAR)
        mask = mask_of(p, scattered)
        layer = layer_of(p, track_running_stats=False).eval()
        assert bits(layer(p.x, mask=mask)) == bits(run_forward(p, mask=mask)[0])

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_update_stats_false(self, momentum):
        p = make_problem((3, 2), np.float64)
        layer = layer_of(p, momentum=momentum)
        before = state_bits(layer)
        y = layer(p.x, mask=[0.25, 0.25, 0.0], update_stats=False)
        assert bits(y) == bits(run_forward(p, mask=[0.25, 0.25, 0.0])[0])
        assert state_bits(layer) == before

    @pytest.mark.parametrize(
        ("mask", "error"),
        [
            (np.zeros((4, 3, 7), bool), ValueError),
            (np.full((4, 3, 7), 0.01), ValueError),
            (-np.ones((4, 3, 7)), ValueError),
            (np.ones((4, 3)), ValueError),
            (np.ones((4, 3, 7), int), TypeError),
            (np.ma.masked_array(np.ones((4, 3, 7)), False), TypeError),
        ],
        ids=["none", "light", "negative", "shape", "int", "masked array"],
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_a_refused_mask_changes_nothing(self, mask, error, momentum):
        p = make_problem(PLANAR)
        layer = layer_of(p, momentum=momentum)
        layer(p.x)
        before, out = state_bits(layer), poisoned_like(p.x)
        dx = layer.backward(p.dy)
        layer.zero_grad()
        with pytest.raises(error, match=r"(?i)mask"):
            layer(p.x, out=out, mask=mask)
        assert state_bits(layer) == before
        assert np.isnan(out).all()
        assert bits(layer.backward(p.dy)) == bits(dx), "the last forward is still that one"

    def test_a_forward_without_a_mask_forgets_the_last_one(self):
        p = make_problem(PLANAR)
        layer = layer_of(p)
        layer(p.x, mask=mask_of(p, scattered))
        layer(p.x)
        want = run_backward(p, run_forward(p)[1])
        assert bits(layer.backward(p.dy)) == bits(want.x)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
    def test_copies_keep_no_mask(self, duplicate):
        p = make_problem(PLANAR)
        layer = layer_of(p)
        layer(p.x, mask=mask_of(p, scattered))
        again = duplicate(layer)
        assert state_bits(again) == state_bits(layer)
        assert bits(again(p.x)) == bits(run_forward(p)[0])

    @pytest.mark.parametrize("kind", [bool, np.float64])
    def test_population_statistics(self, kind, rng):
        """Those of what the masks count."""
        layer = bnfast.BatchNorm(3, dtype=np.float64)
        batches = [make_problem((n, 3, 4), np.float64, seed=n).x for n in (3, 5, 2)]
        masks = [rng.random((len(x), 4)) < 0.7 for x in batches]
        masks = [m if kind is bool else m * rng.uniform(0.5, 2, m.shape) for m in masks]
        bnfast.recompute_statistics(
            lambda pair: layer(pair[0], mask=pair[1]), zip(batches, masks, strict=True), [layer]
        )
        total = sum(bnfast.moments(x, mask=m) for x, m in zip(batches, masks, strict=True))
        np.testing.assert_allclose(layer.running_mean, total.mean, rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, total.var(1), rtol=1e-13)


# --- lengths_mask -------------------------------------------------------------------------------


class TestLengthsMask:
    @pytest.mark.parametrize("size", [None, 4, 6])
    def test_counts_the_first_of_each(self, size):
        lengths = [4, 0, 1, 3]
        got = lengths_mask(lengths, size)
        assert got.dtype == bool
        assert got.shape == (4, size or 4)
        for row, length in zip(got, lengths, strict=True):
            assert row.tolist() == [i < length for i in range(size or 4)]

    @pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
    def test_of_any_integers(self, kind):
        got = lengths_mask(np.array([2, 0, 3], kind), np.int16(3))
        assert got.tolist() == [[True, True, False], [False] * 3, [True] * 3]

    @pytest.mark.parametrize("size", [None, 0, 3])
    def test_of_no_sequences(self, size):
        assert lengths_mask([], size).shape == (0, size or 0)
        assert lengths_mask(np.zeros(0, int), size).shape == (0, size or 0)
        assert lengths_mask([0, 0], size).shape == (2, size or 0)

    @pytest.mark.parametrize("last", [False, True], ids=["(N, C, L)", "(N, L, C)"])
    def test_statistics_are_those_of_the_sequences_end_to_end(self, last):
        p = make_problem((5, 3, 7), np.float64)
        lengths = [7, 0, 2, 5, 1]
        rows = np.concatenate([p.x[i, :, :n].T for i, n in enumerate(lengths)])
        x = np.ascontiguousarray(np.moveaxis(p.x, 1, -1)) if last else p.x
        got = bnfast.moments(x, axis=-1 if last else 1, mask=lengths_mask(lengths, 7))
        s = batch_statistics(rows, 1)
        assert got.count == 15
        assert_within(got.mean, s.mean, 4 * s.mean_error)
        assert_within(got.var(), s.var, 4 * s.var_error)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            (([1.0, 2.0],), TypeError, ("lengths", "float64", "integers")),
            (([True, False],), TypeError, ("lengths", "bool", "integers")),
            (("text",), TypeError, ("lengths",)),
            ((None,), TypeError, ("lengths",)),
            (([[1, 2]],), ValueError, ("lengths", (1, 2), "(N,)")),
            ((3,), ValueError, ("lengths", "()", "(N,)")),
            (([3, 2], 2), ValueError, ("lengths", 3, "0 to 2")),
            (([3, -1],), ValueError, ("lengths", "-1")),
            (([-2],), ValueError, ("lengths", "-2")),
            (([3, -1], 5), ValueError, ("lengths", "-1", "0 to 5")),
            (([1], -1), ValueError, ("size", "-1")),
            (([1], 2.0), TypeError, ("size", "integer")),
            (([1], True), TypeError, ("size", "integer")),
            (([1], "2"), TypeError, ("size", "integer")),
            ((np.ma.masked_array([1, 2], [True, False]),), TypeError, ("lengths", "masked array")),
        ],
        ids=str,
    )
    def test_refused(self, arguments, error, words):
        with pytest.raises(error, match=mentions(*words)):
            lengths_mask(*arguments)


# --- Properties -----------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])


@st.composite
def problems(draw, **options):
    shape = (draw(st.integers(2, 30)), *draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    options.setdefault("axis", draw(st.integers(1, len(shape) - 1)))
    options.setdefault("dtype", draw(dtypes))
    options.setdefault("activation", draw(st.sampled_from(ACTIVATIONS)))
    options.setdefault("residual", draw(st.booleans()))
    p = make_problem(shape, seed=draw(seeds), **options)
    return p, mask_of(p, draw(st.sampled_from(MASKS)), draw(seeds))


class TestProperties:
    @given(problems())
    def test_results_are_the_references(self, both):
        check(*both)

    @given(problems(), st.integers(-40, 40))
    def test_weights_may_be_scaled(self, both, k):
        """Only their ratios matter; a power of two rounds nothing."""
        p, mask = both
        assume(not (mask == 1).all())  # is no mask, and summed otherwise
        found, count = everything(p, mask.astype(float))
        scaled, total = everything(p, mask * 2.0**k)
        assert total == count * 2.0**k
        assert scaled[:-1] == found[:-1]
        m2, scaled_m2 = (np.frombuffer(a[-1]) for a in (found, scaled))
        assert bits(scaled_m2) == bits(m2 * 2.0**k)

    @given(problems(residual=False), st.data())
    def test_rows_that_do_not_count_may_be_left_out(self, both, data):
        """The batch is what the mask counts, up to the rounding of sums in another order."""
        p, _ = both
        n = len(p.x)
        rows = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=2)))
        q = p.replace(x=np.ascontiguousarray(p.x[rows]), dy=p.dy[rows])
        mask = np.zeros((n, *[1] * (p.x.ndim - 1)), bool)
        mask[rows] = True
        dy = np.where(mask, p.dy, p.dy.dtype.type(0))
        masked = p.replace(dy=dy)
        s = batch_statistics(q.x, p.axis)
        y, stats = run_forward(masked, mask=mask)
        want, alone = run_forward(q)
        assert stats.count == alone.count
        assert_within(y[rows], wide(want), 2 * forward_bound(q, s))
        off_the_kinks(q, s)
        masked.dy[rows] = q.dy
        exact = reference.backward(wide(q.dy), *q.exact())
        bounds = backward_bounds(q, s, exact)
        g, wanted = run_backward(masked, stats, mask=mask), run_backward(q, alone)
        # The product with a weight of 1 rounds nothing; sums of zeros do not either.
        for a, b, bound in zip((g.x[rows], *g[1:3]), wanted[:3], bounds[:3], strict=True):
            assert_within(a, wide(b), 3 * bound)

    @given(problems(dtype=np.float64))
    def test_a_mask_and_its_complement_are_the_whole(self, both):
        p, mask = both
        mask = mask > 0
        got = bnfast.moments(p.x, axis=p.axis, mask=mask)
        got += bnfast.moments(p.x, axis=p.axis, mask=~mask)
        s = batch_statistics(p.x, p.axis)
        assert got.count == p.m
        # `weighted_moments_of` has four times the error of a mean, of which the variance has a
        # square, and five times that of its sums; then one merge.
        assert_within(got.mean, s.mean, 6 * s.mean_error)
        assert_within(got.var(), s.var, 18 * s.var_error)

    @given(problems(dtype=np.float64, activation=None, residual=False), st.data())
    def test_whole_weights_are_copies_of_rows(self, both, data):
        p, _ = both
        n = len(p.x)
        times = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
        if sum(t > 0 for t in times) < 2:
            times = [1, 2, *times[2:]]
        copies = np.repeat(p.x, times, axis=0)
        mask = np.array(times, float).reshape(-1, *[1] * (p.x.ndim - 1))
        got, want = bnfast.moments(p.x, axis=p.axis, mask=mask), bnfast.moments(copies, axis=p.axis)
        s = batch_statistics(copies, p.axis)
        assert got.count == want.count
        # as above
        assert_within(got.mean, wide(want.mean), 6 * s.mean_error)
        assert_within(got.var(), wide(want.var()), 18 * s.var_error)

    @given(problems(activation=None, residual=False))
    def test_output_that_counts_has_the_moments_asked_for(self, both):
        """Mean bias, variance weight^2 var / (var + eps), both by the weights."""
        p, mask = both
        weights = weights_read(mask, p)
        y, _ = run_forward(p, mask=mask)
        s = weighted_moments_of(p.x, p.axis, weights)
        got = weighted_moments_of(y, p.axis, weights)
        off = np.where(weights > 0, forward_bound(p, s), 0).max()
        want = wide(p.weight) ** 2 * s.var / (s.var + p.eps)
        assert_within(got.mean, wide(p.bias), off)
        assert_within(got.var, want, 4 * off * np.sqrt(want) + 4 * off**2)

    @given(problems(activation=None, residual=False))
    def test_gradient_is_orthogonal_to_a_constant(self, both):
        """Adding a constant to all of x changes nothing, so dx sums to 0."""
        p, mask = both
        weights = weights_read(mask, p)
        s = weighted_moments_of(p.x, p.axis, weights)
        x, *rest = p.exact()
        exact = reference.weighted_backward(wide(p.dy), x, weights, *rest)
        bound = backward_bounds(p, s, exact, weights=weights).x
        g = run_backward(p, run_forward(p, mask=mask)[1], mask=mask)
        total = reference.over_channel(np.sum, wide(g.x), p.axis)
        off = SECOND_ORDER * reference.over_channel(np.sum, bound, p.axis)
        assert_within(total, 0 * total, off)
