"""Arrays of any rank, order and owner: read in place, or copied once, with correct results.

Peak memory shows what was copied: NumPy reports its own arrays to tracemalloc.
"""

from itertools import permutations
from math import prod

import numpy as np
import pytest
import reference
from cases import backwards, bits, make_problem, peak, poisoned_like, with_gaps, with_memory_order
from numpy.lib.stride_tricks import as_strided, sliding_window_view

import bnfast

# 1 MB of float32 at each rank; all sizes differ, except where there are too many.
SHAPES = {
    2: (4096, 64),
    3: (64, 32, 128),
    4: (16, 8, 64, 32),
    5: (8, 16, 4, 32, 16),
    6: (4, 8, 2, 16, 32, 8),
}
# Sums of the channels (up to 4096, in several blocks) and Python's own objects.
LITTLE = 500_000


def some_orders(rank):
    """Every order of up to four axes; of more the plain, the reversed and the rotated ones."""
    if rank <= 4:
        return list(permutations(range(rank)))
    rotated = [tuple((i + k) % rank for i in range(rank)) for k in range(rank)]
    return [*rotated, tuple(reversed(range(rank)))]


@pytest.mark.parametrize("rank", SHAPES)
class TestAnyOrderOfAnyRank:
    def test_is_read_in_place(self, rank):
        for order in some_orders(rank):
            for axis in range(rank):
                p = make_problem(SHAPES[rank], axis=axis, arrange=with_memory_order(*order))
                out = np.empty_like(p.x)
                used = peak(
                    lambda p=p, out=out: bnfast.scale_shift(
                        p.x, p.weight, p.bias, axis=p.axis, out=out
                    )
                )
                assert used < LITTLE, (order, axis, used)

    def test_is_summed_in_place(self, rank):
        for order in some_orders(rank):
            p = make_problem(SHAPES[rank], axis=1, arrange=with_memory_order(*order))
            assert peak(lambda p=p: bnfast.moments(p.x)) < LITTLE, order

    def test_same_result_as_plain_copy(self, rank):
        """To the bit in inference, where nothing is summed; the memory order included."""
        for order in some_orders(rank):
            for axis in range(-rank, rank):
                p = make_problem(SHAPES[rank][-rank:], axis=axis, arrange=with_memory_order(*order))
                got = bnfast.scale_shift(p.x, p.weight, p.bias, axis=axis)
                want = bnfast.scale_shift(np.ascontiguousarray(p.x), p.weight, p.bias, axis=axis)
                assert np.array_equal(got, want), (order, axis)
                assert got.strides == p.x.strides, (order, axis)

    def test_sliced_costs_one_copy(self, rank):
        p = make_problem(SHAPES[rank], arrange=with_gaps)
        out = np.empty(p.x.shape, p.x.dtype)
        used = peak(lambda: bnfast.scale_shift(p.x, p.weight, p.bias, out=out))
        assert used < p.x.nbytes + LITTLE
        want = bnfast.scale_shift(np.ascontiguousarray(p.x), p.weight, p.bias)
        assert bits(out) == bits(want)


@pytest.mark.parametrize("name", ["x", "residual", "out"])
def test_each_sliced_tensor_costs_one_copy(name):
    p = make_problem(SHAPES[4], residual=True)
    tensors = {"x": p.x, "residual": p.residual, "out": np.empty_like(p.x)}
    tensors[name] = with_gaps(tensors[name])
    used = peak(lambda: bnfast.scale_shift(scale=p.weight, shift=p.bias, **tensors))
    assert p.x.nbytes <= used < p.x.nbytes + LITTLE


def test_tensors_of_one_call_in_different_orders():
    p = make_problem(SHAPES[4], residual=True, activation="relu")
    want, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **p.options)
    want_g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
    turned = p.replace(residual=np.asfortranarray(p.residual), dy=with_gaps(p.dy))
    out = with_memory_order(2, 0, 3, 1)(poisoned_like(p.x))
    got, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=out, **turned.options)
    assert got is out
    assert bits(got) == bits(want)
    g = bnfast.batch_norm_backward(turned.dy, p.x, stats, p.weight, p.bias, **turned.options)
    assert [bits(a) for a in g] == [bits(a) for a in want_g]


# --- Strides


def with_odd_strides(a):
    """The same memory; strides of axes with one index are arbitrary."""
    odd = (0, 1, -3, 2**40, -(2**62), 2**62 - 1)
    strides = [
        odd[i % len(odd)] if n == 1 or a.size == 0 else stride
        for i, (n, stride) in enumerate(zip(a.shape, a.strides, strict=True))
    ]
    return as_strided(a, a.shape, strides)


def results(p, *, out=False):
    """All results of a problem: inference, which sums nothing, and training."""

    def target():
        return with_odd_strides(poisoned_like(p.x)) if out else None

    y = bnfast.normalize(p.x, p.bias, p.weight**2, p.weight, p.bias, out=target(), **p.options)
    z, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=target(), **p.options)
    g = bnfast.batch_norm_backward(
        p.dy, p.x, stats, p.weight, p.bias, out=target(), **p.options)  # fmt: skip
    return [y, z, stats.mean, *g, bnfast.moments(p.x, axis=p.axis).m2]


MOST_AXES = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32


@pytest.mark.parametrize("shape", [
    (1, 5, 7), (6, 1, 7), (6, 5, 1), (1, 1, 7), (6, 1, 1, 1), (1, 4, 1, 5, 1, 6, 1), (1, 4, 3, 1),
    (3, *(1,) * (MOST_AXES - 2), 4), (*(1,) * (MOST_AXES - 4), 2, 3, 4, 5),
    (0, 3), (4, 0, 1, 2), (0, 0),
], ids=lambda shape: f"{len(shape)} axes, {prod(shape)} values")  # fmt: skip
@pytest.mark.parametrize("order", ["plain", "reversed", "rotated"])
def test_strides_of_axes_of_length_one(shape, order):
    """Strides of axes with one index have no meaning, wherever the channel axis is."""
    axes = tuple(range(len(shape)))
    turned = {"plain": axes, "reversed": axes[::-1], "rotated": (*axes[1:], 0)}[order]
    for axis in sorted({i for i in axes if shape[i] != 1} | {0, len(shape) - 1}):
        p = make_problem(shape, axis=axis, residual=True, arrange=with_memory_order(*turned))
        if p.x.size == p.channels:
            continue  # one value per channel
        odd = p.replace(x=with_odd_strides(p.x), dy=with_odd_strides(p.dy),
                        residual=with_odd_strides(p.residual))  # fmt: skip
        for out in (False, True):
            for got, want in zip(results(odd, out=out), results(p), strict=True):
                assert got.shape == want.shape
                assert bits(got) == bits(want)


def test_meaningless_strides_cost_no_copy():
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)):
        p = make_problem((1, 64, 1, 4096), residual=True, arrange=with_memory_order(*axes))
        x, residual, out = map(with_odd_strides, (p.x, p.residual, np.empty_like(p.x)))
        used = peak(
            lambda p=p, x=x, residual=residual, out=out: bnfast.scale_shift(
                x, p.weight, p.bias, residual=residual, out=out
            )
        )
        assert used < LITTLE, (axes, used)


def test_any_strides():
    """The tensors of one call each have their own memory order, gaps and directions."""
    drawn = np.random.default_rng(3)
    ways = [with_gaps, backwards, np.asfortranarray, lambda a: a.astype(">f8")]
    for _ in range(300):
        shape = tuple(drawn.integers(1, 5, size=drawn.integers(2, 7)))
        axis = int(drawn.integers(len(shape)))
        if prod(shape) < 3 * shape[axis]:
            continue  # too few values for a variance with an error limit
        plain = make_problem(shape, np.float64, axis=axis, residual=True)

        def arrange(a):
            if drawn.random() < 0.5:
                return with_memory_order(*drawn.permutation(a.ndim))(a)
            return ways[drawn.integers(len(ways))](a)

        p = plain.replace(
            x=arrange(plain.x), dy=arrange(plain.dy), residual=arrange(plain.residual)
        )
        out = arrange(poisoned_like(plain.x))
        y, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=out, **p.options)
        assert y is out
        g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
        exact = plain.x, plain.weight, plain.bias, plain.eps, axis, plain.residual
        np.testing.assert_allclose(y, reference.forward(*exact), 1e-9, 1e-9)
        for got, want in zip(g, reference.backward(plain.dy, *exact), strict=True):
            np.testing.assert_allclose(got, want, 1e-9, 1e-9)


def test_values_that_share_memory_are_read():
    """For example windows over a signal. As a result they are refused."""
    signal = make_problem((1, 64)).x[0]
    windows = sliding_window_view(signal, 8)
    for x in (windows, windows.T, windows[:, ::-1], as_strided(signal, (5, 6), (0, 4))):
        p = make_problem(x.shape).replace(x=np.ascontiguousarray(x))
        for got, want in zip(results(p.replace(x=x)), results(p), strict=True):
            assert bits(got) == bits(want)
        with pytest.raises(ValueError, match=r"^out .*(share memory|read-only)"):
            bnfast.scale_shift(p.x, None, None, out=x)


@pytest.mark.parametrize("shape", [(2**40, 4), (2**59, 2), (2**61 - 1, 1), (2,) * 60], ids=len)
def test_more_values_than_memory(shape):
    x = as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))
    stats = bnfast.BatchStats.from_population(np.zeros(shape[1]), np.ones(shape[1]))
    for call in (
        lambda: bnfast.moments(x),
        lambda: bnfast.scale_shift(x, None, None),
        lambda: bnfast.batch_norm_forward(x, residual=x),
        lambda: bnfast.batch_norm_backward(x, x, stats),
        lambda: bnfast.BatchNorm(shape[1])(x),
        lambda: bnfast.BatchNorm(shape[1]).freeze()(x),
    ):
        with pytest.raises(MemoryError):
            call()


# --- Other libraries' arrays


class OnlyDLPack:
    """The minimum that the protocol requires."""

    def __init__(self, a):
        self.array = a

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnlyArray:
    def __init__(self, a):
        self.array = a

    def __array__(self, dtype=None, copy=None):
        assert dtype is None or dtype == self.array.dtype
        return self.array


class OnlyInterface:
    def __init__(self, a):
        self.array = a
        self.__array_interface__ = a.__array_interface__


def tensor(a):
    return pytest.importorskip("torch").from_numpy(a)


OWNERS = [OnlyDLPack, OnlyArray, OnlyInterface, memoryview, tensor]


@pytest.mark.parametrize("own", OWNERS)
class TestForeignArrays:
    def test_are_read_in_place(self, own):
        p = make_problem(SHAPES[4], residual=True)
        y, dx = np.empty_like(p.x), np.empty_like(p.x)
        x, dy, residual = own(p.x), own(p.dy), own(p.residual)
        _, stats = bnfast.batch_norm_forward(p.x)
        for call in (
            lambda: bnfast.moments(x),
            lambda: bnfast.batch_norm_forward(x, residual=residual, out=y),
            lambda: bnfast.scale_shift(x, p.weight, p.bias, residual=residual, out=y),
            lambda: bnfast.batch_norm_backward(dy, x, stats, out=dx),
            lambda: bnfast.BatchNorm(8)(x, residual, out=y),
        ):
            assert peak(call) < LITTLE

    def test_results_are_numpy_arrays(self, own):
        p = make_problem((4, 5, 6), residual=True, activation="relu")
        x, dy, residual, weight, bias = map(own, (p.x, p.dy, p.residual, p.weight, p.bias))
        y, stats = bnfast.batch_norm_forward(
            x, weight, bias, residual=residual, activation=p.activation
        )
        g = bnfast.batch_norm_backward(
            dy, x, stats, weight, bias, residual=residual, activation=p.activation
        )
        want, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **p.options)
        want_g = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
        for a, b in zip((y, *g), (want, *want_g), strict=True):
            assert type(a) is np.ndarray
            assert bits(a) == bits(b)

    def test_in_layers(self, own):
        p = make_problem((4, 5, 6), residual=True, activation="relu")
        layer, other = (bnfast.BatchNorm(5, activation="relu") for _ in range(2))
        got, want = layer(own(p.x), own(p.residual)), other(p.x, p.residual)
        assert type(got) is np.ndarray
        assert bits(got) == bits(want)
        for a, b in zip(layer.backward(own(p.dy)), other.backward(p.dy), strict=True):
            assert bits(a) == bits(b)
        assert bits(layer.freeze()(own(p.x))) == bits(other.freeze()(p.x))
        assert bits(layer.eval()(own(p.x))) == bits(other.eval()(p.x))

    def test_are_not_written_to(self, own):
        """Outputs and running statistics must be NumPy arrays. How other libraries handle a write
        to their arrays is not known.
        """
        p = make_problem((4, 5, 6))
        out = own(p.x.copy())
        with pytest.raises(TypeError, match=r"^out is .*expected a NumPy array"):
            bnfast.scale_shift(p.x, p.weight, p.bias, out=out)
        mean, var = p.bias, p.weight**2
        for running in ((own(mean), var), (mean, own(var))):
            with pytest.raises(TypeError, match=r"^running_.* is .*expected a NumPy array"):
                bnfast.batch_norm(p.x, *running, training=True)


def test_a_tensor_with_a_gradient_is_named():
    """It must be detached by hand: nothing would be recorded here."""
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(TypeError, match=r"(?s)^x is .*of type Tensor.*grad"):
        bnfast.moments(x)
