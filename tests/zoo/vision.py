"""Import model libraries with a PyTorch that their compiled parts were not built for."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

PACKAGES = ("torchvision", "timm", "ultralytics", "transformers", "segmentation_models_pytorch")
_kept: list[object] = []  # a library's definitions are removed with it


def missing() -> list[str]:
    """Return the packages that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def stay_offline() -> None:
    """Keep the packages from using the network, and from writing into the home folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())


def define_missing_operators() -> None:
    """Let torchvision be imported if its compiled part cannot be loaded.

    The torchvision of PyPI is built for a PyTorch with CUDA, and finds no libraries with a CPU-only
    PyTorch. Its models do not need them, but its import describes two operators that must exist
    then. So they get a schema, and no kernel.
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
