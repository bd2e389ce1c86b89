"""The kernels as ``torch.ops.bnfast`` operators, for whatever records operations to run them later.

`torch.compile`, `torch.export` and dispatch modes see an operator, its fake kernel and its
gradients. Calls that are run at once do not pass here (see `modules`): dispatching to an operator
written in Python costs several times what a small batch norm does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd, kernels

_library = torch.library.Library("bnfast", "DEF")
_library.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps,"
    " str? activation=None, float slope=0.01)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor inv_std)"
)
_library.define(
    "normalize(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var,"
    " float eps, str? activation=None, float slope=0.01) -> Tensor"
)
# What `needs`, of x, weight, bias and residual, leaves out is an empty tensor.
_library.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor inv_std, Tensor? weight,"
    " Tensor? bias, Tensor? y, bool through, str? activation, float slope, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "batch_norm", "CPU")
def _batch_norm_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None = None,
    slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, (mean, var, inv_std) = kernels.forward(
        x, weight, bias, residual, None, 0.0, eps, autograd.with_slope(activation, slope)
    )
    return y, torch.from_numpy(mean), torch.from_numpy(var), torch.from_numpy(inv_std)


@torch.library.register_fake("bnfast::batch_norm", lib=_library)
def _batch_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None = None,
    slope: float = 0.01,
) -> tuple[Tensor, ...]:
    stats = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))
    return (torch.empty_like(x), *stats)


def _batch_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, residual, _, activation, slope = inputs
    y, mean, var, inv_std = output
    ctx.mark_non_differentiable(mean, var, inv_std)
    activation = autograd.with_slope(activation, slope)
    autograd.save(ctx, x, weight, bias, residual, y, mean, inv_std, True, activation)


def _batch_norm_gradients(ctx: Any, dy: Tensor, *of_statistics: Any) -> Any:
    return (*autograd.gradients(ctx, dy), None, None, None)


torch.library.register_autograd(
    "bnfast::batch_norm",
    _batch_norm_gradients,
    setup_context=_batch_norm_setup,
    lib=_library,
)


@torch.library.impl(_library, "normalize", "CPU")
def _normalize_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None = None,
    slope: float = 0.01,
) -> Tensor:
    return kernels.normalize(
        x, mean, var, weight, bias, residual, eps, autograd.with_slope(activation, slope)
    )


@torch.library.register_fake("bnfast::normalize", lib=_library)
def _normalize_fake(x: Tensor, *others: Any, **options: Any) -> Tensor:
    return torch.empty_like(x)


def _normalize_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, residual, mean, var, eps, activation, slope = inputs
    activation = autograd.with_slope(activation, slope)
    autograd.save_fixed(ctx, x, weight, bias, residual, output, mean, var, eps, activation)


def _normalize_gradients(ctx: Any, dy: Tensor) -> Any:
    return (*autograd.gradients(ctx, dy), None, None, None, None, None)


torch.library.register_autograd(
    "bnfast::normalize", _normalize_gradients, setup_context=_normalize_setup, lib=_library
)


@torch.library.impl(_library, "batch_norm_backward", "CPU")
def _batch_norm_backward_cpu(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    through: bool,
    activation: str | None,
    slope: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    found = kernels.backward(
        dy,
        x,
        mean,
        inv_std,
        weight,
        bias,
        y,
        through,
        autograd.with_slope(activation, slope),
        tuple(needs),
    )
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


@torch.library.register_fake("bnfast::batch_norm_backward", lib=_library)
def _batch_norm_backward_fake(
    dy: Tensor, x: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, ...]:
    needs = others[-1]
    vector = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    like = (torch.empty_like(x), *vector, torch.empty_like(x))
    return tuple(
        given if needed else x.new_empty(0) for given, needed in zip(like, needs, strict=True)
    )


def _batch_norm_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, through, activation, slope, needs = inputs
    ctx.save_for_backward(*tensors)
    ctx.needs = needs
    ctx.options = (through, autograd.with_slope(activation, slope))


def _batch_norm_backward_gradients(ctx: Any, *cotangents: Tensor) -> Any:
    """Differentiate the formula, which recomputes the statistics as functions of x."""
    again = torch.is_grad_enabled()
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    with torch.enable_grad():
        inputs: list[Any] = [_alias(t) for t in ctx.saved_tensors]
        results = autograd.formula(*inputs, *ctx.options)
        pairs = [(r, c) for r, c, n in zip(results, cotangents, ctx.needs, strict=True) if n]
        found = torch.autograd.grad(
            [r for r, _ in pairs],
            [inputs[i] for i in wanted],
            [c for _, c in pairs],
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
    gradients = dict(zip(wanted, found, strict=True))
    return tuple(gradients.get(i) for i in range(len(ctx.needs_input_grad)))


def _alias(t: Tensor | None) -> Tensor | None:
    """Return t as a variable of its own, so that a gradient stops there and not at t's past."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


torch.library.register_autograd(
    "bnfast::batch_norm_backward",
    _batch_norm_backward_gradients,
    setup_context=_batch_norm_backward_setup,
    lib=_library,
)

batch_norm = torch.ops.bnfast.batch_norm
normalize = torch.ops.bnfast.normalize
batch_norm_backward = torch.ops.bnfast.batch_norm_backward
