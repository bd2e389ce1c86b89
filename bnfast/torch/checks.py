"""What layers that compute through `bnfast._core` ask of their tensors, before statistics move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnfast import _core, _errors, _masks, _options

from . import fused, tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnfast._types import Activation, Array

    from .fused import Vector

_STATE = ("weight", "bias", "running_mean", "running_var")
_ACCEPTED = ", ".join(sorted(str(dtype) for dtype in fused.DTYPES))
_OF_MASKS = (*fused.DTYPES, torch.bool)


def plain(activation: Any) -> Activation:
    """Return an activation in Python's own types, or raise."""
    return _options.plain_activation(activation, _core.ACTIVATIONS)


def wide(x: Tensor) -> torch.dtype:
    """Return the type that data are computed in, which their parameters have."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def check_tensors(
    channels: int, x: Tensor, residual: Tensor | None, state: Sequence[Vector]
) -> None:
    """Refuse tensors that the kernels cannot read, or that do not fit x."""
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels, got input {tuple(x.shape)}")
    own = {name: t for name, t in zip(_STATE, state, strict=True) if t is not None}
    for name, tensor in {"input": x, "residual": residual, **own}.items():
        if tensor is not None:
            check_readable(name, tensor)
    for name, tensor in own.items():
        if tensor.dtype not in (wide(x), x.dtype):
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected {wide(x)} beside input of {x.dtype}"
            )
        if tensor.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({channels},)")
        if name.startswith("running") and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires a gradient; a batch norm has none for it")
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual is of {residual.dtype} and shape {tuple(residual.shape)}; expected "
            f"those of input, {x.dtype} and {tuple(x.shape)}"
        )


def check_readable(name: str, tensor: Any) -> None:
    """Refuse what is not a plain dense tensor in the CPU's memory."""
    if not fused.is_plain(tensor):
        _refuse(name, tensor, _ACCEPTED)


def _refuse(name: str, tensor: Any, accepted: str) -> None:
    if isinstance(tensor, Tensor):  # PyTorch's repr crashes for a tensor whose memory was freed
        found = f"a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
    else:
        found = _errors.described(tensor)
    raise TypeError(
        f"{name} is {found}; expected a dense tensor in the CPU's memory, of {accepted}"
    )


def check_mask(mask: Any) -> None:
    """Refuse what cannot be a mask because of its type; its values are not read."""
    if not isinstance(mask, Tensor):
        _masks.read(mask)
    elif mask.requires_grad:
        raise ValueError("mask requires a gradient, which weights do not get; detach() it")
    elif mask.dtype not in _OF_MASKS:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, {_ACCEPTED}")


def mask_array(mask: Any) -> Array | None:
    """Return a copy of a mask, a tensor or array_like; None stays None."""
    if not isinstance(mask, Tensor):
        return None if mask is None else np.array(_masks.read(mask))
    check_mask(mask)
    given = mask.detach().resolve_neg()
    if not fused.is_plain(given, _OF_MASKS):
        _refuse("mask", given, f"torch.bool, {_ACCEPTED}")
    if given.dtype is not torch.bool:
        return np.array(tensors.array(given))
    return np.asarray(tensors.array(given.view(torch.uint8))).astype(np.bool_)


def check_savable(*kept: Tensor | None) -> None:
    """Refuse what autograd cannot keep."""
    if any(t is not None and t.is_inference() for t in kept):
        raise RuntimeError(
            "Inference tensors cannot be saved for backward; expected clones of those made in "
            "inference mode"
        )


def check_saved(**saved: Tensor | None) -> None:
    """Refuse tensors that a forward kept if their memory was freed since."""
    for name, tensor in saved.items():
        if tensor is not None and not fused.is_plain(tensor):
            what = name.replace("_", " ")
            raise RuntimeError(f"the {what}'s memory was freed; expected it for the backward")


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether a call on these inputs must be differentiable."""
    if not torch.is_grad_enabled():
        return False
    given = [t for t in inputs if t is not None]
    # As in PyTorch, there is no gradient if all tensors were made in inference mode.
    return any(t.requires_grad for t in given) and not all(t.is_inference() for t in given)


def typed(
    parts: Sequence[Tensor | None], dtypes: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of weight and bias in these types, None where not needed."""
    return [
        part.to(dtype) if needed and part is not None else None
        for part, dtype, needed in zip(parts, dtypes, needs[1:3], strict=True)
    ]
