"""With `enable()`: values, gradients, running statistics and strides of PyTorch's operators."""

import itertools

import numpy as np
import pytest
import reference
import tolerance
import torch
import torch.nn.functional as F
from cases import make_problem
from layers import TENSORS, channels_last, gappy, leaf
from test_result_strides import INPUTS, REORDERED
from wide import wide

import bnfast.torch

aten = torch.ops.aten
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
DTYPES = {"float32": np.float32, "float64": np.float64}
HALVES = [torch.float16, torch.bfloat16]
MASKS = list(itertools.product([True, False], repeat=3))
SHAPE = (4, 6, 3, 5)
RAN = {True: {"training": 1}, False: {"evaluation": 1}}


def plain(operator, *args):
    """The result of PyTorch's own kernel."""
    before = bnfast.torch.is_enabled()
    bnfast.torch.disable()
    try:
        return operator(*args)
    finally:
        if before:
            bnfast.torch.enable()


def vectors(channels, dtype):
    """Weight, bias, running mean and running variance."""
    weight, bias, mean = torch.randn(3, channels, dtype=torch.float64).to(dtype)
    return weight, bias, mean, (torch.rand(channels, dtype=torch.float64) + 0.5).to(dtype)


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TENSORS)
def test_values_and_gradients_as_reference(kind, dtype, training, calls):
    """The limits are `tolerance`'s, for the same kernels over arrays."""
    shape, arrange, _ = TENSORS[kind]
    p = make_problem(shape, DTYPES[dtype])
    weight, bias, mean, var = vectors(p.channels, getattr(torch, dtype))
    weight, bias = torch.from_numpy(p.weight).clone(), torch.from_numpy(p.bias).clone()
    weight.requires_grad_(), bias.requires_grad_()
    old = mean.numpy().copy(), var.numpy().copy()
    s = tolerance.batch_statistics(p.x, 1) if training else tolerance.constants(*old)
    x, dy = leaf(arrange(torch.from_numpy(p.x))), arrange(torch.from_numpy(p.dy))

    y = F.batch_norm(x, mean, var, weight, bias, training, 0.25, p.eps)
    y.backward(dy)
    assert calls() == ({**RAN[training], "backward": 1}, {})

    want = reference.inference(p.exact()[0], s.mean, s.var, *p.exact()[1:])
    tolerance.assert_within(y.detach().numpy(), want, tolerance.forward_bound(p, s), "y")
    exact = exact_gradients(p, s, training)
    bounds = tolerance.backward_bounds(p, s, exact, training)
    found = (x.grad, weight.grad, bias.grad)
    for name, got, want, bound in zip(exact._fields, found, exact, bounds, strict=False):
        bound = bound + tolerance.unit(p.x.dtype) * np.abs(want)
        tolerance.assert_within(got.numpy(), want, bound, name)
    check_running((mean, var), old, s, p, training)


def exact_gradients(p, s, training):
    dy = wide(p.dy)
    if training:
        return reference.backward(dy, *p.exact())
    return reference.inference_backward(dy, p.exact()[0], s.mean, s.var, *p.exact()[1:])


def check_running(found, old, s, p, training):
    if not training:
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, old, strict=True))
        return
    unbiased = p.m / (p.m - 1)
    new = (s.mean, s.mean_error), (s.var * unbiased, s.var_error * unbiased)
    for before, after, (value, error) in zip(old, found, new, strict=True):
        want = reference.running_average(wide(before), value, 0.25)
        bound = tolerance.running_bound(before, value, error, 0.25, p.x.dtype)
        tolerance.assert_within(after.numpy(), want, bound)


def assert_alike(found, expected, bound):
    """Compare two tensors of one type, shape and memory order, relative to the largest value."""
    if expected is None:
        assert found is None
        return
    assert (found.dtype, found.shape, found.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    if expected.numel():
        largest = expected.double().abs().max().item()
        torch.testing.assert_close(
            found, expected, rtol=0, atol=bound * max(largest, 1), equal_nan=True
        )


GIVEN = ["all", "no affine", "no weight", "no bias"]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("given", "training"),
    # Evaluation without statistics crashes in PyTorch's kernel.
    [("no statistics", True), *itertools.product(GIVEN, [True, False])],
)
@pytest.mark.parametrize("name", ["NCHW", "NHWC", "(N, C)", "NHWC with gaps"])
def test_operators_as_pytorch(name, given, mask, training, calls):
    """In float64, where a sum of m terms is right to m units of roundoff, in both."""
    x = INPUTS[name].double()
    weight, bias, *running = vectors(x.shape[1], torch.float64)
    weight = None if given in ("no affine", "no weight") else weight
    bias = None if given in ("no affine", "no bias") else bias
    running = [None, None] if given == "no statistics" else running
    dy = torch.randn_like(x)
    bound = 16 * x.numel() / x.shape[1] * torch.finfo(torch.float64).eps

    def both(x):
        moved = [None if r is None else r.clone() for r in running]
        forward = aten.native_batch_norm(x, weight, bias, *moved, training, 0.1, 1e-5)
        backward = aten.native_batch_norm_backward(
            dy, x, weight, *moved, *forward[1:], training, 1e-5, mask
        )
        return [*forward, *backward, *moved]

    found = both(x)
    assert calls() == ({**RAN[training], "backward": 1}, {})
    for ours, theirs in zip(found, plain(both, x), strict=True):
        assert_alike(ours, theirs, bound)


@TRAINING
@pytest.mark.parametrize("params", ["half", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, gappy])
def test_halves(arrange, dtype, params, training, calls):
    """The float64 result, rounded once: half a unit in the last place, and float32's error."""
    kind = dtype if params == "half" else torch.float32
    x, dy = arrange(torch.randn(SHAPE).to(dtype)), arrange(torch.randn(SHAPE).to(dtype))
    weight, bias, *running = vectors(SHAPE[1], kind)

    def both(x, dy, *params):
        weight, bias, *moved = (p.clone() for p in params)
        forward = aten.native_batch_norm(x, weight, bias, *moved, training, 0.1, 1e-5)
        backward = aten.native_batch_norm_backward(
            dy, x, weight, *moved, *forward[1:], training, 1e-5, [True, True, True]
        )
        return [*forward, *backward, *moved]

    found = both(x, dy, weight, bias, *running)
    assert calls() == ({**RAN[training], "backward": 1}, {})
    params = [p.double() for p in (weight, bias, *running)]
    exact = plain(both, x.double(), dy.double(), *params)
    theirs = plain(both, x, dy, weight, bias, *running)
    for ours, want, like in zip(found, exact, theirs, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (like.dtype, like.shape, like.stride())
        largest = want.abs().max().item() if want.numel() else 0
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(
            ours.double(), want, rtol=eps / 2 * 1.01, atol=(1e-5 if eps > 1e-6 else 1e-6) * largest
        )


@TRAINING
@pytest.mark.parametrize("name", [*INPUTS, *REORDERED])
def test_result_strides_as_pytorch(name, training, calls):
    x = (INPUTS | REORDERED)[name]
    dy = torch.randn(x.shape)
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])

    def both(x):
        y = F.batch_norm(x, mean.clone(), var.clone(), training=training)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y, dx

    def fresh():
        return x.detach().requires_grad_()

    found = both(fresh())
    assert calls() == ({**RAN[training], "backward": 1}, {})
    for ours, theirs in zip(found, plain(both, fresh()), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_result_strides_with_axes_of_length_one(dim, calls):
    """Where the memory order is ambiguous: every order, every axis of length one."""

    def both(x, dy):
        y = aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
        return y[0], aten.native_batch_norm_backward(
            dy, x, None, None, None, *y[1:], True, 1e-5, [True, False, False]
        )[0]

    orders = list(itertools.permutations(range(dim)))
    for ones in itertools.product([1, 3], repeat=dim):
        for order in orders[:: max(1, len(orders) // 30)]:
            places = [order.index(axis) for axis in range(dim)]
            x = torch.randn([ones[axis] for axis in order]).permute(places)
            for dy in (x, x.contiguous(), torch.ones(()).expand(x.shape)):
                for ours, theirs in zip(both(x, dy), plain(both, x, dy), strict=True):
                    assert ours.stride() == theirs.stride(), (x.shape, x.stride(), dy.stride())
    assert calls()[1].keys() == {"bnfast was not enabled"}


def normalized(x):
    return F.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize("arrange", [torch.clone, channels_last, gappy])
def test_gradients_in_another_order_than_the_input(arrange, calls):
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    for dy in (arrange(torch.randn(SHAPE, dtype=torch.float64)), torch.ones(()).expand(SHAPE)):
        for data in (x, channels_last(x.detach()).requires_grad_()):
            (got,) = torch.autograd.grad(normalized(data), data, dy.double())
            (want,) = plain(torch.autograd.grad, plain(normalized, data), data, dy.double())
            torch.testing.assert_close(got, want)
            assert got.stride() == want.stride()
    assert calls()[0] == {"training": 4, "backward": 4}


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_as_pytorch(training, calls):
    x = torch.randn(0, 3, 2, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    y = F.batch_norm(x, mean, var, training=training)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]
    assert calls()[0] == {}


@pytest.mark.parametrize("order", [1, 2])
@TRAINING
@pytest.mark.parametrize("arrange", [torch.clone, channels_last])
def test_gradients_of_every_order(arrange, training, order, calls):
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    x = arrange(torch.randn(3, 2, 2, 2, dtype=torch.float64)).requires_grad_()
    weight, bias, mean, var = vectors(2, torch.float64)

    def f(x, weight, bias):
        return F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    assert check(f, (x, weight.requires_grad_(), bias.requires_grad_()))
    ran, left = calls()
    assert ran["backward"] > 0
    assert left == {}


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_state_as_pytorch(dtype, momentum, calls):
    ours = torch.nn.BatchNorm2d(6, momentum=momentum, dtype=dtype)
    theirs = torch.nn.BatchNorm2d(6, momentum=momentum, dtype=dtype)
    for _ in range(3):
        x = torch.randn(SHAPE, dtype=dtype)
        ours(x)
        plain(theirs, x)
    for name, want in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], want)
    assert calls()[0] == {"training": 3}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_runs_here(training, track, calls):
    ours = torch.nn.InstanceNorm2d(6, affine=True, track_running_stats=track).train(training)
    x = torch.randn(SHAPE, requires_grad=True)
    y = ours(x)
    y.backward(torch.ones_like(y))
    by_batch = training or not track
    assert calls() == ({"training" if by_batch else "evaluation": 1, "backward": 1}, {})
    state = {name: t.clone() for name, t in ours.state_dict().items()}
    ours.reset_running_stats()
    torch.testing.assert_close(y, plain(ours, x))
    for name, want in ours.state_dict().items():
        torch.testing.assert_close(state[name], want)


def test_gradient_digits_at_large_mean(calls):
    """PyTorch's backward has the mean in float32: of 1e6 it keeps a sixteenth."""
    x = torch.randn(64, 3, 4, 4) + 1e6
    dy = torch.randn(x.shape)

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, dy.to(x.dtype))[0]

    exact = plain(gradient, x.double())

    def error(got):
        return ((got.double() - exact).abs().max() / exact.abs().max()).item()

    assert error(gradient(x)) < 1e-6
    assert error(plain(gradient, x)) > 1e-5


@pytest.mark.parametrize("arrange", [torch.clone, channels_last])
def test_pytorch_thread_count_changes_no_bit(arrange, calls):
    x = arrange(torch.randn(16, 64, 28, 28)).requires_grad_()
    dy = torch.randn(x.shape)

    def step():
        y = F.batch_norm(x, None, None, training=True)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = step()
        torch.set_num_threads(3)
        three = step()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, three))


def test_flushed_denormals_change_no_bit(calls):
    x, dy = torch.randn(2, *SHAPE)
    weight = torch.full(SHAPE[1:2], 1e-39)

    def step():
        y, *saved = aten.native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
        return y, *aten.native_batch_norm_backward(
            dy, x, weight, None, None, *saved, True, 1e-5, [True, True, True]
        )

    want = step()
    assert torch.set_flush_denormal(True)
    try:
        got = step()
    finally:
        torch.set_flush_denormal(False)
    assert all(map(torch.equal, got, want))
    assert 0 < want[0].abs().max() < torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("given", [0, 1], ids=["mean", "variance"])
def test_single_running_statistic_is_refused_as_by_pytorch(given):
    x = torch.randn(SHAPE, dtype=torch.float64)
    running = [None, None]
    running[given] = torch.ones(SHAPE[1], dtype=x.dtype)
    with pytest.raises((RuntimeError, ValueError), match="must either both be None or neither"):
        aten.native_batch_norm(x, None, None, *running, True, 0.1, 1e-5)
    assert torch.equal(running[given], torch.ones_like(running[given]))
