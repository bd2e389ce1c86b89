"""Small networks of known kinds, exported by PyTorch: ``python onnx_networks.py FOLDER``.

Each is exported with its batch norms kept, by both exporters, as FOLDER/NETWORK.EXPORTER.onnx. Its
input and PyTorch's output are in FOLDER/NETWORK.npz.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def conv(into, out, size=1, stride=1, groups=1, act=nn.ReLU):
    """Return a convolution without bias, its batch norm, and an activation."""
    layers = [nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(out), *([act()] if act else []))


class Residual(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        narrow = out // 2
        self.body = nn.Sequential(
            conv(into, narrow), conv(narrow, narrow, 3, stride), conv(narrow, out, act=None)
        )
        self.short = conv(into, out, 1, stride, act=None)

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


class PreActivation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class Inception(nn.Module):
    """Branches joined; with `late`, one batch norm after the join instead of one in each."""

    def __init__(self, into, late):
        super().__init__()
        self.late = late
        if late:
            self.branches = nn.ModuleList(
                nn.Conv2d(into, out, size, padding=size // 2, bias=size > 1)
                for out, size in ((3, 1), (4, 3), (5, 5))
            )
            self.bn = nn.BatchNorm2d(12)
        else:
            self.branches = nn.ModuleList(
                [conv(into, 3), nn.Sequential(conv(into, 2), conv(2, 4, 3)), conv(into, 5, 5)]
            )

    def forward(self, x):
        y = torch.cat([branch(x) for branch in self.branches], 1)
        return F.relu(self.bn(y)) if self.late else y


class Inverted(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        wide = 3 * into
        self.body = nn.Sequential(
            conv(into, wide, act=nn.ReLU6),
            conv(wide, wide, 3, stride, groups=wide, act=nn.ReLU6),
            conv(wide, out, act=None),
        )
        self.same = (into, stride) == (out, 1)

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


class Dense(nn.Module):
    def __init__(self, into, grow):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, 2 * grow, 1, bias=False)),
            *(nn.BatchNorm2d(2 * grow), nn.ReLU()),
            nn.Conv2d(2 * grow, grow, 3, padding=1, bias=False),
        )

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


class Shuffle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(conv(half, half), conv(half, half, 3, groups=half, act=None))

    def forward(self, x):
        kept, changed = x.chunk(2, 1)
        y = torch.cat([kept, self.body(changed)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Up(nn.Module):
    """The two halves of a U."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(3, 4, 3), conv(4, 6, 3, 2)
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.last = conv(8, 5, 3)

    def forward(self, x):
        x = self.down(x)
        return self.last(torch.cat([x, self.up(self.deep(x))], 1))


class Scale(nn.Module):
    """As in Caffe: one factor and one addend per channel."""

    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.addend = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return x * self.factor + self.addend.view(1, -1, 1, 1)


class Points(nn.Module):
    """Rows of pixels, cropped, as points."""

    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.second, self.bn2 = nn.Conv2d(6, 8, 1), nn.BatchNorm1d(8)
        self.third, self.bn3 = nn.Conv1d(8, 10, 1, bias=False), nn.BatchNorm1d(10)

    def forward(self, x):
        x = F.relu(self.bn1(self.first(x)[:, :, 1:-1, 2:]))
        x = F.relu(self.bn2(self.second(x).flatten(2)))
        return self.bn3(self.third(x)).amax(2)


def head(channels):
    """Return a mean over the pixels, and two linear layers around a batch norm."""
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7, bias=False)]
    return nn.Sequential(*pooled, nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5))


def networks():
    """Return the networks by name."""
    seq = nn.Sequential
    scaled = [conv(3, 6, 3, act=None), Scale(6), nn.ReLU()]
    scaled += [nn.Conv2d(6, 4, 1), Scale(4), nn.BatchNorm2d(4), nn.ReLU()]
    return {
        "residual": seq(conv(3, 8, 3), Residual(8, 8, 1), Residual(8, 12, 2), head(12)),
        "preactivation": seq(nn.Conv2d(3, 6, 3), PreActivation(6), PreActivation(6), head(6)),
        "inception": seq(conv(3, 6, 3), Inception(6, False), Inception(12, True), head(12)),
        "mobile": seq(conv(3, 6, 3, 2), Inverted(6, 6, 1), Inverted(6, 8, 2), head(8)),
        "dense": seq(conv(3, 4, 3), Dense(4, 4), Dense(8, 4), nn.BatchNorm2d(12), head(12)),
        "shuffle": seq(conv(3, 8, 3), Shuffle(8), Shuffle(8), head(8)),
        "up": seq(Up(), head(5)),
        "caffe": seq(*scaled, head(4)),
        "points": Points(),
    }


def trained(net):
    """Set statistics of a network's batch norms from data, and switch to evaluation."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 2)
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values)
    return net.eval()


def export(net, x, exporter, path):
    """Write a network with its batch norms kept."""
    if exporter == "torchscript":
        keep = torch.onnx.TrainingMode.PRESERVE  # otherwise the exporter folds
        torch.onnx.export(net, (x,), path, dynamo=False, training=keep, do_constant_folding=False)
        return
    batch = {0: torch.export.Dim("batch")} if exporter == "dynamic" else None
    torch.onnx.export(
        net, (x,), path, dynamo=True, optimize=False, dynamic_shapes=(batch,), verbose=False
    )


def main(folder):
    """Export them all."""
    warnings.simplefilter("ignore")
    torch.manual_seed(20150302)
    x = torch.randn(2, 3, 12, 12)
    for name, net in networks().items():
        trained(net)
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=net(x).detach().numpy())
        for exporter in ("torchscript", "static", "dynamic"):
            export(net, x, exporter, folder / f"{name}.{exporter}.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
