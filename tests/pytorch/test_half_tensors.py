"""float16 and bfloat16 tensors with float32 parameters, and models under autocast."""

import pytest
import torch

import bnfast.torch
from bnfast import _core

SHAPE = (4, 16, 5, 7)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
LAYOUT = pytest.mark.parametrize(
    ("memory_format", "layout"),
    [(torch.contiguous_format, "planar"), (torch.channels_last, "interleaved")],
    ids=["contiguous", "channels_last"],
)


def pair(dtype, memory_format):
    """PyTorch's layer and ours with the same state, and the same input for each."""
    torch.manual_seed(0)
    theirs, ours = torch.nn.BatchNorm2d(SHAPE[1]), bnfast.torch.BatchNorm2d(SHAPE[1])
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(SHAPE).to(dtype).to(memory_format=memory_format)
    return [
        (m, x.clone(memory_format=torch.preserve_format).requires_grad_()) for m in (theirs, ours)
    ]


def close(got, expected, dtype, sums=1):
    """Compare two results that were rounded to the half type from one float32 result each, so they
    differ by at most one unit in the last place. Sums of many such gradients, in float32, differ
    by their order of additions.
    """
    torch.testing.assert_close(
        got.float(), expected.float(), rtol=torch.finfo(dtype).eps * sums, atol=1e-5
    )


def kinds():
    """Direction, data type and layout of the kernels that ran."""
    return {key[:3] for key in _core.dispatches()}


@HALF
@LAYOUT
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_pytorch(dtype, memory_format, layout, training):
    (theirs, x), (ours, x_ours) = pair(dtype, memory_format)
    theirs.train(training), ours.train(training)
    dy = torch.randn(SHAPE).to(dtype).to(memory_format=memory_format)
    expected = theirs(x)
    expected.backward(dy)
    _core.reset_dispatches()
    y = ours(x_ours)
    y.backward(dy)
    name = str(dtype).removeprefix("torch.")
    forward = "forward" if training else "inference"
    assert kinds() == {(forward, name, layout), ("backward", name, layout)}
    assert y.dtype == x_ours.grad.dtype == dtype
    assert y.stride() == expected.stride()
    assert ours.weight.grad.dtype == torch.float32
    close(y, expected, dtype)
    close(x_ours.grad, x.grad, dtype)
    close(ours.weight.grad, theirs.weight.grad, torch.float32, sums=100)
    close(ours.running_var, theirs.running_var, torch.float32, sums=10)


def test_autocast_reaches_the_kernels():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    bnfast.torch.convert(model)
    _core.reset_dispatches()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert kinds() == {("forward", "bfloat16", "planar"), ("backward", "bfloat16", "planar")}
    assert model[1].weight.grad.dtype == torch.float32
    assert model[1].weight.grad.abs().max() > 0
