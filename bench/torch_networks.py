"""Two networks to train and evaluate: ResNet-50 and MobileNetV2, as their papers have them."""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """He et al. (2016), figure 5: 1x1, 3x3, 1x1, each with its batch norm, and the way around."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != wide:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


def resnet50() -> nn.Module:
    stem = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64),
        nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1),
    ]  # fmt: skip
    blocks, channels = [], 64
    for width, count, first in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(count):
            blocks.append(Bottleneck(channels, width, first if i == 0 else 1))
            channels = 4 * width
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    )


class InvertedResidual(nn.Module):
    """Sandler et al. (2018), figure 4: wide, depthwise, narrow again, without a ReLU at the end."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        layers = [*convolution(channels, wide, 1)] if expansion != 1 else []
        layers += convolution(wide, wide, 3, stride, groups=wide)
        layers += [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def convolution(channels: int, out: int, size: int, stride: int = 1, groups: int = 1) -> list:
    return [
        nn.Conv2d(channels, out, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out), nn.ReLU6(inplace=True),
    ]  # fmt: skip


def mobilenet_v2() -> nn.Module:
    layers, channels = convolution(3, 32, 3, 2), 32
    for expansion, out, count, first in [
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ]:  # fmt: skip
        for i in range(count):
            layers.append(InvertedResidual(channels, out, first if i == 0 else 1, expansion))
            channels = out
    layers += convolution(channels, 1280, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


NETWORKS = {"resnet50": resnet50, "mobilenet_v2": mobilenet_v2}
