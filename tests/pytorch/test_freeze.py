"""`bnfast.torch.freeze`: what is folded, which is right for every input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from freeze_cases import SHAPES, Holder, OwnSequence, Pair, frozen_of, hooked, sequence
from layers import SmallResNet
from test_freeze_values import apart, trained
from torch import nn

import bnfast.torch
from bnfast.torch import FrozenReport, freeze, reach, report


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
