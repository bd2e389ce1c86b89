"""`torch.compile(model, backend="bnfast")`: values, gradients, statistics, and what is fused."""

import pytest
import torch
import torch.nn.functional as F
from compiling import (
    ACTIVATIONS,
    FORMATS,
    ReadsBetween,
    Residual,
    assert_same_steps,
    compile_copy,
    images,
)
from layers import SmallResNet
from torch import nn

import bnfast.torch

pytestmark = pytest.mark.usefixtures("fresh")

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


FUNCTIONS = {
    "sigmoid": (torch.sigmoid, torch.Tensor.sigmoid, torch.special.expit),
    "tanh": (torch.tanh, torch.Tensor.tanh),
    "silu": (F.silu,),
    "gelu": (F.gelu,),
}


@pytest.mark.parametrize(
    ("activation", "function"), [(name, f) for name, all_ in FUNCTIONS.items() for f in all_]
)
def test_functions(activation, function, fused):
    class Model(Residual):
        def forward(self, x):
            return function(self.norm(x))

    assert_same_steps(Model().double(), 4 * images())
    assert set(fused()[0]) == {f"batch norm + {activation}"}


@pytest.mark.parametrize("residual", [False, True])
def test_approximate_gelu_is_left_to_pytorch(residual, fused):
    """It is another function."""
    gelu = nn.GELU(approximate="tanh")
    model = Residual(gelu) if residual else nn.Sequential(nn.BatchNorm2d(5), gelu)
    assert_same_steps(model.double(), 4 * images())
    kinds, reasons = fused()
    assert set(kinds) == {"batch norm" + (" + addition" if residual else "")}
    assert set(reasons) == {"followed by gelu"}


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
