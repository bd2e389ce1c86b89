"""Networks to train and evaluate.

ResNet-50, MobileNetV2 and an MLP are written out here as in their papers, and need only PyTorch.
Where torchvision, timm and ultralytics are installed (`make test-zoo` installs them in .venv-zoo),
their implementations are used instead, and more networks are added. Weights are random.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[3] / "tests" / "zoo"))
import vision


class Bottleneck(nn.Module):
    """He et al. (2016), figure 5: 1x1, 3x3, 1x1, each with its batch norm, and a shortcut."""

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
    """Sandler et al. (2018), figure 4: expand, depthwise, project, without a ReLU at the end."""

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


def mlp() -> nn.Module:
    """Four layers of 64 units: calls so small that overhead decides."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def of_torchvision(name: str) -> nn.Module:
    vision.define_missing_operators()
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options)


def of_timm(name: str) -> nn.Module:
    vision.define_missing_operators()
    import timm

    return timm.create_model(name, pretrained=False)


def of_ultralytics(name: str) -> nn.Module:
    """Return a detector, without its loss."""
    vision.stay_offline()
    vision.define_missing_operators()
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False)


@dataclass(frozen=True)
class Network:
    """A network, the package that has it, and a replacement if that is not installed."""

    name: str
    package: str
    make: Callable[[str], nn.Module]
    own: Callable[[], nn.Module] | None = None
    rows: int = 0  # rows of 64 values in a batch, for networks that take no images

    @property
    def there(self) -> bool:
        return self.own is not None or find_spec(self.package) is not None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.own is not None and find_spec(self.package) is None:
            return self.own()
        return self.make(self.name.removeprefix("timm_"))

    def input(self, batch: int, size: int) -> Tensor:
        return torch.randn((self.rows, 64) if self.rows else (batch, 3, size, size))


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet50", "torchvision", of_torchvision, resnet50),
        Network("densenet121", "torchvision", of_torchvision),
        Network("mobilenet_v2", "torchvision", of_torchvision, mobilenet_v2),
        Network("mobilenet_v3_large", "torchvision", of_torchvision),
        Network("efficientnet_b0", "torchvision", of_torchvision),
        Network("timm_efficientnet_b0", "timm", of_timm),
        Network("yolov8n", "ultralytics", of_ultralytics),
        Network("googlenet", "torchvision", of_torchvision),
        Network("mlp_32", "torch", lambda _: mlp(), rows=32),
        Network("mlp_2048", "torch", lambda _: mlp(), rows=2048),
    )
}
