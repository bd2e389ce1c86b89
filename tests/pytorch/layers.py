"""Layers, tensors and memory formats that the tests of `bnfast.torch` share."""

import copy

import torch
from torch import nn

import bnfast.torch

CLASSES = {
    2: (nn.BatchNorm1d, bnfast.torch.BatchNorm1d),
    3: (nn.BatchNorm1d, bnfast.torch.BatchNorm1d),
    4: (nn.BatchNorm2d, bnfast.torch.BatchNorm2d),
    5: (nn.BatchNorm3d, bnfast.torch.BatchNorm3d),
}


def dense(x):
    return x.contiguous()


def channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()])


def gappy(x):
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    view = wide[..., ::2]
    return view.copy_(x)


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


# Shapes with their memory order, and the layout in which the kernels should see them.
TENSORS = {
    "(N, C)": ((17, 5), dense, "interleaved"),
    "(N, C, L)": ((6, 5, 7), dense, "planar"),
    "NCHW": ((4, 5, 3, 6), dense, "planar"),
    "channels_last": ((4, 5, 3, 6), channels_last, "interleaved"),
    "channels_last 1x1": ((9, 5, 1, 1), channels_last, "interleaved"),
    "NCDHW": ((2, 5, 3, 2, 3), dense, "planar"),
    "channels_last_3d": ((2, 5, 3, 2, 3), channels_last, "interleaved"),
    "gaps": ((4, 5, 3, 6), gappy, "planar"),
    "transposed": ((4, 5, 3, 6), transposed, "planar"),
    "one channel": ((4, 1, 3, 6), dense, "planar"),
}


def ours_like(theirs):
    """A copy of a layer or model, converted."""
    return bnfast.torch.convert(copy.deepcopy(theirs))


def leaf(x):
    """The same values in the same memory order, as a leaf that requires gradients."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if is_dense(x) else gappy(x)
    return y.copy_(x).detach().requires_grad_()


def is_dense(x):
    return x.untyped_storage().nbytes() == x.nbytes


class Block(nn.Module):
    """The residual block of a ResNet, in its usual form."""

    def __init__(self, channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class SmallResNet(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
