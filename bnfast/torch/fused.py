"""Batch norm, addition and activation as one operator, and its gradients.

``torch.ops.bnfast.batch_norm_act`` and its backward are written in C, below autograd. The graphs
of `bnfast.torch.backend` call them. `batch_norm_act` adds autograd, for the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnfast import _core, _options

from . import process

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import TypeAlias

    from bnfast._types import Activation

    Vector: TypeAlias = Tensor | None
    # The gradients of x, weight, bias and residual; None where not needed.
    Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_library = torch.library.Library("bnfast", "DEF")
# y = act(batch_norm(x) + residual); the rest as in aten::native_batch_norm.
_library.define(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, bool training, float momentum, float eps, Tensor? residual,"
    " str? activation, float slope) -> (Tensor y, Tensor save_mean, Tensor save_invstd)"
)
# beside, where there was a residual: the output, if it tells the activation's derivative, else the
# residual. Where there was none, x tells what the output was.
_library.define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_invstd,"
    " bool training, float eps, Tensor? beside, str? activation, float slope, bool[4] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor with the strides of PyTorch's batch norm of x."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _vector_like(x: Tensor, *vectors: Vector) -> Tensor:
    given = next((v for v in vectors if v is not None), x)
    return given.new_empty(x.shape[1])


@torch.library.register_fake("bnfast::batch_norm_act", lib=_library)
def _(
    x: Tensor,
    weight: Vector,
    bias: Vector,
    running_mean: Vector,
    running_var: Vector,
    training: bool,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    vector = _vector_like(x, weight, bias, running_mean, running_var)
    save_mean, save_invstd = (vector.new_empty(x.shape[1] if training else 0) for _ in range(2))
    return empty_like(x), save_mean, save_invstd


@torch.library.register_fake("bnfast::batch_norm_act_backward", lib=_library)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Vector,
    bias: Vector,
    running_mean: Vector,
    running_var: Vector,
    save_mean: Vector,
    *others: Any,
) -> Gradients:
    vectors = (weight, running_mean, running_var, save_mean)
    made = (
        lambda: empty_like(x),
        lambda: _vector_like(x, *vectors),
        lambda: _vector_like(x, *vectors),
        lambda: empty_like(x),
    )
    return tuple(make() if n else None for make, n in zip(made, others[-1], strict=True))  # type: ignore[return-value]


process.install()


# ---- Who runs a call

DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_CLASSES = (Tensor, torch.nn.Parameter)


def is_plain(x: Any, dtypes: Collection[torch.dtype] = DTYPES) -> bool:
    """Whether x is an ordinary dense tensor whose values the kernels can read now.

    A tensor without memory (a symbolic zero, a parameter whose storage was freed) is not.
    """
    return (
        type(x) in _CLASSES
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in dtypes
        and not x.is_neg()
        and (x.data_ptr() != 0 or x.numel() == 0)
    )


def is_transformed() -> bool:
    """Whether a tensor may stand for more than its values: functorch, forward mode, jit."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_recorded() -> bool:
    """Whether a mode must see every operation: fake tensors, proxies, counters."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def takes(x: Any, residual: Any, vectors: tuple[Vector, ...], training: bool) -> bool:
    """Whether the operator takes these tensors as they are; PyTorch handles or refuses the others.

    Parameters
    ----------
    x, residual
        The layer's arguments.
    vectors : tuple
        weight, bias, running_mean and running_var.
    training : bool
        Whether the batch's own statistics are used.
    """
    given = [t for t in (x, residual, *vectors) if t is not None]
    if is_transformed() or is_recorded() or not all(is_plain(t) for t in given):
        return False
    kinds = {v.dtype for v in vectors if v is not None}
    allowed = {x.dtype} if x.dtype in (torch.float32, torch.float64) else {x.dtype, torch.float32}
    return (
        x.dim() >= 2
        and x.numel() > (x.shape[1] if training else 0)
        and len(kinds) <= 1
        and kinds <= allowed
        and all(v is None or v.shape == x.shape[1:2] for v in vectors)
        # PyTorch raises for running statistics that require grad; so must we.
        and not any(v is not None and v.requires_grad for v in vectors[2:])
        and (residual is None or (residual.shape == x.shape and residual.dtype is x.dtype))
    )


# ---- Activations


def name_and_slope(activation: Activation) -> tuple[str | None, float]:
    """Return an activation as the two values that an operator takes."""
    if activation is None or isinstance(activation, tuple):
        return activation or (None, 0.0)
    return activation, _core.ACTIVATIONS[activation].slope


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Apply an activation with PyTorch's own operation."""
    name, slope = name_and_slope(activation)
    if name is None:
        return y
    activated: Tensor = getattr(F, name)(y, *((slope,) if slope else ()))
    return activated


def tells_derivative(activation: Any) -> bool:
    """Whether an activation's output tells its derivative."""
    return _options.is_from_output(activation, _core.ACTIVATIONS)


def beside(y: Tensor, residual: Tensor | None, activation: Any) -> Tensor | None:
    """Return what a forward keeps, beside x, for the activation's derivative: y or the residual.

    Nothing where there was no residual or no activation: then x tells.
    """
    if residual is None or activation is None:
        return None
    return y if tells_derivative(activation) else residual


def residual_and_output(kept: Any, activation: Any) -> tuple[Any, Any]:
    """Return what `beside` kept as the residual and the output of a backward, one of them None."""
    return (None, kept) if tells_derivative(activation) else (kept, None)


def rest(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """Add and activate with PyTorch's own operations."""
    return activate(y if residual is None else y + residual, activation)


# ---- Autograd


def batch_norm_act(
    x: Tensor,
    weight: Vector,
    bias: Vector,
    running_mean: Vector,
    running_var: Vector,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Return ``act(batch_norm(x) + residual)``, with gradients of every order.

    Parameters
    ----------
    x : Tensor
        And all others: what `takes` said yes to.
    weight, bias, running_mean, running_var : Tensor, shape (channels,), optional
    training : bool
        Normalise by the batch, and move the running statistics towards it by `momentum`.
    momentum, eps : float
    residual : Tensor, optional
        Added before the activation; shape and dtype of `x`.
    activation : str, ("leaky_relu", slope) or None

    Returns
    -------
    Tensor
        With the strides of PyTorch's batch norm.
    """
    y: Tensor = _BatchNormAct.apply(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        *name_and_slope(activation),
    )
    return y


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Vector,
        bias: Vector,
        residual: Tensor | None,
        running_mean: Vector,
        running_var: Vector,
        training: bool,
        momentum: float,
        eps: float,
        *activation: Any,
    ) -> Tensor:
        rest = (training, momentum, eps, residual, *activation)
        y: Tensor
        y, save_mean, save_invstd = torch.ops.bnfast.batch_norm_act(
            x, weight, bias, running_mean, running_var, *rest
        )
        fixed: tuple[Vector, Vector] = (None, None)
        if not training:  # copies: a training forward before the backward may change them
            fixed = tuple(v.clone() for v in (running_mean, running_var) if v is not None)
        kept = beside(y, residual, activation[0])
        ctx.save_for_backward(x, weight, bias, *fixed, save_mean, save_invstd, kept)
        ctx.options = (training, eps, *activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        name = ctx.options[2]
        *needs, to_residual = ctx.needs_input_grad[:4]
        passes = to_residual and name is None  # the gradient of a sum is the gradient of each term
        needs = [*needs, to_residual and not passes]
        again = torch.is_grad_enabled()
        plain = is_plain(dy) and not is_recorded() and not is_transformed()
        found = (_formula if again or not plain else _kernel)(ctx, dy, needs)
        *others, dresidual = found
        return (*others, dy if passes else dresidual, *(None,) * 7)


def _kernel(ctx: Any, dy: Tensor, needs: list[bool]) -> Gradients:
    if not any(needs):
        return None, None, None, None
    training, eps, *activation = ctx.options
    *tensors, kept = ctx.saved_tensors
    found: Gradients = torch.ops.bnfast.batch_norm_act_backward(
        dy, *tensors, training, eps, kept, *activation, needs
    )
    return found


def _formula(ctx: Any, dy: Tensor, needs: list[bool]) -> Gradients:
    """Compute the gradients with PyTorch's operators, which can be differentiated again."""
    x, weight, bias, mean, var, *_, kept = ctx.saved_tensors
    training, eps, name, slope = ctx.options
    with torch.enable_grad():
        inputs = [None if t is None else _alias(t) for t in (x, weight, bias)]
        z = F.batch_norm(inputs[0], mean, var, inputs[1], inputs[2], training, 0.0, eps)
        g = dy if name is None else _before_activation(dy, z, kept, (name, slope))
        wanted = [t for t, n in zip(inputs, needs, strict=False) if n]
        found = iter(torch.autograd.grad(z, wanted, g, create_graph=True) if wanted else ())
    dx, dweight, dbias = (next(found) if n else None for n in needs[:3])
    return dx, dweight, dbias, g if needs[3] else None


def _before_activation(dy: Tensor, z: Tensor, kept: Tensor | None, activation: Any) -> Tensor:
    """Return dy times the activation's derivative, itself differentiable."""
    residual, y = residual_and_output(kept, activation)
    if tells_derivative(activation):  # piecewise linear: the second derivative is 0
        at = (z if y is None else y).detach().requires_grad_()
    else:
        at = z if residual is None else z + residual
    (g,) = torch.autograd.grad(activate(at, activation), at, dy, create_graph=True)
    return g


def _alias(t: Tensor) -> Tensor:
    """Return t as a variable of its own, so that a gradient stops there and not at t's history."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
