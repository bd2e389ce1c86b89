"""Swap a model's batch norms for bnfast's, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from . import fuse as _fuse
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormOnCPU

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_Model = TypeVar("_Model", bound=nn.Module)


def convert(model: _Model, fuse: bool = False) -> _Model:
    """Make every batch norm of a model run on bnfast, in place.

    Layers stay the objects they are, with their parameters, buffers, hooks and modes; only their
    class changes. Converting twice changes nothing more.

    Parameters
    ----------
    model : torch.nn.Module
        Or a single batch norm.
    fuse : bool
        Also let a batch norm take over the ReLU behind it, and an addition between the two, where
        `torch.fx` can tell that nobody else looks at the values between.

    Returns
    -------
    torch.nn.Module
        `model`.

    See Also
    --------
    report : what was converted, what was not, and why.
    revert : the way back.
    """
    for module in model.modules():
        if type(module) in OURS and _why_not(module) is None:
            module.__class__ = OURS[type(module)]
    if fuse:
        _fuse.fuse(model)
    return model


def revert(model: _Model) -> _Model:
    """Undo `convert`, in place.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        `model`, its layers PyTorch's own again, with the state they have now.
    """
    theirs = {ours: their for their, ours in OURS.items()}
    for module in model.modules():
        _fuse.unfuse(module)
        if type(module) in theirs:
            module.__class__ = theirs[type(module)]
    return model


@dataclass(frozen=True)
class Report:
    """What `convert` made of a model.

    Attributes
    ----------
    converted : tuple of str
        Names of the layers that run on bnfast.
    left : dict of str to str
        Names of the batch norms that do not, and why.
    fused : dict of str to str
        Names of the layers that took over what follows them, and what that is.
    unfused : dict of str to str
        Names of layers that could not, and of modules whose forward could not be traced, and why.
    """

    converted: tuple[str, ...]
    left: dict[str, str]
    fused: dict[str, str]
    unfused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} batch norms run on bnfast, {len(self.fused)} fused"]
        lines += [f"{name}: fused with {what}" for name, what in self.fused.items()]
        lines += [f"{name}: not fused, {why}" for name, why in self.unfused.items()]
        lines += [f"{name}: left to PyTorch, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Say which batch norms of a model run on bnfast, what they are fused with, and why not.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Report
        The model itself goes by the name "(model)". ``print`` shows it a line each.
    """
    found = Report((), {}, {}, {})
    converted = []
    for path, module in model.named_modules():
        name = path or "(model)"
        if isinstance(module, BatchNormOnCPU):
            converted.append(name)
        elif (why := _why_not(module)) is not None:
            found.left[name] = why
        elif type(module) in OURS:
            found.left[name] = "convert has not been called"
        if (reason := _fuse.reason_of(module)) is not None:
            found.unfused[name] = reason
        for fusion in _fuse.fusions_of(module):
            inside = f"{path}." if path else ""
            found.fused.update({inside + layer: what for layer, what in fusion.fused.items()})
            found.unfused.update({inside + layer: why for layer, why in fusion.kept.items()})
    return replace(found, converted=tuple(converted))


def _why_not(module: nn.Module) -> str | None:
    """Return why convert leaves a batch norm alone; None for those it takes, and for the rest."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "")
        return f"a scripted {scripted}" if "BatchNorm" in scripted else None
    if not isinstance(module, _BatchNorm | _LazyNormBase):
        return None
    if kind in OURS:
        patched = "forward" in vars(module)
        return "its forward was replaced on the instance" if patched else None
    if isinstance(module, BatchNormOnCPU):  # or a class made of it, as parametrizations do
        return None
    if isinstance(module, _LazyNormBase):
        return f"{kind.__name__} becomes a batch norm at its first forward; convert after that"
    return f"{kind.__name__} is a class of its own with a forward of its own"
