"""Some seventy architectures with batch norms, with random weights and small inputs.

Sizes are the smallest whose last feature maps still have a few values per channel. With two values,
a batch norm gives plus and minus one for any input, and its gradient is only rounding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import vision
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """How a model is made, and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self) -> nn.Module:
        vision.stay_offline()
        vision.define_missing_operators()
        torch.manual_seed(0)
        model = self.build().double()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _stir(module)
        return model

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.shape, dtype=torch.float64, generator=generator)


@torch.no_grad()
def _stir(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Give a new layer parameters and statistics that differ between channels."""
    if norm.weight is not None:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
    if norm.running_mean is not None:
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)


def images(size: int, batch: int = 2) -> tuple[int, ...]:
    return (batch, 3, size, size)


# ---- torchvision


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    options.setdefault("num_classes", CLASSES)
    return torchvision.models.get_model(name, weights=None, **options)


def segmentation(name: str) -> nn.Module:
    return torchvision_model(name, weights_backbone=None)


def pyramid(backbone: str) -> nn.Module:
    """Return the backbone of torchvision's detectors."""
    from torchvision.models.detection import backbone_utils

    options = {"weights": None, "norm_layer": nn.BatchNorm2d}
    if backbone.startswith("resnet"):
        return backbone_utils.resnet_fpn_backbone(backbone_name=backbone, **options)
    return backbone_utils.mobilenet_backbone(backbone_name=backbone, fpn=True, **options)


def vgg() -> nn.Module:
    """Return VGG11's convolutions; its gigabyte of linear layers has no batch norm."""
    return torchvision_model("vgg11_bn").features


def wide_resnet() -> nn.Module:
    """Return WideResNet with one block per stage instead of three to six."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=128)


TORCHVISION = (
    "densenet121", "efficientnet_b0", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x1_0",
)  # fmt: skip
SEGMENTATION = {
    "deeplabv3_mobilenet_v3_large": 64,
    "fcn_resnet50": 32,
    "lraspp_mobilenet_v3_large": 64,
}
VIDEO = ("r2plus1d_18", "r3d_18")
ODD = {
    "googlenet": (96, {"init_weights": False}),
    "inception_v3": (107, {"init_weights": False, "aux_logits": False}),
}


def of_torchvision() -> dict[str, Architecture]:
    make = functools.partial
    video, found = (2, 3, 4, 32, 32), {}
    for name in TORCHVISION:
        found[name] = Architecture(make(torchvision_model, name), images(64))
    for name, (size, options) in ODD.items():
        found[name] = Architecture(make(torchvision_model, name, **options), images(size))
    for name, size in SEGMENTATION.items():
        found[name] = Architecture(make(segmentation, name), images(size))
    for name in VIDEO:
        found[name] = Architecture(make(torchvision_model, name), video)
    for name in ("resnet18", "mobilenet_v3_large"):
        found[f"{name} pyramid"] = Architecture(make(pyramid, name), images(64))
    found["vgg11_bn"] = Architecture(vgg, images(64))
    found["wide_resnet"] = Architecture(wide_resnet, images(64))
    return found


# ---- timm

TIMM = (
    "cspdarknet53", "dla34", "dpn68", "ecaresnet26t", "efficientnet_b0", "efficientvit_b0",
    "ese_vovnet19b_dw", "fastvit_t8", "ghostnet_100", "hgnet_tiny", "hrnet_w18_small",
    "lcnet_050", "legacy_seresnet18", "mixnet_s", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mobileone_s0", "regnety_002", "repvgg_a0", "repvit_m0_9",
    "res2net50_14w_8s", "resnest14d", "resnetv2_18", "rexnet_100", "selecsls42b", "skresnet18",
    "starnet_s1", "tf_efficientnet_b0", "xception41",
)  # fmt: skip


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES)


def of_timm() -> dict[str, Architecture]:
    return {
        f"timm {name}": Architecture(functools.partial(timm_model, name), images(64))
        for name in TIMM
    }


# ---- ultralytics

YOLO = (
    "yolo11n", "yolo26n", "yolov10n", "yolov3-tiny", "yolov5n", "yolov8n", "yolov8n-cls",
    "yolov8n-seg",
)  # fmt: skip
TASKS = {"cls": "ClassificationModel", "seg": "SegmentationModel"}


def yolo_model(name: str) -> nn.Module:
    from ultralytics.nn import tasks

    task = TASKS.get(name.partition("-")[2], "DetectionModel")
    return getattr(tasks, task)(f"{name}.yaml", verbose=False)


def of_ultralytics() -> dict[str, Architecture]:
    return {name: Architecture(functools.partial(yolo_model, name), images(64)) for name in YOLO}


# ---- transformers: image models that have batch norms, and two that take no images


def transformer(name: str, **options: Any) -> nn.Module:
    import transformers

    name, _, head = name.partition(" ")
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}{head}")(config)


B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
TRANSFORMERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "EfficientNet Model": (images(64), B0),
    "HGNetV2 ForImageClassification": (images(64), {}),
    "Levit Model": (images(224), {}),
    "MobileNetV1 Model": (images(64), {}),
    "MobileNetV2 ForSemanticSegmentation": (images(64), {}),
    "MobileViT Model": (images(64), {}),
    "PatchTST Model": ((4, 32, 7), {"num_input_channels": 7, "context_length": 32}),
    "RegNet Model": (images(64), {}),
    "ResNet Model": (images(64), {}),
    "Segformer ForSemanticSegmentation": (images(64), {}),
    "SwiftFormer Model": (images(224), {}),
}


def of_transformers() -> dict[str, Architecture]:
    return {
        f"transformers {name}": Architecture(functools.partial(transformer, name, **options), shape)
        for name, (shape, options) in TRANSFORMERS.items()
    }


# ---- segmentation_models_pytorch

SMP = {"DeepLabV3Plus": "resnet18", "FPN": "mobilenet_v2", "Unet": "efficientnet-b0"}


def smp_model(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch

    make = getattr(segmentation_models_pytorch, name)
    return make(encoder, encoder_weights=None, classes=CLASSES)


def of_smp() -> dict[str, Architecture]:
    return {
        f"smp {name} {encoder}": Architecture(
            functools.partial(smp_model, name, encoder), images(64)
        )
        for name, encoder in SMP.items()
    }


# ---- layers in uses that the libraries do not have


class Mlp(nn.Sequential):
    """Batch norms over (N, C)."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        for _ in range(layers):
            self.extend([nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()])
        self.append(nn.Linear(width, CLASSES))


class PointNet(nn.Module):
    """Qi et al. (2017) without its transforms: batch norms over (N, C, points) and (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 64, 64, 128, 1024]
        self.points = nn.Sequential()
        for a, b in itertools.pairwise(sizes):
            self.points.extend([nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()])
        self.head = nn.Sequential(
            nn.Linear(1024, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(2))


class Functional(nn.Module):
    """A forward that calls `F.batch_norm`, one layer of it without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.bias = nn.Parameter(torch.randn(16))
        self.register_buffer("mean", torch.randn(16))
        self.register_buffer("var", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.first(x), None, None, training=True)
        y = self.second(F.relu(y))
        return F.batch_norm(y, self.mean, self.var, self.weight, self.bias, self.training)


OURS = {
    "MLP": Architecture(Mlp, (16, 64)),
    "PointNet": Architecture(PointNet, (8, 3, 50)),
    "F.batch_norm": Architecture(Functional, images(16)),
}

ARCHITECTURES: dict[str, Architecture] = (
    of_torchvision() | of_timm() | of_ultralytics() | of_transformers() | of_smp() | OURS
)
