"""`freeze` leaves alone what it would be wrong to fold for some input."""

import functools

import pytest
import torch
import torch.nn.functional as F
from freeze_cases import SHAPES, OwnSequence, Pair, frozen_of, hooked, sequence
from test_freeze_values import apart, trained
from torch import nn
from torch.nn.utils import prune

from bnfast.torch import freeze, report


class Returns(Pair):
    def forward(self, x):
        y = self.conv(x)
        return y, self.bn(y)


class InPlace(Pair):
    def forward(self, x):
        y = self.conv(x)
        y += 1
        return self.bn(y)


class InPlaceMethod(Pair):
    def forward(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)


class Item(Pair):
    def forward(self, x):
        y = self.conv(x)
        y[:, 0] = 0
        return self.bn(y)


class Flag(Pair):
    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.bn(y)


class Default(Pair):
    def forward(self, x, skip=None):
        y = self.conv(x)
        return y * 3 if skip is None else self.bn(y) + skip


class Kind(Pair):
    def forward(self, x):
        if isinstance(x, (list, tuple)):
            return self.conv(x[0])
        return self.bn(self.conv(x))


class Values(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.sum() > 1e9 else F.relu(y)


class Wrapped(Pair):
    """Makes a module around one that it has."""

    def forward(self, x):
        return self.bn(self.conv(x)) + OwnSequence(self.conv)(x)


class MadeOf(Pair):
    def forward(self, x):
        made = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        made.weight = self.conv.weight
        return self.bn(self.conv(x)) + made(x)


class Swallows(Pair):
    def forward(self, x):
        y = self.conv(x)
        try:
            return [self.bn(row[None]) for row in y]
        except Exception:  # noqa: BLE001
            return self.bn(y)


class ConvTwice(Pair):
    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


class NormTwice(Pair):
    def forward(self, x):
        return self.bn(self.bn(self.conv(x)))


class Weight(Pair):
    def forward(self, x):
        return F.conv_transpose2d(self.bn(self.conv(x)), self.conv.weight)


class Statistics(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_mean[:, None, None]


class Numbers(Pair):
    def forward(self, x):
        decay = sum((p.detach() ** 2).sum() for p in self.parameters())
        return self.bn(self.conv(x)) + decay


class LooksAtTheClass(Pair):
    """Behaves differently if the batch norm has another class."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if isinstance(self.bn, nn.BatchNorm2d) else y * 2


class AsksItsNorm(Pair):
    """Reads an attribute of the batch norm that its replacement does not have."""

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.eps


class Both(Pair):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + self.other(y)


class Aside(Pair):
    def __init__(self):
        super().__init__()
        self.row = [self.conv]

    def forward(self, x):
        return self.bn(self.conv(x)) + self.row[0](x)


class Bound(Pair):
    def __init__(self):
        super().__init__()
        self.call = self.conv.forward

    def forward(self, x):
        return self.bn(self.conv(x)) + self.call(x)


class Helper:
    """A user's object that is not a module, but refers to one."""

    def __init__(self, conv):
        self.parts = {"conv": functools.partial(conv)}

    def tap(self, x):
        return self.parts["conv"](x)


class Helped(Pair):
    def __init__(self):
        super().__init__()
        self.helper = Helper(self.conv)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.helper.tap(x)


class Taps(nn.Module):
    """The usual perceptual loss: outputs of a sequence's parts."""

    def __init__(self, counted):
        super().__init__()
        self.features, self.counted = sequence(), counted

    def forward(self, x):
        outputs = [x] * (int(x.shape[0]) if self.counted else 1)
        for layer in self.features:
            x = layer(x)
            outputs.append(x.clone())
        return outputs


class Reaches(nn.Module):
    """Calls the convolution inside another module, in a forward that cannot be followed."""

    def __init__(self):
        super().__init__()
        self.block = Pair()

    def forward(self, x):
        for _ in range(int(x.shape[0])):
            x = self.helper(x)
        return x

    def helper(self, x):
        return tapped(self.block, x) + self.block(x)


def tapped(block, x):
    return block.conv(x)


class ByName(Reaches):
    def helper(self, x):
        return getattr(self.block, "".join(["co", "nv"]))(x) + self.block(x)


class ByWrittenName(Reaches):
    def helper(self, x):
        return getattr(self.block, "conv")(x) + self.block(x)  # noqa: B009


class Looks(Reaches):
    def helper(self, x):
        return next(self.block.children())(x) + self.block(x)


class Method(Reaches):
    """Calls another method of a module, which calls the convolution."""

    def __init__(self):
        super().__init__()
        self.block = WithMethod()

    def helper(self, x):
        return self.block.before_norm(x) + self.block(x)


class WithMethod(Pair):
    def before_norm(self, x):
        return self.conv(x)


def shared():
    model = nn.Sequential(Pair(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1] = model[0].conv
    return model


def tied():
    model = nn.Sequential(Pair(), Pair())
    model[1].conv.weight = model[0].conv.weight
    return model


def replaced(name):
    model = Pair()
    part = model.get_submodule(name)
    part.forward = lambda x, forward=part.forward: forward(x) * 2
    return model


def parametrized(name):
    model = Pair()
    nn.utils.parametrizations.weight_norm(model.conv) if name == "conv" else (
        nn.utils.parametrize.register_parametrization(model.bn, "weight", nn.Softplus())
    )
    return model


def pruned():
    model = Pair()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    return model


def without_statistics():
    model = Pair()
    model.bn = nn.BatchNorm2d(3, track_running_stats=False)
    return model


class AlwaysTrains(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def with_(**parts):
    model = Pair()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


class Moves(nn.Module):
    """A batch norm before a convolution, whose input changes in between."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = x.clone()
        y = self.bn(x)
        x += 1
        return self.conv(y) + x


class CalledWithMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)
        self.before = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(self.before(x), output_size=(x.shape[2] + 1, x.shape[3] + 1)))


LEFT = {
    "returns": (Returns, "the output of conv goes elsewhere"),
    "in place": (InPlace, "no single linear layer"),
    "in-place method": (InPlaceMethod, "the output of conv goes elsewhere"),
    "item": (Item, "the output of conv goes elsewhere"),
    "flag": (Flag, "the output of conv goes elsewhere"),
    "default": (Default, "the output of conv goes elsewhere"),
    "kind": (Kind, "the output of conv goes elsewhere"),
    "values": (Values, "the output of conv goes elsewhere"),
    "swallows": (Swallows, "it iterates over what only an input decides"),
    "class": (LooksAtTheClass, "the forward of (model) depends on what stands in its place"),
    "attribute": (AsksItsNorm, "the forward of (model) depends on what stands in its place"),
    "wrapped": (Wrapped, "module is not installed as a submodule"),
    "made of": (MadeOf, "the forward of (model), which may get at it"),
    "conv twice": (ConvTwice, "the output of conv goes elsewhere"),
    "norm twice": (NormTwice, "no single linear layer"),
    "weight": (Weight, "a forward uses the tensors of conv"),
    "statistics": (Statistics, "a forward uses the tensors of bn"),
    "numbers": (Numbers, "a forward uses the tensors of bn"),
    "aside": (Aside, "conv is also kept in an attribute"),
    "bound": (Bound, "conv is also kept in an attribute"),
    "helped": (Helped, "conv is also kept in an attribute"),
    "taps": (lambda: Taps(False), "the output of features.0 goes elsewhere"),
    "taps, counted": (lambda: Taps(True), "the forward of (model), which may get at it"),
    "reaches": (Reaches, "the forward of (model), which may get at it"),
    "by name": (ByName, "the forward of (model), which may get at it"),
    "by written name": (ByWrittenName, "the forward of (model), which may get at it"),
    "looks": (Looks, "the forward of (model), which may get at it"),
    "method": (Method, "the forward of (model), which may get at it"),
    "shared": (shared, "is in the model at more than one place"),
    "tied": (tied, "shares a parameter with another module"),
    "hooks on conv": (lambda: hooked(Pair(), "conv"), "cannot be changed: it has hooks"),
    "hooks on bn": (lambda: hooked(Pair(), "bn"), "it has hooks"),
    "replaced conv": (lambda: replaced("conv"), "its forward was replaced on the instance"),
    "replaced bn": (lambda: replaced("bn"), "its forward was replaced on the instance"),
    "parametrized conv": (lambda: parametrized("conv"), "it is parametrized"),
    "parametrized bn": (lambda: parametrized("bn"), "it is parametrized"),
    "pruned": (pruned, "it has hooks"),
    "no statistics": (without_statistics, "it has no running statistics"),
    "own forward": (lambda: with_(bn=OwnForward(3)), "OwnForward has a forward of its own"),
    "own conv": (lambda: with_(conv=OwnConvolution(3, 3, 1)), "no single linear layer"),
    "always trains": (lambda: with_(bn=AlwaysTrains(3)), "eval() leaves it in training"),
    "moves": (Moves, "its input may change before conv takes it"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    make, why = LEFT[name]
    torch.manual_seed(1)
    frozen = freeze(trained(make())) if name == "always trains" else frozen_of(make())
    left = report(frozen).left
    assert left
    assert all(why in reason for reason in left.values()), left


def test_two_batch_norms_of_one_convolution():
    got = report(frozen_of(Both()))
    assert not got.folded
    assert len(got.left) == 2


def test_a_call_with_more_for_the_convolution():
    got = report(frozen_of(CalledWithMore()))
    assert got.folded == {"bn": "conv"}
    assert got.left == {"before": "conv is called with other inputs, too"}


def test_several_kinds_of_argument():
    model = trained(Kind()).double()
    frozen = freeze(model)
    x = torch.randn(2, 3, 8, 8).double()
    for given in (x, [x], (x,)):
        assert apart(model, frozen, given) < 1e-12


def test_forward_with_side_effects_is_not_run():
    class Remembers(Pair):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.seen.append(x)
            self.count += 1
            return super().forward(x)

    model = trained(Remembers())
    frozen = freeze(model, example=torch.randn(SHAPES[0]).fill_(1))
    assert model.seen == []
    assert model.count == 0
    assert report(frozen).folded == {"bn": "conv"}


def test_only_noticed_batch_norms_not_folded():
    got = report(frozen_of(nn.Sequential(Pair(), LooksAtTheClass(), Pair())))
    assert got.folded == {"0.bn": "0.conv", "2.bn": "2.conv"}
    assert list(got.left) == ["1.bn"]
