"""`bnfast.torch.freeze` with forwards that keep, change or expose more than they return."""

import operator

import pytest
import torch
from freeze_cases import Pair
from test_freeze_values import trained
from torch import nn

from bnfast.torch import freeze, report

LOG = []
get_conv = operator.attrgetter("conv")


class Counts(Pair):
    calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        return self.bn(y) if self.calls % 2 else y


class Remembers(Pair):
    seen = None

    def forward(self, x):
        y = self.conv(x)
        if self.seen is None:
            self.seen = True
            return self.bn(y)
        return y


class Sets(Pair):
    def forward(self, x):
        self.bn.eps = 0.5
        return self.bn(self.conv(x))


class KeepsAside(Pair):
    def forward(self, x):
        self.activations = self.conv(x)
        return torch.relu(self.bn(self.activations))


class Logs(Pair):
    def forward(self, x):
        y = self.conv(x)
        LOG.append(y)
        return self.bn(y)


class Asks(Pair):
    def forward(self, x, mask):
        y = self.conv(x)
        return self.bn(y * 2 if mask is None else y)


class Identity(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.dtype is torch.float32 else y


class Numbers(Pair):
    def forward(self, x):
        y = self.conv(x)
        try:
            return y * int(x.shape[0])
        except TypeError:
            return self.bn(y)


class Alias(nn.Module):
    """Exposes modules of the module inside it, as wrappers of models do."""

    def __init__(self):
        super().__init__()
        self.module = Pair()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x):
        return self.module(x)


class Unfollowed(nn.Module):
    def __init__(self, inner, step):
        super().__init__()
        self.inner, self.step = inner, step

    def forward(self, x):
        y = self.step(self.inner, x)
        for _ in range(int(x.shape[0])):
            y = y + self.inner(x)
        return y


def hooked():
    model = nn.Sequential(Pair(), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, y: y + module.conv(args[0]))
    return model


CASES = {
    **{kind.__name__: kind for kind in (Counts, Remembers, Sets, KeepsAside, Logs, Identity)},
    "Numbers": Numbers,
    "a hook": hooked,
    "a wrapper": lambda: Unfollowed(Alias(), lambda inner, x: inner.conv(x)),
    "attrgetter": lambda: Unfollowed(Pair(), lambda inner, x: get_conv(inner)(x)),
}


@pytest.mark.parametrize("name", CASES)
def test_forwards_with_side_effects_not_folded(name):
    model = trained(CASES[name]())
    frozen = freeze(model)
    assert len(report(frozen).left) == 1
    x = torch.randn(2, 3, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(frozen._call_impl(x), model(x))


@pytest.mark.parametrize("mask", [None, 1])
def test_an_argument_that_may_be_none(mask):
    model = trained(Asks())
    frozen = freeze(model)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(frozen._call_impl(x, mask), model(x, mask))


def test_more_models_than_dynamo_recaptures():
    """Each model has its own limit."""
    torch._dynamo.reset()
    models = [trained(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())) for _ in range(12)]
    before = report().compiled.get("batch norm + relu", 0)
    for model in models:
        freeze(model)(torch.randn(2, 3, 5, 5))
    assert report().compiled["batch norm + relu"] == before + 12
