"""`torch.compile(model, backend="bnfast")` together with other features of PyTorch."""

import copy
import importlib.metadata
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from compiling import ACTIVATIONS, assert_same, assert_same_steps, compile_copy, images, step
from layers import Block, SmallResNet, channels_last, gappy, leaf, transposed
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnfast.torch
from bnfast import _core

pytestmark = pytest.mark.usefixtures("fresh")


def batch(n=4, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, dtype=dtype)


def test_entry_point():
    """The name that `torch.compile` looks up when bnfast is installed."""
    known = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if "bnfast" not in known.names:
        pytest.skip("bnfast is not installed with its entry points")
    assert known["bnfast"].load() is bnfast.torch.backend
    x = batch()
    model = SmallResNet().double()
    assert_same([torch.compile(copy.deepcopy(model), backend="bnfast")(x)], [model(x)])


def test_dynamic_shapes(fused):
    """One graph for all sizes."""
    model = SmallResNet().double()
    faster, _ = compile_copy(model, dynamic=True)
    for n in (4, 5, 7):
        x = torch.randn(n, 3, 2 * n, 9, dtype=torch.float64)
        assert_same(step(faster, x), step(model, x))
    kinds, _ = fused()
    assert kinds == {"batch norm + relu": 3, "batch norm + addition + relu": 2, "batch norm": 1}


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training, fused):
    """The distance from the float64 results is that without the backend."""
    model = SmallResNet().train(training)
    faster, _ = compile_copy(model)
    x = batch(dtype=torch.float32)
    exact = step(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = step(faster, x), step(model, x)
    assert set(fused()[0]) == {
        "batch norm + relu",
        "batch norm + addition + relu",
        "batch norm",
    }
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype is b.dtype
        assert a.stride() == b.stride()
        if c.norm() > 1e-6:  # the gradient of a bias before a batch norm is 0
            assert (a - c).norm() <= 1.5 * (b - c).norm() + 0.1 * c.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype, fused):
    """All parameters are half types."""
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).to(dtype)
    faster, ours = compile_copy(model)
    x = images().to(dtype)
    for a, b in zip(step(faster, x), step(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    for a, b in zip(ours.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert fused()[0] == {"batch norm + relu": 1}


def test_checkpointing(fused):
    """The fused operator runs again in the backward, and updates statistics once."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.block = Block(8, 8)

        def forward(self, x):
            return checkpoint(self.block, self.stem(x), use_reentrant=False).sin()

    model = Checkpointed().double()
    plain, x = copy.deepcopy(model), batch()
    plain.forward = lambda x: plain.block(plain.stem(x)).sin()  # updates them once
    faster, ours = compile_copy(model)
    assert_same(step(faster, x), step(plain, x))
    assert_same(list(ours.buffers()), list(plain.buffers()))
    assert fused()[0] == {"batch norm + relu": 1, "batch norm + addition + relu": 1}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo reads it
def test_graph_break(fused):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
            self.second = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU6())

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    assert_same_steps(Breaks().double(), images(), fullgraph=False)
    assert set(fused()[0]) == {"batch norm + relu", "batch norm + relu6"}


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's: one module with its own forward."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


def test_fused_class(fused):
    assert_same_steps(BatchNormAct2d(5).double(), images())
    assert set(fused()[0]) == {"batch norm + relu"}


@pytest.mark.parametrize("order", [gappy, transposed, channels_last])
def test_memory_orders(order):
    """The values are right in any memory order; in the backward, too.

    Strides are the ones that PyTorch traced: code that it compiles after them relies on these. Its
    eager kernels give other strides for a transposed tensor.
    """
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).double()
    faster, _ = compile_copy(model)
    x, dy = order(images()), order(images())
    ours, theirs, traced = [], [], []
    traceable = copy.deepcopy(model).to("meta")
    for found, f, device in (
        (ours, faster, "cpu"),
        (theirs, model, "cpu"),
        (traced, traceable, "meta"),
    ):
        a = leaf(x).detach().to(device).requires_grad_()
        y = f(a)
        found += [y, *torch.autograd.grad(y, a, dy.to(device))]
    for a, b, c in zip(ours, theirs, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert a.stride() == c.stride()


def test_retained_graph():
    """A backward changes nothing that a second one reads."""
    model = SmallResNet().double()
    faster, _ = compile_copy(model)
    x = batch().requires_grad_()
    y = faster(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert_same([first], [second])


def test_double_backward_is_refused():
    faster, _ = compile_copy(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).double())
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(faster(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_frozen_statistics_changed_before_the_backward():
    """PyTorch refuses this, too."""
    faster, ours = compile_copy(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).double().eval())
    y = faster(images().requires_grad_())
    ours[0].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class ChangesItsInputs(nn.Module):
    """Changes the bias, or a residual that is kept between calls, after it is used."""

    def __init__(self, changed, activation):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)
        self.activation = activation
        self.register_buffer("state", torch.randn(8, 5, 3, 6))
        self.changed = changed

    def forward(self, x):
        z = self.norm(x)
        if self.changed == "bias":
            y = self.activation(z)
            with torch.no_grad():
                self.norm.bias.add_(1)
            return y
        residual = self.state[4:] if self.changed == "view" else self.state.chunk(2)[1]
        y = self.activation(z + residual)
        self.state.mul_(3)
        return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("changed", ["bias", "view", "chunk"])
def test_inputs_changed_after_the_forward(changed, activation, fused):
    """The gradients are those of the values that the forward read."""
    model = ChangesItsInputs(changed, ACTIVATIONS[activation]()).double()
    faster, ours = compile_copy(model)
    for _ in range(2):
        x = images()
        assert_same(step(faster, x), step(model, x))
    assert_same(list(ours.buffers()), list(model.buffers()))
    left = changed == "bias" or not _core.ACTIVATIONS[activation].from_output
    reason = "an input that its gradient needs is changed in place"
    assert fused()[1] == ({reason: 1} if left else {})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_residual_changed_before_the_backward(activation):
    """It is an error where the gradient needs the residual."""
    model = nn.BatchNorm2d(5).double()
    act = ACTIVATIONS[activation]()
    faster = torch.compile(lambda x, r: act(model(x) + r), backend=bnfast.torch.backend)
    x, residual = images().requires_grad_(), images()
    y = faster(x, residual)
    residual.add_(1)
    if _core.ACTIVATIONS[activation].from_output:
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_under_enable():
    with bnfast.torch.enabled():
        assert_same_steps(SmallResNet().double(), batch(), steps=1)


def test_converted():
    model = SmallResNet().double()
    ours = bnfast.torch.convert(copy.deepcopy(model))
    faster = torch.compile(ours, backend=bnfast.torch.backend)
    x = batch()
    assert_same(step(faster, x), step(model, x))
    assert_same(list(ours.buffers()), list(model.buffers()))


def test_inplace_on_the_input():
    """An activation in place changes the caller's tensor, as it would without the backend."""

    def function(norm, x):
        F.relu(x, inplace=True)
        return F.relu(norm(x), inplace=True)

    norm = nn.BatchNorm2d(5).double()
    x, y = images(), None
    z = x.clone()
    y = torch.compile(function, backend=bnfast.torch.backend, fullgraph=True)(norm, x)
    assert_same([y, x], [function(copy.deepcopy(norm), z), z])
    assert (x >= 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_inplace_on_an_input_with_gradient():
    """Its backward reads the input's old values."""

    def function(norm, x):
        F.hardtanh(x, 0, 6, inplace=True)
        return norm(x)

    norm = nn.BatchNorm2d(5).double()
    found = []
    for f in (torch.compile(function, backend=bnfast.torch.backend, fullgraph=True), function):
        x = (5 * torch.ones(2, 5, 3, 4, dtype=torch.float64)).cumsum(3).sub_(9).requires_grad_()
        y = f(copy.deepcopy(norm), x * 1)
        found.append([y, *torch.autograd.grad(y.pow(3).sum(), x)])
    assert_same(*found)


def test_report():
    faster, _ = compile_copy(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)))
    before = bnfast.torch.report().compiled.get("batch norm + relu", 0)
    with torch.no_grad():
        faster(torch.randn(2, 5, 3, 3)).sin()
    after = bnfast.torch.report()
    assert after.compiled["batch norm + relu"] == before + 1
    assert "compiled as batch norm + relu" in str(after)


PROGRAM = """
    import os, sys, torch
    import torch.distributed as dist
    from torch import nn
    import bnfast.torch
    from layers import SmallResNet

    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = [SmallResNet().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    wrapped = [nn.parallel.DistributedDataParallel(m) for m in models]
    wrapped[1] = torch.compile(wrapped[1], backend=bnfast.torch.backend)
    for i in range(2):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64) + rank
        for m in wrapped:
            m.zero_grad()
            m(x).square().sum().backward()
        pairs = [(a.grad, b.grad) for a, b in zip(*(m.parameters() for m in models))]
        pairs += zip(*(m.buffers() for m in models))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert bnfast.torch.report().compiled["batch norm + relu"] == 3
    dist.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(program)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env={**os.environ, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
