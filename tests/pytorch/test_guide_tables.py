"""The tables of docs/guide/pytorch.md, row by row: what is served, converted, folded and fused."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import ROOT
from test_freeze_kinds import BatchNormAct2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils import parametrize

import bnfast
import bnfast.torch
from bnfast import _core
from bnfast.torch import convert, freeze, report
from bnfast.torch.folding import _LINEAR as FOLDED_INTO

PAGE = ROOT / "docs" / "guide" / "pytorch.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not run from a source tree")
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
CHANNELS = 4
LAYER_FOR = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def rows(first, *others):
    """Return the cells of each row of the table with this head."""
    head = f"| {' | '.join((first, *others))} |\n"
    table = TEXT.partition(head)[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


CLASSES = rows("batch norm", "`enable()` serves it", "`convert` changes it", "`freeze` folds it")
ACTIVATIONS = rows("activation", "`activation=`", "the backend fuses it")


# ---- Classes


class Derived(nn.BatchNorm2d):
    pass


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Functional(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var)


def parametrized(channels):
    norm = nn.BatchNorm2d(channels)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


def replaced(channels):
    norm = nn.BatchNorm2d(channels)
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x)
    return norm


FROZEN = (
    "`FrozenBatchNorm2d` of torchvision, detectron2 or transformers, timm's `FrozenBatchNormAct2d`"
)
# Rows whose first cell is not the names of classes.
IN_WORDS = {
    "a class derived from these, without a forward of its own": Derived,
    "one with a forward of its own": OwnForward,
    "timm's `BatchNormAct2d`": BatchNormAct2d,
    FROZEN: FrozenBatchNorm2d,
    "`torch.nn.functional.batch_norm` in a forward": Functional,
    "one with parametrized parameters": parametrized,
    "one whose `forward` was replaced": replaced,
    "a scripted one": lambda channels: torch.jit.script(nn.BatchNorm2d(channels)),
    "`nn.LazyBatchNorm2d`, before its first forward": lambda _: nn.LazyBatchNorm2d(),
    "`nn.GroupNorm`, `nn.LayerNorm`": lambda channels: nn.GroupNorm(2, channels),
}


def cases():
    for label, *cells in CLASSES:
        if label in IN_WORDS:
            yield pytest.param(IN_WORDS[label], 2, cells, id=label)
            continue
        for name in re.findall(r"`([\w.]+)`", label):
            made = eval(name, {"nn": nn, "bnfast": bnfast})
            axes = int(name[-2]) if name.endswith("d") else 2
            yield pytest.param(made, axes, cells, id=name)


def network(made, axes):
    """Return an evaluated network of a convolution and a norm, and an input."""
    model = nn.Sequential(LAYER_FOR[axes](3, CHANNELS, 1), made(CHANNELS)).eval()
    return model, torch.randn(2, 3, *[4] * axes)


def what_became(named, done):
    return "yes" if "1" in done else "no" if "1" in named else "no, not named"


def test_every_row_of_classes_is_read():
    assert len(CLASSES) == 14
    assert set(IN_WORDS) < {label for label, *_ in CLASSES}


@pytest.mark.parametrize(("made", "axes", "cells"), list(cases()))
def test_class(made, axes, cells, calls):
    served, converted, folded = cells
    model, x = network(made, axes)
    calls()
    model(x)
    assert re.split(r"\W", served)[0] == ("yes" if calls()[0] else "no")

    found = report(convert(network(made, axes)[0]))
    says = "yes" if converted.startswith("yes") else converted
    assert says == what_became(found.left, found.converted)

    model, _ = network(made, axes)
    if folded == "raises an error":
        with pytest.raises(ValueError, match="uninitialized"):
            freeze(model)
    else:
        found = report(freeze(model))
        assert folded == what_became(found.left, found.folded)


def test_layers_that_batch_norms_fold_into():
    sentence = re.search(r"`freeze` folds into (.+?)\. ", TEXT.replace("\n", " "))[1]
    named = re.findall(r"`nn\.(\w+)`", sentence)
    assert named == [kind.__name__ for kind in FOLDED_INTO]


# ---- Activations


def test_every_activation_has_a_row():
    options = [eval(option.strip("`")) for _, option, _ in ACTIVATIONS if option != "none"]
    assert {o if isinstance(o, str) else o[0] for o in options} == set(_core.ACTIVATIONS)


@pytest.mark.parametrize(("module", "option", "fused"), ACTIVATIONS)
def test_activation_option(module, option, fused):
    assert (option == "none") == (fused == "no")
    if option == "none":
        return
    x = torch.linspace(-7, 7, 101).reshape(1, 101)
    one, zero = np.ones(101, np.float32), np.zeros(101, np.float32)
    activation = eval(option.strip("`"))
    y = bnfast.scale_shift(x.numpy(), one, zero, activation=activation)
    theirs = eval(module.strip("`"), {"nn": nn})(x.double())
    # PyTorch cancels in GELU: 1 + erf(x).
    np.testing.assert_allclose(y, theirs.numpy(), rtol=1e-6, atol=1e-14)


class Pairs(nn.Module):
    def __init__(self, activations):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in activations)
        self.activations = nn.ModuleList(activations)

    def forward(self, x):
        return [a(norm(x)) for norm, a in zip(self.norms, self.activations, strict=True)]


@pytest.mark.usefixtures("fresh")
def test_backend_fuses_what_the_table_says():
    """One graph with a batch norm in front of each row's activation."""
    made = [eval(module.strip("`"), {"nn": nn}) for module, _, _ in ACTIVATIONS]
    torch.compile(Pairs(made), backend="bnfast")(torch.randn(2, CHANNELS, 3, 3))
    expected = Counter()
    for _, option, fused in ACTIVATIONS:
        value = eval(option.strip("`")) if fused == "yes" else None
        name = value if isinstance(value, str) or value is None else value[0]
        expected[f"batch norm + {name}" if name else "batch norm"] += 1
    assert report().compiled == expected
