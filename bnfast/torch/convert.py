"""Change a model's batch norms to bnfast's, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from bnfast.layers import BatchNorm, FrozenBatchNorm

from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormOnCPU
from .process import Activity, activity, replace_kernels

if TYPE_CHECKING:
    from .freeze import FrozenReport

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
NUMPY_LAYERS = (BatchNorm, FrozenBatchNorm)
_Model = TypeVar("_Model", bound=nn.Module)
_NO_MODEL = object()


def convert(model: _Model, fuse: bool = False) -> _Model:
    """Make every batch norm of a model run on bnfast, in place.

    Layers stay the same objects, with their parameters, buffers, hooks and modes. Only their class
    changes, to one that runs the same operator on bnfast. Converting a second time changes nothing.
    PyTorch's own ``BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` are converted, and
    subclasses that have no forward of their own. `enable` also serves all other batch norms.

    Parameters
    ----------
    model : torch.nn.Module
        Or a single batch norm.
    fuse : bool
        Only False is accepted. Whole models are not fused: a recorded graph of a forward is not
        the forward. To fuse an addition and an activation into a batch norm, pass `residual` and
        `activation` to the layers of this module.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is not a `torch.nn.Module`.
    ValueError
        If `fuse` is true. The model is then unchanged.

    See Also
    --------
    report : what was converted, what was not, and why.
    revert : undo the conversion.
    """
    _check_model(model)
    if fuse:
        raise ValueError(
            f"fuse is {fuse!r:.60}; expected False: a recorded graph of a forward is not the "
            "forward. To fuse, pass residual= and activation= to bnfast.torch's layers"
        )
    replace_kernels()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not _is_ours(module) and _why_not(module) is None:
            module.__class__ = OURS.get(type(module)) or derived(type(module))
    return model


def revert(model: _Model) -> _Model:
    """Undo `convert`, in place.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        `model`. Its layers are PyTorch's own again and keep their present state.

    Raises
    ------
    TypeError
        If `model` is not a `torch.nn.Module`.
    """
    _check_model(model)
    theirs = {ours: their for their, ours in OURS.items()}
    for module in model.modules():
        kind = theirs.get(type(module)) or vars(type(module)).get("derived_from")
        if kind is not None:
            module.__class__ = kind
    return model


@dataclass(frozen=True)
class Report:
    """What `convert` did to a model.

    Attributes
    ----------
    converted : tuple of str
        Names of the layers that run on bnfast.
    left : dict of str to str
        Names of the batch norms that do not run on bnfast, and why.
    """

    converted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} batch norms run on bnfast"]
        lines += [f"{name}: left to PyTorch, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


@overload
def report() -> Activity: ...
@overload
def report(model: nn.Module) -> Report | FrozenReport: ...
def report(model: Any = _NO_MODEL) -> Activity | Report | FrozenReport:
    """Report which batch norms of a model run on bnfast, and why others do not.

    Without a model, report how many calls in this process ran on bnfast through `enable`, and why
    others were left to PyTorch.

    Only modules derived from PyTorch's batch norms are named. Other kinds of batch norm, such as a
    `FrozenBatchNorm2d`, and calls of ``torch.nn.functional.batch_norm`` in a forward are not seen.

    Parameters
    ----------
    model : torch.nn.Module, optional

    Returns
    -------
    Activity, Report or FrozenReport
        An Activity without a model, a FrozenReport for a model that `freeze` returned. The model
        itself is named "(model)". ``print`` shows one line per layer.

    Raises
    ------
    TypeError
        If `model` is not a `torch.nn.Module`.
    """
    if model is _NO_MODEL:
        return activity()
    _check_model(model)
    from .freeze import frozen_report  # imports this module

    if (frozen := frozen_report(model)) is not None:
        return frozen
    converted, left = [], {}
    for path, module in model.named_modules():
        name = path or "(model)"
        if _is_ours(module):
            converted.append(name)
        elif (why := _why_not(module)) is not None:
            left[name] = why
        elif isinstance(module, _BatchNorm):
            left[name] = "convert has not been called"
    return Report(tuple(converted), left)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        what = model if isinstance(model, type) else type(model)
        name = f"{what.__module__}.{what.__qualname__}"
        of_numpy = ", a layer for NumPy arrays" if issubclass(what, NUMPY_LAYERS) else ""
        raise TypeError(
            f"model is {'the class' if what is model else 'of type'} {name}{of_numpy}; "
            "expected a torch.nn.Module"
        )


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, BatchNormOnCPU)  # or a class derived from it, as parametrizations do


def _why_not(module: nn.Module) -> str | None:
    """Return why convert skips a batch norm; None for those it converts and for other modules."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "")
        return f"a scripted {scripted}" if "BatchNorm" in scripted else None
    if not isinstance(module, _BatchNorm):
        return None
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, _LazyNormBase):
        return f"{kind.__name__} becomes a batch norm at its first forward; convert after that"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized; convert before that"
    if kind in OURS or kind.forward is _BatchNorm.forward:
        return None
    return f"{kind.__name__} has a forward of its own, which enable() serves"


# ---- Classes that users derived from PyTorch's

_derived: dict[type[nn.Module], type[nn.Module]] = {}


def derived(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the user's class with our forward. Each class is made once, at its first use."""
    if kind not in _derived:
        members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "derived_from": kind}
        made = type(kind.__name__, (BatchNormOnCPU, kind), {**members, "__reduce_ex__": _reduce})
        _derived.setdefault(kind, made)
    return _derived[kind]


def _reduce(module: Any, protocol: int) -> Any:
    """Pickle by the user's class: pickle cannot find ours by its name."""
    constructor, args, *rest = super(type(module), module).__reduce_ex__(protocol)
    if args[:1] != (type(module),):  # the user's own __reduce__
        return constructor, args, *rest
    return _rebuilt, (module.derived_from, constructor, *args[1:]), *rest


def _rebuilt(kind: type[nn.Module], constructor: Any, *args: Any) -> Any:
    return constructor(derived(kind), *args)
