"""bnfast for PyTorch: `enable` makes every batch norm of the process run on bnfast.

``bnfast.torch.convert(model)`` does the same for one model.

This module needs PyTorch, which the extra ``bnfast[torch]`` installs. The rest of bnfast does not.
"""

from .compiled import backend
from .convert import Report, convert, report, revert
from .freeze import FrozenReport, freeze
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    checkpoint_contexts,
    paused_statistics,
)
from .population import recompute_statistics
from .process import Activity, disable, enable, enable_if_asked, enabled, is_enabled
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "Activity",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenReport",
    "Report",
    "SyncBatchNorm",
    "backend",
    "checkpoint_contexts",
    "convert",
    "convert_sync_batchnorm",
    "disable",
    "enable",
    "enabled",
    "freeze",
    "is_enabled",
    "paused_statistics",
    "recompute_statistics",
    "report",
    "revert",
]

enable_if_asked()
