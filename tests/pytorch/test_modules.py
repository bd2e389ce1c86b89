"""The layers compared with the paper, PyTorch's own tests of its layers, and unusual tensors."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import reference
import tolerance
import torch
from cases import by_direction, make_problem
from layers import CLASSES, TENSORS, channels_last, leaf
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from wide import wide

import bnfast.torch
from bnfast import _core

DTYPES = {"float32": np.float32, "float64": np.float64}
ACTIVATIONS = (None, *_core.ACTIVATIONS, ("leaky_relu", 0.3))
NORMS = [info for info in module_db if info.name.startswith("nn.BatchNorm")]


def variant(activation, residual):
    name = activation[0] if isinstance(activation, tuple) else activation or ""
    return f"{name}+residual".lstrip("+") if residual else name or "plain"


def tensors_of(p, arrange):
    x, dy = (arrange(torch.from_numpy(a)) for a in (p.x, p.dy))
    residual = None if p.residual is None else arrange(torch.from_numpy(p.residual))
    return x, dy, residual


def layer_of(p, dtype):
    layer = CLASSES[p.x.ndim][1](p.channels, eps=p.eps, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(p.weight))
        layer.bias.copy_(torch.from_numpy(p.bias))
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TENSORS)
def test_values_and_gradients_as_reference(kind, dtype, activation, residual, training, ran):
    """The limits are `tolerance`'s, for the same kernels over arrays. PyTorch adds one rounding: of
    weight and bias gradients, from float64 to their type.
    """
    shape, arrange, layout = TENSORS[kind]
    p = make_problem(shape, DTYPES[dtype], activation=activation, residual=residual)
    layer = layer_of(p, getattr(torch, dtype)).train(training)
    if training:
        s = tolerance.batch_statistics(p.x, 1)
    else:
        s = tolerance.constants(layer.running_mean.numpy().copy(), layer.running_var.numpy().copy())
    tolerance.off_the_kinks(p, s)
    x, dy, r = tensors_of(p, arrange)
    x, r = leaf(x), None if r is None else leaf(r)

    y = layer(x, r, activation)
    assert ran() == {
        ("forward" if training else "inference", dtype, layout, variant(activation, residual)): 1
    }
    y.backward(dy)
    # The gradient of a sum is the gradient of each term, so no kernel computes it.
    masked = variant(activation, residual and activation is not None)
    assert ran() == {("backward", dtype, layout, masked): 1}

    assert y.stride() == CLASSES[x.dim()][0](p.channels, dtype=x.dtype)(x).stride()
    want = reference.inference(p.exact()[0], s.mean, s.var, *p.exact()[1:])
    tolerance.assert_within(y.detach().numpy(), want, tolerance.forward_bound(p, s), "y")
    exact = exact_gradients(p, s, training)
    bounds = tolerance.backward_bounds(p, s, exact, training)
    found = (x.grad, layer.weight.grad, layer.bias.grad, None if r is None else r.grad)
    for name, got, want, bound in zip(exact._fields, found, exact, bounds, strict=True):
        if got is not None:
            bound = bound + tolerance.unit(p.x.dtype) * np.abs(want)
            tolerance.assert_within(got.numpy(), want, bound, name)


def exact_gradients(p, s, training):
    dy = wide(p.dy)
    if training:
        return reference.backward(dy, *p.exact())
    return reference.inference_backward(dy, p.exact()[0], s.mean, s.var, *p.exact()[1:])


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_as_reference(dtype, momentum, ran):
    layer = CLASSES[4][1](5, momentum=momentum, dtype=getattr(torch, dtype))
    for batch in range(3):
        p = make_problem((4, 5, 3, 6), DTYPES[dtype], seed=batch)
        s, m = tolerance.batch_statistics(p.x, 1), p.m
        factor = 1 / (batch + 1) if momentum is None else momentum
        old = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
        layer(torch.from_numpy(p.x))
        new = (s.mean, s.mean_error), (s.var * m / (m - 1), s.var_error * m / (m - 1))
        for before, after, (batch_value, error) in zip(
            old, (layer.running_mean, layer.running_var), new, strict=True
        ):
            want = reference.running_average(wide(before), batch_value, factor)
            bound = tolerance.running_bound(before, batch_value, error, factor, DTYPES[dtype])
            tolerance.assert_within(after.numpy(), want, bound)
        assert layer.num_batches_tracked == batch + 1
        assert ran() == {("forward", dtype, "planar", "plain"): 1}


# ---- PyTorch's own tests of its batch norms


def samples(info, dtype, training):
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["of the same name", "SyncBatchNorm"])
@pytest.mark.parametrize("info", NORMS, ids=lambda info: info.name)
def test_pytorch_module_inputs(info, name, dtype, training, ran):
    """Two programs compute one formula, so use assert_close's tolerances of PyTorch's tests.

    `SyncBatchNorm` is a plain layer here, without a process group.
    """
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    kind = getattr(bnfast.torch, name if name in dir(bnfast.torch) else info.module_cls.__name__)
    for sample in samples(info, dtype, training):
        args, options = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **options, dtype=parameters).train(training)
        ours = kind(*args, **options, dtype=parameters)
        ours.load_state_dict(theirs.state_dict())
        ours.train(training)
        x = sample.forward_input.args[0]
        mine = leaf(x)
        want, got = theirs(x), ours(mine)
        dy = torch.randn_like(want)
        want.backward(dy)
        got.backward(dy)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(mine.grad, x.grad)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        assert repr(ours).partition("(")[2] == repr(theirs).partition("(")[2]
        of_batch = training or not theirs.track_running_stats
        directions = {"forward" if of_batch else "inference", "backward"} if x.numel() else set()
        seen = (str(dtype).removeprefix("torch."), "interleaved" if x.dim() == 2 else "planar")
        assert ran() == {(direction, *seen, "plain"): 1 for direction in directions}


@pytest.mark.parametrize("info", NORMS, ids=lambda info: info.name)
def test_pytorch_module_errors(info):
    if info.module_error_inputs_func is None:
        pytest.skip("this PyTorch has none")
    found = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert found
    for error in found:
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
        sample = error.module_error_input
        args, options = sample.constructor_input.args, sample.constructor_input.kwargs
        layer = getattr(bnfast.torch, info.module_cls.__name__)(*args, **options)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*sample.forward_input.args)


@pytest.mark.parametrize("rank", CLASSES)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 5, 3), (2, 5, 3, 3), (2, 5, 3, 3, 3), (4, 6)])
def test_shapes_are_refused_as_pytorch_refuses_them(rank, shape, ran):
    theirs, ours = (kind(5) for kind in CLASSES[rank])
    x = torch.randn(shape)
    try:
        theirs(x)
    except (ValueError, RuntimeError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            ours(x)
        assert not ran()
    else:
        torch.testing.assert_close(ours(x), theirs(x))
        assert by_direction(ran()) == {"forward": 1}


def test_a_refused_batch_is_not_counted():
    layer = bnfast.torch.BatchNorm2d(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 3, 1, 1))
    assert all(torch.equal(a, before[name]) for name, a in layer.state_dict().items())


# ---- Modules compared with PyTorch's


def test_state_dict_both_ways_and_pickling(ran):
    theirs, ours = nn.BatchNorm2d(3), bnfast.torch.BatchNorm2d(3)
    theirs(torch.randn(4, 3, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    ours(torch.randn(4, 3, 2, 2))
    theirs.load_state_dict(ours.state_dict())
    assert by_direction(ran()) == {"forward": 1}
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for layer in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert type(layer) is type(ours)
        assert isinstance(layer, nn.BatchNorm2d)
        for name, value in theirs.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value)


def test_hooks_run(ran):
    layer, seen = bnfast.torch.BatchNorm2d(3), []
    layer.register_forward_pre_hook(lambda *a: seen.append("before"))
    layer.register_forward_hook(lambda *a: seen.append("after"))
    layer.register_full_backward_hook(lambda *a: seen.append("backward"))
    layer(torch.randn(4, 3, 2, 2, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    assert len(ran()) == 2


# ---- Unusual tensors


def check_alike(layer, call):
    theirs = copy.deepcopy(layer)
    bnfast.torch.revert(theirs)
    got, want = call(layer), call(theirs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer.state_dict(), theirs.state_dict())


def test_meta_tensors():
    layer = bnfast.torch.BatchNorm2d(3, device="meta")
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).device.type == "meta"


def test_fake_tensors_keep_their_strides():
    x = channels_last(torch.randn(2, 3, 4, 4))
    layer = bnfast.torch.BatchNorm2d(3)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
    assert y.shape == x.shape
    assert y.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_functorch(training):
    x = torch.randn(5, 4, 3, 2, 2)
    layer = bnfast.torch.BatchNorm2d(3, track_running_stats=not training).train(training)

    def vmapped(layer):
        return torch.func.vmap(layer)(x)

    def gradient(layer):
        return torch.func.grad(lambda x: layer(x).square().sum())(x[0])

    def forward_mode(layer):
        return torch.func.jvp(layer, (x[0],), (x[1],))

    for call in (vmapped, gradient, forward_mode):
        check_alike(layer, call)


def test_forward_mode():
    from torch.autograd import forward_ad

    x, tangent = torch.randn(2, 4, 3, 2, 2)

    def derivative(layer):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent

    check_alike(bnfast.torch.BatchNorm2d(3), derivative)


def test_other_types_and_devices():
    x = torch.randn(4, 3, 2, 2)
    layer = bnfast.torch.BatchNorm2d(3)
    check_alike(layer, lambda layer: layer(torch._neg_view(x)))

    class Tagged(torch.Tensor):
        pass

    check_alike(layer, lambda layer: layer(x.as_subclass(Tagged)))
    assert isinstance(layer(x.as_subclass(Tagged)), Tagged)
    empty = torch.randn(0, 3, 2, 2)
    check_alike(layer, lambda layer: layer(empty))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_activations_without_fused_operator(training, activation, ran):
    x, residual = torch.randn(2, 4, 3, 2, 2)
    layer = bnfast.torch.BatchNorm2d(3).train(training)
    want = copy.deepcopy(layer)(-x, residual, activation)
    assert [v for *_, v in ran()] == [variant(activation, True)]
    torch.testing.assert_close(layer(torch._neg_view(x), residual, activation), want)
    assert [v for *_, v in ran()] == ["plain"]


def test_traced_by_jit():
    layer = bnfast.torch.BatchNorm2d(3).eval()
    x = torch.randn(4, 3, 2, 2)
    traced = torch.jit.trace(layer, x)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(2 * x), layer(2 * x))


def test_mixed_residuals_are_added_by_pytorch(ran):
    layer = bnfast.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2)
    for residual in (torch.randn(4, 1, 2, 2), x.double()):
        want = copy.deepcopy(layer)(x) + residual
        ran()
        got = layer(x, residual)
        assert [v for *_, v in ran()] == ["plain"]
        torch.testing.assert_close(got, want)


# ---- Possible types of a residual and an activation


class Ways:
    """Situations in which the single operator does not run."""

    eager = staticmethod(lambda layer: layer)
    compiled = staticmethod(lambda layer: torch.compile(layer, backend="aot_eager"))
    negative = staticmethod(lambda layer: lambda x, *rest: layer(torch._neg_view(x), *rest))


@pytest.mark.parametrize("way", ["eager", "compiled", "negative"])
@pytest.mark.parametrize("given", ["mish", ("leaky_relu", 2.0), ("leaky_relu",), 3, ("relu", 1)])
def test_unknown_activations_are_refused(given, way):
    torch._dynamo.reset()
    layer = bnfast.torch.BatchNorm2d(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((ValueError, TypeError), match="activation"):
        getattr(Ways, way)(layer)(torch.randn(4, 3, 2, 2), None, given)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (2, 4, 3, 2, 2), (3,)])
def test_a_residual_that_does_not_fit_is_refused(shape):
    layer = bnfast.torch.BatchNorm2d(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"residual has shape .*; expected that of input, \(4, 3"):
        layer(torch.randn(4, 3, 2, 2), torch.randn(shape))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
