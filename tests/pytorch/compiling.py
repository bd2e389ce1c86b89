"""Models compiled by the backend, each compared with itself uncompiled."""

import copy
import inspect
from functools import partial

import torch
import torch.nn.functional as F
from layers import channels_last, dense
from torch import nn

import bnfast.torch
from bnfast import _core

FORMATS = {"NCHW": dense, "channels_last": channels_last}


def compile_copy(model, **options):
    """Return a copy of a model, compiled, and the copy itself."""
    ours = copy.deepcopy(model)
    options = {"fullgraph": True, **options}
    return torch.compile(ours, backend=bnfast.torch.backend, **options), ours


def step(model, x):
    """One forward and backward: y, and the gradients of x and all parameters."""
    x = x.detach().clone().requires_grad_()
    for p in model.parameters():
        p.grad = None
    y = model(x)
    (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
            assert a.stride() == b.stride()


def assert_same_steps(model, x, steps=2, **options):
    """Compare a compiled model with the plain one: steps in training, then evaluation."""
    faster, ours = compile_copy(model, **options)
    for training in (True, False, True):
        model.train(training)
        ours.train(training)
        for _ in range(steps):
            assert_same(step(faster, x), step(model, x))
            assert_same(list(ours.buffers()), list(model.buffers()))
        with torch.no_grad():
            assert_same([faster(x)], [model(x)])
            assert_same(list(ours.buffers()), list(model.buffers()))
    with torch.inference_mode():
        model.eval()
        ours.eval()
        assert_same([faster(x)], [model(x)])


class Residual(nn.Module):
    def __init__(self, activation=None, swap=False, **options):
        super().__init__()
        self.norm = nn.BatchNorm2d(5, **options)
        self.activation = activation or nn.Identity()
        self.swap = swap

    def forward(self, x):
        y = self.norm(x * 1.5)
        return self.activation(x + y if self.swap else y + x)


def module_of(name):
    """PyTorch's module for an activation of the list, with another slope than the usual one."""
    (kind,) = (
        k for k in vars(nn).values() if getattr(k, "__name__", "").lower() == name.replace("_", "")
    )
    if "inplace" not in inspect.signature(kind).parameters:
        return lambda inplace=False: InPlace(name) if inplace else kind()
    return partial(kind, 0.2) if _core.ACTIVATIONS[name].slope else kind


class InPlace(nn.Module):
    """An activation whose module has no such option."""

    def __init__(self, name):
        super().__init__()
        self.operator = getattr(torch.ops.aten, f"{name}_")

    def forward(self, z):
        return self.operator(z)


ACTIVATIONS = {name: module_of(name) for name in _core.ACTIVATIONS}


def images(memory=dense):
    return memory(torch.randn(4, 5, 3, 6, dtype=torch.float64))


class ReadsBetween(nn.Module):
    """The output of the batch norm has a second reader."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        y = self.norm(x)
        return F.relu(y) + y.sin()


def recorded(function):
    with torch.profiler.profile() as profile:
        function()
    return [event.name for event in profile.events()]
