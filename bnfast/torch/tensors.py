"""Tensors as NumPy arrays over the same memory, so that bnfast's functions can take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bnfast import _core, _threads
from bnfast.moments import Moments

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from bnfast._types import Array


def array(x: Tensor | None) -> Any:
    """Return a dense CPU tensor's memory as an array, valid while the tensor lives.

    None stays None. The array has the tensor's axes.

    `Tensor.numpy()` would make the storage impossible to resize, forever. A tensor with gaps is
    copied.
    """
    if x is None:
        return None
    x = x.detach()
    order = sorted(range(x.dim()), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    inner = x.permute(order)
    if not inner.is_contiguous():
        dense = x.contiguous()
        return _over(dense).copy()
    return _over(inner).transpose(np.argsort(order))


def _over(x: Tensor) -> Array:
    if x.dtype is torch.bfloat16:
        import ml_dtypes  # NumPy has no bfloat16

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    found: Array = _core.over_memory(x.data_ptr(), tuple(x.shape), dtype.num)
    return found


def tensor(values: Array, like: Tensor) -> Tensor:
    """Return a result as a tensor, with the strides of ``torch.empty_like(like)``."""
    if like.dtype is torch.bfloat16:
        made = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    else:
        made = torch.from_numpy(values)
    strides = torch.empty_like(like, device="meta").stride()
    return made if made.stride() == strides else torch.empty_like(like).copy_(made)


def moments(x: Tensor, mask: Array | None = None) -> Moments:
    """Return the moments of each channel of a dense CPU tensor, axis 1."""
    with torch_threads():
        return Moments(*_core.moments(array(x), 1, mask))


def torch_threads() -> AbstractContextManager[None]:
    """Compute on as many threads as PyTorch would use here."""
    return _threads.num_threads(min(torch.get_num_threads(), _threads.MAX_THREADS))
