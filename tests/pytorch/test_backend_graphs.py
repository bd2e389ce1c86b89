"""Gradients, statistics and operators of the graphs that the backend makes; refused options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compiling import (
    ReadsBetween,
    Residual,
    assert_same,
    assert_same_steps,
    compile_copy,
    images,
    recorded,
    step,
)
from torch import nn

import bnfast.torch

pytestmark = pytest.mark.usefixtures("fresh")


class Shared(nn.Module):
    """One batch norm, called twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        y = F.relu(self.norm(x))
        return F.relu(self.norm(y.sin()) + x)


class SharedInOneSum(Shared):
    """The first call's sum needs the second call, which needs the first's statistics."""

    def forward(self, x):
        return F.relu(self.norm(x) + self.norm(x.sin()))


class LooksAtStatistics(Shared):
    def forward(self, x):
        before = self.norm.running_mean.sum()
        y = F.relu(self.norm(x))
        return y * before + self.norm.running_var.sum()


class ChangesStatistics(Shared):
    def forward(self, x):
        self.norm.running_mean.mul_(0.5)
        return F.relu(self.norm(x))


@pytest.mark.parametrize("kind", [Shared, SharedInOneSum, LooksAtStatistics, ChangesStatistics])
def test_statistics(kind):
    assert_same_steps(kind().double(), images())


def test_statistics_move_in_place():
    """No copies of statistics, and one call for all counters."""
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)).double()
    faster, _ = compile_copy(model)
    faster(images())
    calls = recorded(lambda: faster(images()))
    assert calls.count("bnfast::batch_norm_act") == 2
    assert calls.count("aten::_foreach_add_") == 1
    assert not {"aten::copy_", "aten::clone"} & set(calls)


def test_one_operator_forward_and_backward():
    model = Residual(nn.ReLU(inplace=True)).double()
    faster, _ = compile_copy(model)
    x = images().requires_grad_()
    faster(x).sum().backward()
    calls = recorded(lambda: faster(x).sum().backward())
    assert calls.count("bnfast::batch_norm_act") == 1
    assert calls.count("bnfast::batch_norm_act_backward") == 1


def test_unfused_activations_are_in_place():
    """Values that are no longer read are overwritten, as in the model."""
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5)).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    faster, _ = compile_copy(model)
    with torch.no_grad():
        assert_same([faster(x)], [model(x)])
        calls = recorded(lambda: faster(x))
    assert "aten::relu_" in calls
    assert "aten::relu" not in calls


class ReadsTwice(nn.Module):
    """A value, its activation, and its sum with itself are all read."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        y = self.linear(x)
        z = F.relu(y) + y
        return z + z


def test_values_read_again_are_not_overwritten():
    x = torch.randn(7, 5, dtype=torch.float64)
    assert_same_steps(ReadsTwice().double(), x, steps=1)


@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_some_gradients(frozen):
    model = Residual(nn.ReLU()).double()
    model.requires_grad_(frozen != "parameters")
    faster, ours = compile_copy(model)
    for training in (True, False):
        model.train(training)
        ours.train(training)
        x = [images().requires_grad_(frozen != "x")]
        x.append(x[0].detach().clone().requires_grad_(frozen != "x"))
        for f, a in zip((faster, model), x, strict=True):
            f(a).square().sum().backward()
        assert_same([x[0].grad], [x[1].grad])
        assert_same([p.grad for p in ours.parameters()], [p.grad for p in model.parameters()])


def test_only_residual_requires_grad():
    """Only the added tensor is differentiated."""
    norm = nn.BatchNorm2d(5, affine=False).double()
    other = copy.deepcopy(norm)

    def function(norm, x, r):
        return F.leaky_relu(norm(x) + r, 0.2)

    faster = torch.compile(function, backend=bnfast.torch.backend, fullgraph=True)
    x, r = images(), images().requires_grad_()
    (theirs,) = torch.autograd.grad(function(norm, x, r).square().sum(), r)
    (ours,) = torch.autograd.grad(faster(other, x, r).square().sum(), r)
    assert_same([ours], [theirs])


def test_same_input_as_residual():
    """The gradient of x comes from both paths."""

    class Own(ReadsBetween):
        def forward(self, x):
            return F.relu(self.norm(x) + x)

    assert_same_steps(Own().double(), images())


@pytest.mark.parametrize("training", [True, False])
def test_statistics_with_gaps(training, fused):
    """Left to PyTorch, with the reason."""

    def norm():
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).double().train(training)
        model[0].running_mean = torch.randn(10, dtype=torch.float64)[::2]
        return model

    ours, model = norm(), norm()
    x = images()
    faster = torch.compile(ours, backend=bnfast.torch.backend)
    assert_same(step(faster, x), step(model, x))
    assert_same(list(ours.buffers()), list(model.buffers()))
    assert fused() == ({}, {"parameters of another shape, or with gaps": 1})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)], ids=str)
def test_empty_batch(shape, training):
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).double().train(training)
    faster, ours = compile_copy(model)
    x = torch.randn(shape, dtype=torch.float64)
    assert_same(step(faster, x), step(model, x))
    assert_same(list(ours.buffers()), list(model.buffers()))


# ---- Refused


@pytest.mark.parametrize("options", [{"options": {"fuse": True}}, {"mode": "reduce-overhead"}])
def test_options_are_refused(options):
    name = next(iter(options))
    faster = torch.compile(nn.BatchNorm2d(5), backend=bnfast.torch.backend, **options)
    with pytest.raises(Exception, match=f"{name} is .* the backend has no options"):
        faster(torch.randn(2, 5, 3, 3))


class Permuted(nn.Module):
    """PyTorch records its result with other strides than it computes; it also has a view of it."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.bn(x.transpose(1, 2)).relu().transpose(1, 2)
        return y.view(y.shape[0], -1) if torch.compiler.is_compiling() else y.flatten(1)


@pytest.mark.parametrize("training", [True, False])
def test_permuted_inputs_and_views(training):
    model = Permuted().double().train(training)
    compiled, copied = compile_copy(model)
    found = []
    for call, owner in ((model, model), (compiled, copied)):
        x = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        y = call(x)
        y.pow(3).sum().backward()
        found.append((y, x.grad, owner.bn.weight.grad, dict(owner.named_buffers())))
    torch.testing.assert_close(found[1], found[0])
