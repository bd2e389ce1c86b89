"""Models for the tests of `freeze`, and a frozen one that was compared with its model."""

import torch
import torch.nn.functional as F
from test_freeze_values import trained
from torch import nn

from bnfast.torch import freeze

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


def sequence():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))


class OwnSequence(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def hooked(model, name):
    model.get_submodule(name).register_forward_hook(lambda m, args, y: y)
    return model
