"""`torch.compile(model, backend="bnfast")`: values, gradients, statistics, and what is fused."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from layers import SmallResNet, channels_last, dense
from torch import nn

import bnfast.torch
from bnfast.torch import compiled

FORMATS = {"NCHW": dense, "channels_last": channels_last}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Reset graphs and counts for each test."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_fused", Counter())
    monkeypatch.setattr(compiled, "_apart", Counter())


@pytest.fixture
def fused():
    """What batch norms became since the last call: ({kind: times}, {reason: times})."""
    last = compiled.fused_so_far()

    def since_last():
        nonlocal last
        now = compiled.fused_so_far()
        news = tuple(
            {k: n - b.get(k, 0) for k, n in a.items() if n != b.get(k, 0)}
            for a, b in zip(now, last, strict=True)
        )
        last = now
        return news

    return since_last


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


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda **options: nn.LeakyReLU(0.2, **options),
}


def images(memory=dense):
    return memory(torch.randn(4, 5, 3, 6, dtype=torch.float64))


# ---- Each pattern


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation, inplace, memory, fused):
    model = nn.Sequential(nn.BatchNorm2d(5), ACTIVATIONS[activation](inplace=inplace)).double()
    x = 4 * images(FORMATS[memory])
    assert_same_steps(model, x)
    kinds, _ = fused()
    assert set(kinds) == {f"batch norm + {activation}"}


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual(activation, swap, memory, fused):
    model = Residual(ACTIVATIONS[activation](inplace=True), swap).double()
    assert_same_steps(model, 4 * images(FORMATS[memory]))
    kinds, _ = fused()
    assert set(kinds) == {f"batch norm + addition + {activation}"}


@pytest.mark.parametrize("memory", FORMATS)
def test_addition_alone(memory, fused):
    assert_same_steps(Residual().double(), images(FORMATS[memory]))
    assert fused() == ({"batch norm + addition": 5}, {})


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": 0.3}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("activation", [None, nn.ReLU()])
def test_options(options, activation, fused):
    assert_same_steps(Residual(activation, **options).double(), images())
    kinds, reasons = fused()
    assert not reasons
    assert set(kinds) == {"batch norm + addition" + (" + relu" if activation else "")}


def test_cumulative_average():
    model = nn.Sequential(nn.BatchNorm2d(5, momentum=None), nn.ReLU()).double()
    assert_same_steps(model, images(), fullgraph=False)


@pytest.mark.parametrize("shape", [(7, 5), (4, 5, 6), (2, 5, 3, 2, 4)], ids=str)
def test_other_ranks(shape, fused):
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)]
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_steps(nn.Sequential(layer(5), nn.ReLU()).double(), x)
    assert set(fused()[0]) == {"batch norm + relu"}


@pytest.mark.parametrize("memory", FORMATS)
def test_network(memory, fused):
    model = SmallResNet().double()
    x = FORMATS[memory](torch.randn(4, 3, 8, 8, dtype=torch.float64))
    if memory == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    assert_same_steps(model, x)
    kinds, _ = fused()
    graphs = 5
    assert kinds == {
        "batch norm + relu": 3 * graphs,
        "batch norm + addition + relu": 2 * graphs,
        "batch norm": graphs,
    }


# ---- What must not be fused


class ReadsBetween(nn.Module):
    """The output of the batch norm has a second reader."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        y = self.norm(x)
        return F.relu(y) + y.sin()


class ReadsSum(ReadsBetween):
    def forward(self, x):
        y = self.norm(x) + x
        return F.relu(y) * y


class Returns(ReadsBetween):
    """The value in between leaves the graph."""

    def forward(self, x):
        y = self.norm(x)
        z = F.relu(y)
        return torch.cat([y, z.flip(0)])


class AddsToItself(ReadsBetween):
    def forward(self, x):
        y = self.norm(x)
        return F.relu(y + y)


class Scaled(ReadsBetween):
    def forward(self, x):
        return F.relu(torch.add(self.norm(x), x, alpha=2))


class Broadcast(ReadsBetween):
    def forward(self, x):
        return F.relu(self.norm(x) + x[:1])


@pytest.mark.parametrize(
    ("kind", "becomes"),
    [
        (ReadsBetween, "batch norm"),
        (ReadsSum, "batch norm + addition"),
        (Returns, "batch norm"),
        (AddsToItself, "batch norm"),
        (Scaled, "batch norm"),
        (Broadcast, "batch norm"),
    ],
)
def test_not_fused(kind, becomes, fused):
    assert_same_steps(kind().double(), images())
    kinds, reasons = fused()
    assert set(kinds) == {becomes}
    assert sum(reasons.values()) == sum(kinds.values())


class ActivationsInterplay(nn.Module):
    """Several gradients of one operator, one of which is not the batch norm's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        y = F.relu(self.norm(x))
        return F.threshold(y, 0, 0) + F.relu(y - 1)


def test_activation_after_activation(fused):
    assert_same_steps(ActivationsInterplay().double(), images())
    assert set(fused()[0]) == {"batch norm + relu"}


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1.5])
def test_slopes_that_the_kernels_do_not_have(slope, fused):
    assert_same_steps(Residual(nn.LeakyReLU(slope)).double(), images())
    kinds, reasons = fused()
    assert kinds.keys() == {"batch norm + addition"}
    assert reasons.keys() == {"a slope that bnfast does not have"}


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)])
def test_no_values(shape, fused):
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
    compiled, copied = compile_copy(model)
    x = torch.randn(shape)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(copied.state_dict(), model.state_dict())
    assert fused()[0] == {}


def test_more_axes_than_the_kernels_take(fused):
    x, vector = torch.randn(2, 3, *[1] * 6, 5), torch.rand(3)

    def norm(x):
        return F.relu(F.batch_norm(x, vector, vector, training=False))

    torch.testing.assert_close(torch.compile(norm, backend=bnfast.torch.backend)(x), norm(x))
    assert fused()[0] == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_type(dtype):
    """Types that PyTorch refuses are still refused; the others give PyTorch's results."""
    norm = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
    faster, _ = compile_copy(norm)
    x = images().to(dtype)
    if dtype is torch.float64:
        with pytest.raises(Exception, match=r"[Ee]xpected|mixed|type"):
            faster(x)
        return
    torch.testing.assert_close(faster(x), norm(x), rtol=2e-2, atol=2e-2)


# ---- Running statistics


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


def recorded(function):
    with torch.profiler.profile() as profile:
        function()
    return [event.name for event in profile.events()]


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
