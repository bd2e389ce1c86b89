"""The caller's `np.errstate` must not change results.

Numbers at the limits of their types overflow, underflow, divide by zero and make NaN in between.
The results are the same if the caller has asked for exceptions, and come without a warning.
"""

import numpy as np
import pytest
from cases import EVERY_DTYPE
from tolerance import finfo

import bnfast
from bnfast import BatchNorm, BatchStats, Moments

CHANNELS = 8


class Numbers:
    """Random arrays that include the limits of their types, infinities and NaN."""

    def __init__(self, dtype):
        self.rng = np.random.default_rng(20150304)
        self.dtype = np.dtype(dtype)

    def __call__(self, *shape, dtype=None):
        dtype = dtype or self.dtype
        info = finfo(dtype)
        ends = [info.max, -info.max, info.tiny, info.smallest_subnormal, 0, np.inf, -np.inf, np.nan]
        with np.errstate(all="ignore"):
            values = self.rng.normal(size=shape).astype(dtype)
        flat = values.reshape(-1)
        places = self.rng.permutation(flat.size)[: len(ends)]
        flat[places] = np.array(ends, dtype)[: places.size]
        return values

    def parameters(self, dtype=np.float32):
        """Mean, variance, weight and bias."""
        mean, var, weight, bias = (self(CHANNELS, dtype=dtype) for _ in range(4))
        return mean, np.abs(var), weight, bias

    def layer(self, dtype=np.float32, **options):
        layer = BatchNorm(CHANNELS, dtype=dtype, **options)
        own = layer.running_mean, layer.running_var, layer.weight, layer.bias
        for a, values in zip(own, self.parameters(dtype), strict=True):
            a[...] = values
        return layer


# ---- calls: generators of their results


def batch_norm(numbers):
    x, (mean, var, weight, bias) = numbers(5, CHANNELS, 3), numbers.parameters()
    for training in (True, False):
        running = mean.copy(), var.copy()
        yield bnfast.batch_norm(x, *running, weight, bias, training, activation="relu6")
        yield running


def normalize(numbers):
    x = numbers(5, CHANNELS, 3)
    for kept in (np.float32, np.float64):
        mean, var, weight, bias = numbers.parameters(kept)
        yield bnfast.normalize(x, mean, var, weight, bias, eps=0)
        yield bnfast.scale_shift(x, weight, bias, residual=x)
        # In unusual memory orders, as lists and with swapped bytes.
        yield bnfast.normalize(x[:, ::-1], mean[::-1].tolist(), var[::-1], weight.astype(">f8"))


def backward(numbers):
    x, dy = numbers(5, CHANNELS, 3), numbers(5, CHANNELS, 3)
    mean, var, weight, bias = numbers.parameters()
    y, stats = bnfast.batch_norm_forward(x, weight, bias)
    yield y
    yield stats
    yield bnfast.batch_norm_backward(dy, x, stats, weight, bias, activation="relu")
    stats = BatchStats.from_population(mean, var, eps=0)
    yield stats
    yield bnfast.batch_norm_backward(dy, x, stats, weight, bias)
    largest = np.full(CHANNELS, np.finfo(np.float64).max)
    yield BatchStats.from_population(largest, largest, eps=1e308)


def moments(numbers):
    row = [bnfast.moments(numbers(n, CHANNELS)) for n in (1, 7, 4, 100)]
    for _ in range(4):
        mean, m2, *_ = numbers.parameters(np.float64)
        row.append(Moments(3, mean, m2))
    row.append(Moments(10**9, np.full(CHANNELS, 1e-300), np.full(CHANNELS, 1e-320)))
    merged = Moments.merge_all(row), sum(row), *map(Moments.merge, row, reversed(row))
    for m in (*row, *merged, Moments.empty(CHANNELS).update(numbers(3, CHANNELS))):
        yield m.count, m.mean, m.m2, m == merged[0]
        for ddof in (0, 1, 2.999, -1e300):
            yield m.var(ddof), m.std(ddof)
    longest = np.finfo(np.longdouble)
    yield Moments(2, np.array([longest.max, longest.tiny]), np.array([longest.max, 1])).mean


def fold(numbers):
    weight, bias = numbers(CHANNELS, 4, 3), numbers(CHANNELS)
    for kept in (np.float32, np.float64):
        for eps in (0.0, 1e-5, 1e308):
            layer = numbers.layer(kept, eps=eps)
            yield bnfast.fold(weight, bias, layer)
            yield bnfast.fold(weight.swapaxes(0, 1), None, layer, out_axis=1)
            yield bnfast.fold_before(weight, bias, layer, groups=2)
            yield bnfast.fold_before(weight[..., 0], None, layer, in_axis=0)


def recompute_statistics(numbers):
    layer = numbers.layer()
    batches = [numbers(n, CHANNELS) for n in (2, 3, 7)]
    tiny = np.tile(np.array([[1e-30], [-1e-30], [0]], np.float32), (1, CHANNELS))
    for row in (batches, [tiny]):
        bnfast.recompute_statistics(layer, row, [layer])
        yield layer.running_mean.copy(), layer.running_var.copy()


def frozen(numbers):
    fixed = bnfast.FrozenBatchNorm(*(numbers(CHANNELS) for _ in range(3)))
    yield fixed(numbers(3, CHANNELS))
    yield fixed.mean, fixed.scale, fixed.shift


def layer(numbers):
    kept = np.float64 if numbers.dtype == np.float64 else np.float32
    trained = numbers.layer(kept, activation="relu")
    state = {name: numbers(CHANNELS, dtype=np.float64) for name in ("running_mean", "bias")}
    trained.load_state_dict(state, strict=False)
    x = numbers(5, CHANNELS, 3)
    for grad in (trained.weight_grad, trained.bias_grad):
        grad[...] = numbers(CHANNELS, dtype=kept)
    yield trained(x)
    yield trained.backward(numbers(5, CHANNELS, 3))
    yield trained.weight_grad, trained.bias_grad, *trained.state_dict().values()
    for eps in (0.0, 1e308):
        frozen = numbers.layer(kept, eps=eps).freeze()
        yield frozen.mean, frozen.scale, frozen.shift, frozen(x)


CALLS = [layer, batch_norm, normalize, backward, moments, fold, recompute_statistics, frozen]


def arrays_of(call, dtype, state):
    with np.errstate(all=state):
        return [np.asarray(a) for result in call(Numbers(dtype)) for a in listed(result)]


def listed(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("call", CALLS)
def test_results_independent_of_errstate(call, dtype):
    want = arrays_of(call, dtype, "ignore")
    assert not all(np.isfinite(a).all() for a in want)
    for state in ("raise", "warn"):
        for ours, theirs in zip(arrays_of(call, dtype, state), want, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes()


def signalling(dtype, shape):
    """NaN whose conversion is invalid: of halves too, on some processors."""
    infinity = np.full(shape, np.inf, dtype)
    return (infinity.view(f"u{infinity.itemsize}") + 1).view(dtype)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_signalling_nan_in_parameters(dtype):
    x = Numbers(np.float32)(4, CHANNELS, 3)
    one, rows = signalling(dtype, CHANNELS), signalling(dtype, (2, CHANNELS))
    stats = BatchStats(rows, rows, rows, 12)
    with np.errstate(all="raise"):
        results = (
            bnfast.scale_shift(x, one, one),
            bnfast.FrozenBatchNorm(one, one, one)(x),
            bnfast.batch_norm_backward(x, x, stats, one, virtual_batch_size=2)[0],
        )
    for result in results:
        assert np.isnan(result).all()
