"""`bnfast.torch.freeze`: folded layers compute the same as before with their batch norms."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfast.torch
from bnfast.torch import folding, freeze, report

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def trained(model):
    """A model in evaluation whose batch norms have trained statistics."""
    for m in model.modules():
        if getattr(m, "running_mean", None) is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.1, 3)
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None:
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.eval()


def apart(model, frozen, *inputs):
    """The largest difference, relative to the largest output."""
    with torch.no_grad():
        want, found = model(*inputs), frozen(*inputs)
    assert want.shape == found.shape
    assert want.dtype is found.dtype
    return ((want - found).abs().max() / want.abs().max()).item()


def random_convolution(rng, dims, transposed):
    groups = rng.choice([1, 2, 3])
    stride, dilation = rng.choice([1, 2]), rng.choice([1, 2])
    options = {"groups": groups, "stride": stride, "dilation": dilation, "bias": rng.random() < 0.5}
    channels = (groups * rng.choice([1, 2]), groups * rng.choice([1, 3]), rng.choice([1, 2, 3]))
    if transposed:
        # less than the stride or the dilation
        options |= {"padding": rng.choice([0, 1]), "output_padding": max(stride, dilation) - 1}
        return TRANSPOSED[dims](*channels, **options)
    mode = rng.choice(["zeros", "reflect", "replicate", "circular"])
    padding = rng.choice([0, 1]) if stride > 1 else rng.choice([0, 1, "same", "valid"])
    return CONVS[dims](*channels, padding=padding, padding_mode=mode, **options)


def random_input(rng, dims, channels):
    return torch.randn(rng.choice([1, 3]), channels, *(rng.choice([5, 6, 8]) for _ in range(dims)))


@pytest.mark.parametrize("seed", range(60))
def test_batch_norm_after_any_convolution(seed):
    rng = random.Random(seed)
    dims, transposed = rng.choice([1, 2, 3]), rng.random() < 0.5
    conv = random_convolution(rng, dims, transposed)
    norm = NORMS[dims](conv.out_channels, affine=rng.random() < 0.8, eps=rng.choice([1e-5, 0.1]))
    model = trained(nn.Sequential(conv, norm)).double()
    x = random_input(rng, dims, conv.in_channels).double()
    frozen = freeze(model, example=x)
    assert report(frozen).folded == {"1": "0"}
    assert type(frozen[1]) is nn.Identity
    assert frozen[0].bias.dtype is torch.float64
    assert apart(model, frozen, x) < 1e-12


@pytest.mark.parametrize("seed", range(60))
def test_batch_norm_before_any_convolution(seed):
    rng = random.Random(seed)
    dims, transposed = rng.choice([1, 2, 3]), rng.random() < 0.3
    conv = random_convolution(rng, dims, transposed)
    norm = NORMS[dims](conv.in_channels)
    model = trained(nn.Sequential(norm, conv)).double()
    to_zero = rng.random() < 0.3
    if to_zero:  # exactly: without a mean or a bias
        norm.running_mean.zero_()
        nn.init.zeros_(norm.bias)
    x = random_input(rng, dims, conv.in_channels).double()
    frozen = freeze(model, example=x)
    pads = conv.padding not in ("valid", (0,) * dims) and conv.padding_mode == "zeros"
    exact = to_zero or not (transposed or pads)
    assert report(frozen).folded == ({"0": "1"} if exact else {})
    assert ("pads" in str(report(frozen)) or "transposed" in str(report(frozen))) != exact
    assert apart(model, frozen, x) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias):
    model = trained(
        nn.Sequential(
            nn.BatchNorm1d(5), nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7), nn.Linear(7, 7)
        )
    ).double()
    x = torch.randn(9, 5).double()
    frozen = freeze(model, example=x)
    assert report(frozen).folded == {"0": "1", "2": "1"}
    assert apart(model, frozen, x) < 1e-12


@pytest.mark.parametrize("before", [True, False])
def test_linear_layer_with_three_axes_changes_shape(before):
    """There the batch norm works on the middle axis, and the linear layer on the last."""
    row = [nn.BatchNorm1d(4), nn.Linear(4, 4)] if before else [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    model = trained(nn.Sequential(*row))
    frozen, x = freeze(model), torch.randn(2, 4, 4)
    assert model(x).shape == (2, 4, 4)
    if before:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            frozen(x)
    else:
        assert frozen(x).shape == (2, 16)
    with pytest.raises(RuntimeError):
        freeze(model, example=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_are_rounded_once(dtype):
    exact = trained(nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40)))
    model = copy.deepcopy(exact).to(dtype)
    wide = copy.deepcopy(model).double()
    got, want = freeze(model)[0], freeze(wide)[0]
    unit = torch.finfo(dtype).eps / 2
    for a, b in ((got.weight, want.weight), (got.bias, want.bias)):
        assert a.dtype is dtype
        normal = b.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        error = ((a.double() - b).abs() / normal).max().item()
        assert error <= unit
        assert a.double().ne(b).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_nearest_even(dtype):
    """Just beyond the midpoint of two halves, by less than float32 resolves."""
    unit = torch.finfo(dtype).eps
    for start in (1.0, 1 + unit):
        middle = torch.tensor([start + unit / 2], dtype=torch.float64)
        for sign in (1, -1):
            above = folding.rounded(sign * middle * (1 + 1e-15), dtype)
            below = folding.rounded(sign * middle * (1 - 1e-15), dtype)
            assert above.item() == sign * (start + unit)
            assert below.item() == sign * start
        even = folding.rounded(middle, dtype).item()
        assert even in (1.0, 1 + 2 * unit)
    many = torch.randn(1000).to(dtype).double()
    assert torch.equal(folding.rounded(many, dtype).double(), many)
    assert folding.rounded(torch.tensor([1e300, -1e300, 0.0]).double(), dtype).tolist() == [
        float("inf"),
        float("-inf"),
        0.0,
    ]


def test_half_weights_beside_float32_statistics():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].half()
    x = torch.randn(2, 3, 8, 8).half()
    frozen = freeze(model, example=x)
    assert report(frozen).folded == {"1": "0"}
    assert frozen[0].bias.dtype is torch.float16


def test_overflowing_weights_not_folded():
    model = trained(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).half()
    model[1].running_var.zero_()
    nn.init.constant_(model[1].weight, 60000)
    assert "not be finite in torch.float16" in report(freeze(model)).left["1"]
    model[1].running_mean.fill_(float("nan"))
    assert "not be finite" in report(freeze(model)).left["1"]


def test_channels_last_weights_stay_so():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last)
    frozen = freeze(model)
    assert frozen[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert apart(model, frozen, x) < 1e-5
    assert frozen(x).stride() == model(x).stride()


class MobileBlock(nn.Module):
    """MobileNetV2's inverted residual."""

    def __init__(self, channels):
        super().__init__()
        wide = 4 * channels
        self.conv = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
            ),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.conv(x)


class DenseLayer(nn.Module):
    """As in DenseNet, batch norm first; it takes a tensor or a list of them."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, given):
        x = torch.cat([given] if isinstance(given, torch.Tensor) else given, 1)
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(3 + 2 * i, 2) for i in range(3))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def test_a_mobilenet():
    model = trained(nn.Sequential(*(MobileBlock(3) for _ in range(3)))).double()
    frozen = freeze(model, example=torch.randn(1, 3, 5, 5).double())
    assert len(report(frozen).folded) == 9
    for shape in ((2, 3, 8, 8), (1, 3, 7, 3)):
        assert apart(model, frozen, torch.randn(shape).double()) < 1e-12


def test_densenet_keeps_batch_norms_before_activations():
    model = trained(DenseNet()).double()
    frozen = freeze(model, example=torch.randn(1, 3, 5, 5).double())
    got = report(frozen)
    assert got.folded == {f"layers.{i}.norm2": f"layers.{i}.conv1" for i in range(3)}
    assert list(got.left) == [f"layers.{i}.norm1" for i in range(3)]
    assert apart(model, frozen, torch.randn(2, 3, 6, 6).double()) < 1e-12


def test_beside_pytorchs_own_folding():
    from torch.fx.experimental.optimization import fuse
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    model = trained(nn.Sequential(*(MobileBlock(3) for _ in range(2)))).double()
    x = torch.randn(2, 3, 6, 6).double()
    theirs = fuse(model)
    frozen = freeze(model)
    torch.testing.assert_close(frozen(x), theirs(x), rtol=1e-12, atol=1e-12)
    for row, fused in (
        ((nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)), fuse_conv_bn_eval),
        ((nn.Linear(3, 4), nn.BatchNorm1d(4)), fuse_linear_bn_eval),
    ):
        pair = trained(nn.Sequential(*row)).double()
        theirs, ours = fused(*pair), freeze(pair)[0]
        torch.testing.assert_close(ours.weight, theirs.weight.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(ours.bias, theirs.bias.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", [bnfast.torch.BatchNorm2d, bnfast.torch.SyncBatchNorm])
def test_bnfasts_own_layers(kind):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), kind(4)))
    x = torch.randn(2, 3, 8, 8)
    frozen = freeze(model, example=x)
    assert report(frozen).folded == {"1": "0"}
    plain = nn.BatchNorm2d if kind is bnfast.torch.BatchNorm2d else nn.SyncBatchNorm
    assert type(frozen[3]) is plain  # it loads without bnfast
    assert type(model[3]) is kind


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = bnfast.torch.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x), residual=x, activation="relu")


def test_layer_called_with_more_arguments_unchanged():
    model = trained(Fused())
    frozen = freeze(model, example=torch.randn(2, 3, 8, 8))
    assert report(frozen).left == {"bn": "it is called with more than its input"}
    assert type(frozen.bn) is bnfast.torch.BatchNorm2d
