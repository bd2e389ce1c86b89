"""First, second and third derivatives, their kernels, and misuse that must raise."""

import copy

import pytest
import torch
from cases import by_direction
from layers import dense
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import bnfast.torch
from bnfast import _core

ACTIVATIONS = [None, *_core.ACTIVATIONS, ("leaky_relu", 0.2)]


def layer_and_inputs(training, residual, shape=(4, 3, 2, 2)):
    layer = bnfast.torch.BatchNorm2d(3, dtype=torch.float64).train(training)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x, r = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    given = (x, weight, bias, r if residual else None)
    return layer, tuple(None if t is None else t.requires_grad_() for t in given)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_first_and_second_derivatives(training, activation, residual, ran):
    layer, inputs = layer_and_inputs(training, residual)

    def call(x, weight, bias, residual):
        parameters = {"weight": weight, "bias": bias}
        return functional_call(layer, parameters, (x, residual, activation))

    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)
    assert {direction for direction, *_ in ran()} >= {"backward"}


def test_third_derivatives(ran):
    """In evaluation: PyTorch's own third derivatives in training are wrong, with and without
    bnfast.
    """
    layer, (x, weight, bias, _) = layer_and_inputs(False, False)

    def second(x, weight, bias):
        y = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        first = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), x, create_graph=True)

    torch.autograd.gradcheck(second, (x, weight, bias))
    assert set(by_direction(ran())) == {"inference", "backward"}


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
def test_only_what_is_needed_is_computed(needed, ran):
    layer, (x, _, _, residual) = layer_and_inputs(True, True)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias, "residual": residual}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needed)
    y = layer(x, residual, "relu")
    y.sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    assert sum(times for (d, *_), times in ran().items() if d == "backward") == 1


def test_nothing_saved_without_gradients(ran):
    layer = bnfast.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert sum(ran().values()) == 2


def test_an_expanded_gradient_is_read(ran):
    theirs = nn.BatchNorm2d(3)
    ours = bnfast.torch.convert(copy.deepcopy(theirs))
    weights = torch.arange(3.0).view(1, 3, 1, 1).expand(4, 3, 2, 2)
    x = torch.randn(4, 3, 2, 2)
    for layer in (theirs, ours):
        layer(x).backward(weights)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert [d for d, *_ in ran()] == ["forward", "backward"]


def test_jacobian_by_vmap(ran):
    layer, (x, *_) = layer_and_inputs(True, False)
    rows = torch.autograd.functional.jacobian(layer, x)
    assert by_direction(ran()) == {"forward": 1, "backward": x.numel()}
    at_once = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    assert by_direction(ran()) == {"forward": 1, "backward": x.numel()}
    torch.testing.assert_close(at_once, rows)


# ---- Misuse


def test_changed_input_raises(ran):
    layer = bnfast.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True) * 1
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert by_direction(ran()) == {"forward": 1}


def test_changed_parameter_raises(ran):
    layer = bnfast.torch.BatchNorm2d(3)
    y = layer(torch.randn(4, 3, 2, 2, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert by_direction(ran()) == {"forward": 1}


def test_changed_output_used_for_mask_raises(ran):
    layer = bnfast.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = layer(x, torch.ones_like(x), "relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert by_direction(ran()) == {"forward": 1}


def test_unneeded_output_may_be_changed(ran):
    layer, (x, *_) = layer_and_inputs(True, False)
    want = torch.autograd.grad(layer(x, None, "relu").sum(), x)
    y = layer(x, None, "relu")
    y.add_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want[0])
    assert by_direction(ran()) == {"forward": 2, "backward": 2}


def test_second_backward_without_retain_graph_raises(ran):
    y = bnfast.torch.BatchNorm2d(3)(torch.randn(4, 3, 2, 2))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()
    assert by_direction(ran()) == {"forward": 1, "backward": 1}


def test_running_statistics_changed_before_backward(ran):
    """The gradient belongs to the forward, whose statistics were constants.

    With an activation. Without one the layer is PyTorch's, which reads the changed statistics.
    """
    layer, (x, *_) = layer_and_inputs(False, False)
    want = torch.autograd.grad(layer(x, None, "relu").square().sum(), x)[0]
    y = layer(x, None, "relu")
    layer.train()(5 * x)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], want)
    assert by_direction(ran()) == {"inference": 2, "forward": 1, "backward": 2}


# ---- Checkpointing


def test_checkpointed_batch_counted_once(ran):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    plain = bnfast.torch.BatchNorm2d(3)
    layers = [copy.deepcopy(plain) for _ in range(3)]
    plain(x).square().sum().backward()
    want, x.grad = x.grad, None

    contexts = bnfast.torch.checkpoint_contexts
    y = checkpoint(layers[0], x, use_reentrant=False, context_fn=contexts)
    y.square().sum().backward()
    assert torch.equal(x.grad, want)
    assert by_direction(ran()) == {"forward": 3, "backward": 2}
    for name, value in plain.state_dict().items():
        assert torch.equal(layers[0].state_dict()[name], value)

    checkpoint(layers[1], x, use_reentrant=False).square().sum().backward()
    moved = torch.equal(layers[1].running_mean, plain.running_mean)
    assert not moved, "the test shows nothing: nobody counts twice"


def test_paused_statistics_do_not_move(ran):
    x = torch.randn(4, 3, 2, 2)
    layer = bnfast.torch.BatchNorm2d(3)
    before = copy.deepcopy(layer.state_dict())
    want = copy.deepcopy(layer)(x)
    with bnfast.torch.paused_statistics():
        assert torch.equal(layer(x), want)
        assert layer(x[:0]).shape == (0, 3, 2, 2)  # PyTorch's forward
    assert by_direction(ran()) == {"forward": 2}
    assert all(torch.equal(a, before[name]) for name, a in layer.state_dict().items())
    layer(dense(x))
    assert layer.num_batches_tracked == 1
