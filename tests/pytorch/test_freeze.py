"""`bnfast.torch.freeze`: folded models are right for every input; doubtful cases are left."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from layers import SmallResNet
from test_freeze_values import apart, trained
from torch import nn
from torch.nn.utils import prune

import bnfast.torch
from bnfast.torch import FrozenReport, freeze, reach, report

SHAPES = [(2, 3, 8, 8), (1, 3, 9, 11)]


class Pair(nn.Module):
    """A convolution and its batch norm, which derived classes call in their own ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Holder(nn.Module):
    def __init__(self, block=None):
        super().__init__()
        self.block = block or Pair()

    def forward(self, x):
        return self.block(x)


def frozen_of(model):
    model = trained(model).double()
    frozen = freeze(model)
    for shape in SHAPES:
        x = torch.randn(shape).double()
        with torch.no_grad():
            want, got = model(x.clone()), frozen(x.clone())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    return frozen


# ---- What is folded


def test_resnet_folds_completely():
    model = trained(SmallResNet()).train()
    model.note, model.stem[0].note = ["mine"], "its"
    seen = []
    model.blocks[0].register_forward_hook(lambda *args: seen.append(args[0]))
    before = copy.deepcopy(model.state_dict())
    modes = {name: m.training for name, m in model.named_modules()}
    frozen = freeze(model, example=torch.randn(2, 3, 8, 8))
    assert type(frozen) is SmallResNet
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert frozen.note == ["mine"]
    assert frozen.note is not model.note
    assert frozen.stem[0].note == "its"
    seen.clear()
    x = torch.randn(3, 3, 9, 10)
    frozen(x)
    assert seen == [frozen.blocks[0]]
    assert apart(copy.deepcopy(model).eval(), frozen, x) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(p.requires_grad for p in model.parameters())
    got = report(frozen)
    assert isinstance(got, FrozenReport)
    assert got.folded["blocks.1.downsample.1"] == "blocks.1.downsample.0"
    assert not got.left
    assert str(got).splitlines()[:2] == [
        "6 batch norms folded, 0 left",
        "stem.1: folded into stem.0",
    ]


class Detector(nn.Module):
    """As in YOLO: a list of layers that know whose output they take; the top has no graph."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Pair(), Pair(), Residual(), Pair())
        for i, m in enumerate(self.model):
            m.takes = -1 if i != 3 else [1, -1]

    def forward(self, x, *args, **kwargs):
        if isinstance(x, dict):
            return self.loss(x, *args, **kwargs)
        return self.predict(x, *args, **kwargs)

    def predict(self, x, again=False):
        outputs = []
        for m in self.model:
            if m.takes != -1:
                x = outputs[m.takes[0]] + x
            x = m(x)
            outputs.append(x)
        while x.sum() > 1e6 or again:
            x, again = x / 2, False
        return x

    def loss(self, x):
        return self.predict(x["image"]).sum(), [len(x["boxes"])]

    def fuse(self):
        return [m.conv for m in self.model]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.cv1, self.cv2, self.add = Pair(), Pair(), True

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


def test_a_detector_whose_top_cannot_be_followed():
    frozen = frozen_of(Detector())
    assert len(report(frozen).folded) == 5
    x = torch.randn(2, 3, 8, 8).double()
    assert torch.equal(frozen(x, again=True), frozen(x) / 2)
    assert torch.equal(frozen({"image": x, "boxes": [1, 2]})[0], frozen(x).sum())


class Asks(Pair):
    """Conditions on inputs, all of whose answers keep the two together, and errors."""

    def forward(self, x, skip=None, scale=1.0):
        if x.dim() != 4:
            raise ValueError("x must have four axes")
        if x.shape[1] != 3:  # pytest would rewrite an assert, and read its values
            raise AssertionError
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        y = self.bn(self.conv(x))
        if skip is not None:
            y = y + skip
        return y * scale if y.sum() > 0 else y


class Head(nn.Module):
    """A head over several levels: one convolution, one batch norm, many calls."""

    def __init__(self):
        super().__init__()
        self.block, self.conv, self.bn = Pair(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        levels = [x, F.max_pool2d(x, 2), x + 1]
        return [self.bn(self.conv(self.block(level))) for level in levels]


class Stages(nn.Module):
    """A U-Net over a backbone whose parts it calls itself."""

    def __init__(self):
        super().__init__()
        self.base = Pair()

    def forward(self, x):
        y = self.base.conv(x)
        return [self.base.bn(y), self.base(x)]


class Closed(nn.Module):
    """Calls its modules as a whole, in a forward that cannot be followed."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * float(x.shape[0])


def sequence():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))


class Branches(nn.Module):
    """As in HRNet: puts the outputs of branches back into a list that it was given."""

    def __init__(self):
        super().__init__()
        self.first, self.branches = Pair(), nn.ModuleList([sequence(), sequence()])

    def forward(self, x):
        return self.exchange([self.first(x), x])

    def exchange(self, rows):
        for i, branch in enumerate(self.branches):
            rows[i] = branch(rows[i])
        return rows


class Loss(Pair):
    """Makes a module in its forward, as transformers' heads do."""

    def forward(self, x, labels=None):
        y = self.bn(self.conv(x))
        return y if labels is None else nn.MSELoss()(y, labels)


class Options(Pair):
    """An option that is asked twice: it has one answer on every path."""

    def forward(self, x, all_of_it=False):
        seen = () if all_of_it else None
        y = self.bn(self.conv(x))
        if all_of_it:
            seen = (*seen, y)
        return y


class Counted(Closed):
    """Loops, but not over its own modules."""

    def forward(self, x):
        for _ in range(int(x.shape[0])):
            x = self.inner(x)
        return x


class Own(nn.BatchNorm2d):
    """A user's class with PyTorch's forward."""


class OwnSequence(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


FOLDED = {
    "asks": (Asks, 1),
    "head": (Head, 2),
    "stages": (Stages, 1),
    "deep sequences": (lambda: nn.Sequential(sequence(), nn.Sequential(sequence())), 2),
    "own class": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Own(3)), 1),
    "own sequence": (lambda: OwnSequence(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), 1),
    "closed": (lambda: Closed(Pair()), 1),
    "closed sequence": (lambda: Closed(sequence()), 1),
    "counted": (lambda: Counted(Pair()), 1),
    "counted sequence": (lambda: Counted(sequence()), 1),
    "loss": (Loss, 1),
    "options": (Options, 1),
    "branches": (Branches, 3),
    "graph": (lambda: torch.fx.symbolic_trace(Head()), 2),
    "hooks above": (lambda: hooked(Holder(sequence()), "block"), 1),
}


def hooked(model, name):
    model.get_submodule(name).register_forward_hook(lambda m, args, y: y)
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    make, count = FOLDED[name]
    got = report(frozen_of(make()))
    assert len(got.folded) == count, got
    assert not got.left


def test_both_branches_are_correct():
    model = trained(Asks()).double()
    frozen = freeze(model)
    x = torch.randn(2, 3, 8, 7).double()
    skip = torch.randn(2, 3, 8, 8).double()
    for args in ((x,), (x, skip), (x, None, 3.0), (x, skip, 3.0)):
        assert apart(model, frozen, *args) < 1e-12
    with pytest.raises(ValueError, match="four axes"):
        frozen(x[0])


# ---- Left, since folding would be wrong for some input


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


def test_a_batch_norm_alone_and_a_model_without():
    alone = freeze(trained(nn.BatchNorm2d(3)))
    assert report(alone).left == {"(model)": "it is the model itself, with nothing beside it"}
    assert report(freeze(nn.ReLU())) == FrozenReport({}, {})
    assert not isinstance(report(nn.ReLU()), FrozenReport)


def test_models_without_values():
    with pytest.raises(ValueError, match=r"^model has the uninitialized 0\.weight; expected one"):
        freeze(nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to("meta")
    assert "on the meta device" in report(freeze(model)).left["1"]


def test_a_model_that_keeps_what_it_computed():
    model = trained(Pair())
    model.last = model(torch.randn(SHAPES[0]))  # with a graph, which PyTorch does not copy
    frozen = freeze(model, example=torch.randn(SHAPES[0]))
    assert report(frozen).folded == {"bn": "conv"}
    assert torch.equal(frozen.last, model.last)


def test_freezing_again_and_compiled_models():
    model = trained(nn.Sequential(Pair(), nn.Conv2d(3, 3, 1)))
    once = freeze(model)
    assert report(freeze(once)) == FrozenReport({}, {})
    compiled = freeze(torch.compile(model, backend="eager"))
    assert type(compiled) is nn.Sequential
    assert len(report(compiled).folded) == 1


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


# ---- The example


class Outputs(Pair):
    def forward(self, x, y=None, *, factor=1):
        out = super().forward(x)
        return {"out": [out * factor, (x if y is None else y, "text")], "sum": out.sum((1, 2, 3))}


def test_examples_of_any_form():
    model, x = trained(Outputs()), torch.randn(SHAPES[0])
    for example in (x, (x, x), [x], {"x": x, "factor": 2}):
        assert len(report(freeze(model, example=example)).folded) == 1


def test_an_example_that_differs(monkeypatch):
    from bnfast.torch import folding

    true = folding.affine_of

    def wrong(norm):
        return true(norm)._replace(shift=true(norm).shift + 1e-2)

    monkeypatch.setattr(folding, "affine_of", wrong)
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(
        RuntimeError,
        match=r"frozen model's output differs from the model's by up to 0\.01; expected at most",
    ):
        freeze(model, example=torch.randn(SHAPES[0]))
    assert len(report(freeze(model)).folded) == 1


def test_examples_that_cannot_be_compared():
    class Nothing(Pair):
        def forward(self, x):
            super().forward(x)

    with pytest.raises(ValueError, match="example gives an output without a tensor"):
        freeze(Nothing(), example=torch.randn(SHAPES[0]))


@pytest.mark.parametrize("model", [None, nn.Conv2d, torch.jit.script(nn.ReLU())])
def test_not_a_model_refused(model):
    with pytest.raises(TypeError, match="model is "):
        freeze(model)


def test_names_are_public():
    assert {"freeze", "FrozenReport"} <= set(bnfast.torch.__all__)


def test_unknown_bytecode(monkeypatch):
    """If Python's bytecode is not known, such a forward may use everything in it."""
    model = Closed(Pair()).eval()
    assert not report(freeze(model)).left
    monkeypatch.setattr(reach, "_UNREAD", (3, 0))
    left = report(freeze(model)).left
    assert left
    assert all("cannot be followed" in why for why in left.values())
