"""Folding a batch norm into its neighbours, and exact population statistics."""

import numpy as np
import pytest
from cases import HALVES
from numpy.lib.stride_tricks import sliding_window_view
from tolerance import finfo

import bnfast
from bnfast import BatchNorm, conventions, fold, fold_before, recompute_statistics

RNG = np.random.default_rng(20150211)


def batch_norm(channels, dtype=np.float64, **options):
    """Return a layer in eval mode with statistics and parameters of a trained one."""
    layer = BatchNorm(channels, dtype=dtype, **options)
    layer.running_mean[:] = RNG.normal(size=channels)
    layer.running_var[:] = RNG.uniform(0.1, 4, channels)
    if layer.weight is not None:
        layer.weight[:] = RNG.normal(size=channels)
        layer.bias[:] = RNG.normal(size=channels)
    layer.eval()
    return layer


def linear(x, weight, bias):
    return x @ weight.T + bias


def conv(x, weight, bias, *, groups=1, padding=0, stride=1):
    """Convolve NCHW with (out, in / groups, kh, kw), by the defining sum."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    parts = [
        np.einsum("nchwij,ocij->nohw", part, kernel)
        for part, kernel in zip(
            np.split(windows, groups, axis=1), np.split(weight, groups), strict=True
        )
    ]
    return np.concatenate(parts, axis=1) + bias[:, None, None]


def conv_transposed(x, weight, bias, *, groups=1, stride=1):
    """Scatter each pixel of NCHW through (in, out / groups, kh, kw)."""
    n, _, height, width = x.shape
    _, out, kh, kw = weight.shape
    y = np.zeros((n, out * groups, (height - 1) * stride + kh, (width - 1) * stride + kw))
    for g, (part, kernel) in enumerate(
        zip(np.split(x, groups, axis=1), np.split(weight, groups), strict=True)
    ):
        for i, j in np.ndindex(kh, kw):
            rows, columns = (
                slice(i, i + height * stride, stride),
                slice(j, j + width * stride, stride),
            )
            y[:, g * out : (g + 1) * out, rows, columns] += np.einsum(
                "nchw,co->nohw", part, kernel[:, :, i, j]
            )
    return y + bias[:, None, None]


def assert_same(actual, expected, terms, magnitude=1.0):
    """Compare two float64 sums of `terms` products that are equal in exact arithmetic.

    Each is off by at most about (terms + 4) * eps times the sum of its terms' sizes; with entries
    of order 1 that sum is below 100 * terms here.
    """
    atol = 2 * (terms + 4) * np.finfo(np.float64).eps * 100 * terms * magnitude
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# ---- fold: the batch norm follows


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.smoke
def test_fold_linear(with_bias, freeze):
    weight, x = RNG.normal(size=(5, 7)), RNG.normal(size=(4, 7))
    bias = RNG.normal(size=5) if with_bias else None
    bn = batch_norm(5)
    folded = fold(weight, bias, bn.freeze() if freeze else bn)
    plain = np.zeros(5) if bias is None else bias
    assert_same(linear(x, *folded), bn(linear(x, weight, plain)), terms=7)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.smoke
def test_fold_convolution(groups):
    weight, bias = RNG.normal(size=(6, 6 // groups, 3, 2)), RNG.normal(size=6)
    x, bn = RNG.normal(size=(2, 6, 6, 5)), batch_norm(6)
    options = {"groups": groups, "padding": 1, "stride": 2}
    expected = bn(conv(x, weight, bias, **options))
    folded = fold(weight, bias, bn)
    assert_same(conv(x, *folded, **options), expected, terms=36)
    for a, b in zip(folded, fold(weight, bias, bn, groups=groups), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("groups", [1, 2])
def test_fold_transposed_convolution(groups):
    weight, bias = RNG.normal(size=(6, 4 // groups, 3, 2)), RNG.normal(size=4)
    x, bn = RNG.normal(size=(2, 6, 4, 5)), batch_norm(4)
    options = {"groups": groups, "stride": 2}
    folded = fold(weight, bias, bn, out_axis=1, groups=groups)
    expected = bn(conv_transposed(x, weight, bias, **options))
    assert_same(conv_transposed(x, *folded, **options), expected, terms=36)


def test_fold_keras_layout():
    weight, bias = RNG.normal(size=(3, 2, 6, 4)), RNG.normal(size=4)
    bn = batch_norm(4, **conventions.KERAS)
    kernel, shift = fold(weight, bias, bn, out_axis=-1)
    same_kernel, same_shift = fold(weight.transpose(3, 2, 0, 1), bias, bn)
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), same_kernel)
    np.testing.assert_array_equal(shift, same_shift)


def test_fold_without_affine():
    weight, x, bn = RNG.normal(size=(5, 7)), RNG.normal(size=(4, 7)), batch_norm(5, affine=False)
    assert_same(linear(x, *fold(weight, None, bn)), bn(linear(x, weight, np.zeros(5))), terms=7)


def test_fold_rounds_once():
    """float32 parameters are the exact ones, within one rounding of float64's own."""
    weight, bias = RNG.normal(size=(5, 7)).astype("f4"), RNG.normal(size=5).astype("f4")
    bn = batch_norm(5, np.float32)
    statistics = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    mean, var, gamma, beta = (a.astype(np.float64) for a in statistics)
    scale = gamma / np.sqrt(var + bn.eps)
    folded, shift = fold(weight, bias, bn)
    assert folded.dtype == shift.dtype == np.float32
    np.testing.assert_array_max_ulp(folded, (weight * scale[:, None]).astype("f4"), maxulp=1)
    np.testing.assert_array_max_ulp(shift, ((bias - mean) * scale + beta).astype("f4"), maxulp=1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("function", [fold, fold_before])
def test_folding_gives_the_nearest_halves(function, dtype):
    """No neighbour of a result is nearer to the result for float64 weights."""
    weight, bias = RNG.normal(size=(40, 40)).astype(dtype), RNG.normal(size=40).astype(dtype)
    bn = batch_norm(40, np.float32)
    exact = function(weight.astype("f8"), bias.astype("f8"), bn)
    for got, want in zip(function(weight, bias, bn), exact, strict=True):
        assert got.dtype == np.dtype(dtype)
        wide = got.astype(np.float64)
        error = np.abs(wide - want)
        patterns = got.view(np.uint16)
        for neighbour in ((patterns + 1).view(dtype), (patterns - 1).view(dtype)):
            assert (error <= np.abs(neighbour.astype(np.float64) - want)).all()
        assert error.any()


@pytest.mark.parametrize("dtype", HALVES)
def test_folded_halves_are_rounded_once(dtype):
    """Just off the midpoint of two halves, by less than float32 resolves."""
    ulp = float(finfo(dtype).eps)
    largest, infinite = float(finfo(dtype).max), float("inf")
    for number, want in [
        (1 + ulp / 2, 1),
        (1 + ulp / 2 + 2.0**-40, 1 + ulp),
        (1 + ulp / 2 - 2.0**-40, 1),
        (1 + 3 * ulp / 2, 1 + 2 * ulp),
        (1 + 3 * ulp / 2 - 2.0**-40, 1 + ulp),
        (largest * (1 + ulp / 8), largest),
        (largest * (1 + ulp / 8 + 2.0**-40), largest),
        (0.0, 0),
        (infinite, infinite),
        (1e300, infinite),
    ]:
        for sign in (1, -1):
            bn = bnfast.FrozenBatchNorm([0.0], [1.0], [sign * number])
            with np.errstate(over="ignore"):
                _, bias = fold(np.ones((1, 1), dtype), None, bn)
            assert float(bias[0]) == sign * want, (number, bias)
    bn = bnfast.FrozenBatchNorm([0.0], [1.0], [np.nan])
    assert np.isnan(fold(np.ones((1, 1), dtype), None, bn)[1]).all()


@pytest.mark.parametrize("half", HALVES)
def test_fold_returns_the_type_of_the_weight(half):
    weight, bias = RNG.normal(size=(5, 7)), RNG.normal(size=5)
    bn = batch_norm(5, np.float32)
    assert {a.dtype for a in fold(weight.astype(half), bias, bn)} == {np.dtype(half)}
    assert {a.dtype for a in fold(weight, bias.astype(half), bn)} == {np.dtype("f8")}
    assert {a.dtype for a in fold(weight, bias.astype("f4"), bn)} == {np.dtype("f8")}
    assert {a.dtype for a in fold(weight.astype("f4"), bias, bn)} == {np.dtype("f4")}
    swapped = fold(weight.astype(">f8"), bias.astype(">f8"), bn)
    for a, b in zip(swapped, fold(weight, bias, bn), strict=True):
        assert a.dtype.isnative
        np.testing.assert_array_equal(a, b)


def test_fold_does_not_change_arguments():
    weight, bias, bn = RNG.normal(size=(5, 7)), RNG.normal(size=5), batch_norm(5)
    before = weight.copy(), bias.copy(), bn.state_dict()
    folded = fold(weight, bias, bn.train())  # the mode does not matter
    assert bn.training
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(bias, before[1])
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[2][name])
    assert not np.shares_memory(folded[0], weight)
    assert not np.shares_memory(folded[1], bias)


# ---- fold_before: the batch norm precedes


@pytest.mark.smoke
def test_fold_before_linear():
    weight, bias, x = RNG.normal(size=(5, 7)), RNG.normal(size=5), RNG.normal(size=(4, 7))
    bn = batch_norm(7)
    expected = linear(bn(x), weight, bias)
    assert_same(linear(x, *fold_before(weight, bias, bn)), expected, terms=7, magnitude=10)
    kernel, shift = fold_before(weight.T, bias, bn, in_axis=0)
    assert_same(linear(x, kernel.T, shift), expected, terms=7, magnitude=10)
    without = fold_before(weight, None, bn)[1] + bias
    assert_same(fold_before(weight, bias, bn)[1], without, terms=7, magnitude=10)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.smoke
def test_fold_before_convolution(groups):
    weight, bias = RNG.normal(size=(12, 6 // groups, 3, 2)), RNG.normal(size=12)
    x, bn = RNG.normal(size=(2, 6, 6, 5)), batch_norm(6)
    folded = fold_before(weight, bias, bn, groups=groups)
    expected = conv(bn(x), weight, bias, groups=groups, stride=2)
    assert_same(conv(x, *folded, groups=groups, stride=2), expected, terms=36, magnitude=10)


def maps_zero_to_zero(channels):
    bn = batch_norm(channels)
    bn.running_mean[:] = 0
    bn.bias[:] = 0
    return bn


def test_fold_before_is_exact_under_padding_where_zero_stays_zero():
    weight, bias = RNG.normal(size=(4, 6, 3, 3)), RNG.normal(size=4)
    x, bn = RNG.normal(size=(2, 6, 6, 5)), maps_zero_to_zero(6)
    folded = fold_before(weight, bias, bn, padded=True)
    expected = conv(bn(x), weight, bias, padding=1)
    assert_same(conv(x, *folded, padding=1), expected, terms=54, magnitude=10)
    bn.bias[4] = 1e-3
    message = r"padded is True.*maps it to 0\.001 in channel 4 \(1 such channels\)"
    with pytest.raises(ValueError, match=message):
        fold_before(weight, bias, bn, padded=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_fold_before_transposed_convolution(groups):
    weight, bias = RNG.normal(size=(6, 4 // groups, 3, 2)), RNG.normal(size=4)
    x, bn = RNG.normal(size=(2, 6, 4, 5)), maps_zero_to_zero(6)
    options = {"groups": groups, "stride": 2}
    folded = fold_before(weight, bias, bn, in_axis=0, groups=groups)
    expected = conv_transposed(bn(x), weight, bias, **options)
    assert_same(conv_transposed(x, *folded, **options), expected, terms=36, magnitude=10)
    with pytest.raises(ValueError, match=r"transposed convolution.*differing parts of the kernel"):
        fold_before(weight, bias, batch_norm(6), in_axis=0, groups=groups)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_fold_before_grouped_linear_of_the_other_layout(groups):
    """(in, out / groups) without a kernel, so the output for zero reaches the bias."""
    weight, bias = RNG.normal(size=(6, 4)), RNG.normal(size=4 * groups)
    x, bn = RNG.normal(size=(5, 6)), batch_norm(6)
    kernel, shift = fold_before(weight, bias, bn, in_axis=0, groups=groups)
    pixels = (slice(None), slice(None), None, None)
    expected = conv_transposed(bn(x)[pixels], weight[pixels], bias, groups=groups)
    got = conv_transposed(x[pixels], kernel[pixels], shift, groups=groups)
    assert_same(got, expected, terms=6, magnitude=10)


# ---- refused by both


@pytest.mark.parametrize("function", [fold, fold_before])
@pytest.mark.smoke
def test_folding_refusals(function):
    weight, bias, bn = np.ones((3, 3)), np.ones(3), batch_norm(3)
    for bad, error, message in [
        ((np.ones((3, 3), int), bias, bn), TypeError, "weight has dtype int64; expected float32"),
        ((weight.astype("g"), bias, bn), TypeError, f"weight has dtype {np.dtype('g')}; expected"),
        ((weight, np.ones(3, complex), bn), TypeError, "bias has dtype complex128; expected"),
        ((np.ma.ones((3, 3)), bias, bn), TypeError, "weight is a masked array"),
        ((weight, np.ones(4), bn), ValueError, r"bias has shape \(4,\); expected \(3,\)"),
        ((weight, np.ones((1, 3)), bn), ValueError, r"bias has shape \(1, 3\); expected \(3,\)"),
        ((np.ones(3), bias, bn), ValueError, r"weight has shape \(3,\); expected at least two"),
        ((weight, bias, batch_norm(4)), ValueError, "has 3 .* channels .* and bn has 4"),
        ((weight, bias, "bn"), TypeError, "bn is of type str; expected a BatchNorm"),
        ((weight, bias, batch_norm(3, activation="relu")), ValueError, "activation 'relu'"),
        (
            (weight, bias, batch_norm(3, activation="relu").freeze()),
            ValueError,
            "activation 'relu'",
        ),
        ((weight, bias, BatchNorm(3, track_running_stats=False)), RuntimeError, "running"),
    ]:
        with pytest.raises(error, match=message):
            function(*bad)
    for groups in (0, -1, 2):
        with pytest.raises(ValueError, match=rf"groups is {groups}; expected a divisor"):
            function(weight, bias, bn, groups=groups)


def test_folding_refuses_bad_axes():
    weight, bias, bn = np.ones((3, 3)), np.ones(3), batch_norm(3)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"out_axis is {axis}; expected an axis of a weight"):
            fold(weight, bias, bn, out_axis=axis)
    for axis in (2, -1):
        with pytest.raises(ValueError, match=rf"in_axis is {axis}; expected 1, or 0"):
            fold_before(weight, bias, bn, in_axis=axis)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out_axis": "0"}, TypeError, "out_axis is '0' .*expected an integer"),
        ({"out_axis": None}, TypeError, "out_axis is None .*expected an integer"),
        (
            {"out_axis": np.array([0, 1])},
            TypeError,
            "out_axis is an array of int64; expected an int",
        ),
        ({"groups": 1.0}, TypeError, "groups is 1.0 .*expected an integer"),
        ({"groups": True}, TypeError, "groups is True .*expected an integer"),
        ({"groups": np.array([1])}, TypeError, "groups is an array of int64; expected an integer"),
    ],
    ids=str,
)
def test_fold_names_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fold(np.ones((3, 3)), None, batch_norm(3), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_axis": "1"}, "in_axis is '1' .*expected an integer"),
        ({"groups": None}, "groups is None .*expected an integer"),
        ({"padded": np.array([True, False])}, "padded is an array of bool; expected True or False"),
    ],
    ids=str,
)
def test_fold_before_names_bad_options(options, message):
    with pytest.raises(TypeError, match=message):
        fold_before(np.ones((3, 3)), None, batch_norm(3), **options)


@pytest.mark.parametrize("function", [fold, fold_before])
@pytest.mark.parametrize("weight", [None, "weight", [[1.0], [1.0, 2.0]], [["a"]]], ids=str)
def test_folding_names_invalid_weight(function, weight):
    with pytest.raises(TypeError, match="weight"):
        function(weight, None, batch_norm(3))


# ---- recompute_statistics


def batches_of(sizes, channels=3, **options):
    """Return batches with very different means, which averaged variances would miss."""
    return [
        RNG.normal(loc=10 * i, scale=1 + i, size=(size, channels, 2, 2)).astype(np.float32)
        for i, size in enumerate(sizes)
    ]


def population(batches):
    """Return the mean and unbiased variance of all batches as one, in float64."""
    x = np.concatenate(batches).astype(np.float64)
    return x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3), ddof=1)


@pytest.mark.parametrize("sizes", [(8,), (4, 4, 4), (5, 1, 9, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_the_whole_set(sizes, training):
    batches = batches_of(sizes)
    layer = BatchNorm(3, momentum=0.5, ddof=0).train(training)
    recompute_statistics(layer, batches, [layer])
    mean, var = population(batches)
    # The layer holds float32, and the moments are exact to 1e-7 and better.
    np.testing.assert_allclose(layer.running_mean, mean, rtol=2e-7)
    np.testing.assert_allclose(layer.running_var, var, rtol=2e-7)
    assert layer.training is training
    assert layer.num_batches_tracked == 0


def test_order_does_not_matter():
    batches, layer = batches_of((5, 2, 9)), BatchNorm(3, dtype=np.float64)
    batches = [batch.astype(np.float64) for batch in batches]
    recompute_statistics(layer, batches, [layer])
    forwards = layer.running_mean.copy(), layer.running_var.copy()
    recompute_statistics(layer, reversed(batches), [layer])
    np.testing.assert_allclose(layer.running_mean, forwards[0], rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, forwards[1], rtol=1e-14)


def test_statistics_written_in_place_and_one_forward_per_batch():
    batches, layer = batches_of((4, 4)), BatchNorm(3)
    mean, var = layer.running_mean, layer.running_var
    seen = []

    def forward(batch):
        seen.append(batch)
        assert layer.training
        return layer(batch)

    recompute_statistics(forward, iter(batches), [layer])
    assert layer.running_mean is mean
    assert layer.running_var is var
    assert [id(batch) for batch in seen] == [id(batch) for batch in batches]


def test_later_layers_see_batch_normalized_inputs():
    """Algorithm 2 fixes the parameters, and each layer's inputs are those of training."""
    batches = batches_of((6, 6))
    first, second = BatchNorm(3, activation="relu"), BatchNorm(3)
    recompute_statistics(lambda batch: second(first(batch)), batches, [first, second])
    inputs = [bnfast.batch_norm(batch, training=True, activation="relu") for batch in batches]
    mean, var = population(inputs)
    np.testing.assert_allclose(second.running_mean, mean, rtol=2e-7)
    np.testing.assert_allclose(second.running_var, var, rtol=2e-7)
    np.testing.assert_allclose(first.running_mean, population(batches)[0], rtol=2e-7)


@pytest.mark.parametrize("times_listed", [1, 2])
def test_a_shared_layer_merges_all_its_inputs(times_listed):
    batches, layer = batches_of((4, 6)), BatchNorm(3)

    def forward(batch):
        layer(batch)
        layer(batch + 1)

    recompute_statistics(forward, batches, [layer] * times_listed)
    mean, var = population([*batches, *(batch + 1 for batch in batches)])
    np.testing.assert_allclose(layer.running_mean, mean, rtol=2e-7)
    np.testing.assert_allclose(layer.running_var, var, rtol=2e-7)


def test_a_pending_backward_keeps_its_forward():
    layer = BatchNorm(3)
    x, dy = batches_of((4,))[0], batches_of((4,))[0]
    layer(x)
    expected = layer.backward(dy)
    layer(x)
    recompute_statistics(layer, batches_of((4, 4)), [layer])
    np.testing.assert_array_equal(layer.backward(dy), expected)


def assert_nothing_changes(error, message, forward, batches, layers, **options):
    states = [layer.state_dict() for layer in layers]
    modes = [layer.training for layer in layers]
    with pytest.raises(error, match=message):
        recompute_statistics(forward, batches, layers, **options)
    for layer, state, mode in zip(layers, states, modes, strict=True):
        assert layer.training is mode
        assert layer._observer is None
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, state[name])


def test_nothing_changes_where_forward_fails():
    first, second = BatchNorm(3).eval(), BatchNorm(3)
    batches = batches_of((4, 4, 4))

    def forward(batch):
        second(first(batch))
        if batch is batches[-1]:
            raise OSError("the disk is full")

    assert_nothing_changes(OSError, "the disk is full", forward, batches, [first, second])


def test_nothing_changes_where_something_is_missing():
    first, second = BatchNorm(3).eval(), BatchNorm(3)
    batches = batches_of((4, 4))
    layers = [first, second]
    assert_nothing_changes(ValueError, "batches is empty", first, [], layers)
    unseen = r"layers\[{}\] saw no values; expected forward to call every layer"
    assert_nothing_changes(RuntimeError, unseen.format(1), first, batches, layers)
    empty = [np.empty((0, 3, 2, 2), np.float32)]
    assert_nothing_changes(RuntimeError, unseen.format(0), first, empty, [first])
    one = [np.ones((1, 3, 1, 1), np.float32)]
    assert_nothing_changes(ValueError, "more than 1 value per channel", first, one, [first])


def test_nothing_changes_where_progress_fails():
    def progress(done):
        raise KeyError(done)

    layer = BatchNorm(3).eval()
    assert_nothing_changes(KeyError, "1", layer, batches_of((4,)), [layer], progress=progress)


def test_no_layer_is_updated_where_memory_runs_out_at_another(monkeypatch):
    first, second = BatchNorm(3), BatchNorm(3)
    x = RNG.normal(size=(8, 3)).astype("f4")
    asked = []

    def var(self, ddof=0):
        asked.append(ddof)
        if len(asked) == 2:
            raise MemoryError
        return np.full(3, 5.0)

    monkeypatch.setattr(bnfast.Moments, "var", var)
    with pytest.raises(MemoryError):
        recompute_statistics(lambda batch: second(first(batch)), [x], [first, second])
    for layer in (first, second):
        assert not layer.running_mean.any()
        assert (layer.running_var == 1).all()
        assert layer.training


def test_bad_arguments_are_named():
    layer, batches = BatchNorm(3), batches_of((4,))
    for arguments, error, message in [
        ((None, batches, [layer]), TypeError, "forward is None; expected a callable"),
        ((layer, batches, layer), TypeError, "layers is of type BatchNorm; expected an iterable"),
        ((layer, batches, [layer.freeze()]), TypeError, r"layers\[0\] is of type FrozenBatchNorm"),
        (
            (layer, batches, [layer, BatchNorm(3, track_running_stats=False)]),
            RuntimeError,
            r"layers\[1\] has no running statistics",
        ),
    ]:
        with pytest.raises(error, match=message):
            recompute_statistics(*arguments)
    with pytest.raises(TypeError, match="progress is 3; expected True, False or a callable"):
        recompute_statistics(layer, batches, [layer], progress=3)
    layer.running_var.flags.writeable = False
    with pytest.raises(ValueError, match=r"layers\[0\]\.running_var is read-only"):
        recompute_statistics(layer, batches, [layer])


def test_batches_not_iterable():
    assert_nothing_changes(TypeError, "batches is of type int", BatchNorm(3), 3, [BatchNorm(3)])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros(4, np.float32), ValueError, r"has shape \(4,\); expected \(3,\)"),
        (np.zeros(1, np.float32), ValueError, r"has shape \(1,\); expected \(3,\)"),
        (np.zeros(3, int), TypeError, "has dtype int64; expected float32 or float64"),
        ([0.0, 0.0, 0.0], TypeError, "expected a NumPy array"),
        (np.ma.zeros(3), TypeError, "is a masked array"),
        (np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,)), ValueError, "share memory"),
    ],
)
def test_statistics_that_cannot_be_written_are_named_first(name, value, error, message):
    """And not after hours of batches."""
    layer = BatchNorm(3)
    setattr(layer, name, value)
    with pytest.raises(error, match=rf"layers\[0\]\.{name} .*{message}"):
        recompute_statistics(lambda batch: pytest.fail("ran"), batches_of((4,)), [layer])
    assert layer._observer is None


def test_nested_recomputation_refused():
    """The inner one would take the outer one's batches."""
    layer, other = BatchNorm(3).eval(), BatchNorm(3)

    def forward(batch):
        recompute_statistics(layer, [batch], [other, layer])

    assert_nothing_changes(
        RuntimeError, r"layers\[1\] is already being observed", forward, batches_of((4,)), [layer]
    )
    assert (other._observer, other.training) == (None, True)


def test_observing_ends_where_a_mode_cannot_be_restored():
    class Stubborn(BatchNorm):
        def train(self, mode=True):
            if not mode:
                raise OSError("no")
            return super().train(mode)

    first, second = Stubborn(3), BatchNorm(3)
    first.training = False
    with pytest.raises(OSError, match="no"):
        recompute_statistics(lambda x: second(first(x)), batches_of((4,)), [first, second])
    assert first._observer is second._observer is None


def test_without_layers_nothing_runs():
    recompute_statistics(lambda batch: pytest.fail("ran"), batches_of((4,)), [])


def test_progress(capsys):
    layer, batches, seen = BatchNorm(3), batches_of((4, 4, 4)), []
    recompute_statistics(layer, batches, [layer], progress=seen.append)
    assert seen == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    recompute_statistics(layer, batches, [layer], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\rrecompute_statistics: batch 3/3\n")
    recompute_statistics(layer, iter(batches), [layer], progress=True)
    assert capsys.readouterr().err.endswith("\rrecompute_statistics: batch 3\n")


# ---- conventions


@pytest.mark.parametrize("name", ["PYTORCH", "KERAS", "ONNX", "FLAX", "TENSORFLOW"])
def test_conventions_are_keywords_of_a_layer(name):
    convention = getattr(conventions, name)
    layer = BatchNorm(3, **convention)
    for key, value in convention.items():
        assert getattr(layer, key) == value
    with pytest.raises(TypeError):
        convention["eps"] = 1.0
