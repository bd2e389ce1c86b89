"""virtual_batch_size=: runs of rows, each normalised by its own statistics.

A run is computed as a call of its own would be, so a loop over the runs gives the same bits.
"""

import copy
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from bad_calls import X, backward, copied, each, forward, inference, mentions, training
from cases import (
    ACTIVATIONS,
    ALL_ORDERS,
    CONTIGUOUS_ORDERS,
    DTYPES,
    EVERY_DTYPE,
    NAMES,
    WITHOUT_FMA,
    bits,
    by_direction,
    computed_in,
    first_of_each,
    make_problem,
    mask_of,
    poisoned_like,
    scattered,
    weights_and_zeros,
)
from cases import backward as run_backward
from cases import forward as run_forward
from hypothesis import assume, given
from layer_cases import STATE, layer_of, state_bits
from tolerance import assert_within, backward_bounds, batch_statistics, forward_bound, off_the_kinks
from wide import wide

import bnfast
from bnfast import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, _core

# Ten rows in runs of three, the last of one row; 34 in runs of four, the last of two.
PLANAR, INTERLEAVED = ((10, 5, 3, 7), 3), ((34, 21), 4)
SHAPES = pytest.mark.parametrize(
    ("shape", "size"), [PLANAR, INTERLEAVED], ids=["planar", "interleaved"]
)
# Of one row; of one channel; of several blocks; many; one, and the rest.
OTHERS = (
    *(((6, 4, 5), 1), ((10, 1, 6), 3), ((11, 1), 4), ((2, 1, 3), 1)),
    *(((5, 2, 20_000), 2), ((40_000, 3), 17_000), ((9, 67, 40), 4)),
    *(((600, 3), 2), ((300, 2, 2), 1), ((7, 5, 3), 6)),
)


def rows_of(p, run):
    """The problem of some rows."""
    return p.replace(
        x=p.x[run], dy=p.dy[run], residual=None if p.residual is None else p.residual[run]
    )


def in_rows(p):
    """The problem with arrays in the order of their axes, as they are computed if axis 0 is not
    the outermost in memory.
    """
    arrays = {"x": p.x, "dy": p.dy, "residual": p.residual}
    return p.replace(**{k: a if a is None else np.ascontiguousarray(a) for k, a in arrays.items()})


def looped(p, size, mask=None):
    """What calls of each run give: y, rows of statistics, the count, gradients."""
    found, whole = [], None if mask is None else np.broadcast_to(mask, full(p))
    for run in reference.runs(len(p.x), size):
        part = rows_of(p, run)
        own = None if mask is None else whole[run]
        y, stats = run_forward(part, mask=own)
        found.append((y, stats, run_backward(part, stats, mask=own)))
    y, stats, gradients = zip(*found, strict=True)
    rows = [np.stack([s[k] for s in stats]) for k in range(3)]
    # In order: the first run's, plus the second's, and so on.
    sums = [in_order([g[k] for g in gradients]) for k in (1, 2)]
    dx = np.concatenate([g.x for g in gradients])
    dresidual = None if p.residual is None else np.concatenate([g.residual for g in gradients])
    count = in_order([s.count for s in stats])
    return np.concatenate(y), rows, count, bnfast.Gradients(dx, *sums, dresidual)


def in_order(numbers):
    """Not `sum`, which rounds less since Python 3.12."""
    total, *others = numbers
    for a in others:
        total = total + a
    return total


def full(p):
    """The shape of a mask with the channel axis."""
    return tuple(1 if i == p.axis % p.x.ndim else n for i, n in enumerate(p.x.shape))


def check(p, size, mask=None, like=None):
    """One call gives the bits of the loop, over `like` if that is not p itself."""
    y, rows, count, gradients = looped(p if like is None else like, size, mask)
    got, stats = run_forward(p, mask=mask, virtual_batch_size=size)
    assert bits(got) == bits(y)
    assert stats.count == count
    assert type(stats.count) is type(count)
    for a, b in zip(stats[:3], rows, strict=True):
        assert (a.dtype, a.shape) == (np.float64, b.shape)
        assert bits(a) == bits(b)
    g = run_backward(p, stats, mask=mask, virtual_batch_size=size)
    for name, a, b in zip(NAMES, g, gradients, strict=True):
        assert a is b is None or bits(a) == bits(b), name


@SHAPES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestEveryVariant:
    def test_one_call_is_a_loop(self, isa, dtype, activation, residual, shape, size):
        check(make_problem(shape, dtype, activation=activation, residual=residual), size)

    def test_with_a_mask(self, dtype, activation, residual, shape, size):
        p = make_problem(shape, dtype, activation=activation, residual=residual)
        mask = mask_of(p, weights_and_zeros)
        mask[: size * (len(p.x) // size) : size] = 1  # two values in each run
        mask[1::size] = mask[-1] = mask[-2] = 2
        check(p, size, np.expand_dims(mask, 1))


@pytest.mark.parametrize(("shape", "size"), OTHERS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.smoke
def test_sizes(isa, dtype, shape, size):
    check(make_problem(shape, dtype, activation="relu"), size)


@SHAPES
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_the_paper(dtype, shape, size):
    """Each run within the limits of a batch of its own."""
    p = make_problem(shape, dtype, activation="relu", residual=True)
    y, stats = run_forward(p, virtual_batch_size=size)
    runs = reference.runs(len(p.x), size)
    assert stats.mean.shape == (len(runs), p.channels)
    assert stats.count == p.m
    exact, bounds = [], []
    for i, run in enumerate(runs):
        part = rows_of(p, run)
        s = batch_statistics(part.x, 1)
        assert_within(y[run], reference.forward(*part.exact()), forward_bound(part, s), "y")
        assert_within(stats.mean[i], s.mean, s.mean_error, "mean")
        assert_within(stats.var[i], s.var, s.var_error, "var")
        off_the_kinks(part, s)  # in p.dy itself
        exact.append(reference.backward(wide(part.dy), *part.exact()))
        bounds.append(backward_bounds(part, s, exact[-1]))
    g = run_backward(p, stats, virtual_batch_size=size)
    for run, want, bound in zip(runs, exact, bounds, strict=True):
        assert_within(g.x[run], want.x, bound.x, "dx")
        assert_within(g.residual[run], want.residual, bound.residual, "dresidual")
    for a, name in ((g.weight, "gamma"), (g.bias, "beta")):
        want = sum(getattr(e, name) for e in exact)
        off = sum(getattr(b, name) for b in bounds)
        # and the additions of the runs' sums
        size_of_sums = sum(np.abs(getattr(e, name)) for e in exact)
        assert_within(a, want, off + len(runs) * 2.0**-52 * size_of_sums, name)


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3, np.int64(2)])
def test_any_axis_but_the_first(axis):
    for size in (2, 3, 7):
        p = make_problem((7, 4, 5, 6), axis=axis, activation="silu", residual=True)
        check(p, size)


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestMemoryOrders:
    def test_of_all_arrays(self, dtype, order):
        """Runs lie in memory one after the other, or x is copied."""
        shape, size = PLANAR
        p = make_problem(shape, dtype, arrange=ALL_ORDERS[order], activation="relu", residual=True)
        rows_first = order in ("channels_last", "nhcw")
        check(p, size, like=p if rows_first else in_rows(p))

    def test_of_x_alone(self, dtype, order):
        shape, size = PLANAR
        p = make_problem(shape, dtype, activation="relu", residual=True)
        q = p.replace(x=ALL_ORDERS[order](p.x))
        if order not in ("channels_last", "nhcw"):
            check(q, size, like=p)

    def test_of_the_others_alone(self, dtype, order):
        shape, size = PLANAR
        p = make_problem(shape, dtype, activation="relu", residual=True)
        turn = ALL_ORDERS[order]
        check(p.replace(dy=turn(p.dy), residual=turn(p.residual)), size, like=p)

    def test_of_a_mask(self, dtype, order):
        shape, size = PLANAR
        p = make_problem(shape, dtype)
        mask = np.expand_dims(mask_of(p, scattered), 1)
        mask[:, :, 0, :2] = True
        y, stats = run_forward(p, mask=mask, virtual_batch_size=size)
        turned = p.replace(x=ALL_ORDERS[order](p.x))
        got, found = run_forward(turned, mask=mask, virtual_batch_size=size)
        assert found.count == stats.count
        if order not in ("channels_last", "nhcw"):
            assert bits(got) == bits(y)
        np.testing.assert_allclose(found.mean, stats.mean, rtol=1e-12, atol=1e-13)

    def test_results_have_the_order_of_x(self, dtype, order):
        shape, size = PLANAR
        p = make_problem(shape, dtype, arrange=ALL_ORDERS[order])
        plain, _ = bnfast.batch_norm_forward(p.x)
        y, stats = bnfast.batch_norm_forward(p.x, virtual_batch_size=size)
        assert y.strides == plain.strides
        if order in CONTIGUOUS_ORDERS:
            assert y.strides == p.x.strides
        g = bnfast.batch_norm_backward(p.dy, p.x, stats, virtual_batch_size=size)
        assert g.x.strides == plain.strides

    def test_of_out(self, dtype, order):
        shape, size = PLANAR
        p = make_problem(shape, dtype)
        want, stats = run_forward(p, virtual_batch_size=size)
        wanted = run_backward(p, stats, virtual_batch_size=size).x
        for q in (p, p.replace(x=np.asfortranarray(p.x))):
            y, dx = (ALL_ORDERS[order](poisoned_like(p.x)) for _ in range(2))
            options = {"virtual_batch_size": size, "eps": p.eps}
            got, _ = bnfast.batch_norm_forward(q.x, p.weight, p.bias, out=y, **options)
            assert got is y
            assert bits(y) == bits(want)
            got = run_backward(q, stats, virtual_batch_size=size, out=dx).x
            assert got is dx
            assert bits(dx) == bits(wanted)


@pytest.mark.parametrize("take", [np.s_[::2], np.s_[:, :, ::2], np.s_[:, :, :, ::2], np.s_[::-2]])
@pytest.mark.parametrize("order", ["fortran", "channels_first", "channels_last_of_transposed"])
def test_gaps_in_other_orders(order, take):
    """x is copied once, with its rows outermost."""
    wide = make_problem((20, 5, 8, 8), np.float64, arrange=ALL_ORDERS[order], residual=True)
    p = wide.replace(x=wide.x[take], dy=wide.dy[take], residual=wide.residual[take])
    y, stats = run_forward(p, virtual_batch_size=3)
    g = run_backward(p, stats, virtual_batch_size=3)
    want, rows, _, wanted = looped(in_rows(p), 3)
    np.testing.assert_allclose(stats.mean, rows[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-11)
    for a, b in zip(g, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("convert", [np.ndarray.tolist, memoryview, lambda a: a.astype(">f8")])
def test_conversions(convert):
    shape, size = PLANAR
    p = make_problem(shape, np.float64)
    want, stats = run_forward(p, virtual_batch_size=size)
    y, _ = bnfast.batch_norm_forward(
        convert(p.x), p.weight, p.bias, eps=p.eps, virtual_batch_size=size
    )
    assert bits(y.astype(np.float64)) == bits(want)
    g = bnfast.batch_norm_backward(
        convert(p.dy), convert(p.x), stats, p.weight, virtual_batch_size=size
    )
    want = run_backward(p, stats, virtual_batch_size=size)
    assert bits(g.x.astype(np.float64)) == bits(want.x)


@SHAPES
@pytest.mark.parametrize("order", ["nchw", "fortran"])
def test_in_place(shape, size, order):
    arrange = ALL_ORDERS[order]
    p = make_problem(shape, activation="relu", residual=True, arrange=arrange)
    y, stats = run_forward(p, virtual_batch_size=size)
    dx = run_backward(p, stats, virtual_batch_size=size).x
    for name in ("x", "residual"):
        q = p.replace(**{name: getattr(p, name).copy(order="K")})
        target = getattr(q, name)
        options = {**q.options, "virtual_batch_size": size, "out": target}
        assert bnfast.batch_norm_forward(q.x, q.weight, q.bias, **options)[0] is target
        assert bits(target) == bits(y)
    for name in ("dy", "x"):
        q = p.replace(**{name: getattr(p, name).copy(order="K")})
        target = getattr(q, name)
        assert run_backward(q, stats, virtual_batch_size=size, out=target).x is target
        assert bits(target) == bits(dx)


class TestAllRows:
    """A run of all rows is the batch; only the statistics have another axis."""

    @SHAPES
    @pytest.mark.parametrize("more", [0, 1, 1000, 2**62, 2**63 - 1000])
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_same_bits(self, dtype, more, shape, size):
        p = make_problem(shape, dtype, activation="relu", residual=True)
        for mask in (None, mask_of(p, scattered), mask_of(p, weights_and_zeros)):
            y, stats = run_forward(p, mask=mask)
            got, found = run_forward(p, mask=mask, virtual_batch_size=len(p.x) + more)
            assert bits(got) == bits(y)
            assert found.count == stats.count
            for a, b in zip(found[:3], stats[:3], strict=True):
                assert a.shape == (1, p.channels)
                assert bits(a) == bits(b)
            want = run_backward(p, stats, mask=mask)
            g = run_backward(p, found, mask=mask, virtual_batch_size=len(p.x) + more)
            for a, b in zip(g, want, strict=True):
                assert bits(a) == bits(b)

    @pytest.mark.parametrize("size", [10, 2**60, 2**62, 2**63 - 1])
    @pytest.mark.parametrize("shape", [(10, 3, 2), (10, 3, 4), (10, 3, 5)], ids=str)
    def test_sizes_that_no_array_has(self, shape, size):
        """Products of them wrap around."""
        p = make_problem(shape)
        for mask in (None, mask_of(p, scattered), mask_of(p, weights_and_zeros)):
            want, _ = run_forward(p, mask=mask)
            assert bits(run_forward(p, mask=mask, virtual_batch_size=size)[0]) == bits(want)

    @pytest.mark.parametrize("size", [np.int64(4), np.uint8(4), np.array(4)], ids=repr)
    def test_of_numpys_integers(self, size):
        p = make_problem((8, 3), np.float64)
        want, _ = run_forward(p, virtual_batch_size=4)
        assert bits(run_forward(p, virtual_batch_size=size)[0]) == bits(want)


class TestMasks:
    @pytest.mark.parametrize("make", [first_of_each, weights_and_zeros])
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_as_a_loop(self, dtype, make):
        p = make_problem((10, 5, 9), dtype)
        mask = mask_of(p, make)
        mask[:, :2] = 1
        mask[::3, -1] = 0  # else a run of ones would be summed as without a mask
        check(p, 3, mask[:, None])
        assert everything(p, 3, mask) == everything(p, 3, mask[:, None])

    @pytest.mark.parametrize("shape", [(1, 9), (10, 1), (1, 1)])
    def test_broadcast(self, shape):
        p = make_problem((10, 5, 9))
        mask = mask_of(p, weights_and_zeros)[: shape[0], : shape[1]] + 0.25
        check(p, 3, mask[:, None])

    @pytest.mark.parametrize("kind", [bool, np.float32])
    def test_ones(self, kind):
        p = make_problem((10, 5, 9))
        assert everything(p, 3, np.ones((10, 9), kind))[0] == everything(p, 3, None)[0]

    def test_nothing_counted_in_a_run(self):
        """Refused, as a call of that run is; so is a run with one value."""
        p = make_problem((10, 5, 9))
        for counted in (0, 1):
            mask = np.ones((10, 9), bool)
            mask[3:6] = False
            mask[4, 3 : 3 + counted] = True
            out, running = poisoned_like(p.x), [np.zeros(5, np.float32), np.ones(5, np.float32)]
            words = ("more than 1 value", f"mask that counts {counted}")
            with pytest.raises(ValueError, match=mentions(*words)):
                bnfast.batch_norm(
                    p.x, *running, training=True, mask=mask, out=out, virtual_batch_size=3
                )
            assert np.isnan(out).all()
            assert (running[0] == 0).all()
            assert (running[1] == 1).all()

    def test_light_weights_in_the_last_run(self):
        """Refused before the first one moves the running statistics."""
        p = make_problem((10, 5, 9))
        mask = np.ones((10, 9))
        mask[9] = 0.1
        layer = layer_of(p, virtual_batch_size=3)
        before = state_bits(layer)
        with pytest.raises(ValueError, match=mentions("mask", "weights", "0.9")):
            layer(p.x, mask=mask)
        assert state_bits(layer) == before
        layer(p.x, mask=mask, update_stats=False)
        assert state_bits(layer) == before

    def test_garbage_under_it(self):
        p = make_problem((10, 5, 9), activation="gelu")
        mask = np.arange(9) < np.array([9, 2, 3, 4, 5, 6, 7, 8, 9, 4])[:, None]
        left_out = np.broadcast_to(~mask[:, None], p.x.shape)
        p.dy[left_out] = 0
        q = p.replace(x=np.where(left_out, np.float32(np.nan), p.x))
        (y, stats), (got, found) = (run_forward(r, mask=mask, virtual_batch_size=3) for r in (p, q))
        assert bits(got[~left_out]) == bits(y[~left_out])
        assert bits(found.var) == bits(stats.var)
        want, g = (run_backward(r, stats, mask=mask, virtual_batch_size=3) for r in (p, q))
        assert bits(g.x) == bits(want.x)
        assert bits(g.weight) == bits(want.weight)


def everything(p, size, mask=None):
    """The bits of all results of a problem in runs."""
    options = {"mask": mask, "virtual_batch_size": size, **p.options}
    y, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **options)
    g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **options)
    return [None if a is None else bits(a) for a in (y, *stats[:3], *g)], stats.count


# Many runs, as many as there are threads, and fewer.
LARGE = (
    *(((64, 13, 20, 20), 5), ((4, 13, 61, 61), 2), ((3, 5, 150, 150), 1)),
    *(((20_001, 31), 64), ((20_001, 31), 7000), ((6, 1, 50_001), 2)),
)


@pytest.mark.parametrize(("shape", "size"), LARGE, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
class TestReproducible:
    def test_any_number_of_threads_gives_the_same_bits(self, dtype, shape, size):
        p = make_problem(shape, dtype, activation="relu", residual=True)
        for mask in (None, np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 2 + 0.5):
            with bnfast.num_threads(1):
                want = everything(p, size, mask)
            for n in (2, 4):
                with bnfast.num_threads(n):
                    assert everything(p, size, mask) == want, f"{n} threads"

    def test_the_loop_on_several_threads(self, dtype, shape, size):
        with bnfast.num_threads(2):
            check(make_problem(shape, dtype), size)

    def test_instruction_sets_with_fma_agree(self, dtype, shape, size):
        p = make_problem(shape, dtype, activation="relu")
        start, results = _core.isa(), []
        try:
            for name in _core.isas():
                if name not in WITHOUT_FMA:
                    _core.set_isa(name)
                    results.append(everything(p, size))
        finally:
            _core.set_isa(start)
        assert all(result == results[0] for result in results)


def test_calls_are_counted(dispatches):
    p = make_problem((100, 3, 4))
    _, stats = run_forward(p, virtual_batch_size=2)
    assert by_direction(dispatches()).keys() == {"forward"}
    run_backward(p, stats, virtual_batch_size=2)
    assert by_direction(dispatches()).keys() == {"backward"}


# --- Running statistics -------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.75])
@pytest.mark.parametrize("data", EVERY_DTYPE)
def test_running_statistics_move_run_by_run(data, momentum, ddof, shape, size):
    """In order: the last run weighs most."""
    p = make_problem(shape, data)
    kind = computed_in(data)
    got = np.full(p.channels, 3, kind), np.full(p.channels, 5, kind)
    want = [a.copy() for a in got]
    options = {"training": True, "momentum": momentum, "eps": p.eps, "ddof": ddof}
    bnfast.batch_norm(p.x, *got, virtual_batch_size=size, **options)
    for run in reference.runs(len(p.x), size):
        bnfast.batch_norm(p.x[run], *want, **options)
    assert bits(got[0]) == bits(want[0])
    assert bits(got[1]) == bits(want[1])


@pytest.mark.parametrize("data", DTYPES)
def test_running_statistics_are_the_formulas(data):
    p = make_problem((12, 3), np.float64)
    mean, var = np.zeros(3, data), np.ones(3, data)
    bnfast.batch_norm(p.x, mean, var, training=True, momentum=0.25, virtual_batch_size=4)
    want_mean, want_var = np.zeros(3), np.ones(3)
    for run in reference.runs(12, 4):
        x = p.x[run]
        want_mean = reference.running_average(want_mean, x.mean(axis=0), 0.25)
        want_var = reference.running_average(want_var, x.var(axis=0, ddof=1), 0.25)
    rounding = 8 * np.finfo(data).eps  # three updates, each rounded
    np.testing.assert_allclose(mean, want_mean, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(var, want_var, rtol=rounding)


def test_running_statistics_with_strides():
    shape, size = PLANAR
    p = make_problem(shape)
    plain, strided = np.zeros((2, 5), np.float32), np.zeros((5, 2), np.float32).T
    for running in (plain, strided):
        bnfast.batch_norm(p.x, *running, training=True, virtual_batch_size=size)
    assert plain.any()
    assert bits(strided) == bits(plain)


# --- Backward -----------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias", "x"), ("residual",), ()], ids=str)
def test_needs(needs):
    shape, size = PLANAR
    p = make_problem(shape, activation="relu", residual=True)
    _, stats = run_forward(p, virtual_batch_size=size)
    whole = run_backward(p, stats, virtual_batch_size=size)
    got = run_backward(p, stats, virtual_batch_size=size, needs=needs, out=None)
    for name, a, b in zip(NAMES, got, whole, strict=True):
        assert a is None if name not in needs else bits(a) == bits(b)


@SHAPES
def test_derivatives_from_the_output(shape, size):
    p = make_problem(shape, activation="relu", residual=True)
    y, stats = run_forward(p, virtual_batch_size=size)
    whole = run_backward(p, stats, virtual_batch_size=size)
    got = run_backward(p.replace(residual=None), stats, y=y, needs=NAMES, virtual_batch_size=size)
    for a, b in zip(got, whole, strict=True):
        assert bits(a) == bits(b)


@SHAPES
def test_constant_statistics_of_each_run(shape, size):
    """A count of 0: no gradient flows through them."""
    p = make_problem(shape)
    _, stats = run_forward(p, virtual_batch_size=size)
    g = run_backward(p, stats._replace(count=0), virtual_batch_size=size)
    for i, run in enumerate(reference.runs(len(p.x), size)):
        fixed = bnfast.BatchStats(stats.mean[i], stats.var[i], stats.inv_std[i], 0)
        assert bits(g.x[run]) == bits(run_backward(rows_of(p, run), fixed).x)


class TestRefusedStatistics:
    @pytest.fixture
    def both(self):
        shape, size = PLANAR
        p = make_problem(shape)
        return p, run_forward(p, virtual_batch_size=size)[1]

    def refuses(self, p, stats, *words, **options):
        out = poisoned_like(p.x)
        with pytest.raises((TypeError, ValueError), match=mentions(*words)):
            run_backward(p, stats, out=out, **options)
        assert np.isnan(out).all()

    def test_of_the_whole_batch(self, both):
        p, _ = both
        self.refuses(p, run_forward(p)[1], "stats.mean", (5,), virtual_batch_size=3)

    @pytest.mark.parametrize("size", [2, 5, 10])
    def test_of_other_runs(self, both, size):
        p, stats = both
        self.refuses(p, stats, "stats.mean", virtual_batch_size=size)

    @pytest.mark.parametrize("name", ["mean", "inv_std"])
    def test_of_another_shape(self, both, name):
        """As many numbers, and not a row for each run."""
        p, stats = both
        for shape in ((5, 4), (20, 1), (2, 10), (2, 2, 5), (20,)):
            other = stats._replace(**{name: getattr(stats, name).reshape(shape)})
            self.refuses(p, other, f"stats.{name}", virtual_batch_size=3)

    def test_without_a_size(self, both):
        p, stats = both
        self.refuses(p, stats, "stats.mean", (4, 5))

    @pytest.mark.parametrize("count", [209, 211, 63])
    def test_count(self, both, count):
        p, stats = both
        self.refuses(p, stats._replace(count=count), "stats.count", 210, virtual_batch_size=3)

    def test_out_over_them(self, both):
        p, stats = both
        memory = np.zeros(p.x.size, np.float32)
        mean = memory[: 2 * stats.mean.size].view(np.float64).reshape(stats.mean.shape)
        mean[...] = stats.mean
        with pytest.raises(ValueError, match=mentions("out overlaps", "stats.mean")):
            run_backward(
                p,
                stats._replace(mean=mean),
                out=memory.reshape(p.x.shape),
                virtual_batch_size=3,
            )


# --- Refused, and empty ------------------------------------------------------------------------

CALLS = each(forward, training, backward, inference)


class TestRefused:
    """With nothing written."""

    @CALLS
    @pytest.mark.parametrize("size", [0, -1, -(2**70), 2**63, 10**400])
    def test_out_of_range(self, call, size):
        words = ("virtual_batch_size", "expected 1 to")
        call.refuses(ValueError, words, virtual_batch_size=size)

    @CALLS
    @pytest.mark.parametrize(
        "size",
        [
            2.0,
            "2",
            True,
            np.True_,
            np.float32(2),
            np.nan,
            [2],
            np.array([2]),
            np.timedelta64(2, "D"),
        ],
        ids=repr,
    )
    def test_no_integer(self, call, size):
        words = ("virtual_batch_size", "expected an integer")
        call.refuses(TypeError, words, virtual_batch_size=size)

    @each(forward, training, backward)
    @pytest.mark.parametrize("axis", [0, -3, np.int64(0)])
    def test_channels_on_axis_0(self, call, axis):
        changes = {
            name: np.ones(6, np.float32)
            for name in ("weight", "bias", "running_mean", "running_var")
            if name in call.named
        }
        words = ("axis", "virtual_batch_size")
        call.refuses(ValueError, words, axis=axis, virtual_batch_size=2, **changes)

    def test_beside_moments(self):
        whole = bnfast.moments(X)
        words = ("virtual_batch_size", "moments")
        forward.refuses(ValueError, words, moments=whole, virtual_batch_size=3)

    def test_beside_sums(self):
        sums = np.zeros(4), np.zeros(4)
        words = ("virtual_batch_size", "sums")
        backward.refuses(ValueError, words, sums=sums, needs=["x"], virtual_batch_size=3)

    @pytest.mark.parametrize(
        ("shape", "size"), [((9, 4), 4), ((9, 4), 8), ((9, 4), 1), ((3, 4, 1, 1), 2), ((5, 1), 2)]
    )
    @each(forward, training)
    def test_run_of_one_value(self, call, shape, size):
        x = np.ones(shape, np.float32)
        changes = {
            name: np.ones(shape[1], np.float32)
            for name in ("weight", "bias", "running_mean", "running_var")
            if name in call.named
        }
        call.refuses(
            ValueError,
            ("Expected more than 1 value per channel when training", shape, f"{size} rows"),
            x=x, residual=None, out=poisoned_like(x), virtual_batch_size=size, **changes,
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    @pytest.mark.parametrize("order", ["nchw", "fortran"])
    def test_running_statistics_over_x(self, name, order):
        """Also where the runs are computed from a copy of x."""
        x = ALL_ORDERS[order](np.ones((10, 5, 3, 7), np.float32))
        running = {"running_mean": np.zeros(5, np.float32), "running_var": np.ones(5, np.float32)}
        memory = x.ravel(order="K")
        assert np.shares_memory(memory, x)
        running[name] = memory[:5]
        with pytest.raises(ValueError, match=mentions(name, "overlaps")):
            bnfast.batch_norm(x, **running, training=True, virtual_batch_size=3)
        assert (x == 1).all()

    def test_good_sizes_are_accepted(self):
        """Otherwise the refusals above would prove nothing."""
        for call in (forward, training, inference):
            arguments = {name: copied(a) for name, a in call.named.items()}
            x = arguments.pop("x")
            call.function(x, virtual_batch_size=2, **arguments)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 0), (3, 0, 2), (0, 4), (0, 0)], ids=str)
def test_empty_batches(shape, size, dispatches):
    x = np.empty(shape, np.float32)
    mean, var = (np.full(shape[1], value, np.float32) for value in (3, 5))
    y = bnfast.batch_norm(x, mean, var, training=True, virtual_batch_size=size)
    assert y.shape == shape
    y, stats = bnfast.batch_norm_forward(x, virtual_batch_size=size)
    runs = len(reference.runs(shape[0], size))
    assert y.shape == shape
    assert stats.mean.shape == stats.var.shape == stats.inv_std.shape == (runs, shape[1])
    g = bnfast.batch_norm_backward(y, x, stats, virtual_batch_size=size)
    assert g.x.shape == shape
    for a in (g.weight, g.bias):
        assert a.tolist() == [0] * shape[1]
    assert (mean == 3).all()
    assert (var == 5).all()
    assert dispatches() == {}


# --- Layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@SHAPES
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_a_layer_is_a_loop(dtype, shape, size, momentum):
    """Output, running statistics, counter, gradients."""
    p = make_problem(shape, dtype, activation="relu", residual=True)
    layer = layer_of(p, virtual_batch_size=size, momentum=momentum)
    plain = layer_of(p, momentum=momentum)
    dx, dresidual = [], []
    for _ in range(2):
        got = layer(p.x, p.residual)
        y = [plain(p.x[run], p.residual[run]) for run in reference.runs(len(p.x), size)]
        assert bits(got) == bits(np.concatenate(y))
        for name in STATE:
            assert bits(getattr(layer, name)) == bits(getattr(plain, name)), name
    assert int(layer.num_batches_tracked) == 2 * len(reference.runs(len(p.x), size))
    found = layer.backward(p.dy)
    for run in reference.runs(len(p.x), size):
        plain(p.x[run], p.residual[run])
        for a, kept in zip(plain.backward(p.dy[run]), (dx, dresidual), strict=True):
            kept.append(a)
    assert bits(found[0]) == bits(np.concatenate(dx))
    assert bits(found[1]) == bits(np.concatenate(dresidual))
    # The loop rounds each sum to the layer's type.
    _, stats = run_forward(p, virtual_batch_size=size)
    g = run_backward(p, stats, virtual_batch_size=size)
    assert bits(layer.weight_grad) == bits(g.weight.astype(computed_in(dtype)))
    assert bits(layer.bias_grad) == bits(g.bias.astype(computed_in(dtype)))


class TestLayers:
    def make(self, **options):
        shape, size = PLANAR
        p = make_problem(shape)
        return p, layer_of(p, virtual_batch_size=size, **options)

    def test_the_option_is_an_attribute(self):
        p, layer = self.make()
        assert layer.virtual_batch_size == 3
        assert BatchNorm(5).virtual_batch_size is None
        assert "virtual_batch_size=3" in repr(layer)
        assert "virtual" not in repr(BatchNorm(5))
        layer.virtual_batch_size = None
        assert bits(layer(p.x)) == bits(layer_of(p)(p.x))

    def test_backward_is_of_the_forwards_runs(self):
        p, layer = self.make()
        layer(p.x)
        layer.virtual_batch_size = 5
        want = run_backward(p, run_forward(p, virtual_batch_size=3)[1], virtual_batch_size=3)
        assert bits(layer.backward(p.dy)) == bits(want.x)

    def test_evaluation_has_no_runs(self):
        p, layer = self.make()
        layer(p.x)
        plain = layer_of(p)
        plain.load_state_dict(layer.state_dict())
        assert bits(layer.eval()(p.x)) == bits(plain.eval()(p.x))
        assert bits(layer.freeze()(p.x)) == bits(plain(p.x))
        one = p.x[:1, :, :1, :1]
        assert bits(layer(one)) == bits(plain(one))

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_update_stats_false(self, momentum):
        p, layer = self.make(momentum=momentum)
        before = state_bits(layer)
        y = layer(p.x, update_stats=False)
        assert bits(y) == bits(run_forward(p, virtual_batch_size=3)[0])
        assert state_bits(layer) == before

    def test_without_running_statistics(self):
        p, layer = self.make(track_running_stats=False)
        assert bits(layer(p.x)) == bits(run_forward(p, virtual_batch_size=3)[0])

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
    def test_copies(self, duplicate):
        p, layer = self.make(momentum=None)
        layer(p.x)
        again = duplicate(layer)
        assert again.virtual_batch_size == 3
        assert state_bits(again) == state_bits(layer)
        assert bits(again(p.x)) == bits(layer(p.x))
        assert state_bits(again) == state_bits(layer)

    def test_pickles_of_older_versions(self):
        """They have no such attribute."""
        p = make_problem(PLANAR[0])
        plain = layer_of(p)
        state = plain.__getstate__()
        del state["virtual_batch_size"]
        layer = BatchNorm.__new__(BatchNorm)
        layer.__dict__.update(state)
        assert layer.virtual_batch_size is None
        assert bits(layer(p.x)) == bits(plain(p.x))
        assert repr(layer) == repr(plain)

    def test_the_state_is_that_of_any_layer(self):
        p, layer = self.make()
        layer(p.x)
        assert tuple(layer.state_dict()) == STATE
        plain = BatchNorm(5)
        plain.load_state_dict(layer.state_dict())
        assert bits(plain.running_var) == bits(layer.running_var)
        assert int(plain.num_batches_tracked) == 4

    @pytest.mark.parametrize(
        ("cls", "shape"),
        [
            (BatchNorm1d, (8, 3)), (BatchNorm1d, (8, 3, 4)), (BatchNorm2d, (8, 3, 2, 2)),
            (BatchNorm3d, (8, 3, 2, 2, 2)),
        ],
    )  # fmt: skip
    def test_of_any_rank(self, cls, shape):
        x = make_problem(shape).x
        want, _ = bnfast.batch_norm_forward(x, virtual_batch_size=2)
        assert bits(cls(3, virtual_batch_size=2)(x)) == bits(want)

    def test_channels_last(self):
        p = make_problem((10, 3, 7, 5), axis=-1)
        layer = layer_of(p, virtual_batch_size=4)
        assert bits(layer(p.x)) == bits(run_forward(p, virtual_batch_size=4)[0])
        assert int(layer.num_batches_tracked) == 3

    @pytest.mark.parametrize("size", [0, -1, 2.5, "2", True, 2**63])
    def test_constructor_refuses(self, size):
        with pytest.raises((TypeError, ValueError), match=r"^virtual_batch_size is"):
            BatchNorm(4, virtual_batch_size=size)

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("size", [0, 2.5, "2"])
    def test_attribute_of_another_value(self, size, momentum):
        p, layer = self.make(momentum=momentum)
        layer(p.x)
        layer.virtual_batch_size = size
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises((TypeError, ValueError), match=r"^virtual_batch_size is"):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_last_run_of_one_value(self, momentum):
        p = make_problem((9, 5))
        layer = layer_of(p, virtual_batch_size=4, momentum=momentum)
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_counter_without_room_for_all_runs(self, momentum):
        """Refused before anything is written, not after the first run."""
        p, layer = self.make(momentum=momentum)
        layer.num_batches_tracked[...] = 2**63 - 3
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises(ValueError, match=r"^num_batches_tracked is"):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()

    def test_channels_on_axis_0(self):
        p = make_problem((5, 6, 4), axis=0)
        layer = layer_of(p, virtual_batch_size=2)
        with pytest.raises(ValueError, match=mentions("axis", "virtual_batch_size")):
            layer(p.x)

    def test_runs_without_values_count(self):
        """As batches without values do: a loop would call the layer twice."""
        layer = BatchNorm(4, virtual_batch_size=2)
        layer(np.empty((3, 4, 0), np.float32))
        assert int(layer.num_batches_tracked) == 2
        assert layer.running_mean.tolist() == [0] * 4
        assert layer.running_var.tolist() == [1] * 4

    def test_population_statistics_are_of_all_rows(self):
        """Not of runs: Algorithm 2 has one population."""
        batches = [make_problem((n, 3, 4), np.float64, seed=n).x for n in (5, 8, 2)]
        layer = BatchNorm(3, dtype=np.float64, virtual_batch_size=2)
        bnfast.recompute_statistics(layer, batches, [layer])
        mean, var = reference.population(batches)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
        assert int(layer.num_batches_tracked) == 0

    def test_population_statistics_with_masks(self):
        p = make_problem((6, 3, 4), np.float64)
        mask = mask_of(p, scattered)
        mask[:, :2] = True
        layer = BatchNorm(3, dtype=np.float64, virtual_batch_size=2)
        bnfast.recompute_statistics(lambda x: layer(x, mask=mask), [p.x], [layer])
        total = bnfast.moments(p.x, mask=mask)
        np.testing.assert_allclose(layer.running_mean, total.mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, total.var(1), rtol=1e-12)


# --- Properties -----------------------------------------------------------------------------------


@st.composite
def problems(draw):
    shape = (draw(st.integers(1, 20)), *draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    return make_problem(
        shape,
        draw(st.sampled_from(DTYPES)),
        axis=draw(st.integers(1, len(shape) - 1)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(problems(), st.integers(1, 25), st.sampled_from([None, scattered, weights_and_zeros]))
def test_any_problem_is_a_loop(p, size, make):
    """Where one of the calls is refused, so is the whole."""
    mask = None
    if make is not None and p.m > 1:
        mask = np.expand_dims(mask_of(p, make), p.axis)
        ones = [(mask[run] == 1).all() for run in reference.runs(len(p.x), size)]
        assume(all(ones) or not any(ones))  # such a run would be summed as without a mask
    if refuses_one(p, size, mask):
        out = poisoned_like(p.x)
        with pytest.raises(ValueError, match="more than 1 value"):
            bnfast.batch_norm_forward(p.x, mask=mask, axis=p.axis, out=out, virtual_batch_size=size)
        assert np.isnan(out).all()
    else:
        check(p, size, mask)


def refuses_one(p, size, mask):
    """Whether a run counts fewer than two values."""
    counts = np.ones(full(p), bool) if mask is None else np.broadcast_to(mask, full(p)) > 0
    return any(counts[run].sum() < 2 for run in reference.runs(len(p.x), size))


@given(st.integers(2, 6), st.integers(1, 4), st.sampled_from(DTYPES), st.randoms())
def test_other_runs_do_not_matter(count, size, dtype, random):
    """Runs may be put in any order: none sees another."""
    p = make_problem((count * size, 3, 2), dtype, activation="relu", residual=True)
    order = list(range(count))
    random.shuffle(order)
    rows = np.arange(count * size).reshape(count, size)[order].reshape(-1)
    y, stats = run_forward(p, virtual_batch_size=size)
    got, found = run_forward(rows_of(p, rows), virtual_batch_size=size)
    assert bits(got) == bits(y[rows])
    assert bits(found.mean) == bits(stats.mean[order])
    assert bits(found.inv_std) == bits(stats.inv_std[order])
