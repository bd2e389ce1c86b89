"""Merge a batch norm's arithmetic into a layer beside it, and check which layers allow it.

As in `bnfast.inference`, all is computed in float64 and rounded once, to the type of the layer's
weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .following import has_hooks, is_called_plainly

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The layers that fold, and the rank of their input with a batch axis.
_LINEAR: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Methods that a subclass must not override if it is to fold.
_METHODS = ("forward", "_conv_forward", "_output_padding")
_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_STATE = ("running_mean", "running_var", "weight", "bias")


class Affine(NamedTuple):
    """What a batch norm computes in inference: ``(x - mean) * scale + shift``, in float64."""

    mean: Tensor
    scale: Tensor
    shift: Tensor

    @property
    def at_zero(self) -> Tensor:
        """The output for an input of zero."""
        return self.shift - self.mean * self.scale


# ---- Batch norms


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `freeze` treats a module as a batch norm."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in getattr(module, "original_name", "")
    return isinstance(module, _BatchNorm) or _frozen_kind(module) is not None


def why_no_affine(norm: nn.Module) -> str | None:
    """Return why a batch norm is not a fixed affine map that can be folded; None if it is."""
    kind = type(norm).__name__
    if isinstance(norm, torch.jit.ScriptModule):
        return "it is scripted"
    if why := _why_not_plain(norm):
        return why
    if isinstance(norm, _BatchNorm) and not (_is_torch_forward(norm) or _is_timm(norm)):
        return f"{kind} has a forward of its own"
    if isinstance(norm, _BatchNorm) and norm.training:
        return "eval() leaves it in training"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics and normalises by each batch"
    return None


def affine_of(norm: Any) -> Affine:
    """Return the affine map of a batch norm that passed `why_no_affine`."""
    mean, var, weight, bias = (_wide(getattr(norm, name)) for name in _STATE)
    scale = 1 / torch.sqrt(var + _eps(norm))
    scale = scale if weight is None else scale * weight
    return Affine(mean, scale, torch.zeros_like(mean) if bias is None else bias)


def successor(norm: Any, after: nn.Module | None = None) -> nn.Module:
    """Return the module that replaces a folded batch norm: its other operations, or none.

    A linear layer folds only for inputs with two axes. With three, the batch norm's channels are
    the middle axis and the linear layer's are the last. `Flatten` leaves two axes as they are; for
    three it gives a shape that is clearly wrong.
    """
    first = nn.Flatten() if isinstance(after, nn.Linear) else nn.Identity()
    rest = _extras(norm)
    rest = [first, *rest] if not rest or isinstance(after, nn.Linear) else rest
    made = rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    return made.eval()


def _extras(norm: Any) -> list[nn.Module]:
    extras = [getattr(norm, name, None) for name in ("drop", "act")] if _is_timm(norm) else []
    return [m for m in extras if m is not None and type(m) is not nn.Identity]


def _eps(norm: Any) -> float:
    # transformers has it as a constant in its code
    return float(norm.eps) if hasattr(norm, "eps") else 1e-5


def _wide(values: Tensor | None) -> Any:
    return None if values is None else values.detach().to("cpu", torch.float64)


def _definer(module: nn.Module) -> type:
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_torch_forward(norm: nn.Module) -> bool:
    """Whether a batch norm runs PyTorch's forward, or bnfast's, which computes the same."""
    definer = _definer(norm)
    ours = definer.__module__.startswith("bnfast.torch.")
    return ours or definer.__module__ == nn.BatchNorm2d.__module__


def _is_timm(norm: nn.Module) -> bool:
    """Whether it is timm's batch norm, followed by dropout and an activation."""
    definer = _definer(norm)
    known = ("BatchNormAct2d", "FrozenBatchNormAct2d")
    return _root(definer) == "timm" and definer.__name__ in known


def _frozen_kind(module: nn.Module) -> str | None:
    """Return the class name of a frozen batch norm whose forward is known, else None."""
    definer = _definer(module)
    root, name = _root(definer), definer.__name__
    known = (
        (root in ("torchvision", "detectron2") and name == "FrozenBatchNorm2d")
        or (root == "timm" and name == "FrozenBatchNormAct2d")
        or (root == "transformers" and name.endswith("FrozenBatchNorm2d"))
    )
    return name if known and all(name in module._buffers for name in _STATE) else None


# ---- Layers beside them


def is_linear(layer: Any) -> bool:
    """Whether a module is a linear layer or a convolution, by class."""
    return _linear_kind(layer) is not None


def _linear_kind(layer: Any) -> type[nn.Module] | None:
    for kind in _LINEAR:
        if isinstance(layer, kind):
            same = all(
                getattr(type(layer), name, None) is getattr(kind, name, None) for name in _METHODS
            )
            return kind if same else None
    return None


def why_not_after(layer: Any, norm: nn.Module) -> str | None:
    """Return why a batch norm does not fold into the layer before it."""
    return _why_not_beside(layer, norm, _outputs(layer))


def why_not_before(layer: Any, norm: nn.Module) -> str | None:
    """Return why a module does more with its input than its state shows; None if it does not."""
    if _extras(norm):
        return "it has an activation or dropout behind it"
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if why := _why_not_beside(layer, norm, inputs):
        return why
    if not _sees_padding(layer) or not affine_of(norm).at_zero.any():
        return None
    if isinstance(layer, _TRANSPOSED):
        return "each output of a transposed convolution sees another part of the kernel"
    return "the convolution after it pads its output with zeros, which are not zeros before it"


def _why_not_beside(layer: Any, norm: Any, channels: int) -> str | None:
    if why := _why_not_plain(layer):
        return f"the {type(layer).__name__} beside it cannot be changed: {why}"
    if not {"weight", "bias"} <= layer._parameters.keys():
        return f"the {type(layer).__name__} beside it keeps its weight elsewhere"
    rank = _LINEAR[_linear_kind(layer) or nn.Linear]
    ranks = next((r for kind, r in _RANKS.items() if isinstance(norm, kind)), None)
    if ranks is None and _frozen_kind(norm) is not None:
        ranks = (4,)
    if ranks is not None and rank not in ranks:
        return f"it takes other tensors than the {type(layer).__name__} beside it"
    if channels != norm.running_mean.numel():
        return (
            f"it has {norm.running_mean.numel()} channels, the {type(layer).__name__} beside it "
            f"{channels}"
        )
    here, there = layer.weight.dtype, norm.running_mean.dtype
    if there is not here and not (there is torch.float32 and here in _TYPES[2:]):
        return f"its statistics are {there}, the weight beside it {here}"
    if layer.weight.device != norm.running_mean.device:
        return f"it is on {norm.running_mean.device}, the layer beside it on {layer.weight.device}"
    return None


def _why_not_plain(module: Any) -> str | None:
    """Return why a module's state is not all that it does with its input."""
    if has_hooks(module):
        return "it has hooks"
    if not is_called_plainly(module):
        return "its forward was replaced on the instance"
    if is_parametrized(module):
        return "it is parametrized"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name == "num_batches_tracked":
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return f"{name} is a {type(tensor).__name__}, {tensor.layout}"
        if tensor.dtype not in _TYPES:
            return f"{name} is {tensor.dtype}"
        if tensor.is_meta:
            return f"{name} is on the meta device and has no values"
    return None


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _sees_padding(layer: Any) -> bool:
    """Whether some outputs of a layer see less than a whole kernel of inputs."""
    if isinstance(layer, nn.Linear):
        return False
    if isinstance(layer, _TRANSPOSED):
        return True
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False  # the other padding modes repeat inputs
    return layer.padding == "same" or any(layer.padding)


# ---- Arithmetic


def fold_after(layer: Any, norm: nn.Module) -> str | None:
    """Merge the batch norm after a layer into it; return why if it cannot be done."""
    affine = affine_of(norm)
    weight = _wide(layer.weight)
    along = _along(affine.scale, weight, isinstance(layer, _TRANSPOSED), layer, output=True)
    bias = 0 if layer.bias is None else _wide(layer.bias)
    return _replace(layer, weight * along, (bias - affine.mean) * affine.scale + affine.shift)


def fold_before(layer: Any, norm: nn.Module) -> str | None:
    """Merge the batch norm before a layer into it; return why if it cannot be done."""
    affine = affine_of(norm)
    weight, transposed = _wide(layer.weight), isinstance(layer, _TRANSPOSED)
    along = _along(affine.scale, weight, transposed, layer, output=False)
    bias = torch.zeros(_outputs(layer)) if layer.bias is None else layer.bias
    bias = _wide(bias)
    if not transposed:  # transposed ones fold only if zero stays zero
        through = weight * _along(affine.at_zero, weight, transposed, layer, output=False)
        bias = bias + through.flatten(1).sum(1)
    return _replace(layer, weight * along, bias)


def _along(values: Tensor, weight: Tensor, transposed: bool, layer: Any, output: bool) -> Tensor:
    """Reshape one value per channel so that it multiplies a weight.

    Axis 0 of the weight has all channels of one side, axis 1 the channels of one group of the
    other.
    """
    rest = (1,) * (weight.dim() - 2)
    if output != transposed:
        return values.view(-1, 1, *rest)
    groups = getattr(layer, "groups", 1)
    by_group = values.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return by_group.reshape(weight.shape[0], -1, *rest)


def _replace(layer: Any, weight: Tensor, bias: Tensor) -> str | None:
    dtype = layer.weight.dtype
    new = [rounded(values, dtype) for values in (weight, bias)]
    if not all(bool(values.isfinite().all()) for values in new):
        return f"the weights folded would not be finite in {dtype}"
    old = layer.weight
    layer.weight = _frozen(torch.empty_like(old).copy_(new[0]))  # keep the memory format
    layer.bias = _frozen(new[1].to(old.device))
    return None


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to nearest even, once.

    PyTorch converts float64 to half types by way of float32, which would round twice. Here the
    float32 step rounds to odd: toward zero, with the last bit set if anything was lost. Then no
    number falls on the midpoint of two halves unless it was there before.
    """
    if dtype in _TYPES[:2]:
        return values.to(dtype)
    single = values.to(torch.float32)
    beyond = single.double().abs() > values.abs()
    single = torch.where(beyond, single.nextafter(torch.zeros_like(single)), single)
    lost = (single.double() != values).to(torch.int32)
    return (single.view(torch.int32) | lost).view(torch.float32).to(dtype)
