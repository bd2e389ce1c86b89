"""bnfast: exact and fast batch normalization for NumPy arrays on CPUs."""

from . import _verbose as _verbose
from . import conventions
from ._config import show_config
from ._core import get_num_threads, release_memory
from ._masks import lengths_mask
from ._threads import num_threads, set_num_threads
from .functional import (
    BatchStats,
    Gradients,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    normalize,
    scale_shift,
)
from .inference import fold, fold_before, recompute_statistics
from .layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, FrozenBatchNorm
from .moments import Moments, moments
from .population import Drift, drift, load_statistics
from .renorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchStats",
    "Drift",
    "FrozenBatchNorm",
    "Gradients",
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "conventions",
    "drift",
    "fold",
    "fold_before",
    "get_num_threads",
    "lengths_mask",
    "load_statistics",
    "moments",
    "normalize",
    "num_threads",
    "recompute_statistics",
    "release_memory",
    "scale_shift",
    "set_num_threads",
    "show_config",
]
