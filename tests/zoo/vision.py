"""Model libraries beside a PyTorch that their compiled parts were not built for."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

PACKAGES = ("torchvision", "timm", "ultralytics", "transformers", "segmentation_models_pytorch")
_kept: list[object] = []  # a library's definitions go with it


def missing() -> list[str]:
    """Say which of the packages are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def stay_offline() -> None:
    """Keep the packages from asking the network, and from writing into the home folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())


def define_missing_operators() -> None:
    """Let torchvision be imported where its compiled part cannot be loaded.

    The torchvision of PyPI is built against a PyTorch with CUDA, and beside one for the CPU alone
    it finds no libraries. Its models need none of that, but its import describes two operators
    that must exist then. So they get a schema, and no kernel.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    if _kept or found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
