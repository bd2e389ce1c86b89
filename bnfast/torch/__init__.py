"""bnfast for PyTorch: ``bnfast.torch.convert(model)`` makes a model's batch norms run on bnfast.

Needs PyTorch, which the extra ``bnfast[torch]`` brings; the rest of bnfast does not.
"""

from .convert import Report, convert, report, revert
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    checkpoint_contexts,
    paused_statistics,
)
from .sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Report",
    "SyncBatchNorm",
    "checkpoint_contexts",
    "convert",
    "convert_sync_batchnorm",
    "paused_statistics",
    "report",
    "revert",
]
