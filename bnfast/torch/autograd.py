"""Gradients of the kernels, of every order.

A forward that wants gradients runs in an `autograd.Function`; its backward is the kernel, and the
gradient of that backward is made of PyTorch's operations, so that it can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels import Activation, Gradients, Running

# ---- The same by PyTorch's operations: what gradients of gradients are made of


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Apply an activation by PyTorch's own operation."""
    name, slope = name_and_slope(activation)
    if name is None:
        return y
    if name == "leaky_relu":
        return F.leaky_relu(y, slope)
    return F.relu6(y) if name == "relu6" else F.relu(y)


def name_and_slope(activation: Activation) -> tuple[str | None, float]:
    """Return an activation as the two values that an operator takes."""
    return activation if isinstance(activation, tuple) else (activation, 0.01)


def with_slope(name: str | None, slope: float) -> Activation:
    """Return an activation as bnfast takes it."""
    return (name, slope) if name == "leaky_relu" else name


def _slopes(z: Tensor, activation: Activation) -> Tensor:
    """Return the activation's derivative where its input was z, or its output."""
    name, slope = name_and_slope(activation)
    ones = torch.ones_like(z)
    if name == "leaky_relu":
        return torch.where(z > 0, ones, slope * ones)
    flat = (z <= 0) | (z >= 6) if name == "relu6" else z <= 0
    return torch.where(flat, 0 * ones, ones)


def formula(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    through: bool,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_backward` does, all four, as differentiable operations in float64."""
    channel = (1, -1, *(1 for _ in range(x.dim() - 2)))
    others = [axis for axis in range(x.dim()) if axis != 1]
    wide_x, g = x.double(), dy.double()
    gamma = torch.ones_like(mean) if weight is None else weight.double()
    if through:
        mean = wide_x.mean(others)
        var = (wide_x - mean.view(channel)).square().mean(others)
        # Of the value that inv_std has, with the derivative of 1 / sqrt(var + eps).
        inv_std = (inv_std.detach() ** -2 + (var - var.detach())).rsqrt()
    x_hat = (wide_x - mean.view(channel)) * inv_std.view(channel)
    if activation is not None:
        z = x_hat * gamma.view(channel) if y is None else y.double()
        if y is None and bias is not None:
            z = z + bias.double().view(channel)
        g = g * _slopes(z.detach(), activation)
    dbias, dweight = g.sum(others), (g * x_hat).sum(others)
    dx = g
    if through:
        m = x.numel() // x.shape[1]
        dx = g - (dbias.view(channel) + x_hat * dweight.view(channel)) / m
    dx = dx * (gamma * inv_std).view(channel)
    return dx.to(x.dtype), dweight, dbias, g.to(x.dtype)


# ---- Gradients


def save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    through: bool,
    activation: Activation,
) -> None:
    """Keep what a backward needs: the output only where the input alone cannot tell the mask."""
    masked_by_y = activation is not None and residual is not None
    ctx.save_for_backward(
        x,
        weight,
        bias if activation is not None else None,
        y if masked_by_y else None,
        mean,
        inv_std,
    )
    ctx.through, ctx.activation = through, activation
    ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))


def gradients(ctx: Any, dy: Tensor) -> Gradients:
    """Return the gradients of what `save` kept the inputs of, those that autograd asks for."""
    x, weight, bias, y, mean, inv_std = ctx.saved_tensors
    *needs, to_residual = ctx.needs_input_grad[:4]
    passes = to_residual and ctx.activation is None  # the gradient of a sum is that of its terms
    dx, dweight, dbias, dresidual = _any_backward(
        dy,
        x,
        mean,
        inv_std,
        weight,
        bias,
        y,
        ctx.through,
        ctx.activation,
        (*needs, to_residual and not passes),
    )
    return (
        dx,
        None if dweight is None else dweight.to(ctx.dtypes[0]),
        None if dbias is None else dbias.to(ctx.dtypes[1]),
        dy if passes else dresidual,
    )


def _any_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    through: bool,
    activation: Activation,
    needs: tuple[bool, ...],
) -> Gradients:
    """Compute a backward by the kernels, or by what can stand for them here."""
    if not any(needs):
        return None, None, None, None
    dy = dy.resolve_neg()
    args = (dy, x, mean, inv_std, weight, bias, y, through)
    if torch.compiler.is_compiling() or kernels.is_recorded():
        return _operator_backward(*args, activation, needs)
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched
    if batched or kernels.is_transformed() or not (kernels.is_plain(dy) and kernels.is_plain(x)):
        return _wanted(formula(*args, activation), needs)
    if torch.is_grad_enabled():  # create_graph: the operator has gradients of its own
        return _operator_backward(*args, activation, needs)
    # The layers' own type of parameters, so that no operation of PyTorch's has to round.
    vectors = np.float64 if x.dtype is torch.float64 else np.float32
    return kernels.backward(*args, activation, needs, vectors=vectors)


def _operator_backward(*args: Any) -> Gradients:
    *tensors, activation, needs = args
    found = torch.ops.bnfast.batch_norm_backward(*tensors, *name_and_slope(activation), list(needs))
    return _wanted(found, needs)


def _wanted(found: Any, needs: tuple[bool, ...]) -> Any:
    return tuple(
        gradient if needed else None for gradient, needed in zip(found, needs, strict=True)
    )


class _BatchNorm(torch.autograd.Function):
    """A training forward that somebody wants gradients of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running | None,
        momentum: float,
        eps: float,
        activation: Activation,
    ) -> Tensor:
        y, (mean, _, inv_std) = kernels.forward(
            x, weight, bias, residual, running, momentum, eps, activation
        )
        mean, inv_std = torch.from_numpy(mean), torch.from_numpy(inv_std)
        save(ctx, x, weight, bias, residual, y, mean, inv_std, True, activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return (*gradients(ctx, dy), None, None, None, None)


class _Normalize(torch.autograd.Function):
    """The same with given statistics, which are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: Activation,
    ) -> Tensor:
        y = kernels.normalize(x, mean, var, weight, bias, residual, eps, activation)
        save_fixed(ctx, x, weight, bias, residual, y, mean, var, eps, activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return (*gradients(ctx, dy), None, None, None, None)


def save_fixed(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Activation,
) -> None:
    """Keep the same for statistics that are constants."""
    # Copies: a training forward in between may move the running statistics.
    mean, var = (running.to(torch.float64, copy=True) for running in (mean, var))
    inv_std = (var + eps).rsqrt()
    save(ctx, x, weight, bias, residual, y, mean, inv_std, False, activation)


# ---- What layers call


@torch.compiler.disable  # what it compiles, it sees as operators
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Normalise plain tensors with the batch, and move the running statistics.

    Parameters
    ----------
    x : Tensor
        Channels on axis 1; `is_plain`.
    weight, bias : Tensor, shape (channels,), optional
    running : tuple of three Tensors or None, optional
        Mean and variance to be moved towards the batch's by `momentum`, and the number of batches.
    momentum, eps : float
    residual : Tensor, optional
        Added before the activation; shape and dtype of `x`.
    activation : {None, "relu", "relu6", "leaky_relu"} or ("leaky_relu", slope)

    Returns
    -------
    Tensor
        In the memory order of `x`.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.batch_norm`; running statistics are then as they were.
    """
    args = (x, weight, bias, residual, running, momentum, eps, activation)
    if _needs_gradient(x, weight, bias, residual):
        y: Tensor = _BatchNorm.apply(*args)
        return y
    return kernels.forward(*args)[0]


@torch.compiler.disable  # what it compiles, it sees as operators
def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Normalise plain tensors with a given mean and variance.

    Parameters
    ----------
    x, weight, bias, eps, residual, activation
        As in `batch_norm`.
    mean, var : Tensor, shape (channels,)

    Returns
    -------
    Tensor
        In the memory order of `x`.
    """
    if _needs_gradient(x, weight, bias, residual):
        y: Tensor = _Normalize.apply(x, weight, bias, residual, mean, var, eps, activation)
        return y
    return kernels.normalize(x, mean, var, weight, bias, residual, eps, activation)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    given = [t for t in tensors if t is not None]
    # As in PyTorch, there is no gradient where all were made in inference mode.
    return any(t.requires_grad for t in given) and not all(t.is_inference() for t in given)
