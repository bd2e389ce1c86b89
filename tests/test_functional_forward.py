"""batch_norm_forward, batch_norm, normalize and scale_shift compared with the paper."""

import numpy as np
import pytest
import reference
from cases import (
    ACTIVATIONS,
    ALL_ORDERS,
    CONTIGUOUS_ORDERS,
    DTYPES,
    EVERY_DTYPE,
    SIZES,
    at_offset,
    bits,
    computed_in,
    forward,
    make_problem,
    poisoned_like,
    with_gaps,
    with_memory_order,
)
from tolerance import (
    assert_within,
    batch_statistics,
    constants,
    forward_bound,
    inv_std_relative,
    running_bound,
)
from wide import wide

import bnfast

PLANAR, INTERLEAVED = (4, 5, 3, 7), (33, 21)


def check_forward(p):
    s = batch_statistics(p.x, p.axis)
    y, stats = forward(p)
    what = f"{p.x.shape} {p.x.dtype} {p.activation}"
    assert y.dtype == p.x.dtype
    assert_within(y, reference.forward(*p.exact()), forward_bound(p, s), what)
    check_stats(stats, p, s)


def check_stats(stats, p, s):
    assert isinstance(stats, bnfast.BatchStats)
    assert stats.count == p.m
    assert {a.dtype for a in (stats.mean, stats.var, stats.inv_std)} == {np.dtype(np.float64)}
    assert_within(stats.mean, s.mean, s.mean_error, "mean")
    assert_within(stats.var, s.var, s.var_error, "var")
    inv_std = 1 / np.sqrt(s.var + p.eps)
    assert_within(stats.inv_std, inv_std, inv_std * inv_std_relative(s, p.eps), "inv_std")


def population(p, rng):
    """Statistics that are not the batch's."""
    mean = (rng.standard_normal(p.channels) + 0.5).astype(p.weight.dtype)
    return mean, rng.uniform(0.5, 4, p.channels).astype(p.weight.dtype)


def check_inference(p, y, mean, var):
    want = reference.inference(p.exact()[0], mean, var, *p.exact()[1:])
    assert y.dtype == p.x.dtype
    assert_within(y, want, forward_bound(p, constants(mean, var)), "inference")


@pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestEveryVariant:
    @pytest.mark.smoke
    def test_training(self, isa, dtype, activation, residual, shape):
        check_forward(make_problem(shape, dtype, activation=activation, residual=residual))

    @pytest.mark.smoke
    def test_inference(self, isa, dtype, activation, residual, shape, rng):
        p = make_problem(shape, dtype, activation=activation, residual=residual)
        mean, var = population(p, rng)
        y = bnfast.batch_norm(
            p.x, mean, var, p.weight, p.bias, eps=p.eps, out=poisoned_like(p.x), **p.options
        )
        check_inference(p, y, mean, var)
        again = bnfast.normalize(
            p.x, mean, var, p.weight, p.bias, eps=p.eps, out=poisoned_like(p.x), **p.options
        )
        assert bits(again) == bits(y)

    @pytest.mark.smoke
    def test_scale_shift(self, isa, dtype, activation, residual, shape):
        # x * scale + shift is normalization with mean 0, variance 1 and eps 0.
        p = make_problem(shape, dtype, activation=activation, residual=residual, seed=1)
        p = p.replace(eps=0.0)
        out = poisoned_like(p.x)
        y = bnfast.scale_shift(p.x, p.weight, p.bias, out=out, **p.options)
        assert y is out
        check_inference(p, y, np.zeros(p.channels), np.ones(p.channels))


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_sizes_around_every_edge(isa, dtype):
    for shape in SIZES:
        check_forward(make_problem(shape, dtype))


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_inference_sizes_around_every_edge(isa, dtype, rng):
    for shape in SIZES:
        p = make_problem(shape, dtype, activation="relu6", residual=True)
        mean, var = population(p, rng)
        y = bnfast.normalize(p.x, mean, var, p.weight, p.bias, out=poisoned_like(p.x), **p.options)
        check_inference(p, y, mean, var)


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestMemoryOrders:
    def test_every_order(self, isa, dtype, order):
        arrange = ALL_ORDERS[order]
        check_forward(
            make_problem(PLANAR, dtype, arrange=arrange, activation="relu", residual=True)
        )

    def test_read_only(self, dtype, order):
        p = make_problem(PLANAR, dtype, arrange=ALL_ORDERS[order], residual=True)
        for a in (p.x, p.residual, p.weight, p.bias):
            a.flags.writeable = False
        check_forward(p)
        assert bnfast.batch_norm_forward(p.x, p.weight, p.bias)[0].flags.writeable

    def test_axes_of_length_one(self, dtype, order):
        """Their strides have no meaning."""
        for shape in ((4, 5, 1, 7), (4, 5, 7, 1), (1, 5, 3, 7), (4, 1, 3, 7), (4, 5, 1, 1)):
            check_forward(make_problem(shape, dtype, arrange=ALL_ORDERS[order]))

    def test_residual_in_another_order(self, dtype, order):
        p = make_problem(PLANAR, dtype, residual=True)
        check_forward(p.replace(residual=ALL_ORDERS[order](p.residual)))

    def test_out_in_another_order(self, dtype, order):
        p = make_problem(PLANAR, dtype)
        fresh, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        out = ALL_ORDERS[order](poisoned_like(p.x))
        y, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=out)
        assert y is out
        assert bits(y) == bits(fresh)


@pytest.mark.parametrize("order", CONTIGUOUS_ORDERS)
def test_fresh_result_keeps_the_memory_order(order):
    p = make_problem(PLANAR, arrange=CONTIGUOUS_ORDERS[order][0])
    y, _ = bnfast.batch_norm_forward(p.x)
    assert y.strides == p.x.strides
    assert bnfast.scale_shift(p.x, p.weight, p.bias).strides == p.x.strides
    assert not np.shares_memory(y, p.x)


def test_gaps_around_out_stay_untouched():
    p = make_problem(PLANAR)
    wide = np.full((*PLANAR[:-1], 2 * PLANAR[-1]), -7, p.x.dtype)
    bnfast.batch_norm_forward(p.x, out=wide[..., ::2])
    assert np.all(wide[..., 1::2] == -7)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_broadcast_x(axis):
    """Strides of 0 along one axis: every value occurs many times."""
    p = make_problem(PLANAR)
    shape = tuple(1 if i == axis else n for i, n in enumerate(PLANAR))
    check_forward(p.replace(x=np.broadcast_to(p.x[tuple(map(slice, shape))], PLANAR)))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -4, np.int64(2)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, np.asfortranarray, with_gaps])
def test_any_axis(axis, arrange):
    check_forward(make_problem((3, 4, 5, 6), axis=axis, arrange=arrange))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 1), (1, 2, 3), (2, 1), (1, 1, 2), (2, 3, 1, 1)])
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_smallest_sizes(isa, dtype, shape):
    check_forward(make_problem(shape, dtype))


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 2), (2, 2, 1, 2, 1, 2, 3)])
def test_many_axes(shape):
    check_forward(make_problem(shape))
    check_forward(make_problem(shape, axis=-1, arrange=with_memory_order(*range(len(shape))[::-1])))


class TestWeights:
    @pytest.mark.parametrize("weight", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED])
    def test_may_be_left_out(self, weight, bias, shape):
        p = make_problem(shape)
        ones, zeros = np.ones_like(p.weight), np.zeros_like(p.bias)
        given, _ = bnfast.batch_norm_forward(
            p.x, p.weight if weight else ones, p.bias if bias else zeros
        )
        left_out, _ = bnfast.batch_norm_forward(
            p.x, p.weight if weight else None, p.bias if bias else None
        )
        assert bits(left_out) == bits(given)

    @pytest.mark.parametrize("data", EVERY_DTYPE)
    @pytest.mark.parametrize("other", DTYPES)
    def test_of_the_other_type(self, data, other):
        """Coefficients are combined in float64: types with the same values give the same bits."""
        p = make_problem(PLANAR, data)
        p = p.replace(weight=p.weight.astype(np.float32), bias=p.bias.astype(np.float32))
        y, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        same, _ = bnfast.batch_norm_forward(p.x, p.weight.astype(other), p.bias.astype(other))
        assert bits(same) == bits(y)

    def test_with_strides(self):
        p = make_problem(PLANAR)
        y, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        same, _ = bnfast.batch_norm_forward(
            p.x, np.repeat(p.weight, 2)[::2], np.ascontiguousarray(p.bias[::-1])[::-1]
        )
        assert bits(same) == bits(y)


class TestRunningStatistics:
    @pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED])
    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.75])
    @pytest.mark.parametrize("data", EVERY_DTYPE)
    def test_follow_the_batch(self, data, momentum, ddof, shape, rng):
        p = make_problem(shape, data)
        old_mean, old_var = population(p, rng)
        mean, var = old_mean.copy(), old_var.copy()
        y = bnfast.batch_norm(p.x, mean, var, p.weight, p.bias, True, momentum, p.eps, ddof=ddof)
        assert bits(y) == bits(forward(p)[0])
        s = batch_statistics(p.x, p.axis)
        unbiased = p.m / (p.m - ddof)
        for got, old, new, error in (
            (mean, old_mean, s.mean, s.mean_error),
            (var, old_var, s.var * unbiased, s.var_error * unbiased),
        ):
            want = reference.running_average(old, new, wide(momentum))
            assert_within(got, want, running_bound(old, new, error, momentum, got.dtype))

    def test_float32_ones_beside_float64_data(self):
        p = make_problem(PLANAR, np.float64)
        mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
        bnfast.batch_norm(p.x, mean, var, training=True, momentum=1.0)
        s = batch_statistics(p.x, 1)
        assert mean.dtype == var.dtype == np.float32
        assert_within(mean, s.mean, running_bound(0, s.mean, s.mean_error, 1, mean.dtype))

    def test_with_strides_are_updated_in_place(self):
        p = make_problem(PLANAR)
        plain, strided = np.zeros((2, 5), np.float32), np.zeros((5, 2), np.float32).T
        for running in (plain, strided):
            bnfast.batch_norm(p.x, running[0], running[1], training=True)
        assert strided[0].strides != plain[0].strides
        assert np.any(plain != 0)
        assert bits(strided) == bits(plain)

    def test_may_be_left_out_in_training(self):
        p = make_problem(PLANAR)
        y = bnfast.batch_norm(p.x, weight=p.weight, bias=p.bias, training=True)
        assert bits(y) == bits(forward(p)[0])

    def test_are_only_read_in_inference(self, rng):
        p = make_problem(PLANAR)
        mean, var = population(p, rng)
        for a in (mean, var, p.x, p.weight, p.bias):
            a.flags.writeable = False
        check_inference(p, bnfast.batch_norm(p.x, mean, var, p.weight, p.bias), mean, var)

    def test_overflowing_float32_hold_infinity(self):
        """The batch's variance is 4e76; PyTorch's running_var also has inf."""
        x = np.float32([[2e38], [-2e38]])
        mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
        y = bnfast.batch_norm(x, mean, var, training=True)
        assert np.isinf(var[0])
        assert_within(y[:, 0], [1, -1], 8 * 2.0**-24)


def test_population_of_float64_beside_float32_data(rng):
    """normalize keeps a float64 mean: a mean of 1e6 loses nothing."""
    p = make_problem(PLANAR)
    mean = rng.standard_normal(5) + 1e6
    var = rng.uniform(0.5, 2, 5)
    p = p.replace(x=(p.x + 1e6).astype(np.float32))
    check_inference(p, bnfast.normalize(p.x, mean, var, p.weight, p.bias), mean, var)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED, (64, 8, 40, 40)])
class TestAliasing:
    def test_out_may_be_x(self, isa, dtype, shape):
        p = make_problem(shape, dtype, activation="relu", residual=True)
        fresh, _ = forward(p)
        x = p.x.copy()
        y, _ = bnfast.batch_norm_forward(x, p.weight, p.bias, out=x, **p.options)
        assert y is x
        assert bits(y) == bits(fresh)

    def test_out_may_be_the_residual(self, isa, dtype, shape):
        p = make_problem(shape, dtype, activation="relu", residual=True)
        fresh, _ = forward(p)
        p = p.replace(residual=p.residual.copy())
        y, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=p.residual, **p.options)
        assert y is p.residual
        assert bits(y) == bits(fresh)

    def test_the_residual_may_be_x(self, dtype, shape):
        p = make_problem(shape, dtype)
        check_forward(p.replace(residual=p.x))

    def test_inference_in_place(self, dtype, shape):
        p = make_problem(shape, dtype)
        fresh = bnfast.scale_shift(p.x, p.weight, p.bias)
        x = p.x.copy()
        assert bnfast.scale_shift(x, p.weight, p.bias, out=x) is x
        assert bits(x) == bits(fresh)


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 0), (3, 0, 2), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_empty_batches(dtype, shape, dispatches):
    channels = shape[1]
    x = np.empty(shape, dtype)
    mean, var = (np.full(channels, value, computed_in(dtype)) for value in (3, 5))
    for training in (True, False):
        y = bnfast.batch_norm(x, mean, var, training=training)
        assert (y.shape, y.dtype) == (shape, x.dtype)
    y, stats = bnfast.batch_norm_forward(x)
    assert y.shape == shape
    assert stats.mean.shape == (channels,)
    assert bnfast.scale_shift(x, mean, var).shape == shape
    assert np.all(mean == 3)
    assert np.all(var == 5)
    assert dispatches() == {}


class TestConversions:
    """An array that is not aligned or native is converted, not refused."""

    @pytest.mark.parametrize(
        "convert",
        [
            np.ndarray.tolist,
            memoryview,
            lambda a: a.astype(a.dtype.newbyteorder()),
            lambda a: a.view(np.recarray),
        ],
        ids=["list", "memoryview", "byte order", "subclass"],
    )
    def test_of_x(self, convert):
        p = make_problem(PLANAR, np.float64)
        y, _ = bnfast.batch_norm_forward(convert(p.x), p.weight, p.bias)
        assert y.dtype == np.dtype(np.float64)
        assert bits(y) == bits(forward(p)[0])

    def test_of_everything_else(self):
        p = make_problem(PLANAR, np.float64, residual=True)
        swapped = [a.astype(">f8") for a in (p.weight, p.bias, p.residual)]
        y, _ = bnfast.batch_norm_forward(p.x, *swapped[:2], residual=swapped[2])
        assert bits(y) == bits(forward(p)[0])

    def test_of_out(self):
        """An output with another byte order or without alignment is filled correctly."""
        p = make_problem(PLANAR, np.float64)
        want, _ = forward(p)
        for out in (np.empty(PLANAR, ">f8"), at_offset(3)(poisoned_like(p.x))):
            y, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=out)
            assert y is out
            assert bits(y.astype(np.float64)) == bits(want)
