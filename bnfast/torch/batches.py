"""Training by other batches than all values: masked, virtual and renormalised ones.

PyTorch's operators know none of them, so these calls go through `bnfast._core`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnfast import _core, _errors, _masks, _options
from bnfast.moments import Moments
from bnfast.renorm import Correction

from . import checks, fused, tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnfast._types import Activation, Array

    from .fused import Vector
    from .modules import BatchNormOnCPU


class Limits(NamedTuple):
    """Those of a renormalisation's r and d."""

    rmax: float
    dmax: float


def forward(
    layer: BatchNormOnCPU,
    x: Tensor,
    residual: Tensor | None,
    activation: Activation,
    mask: Any,
) -> Tensor:
    """Run a layer's forward in training.

    Parameters
    ----------
    layer : torch.nn.Module
        One of bnfast's batch norms; its statistics move.
    x : Tensor, shape (N, C, ...)
    residual : Tensor or None
    activation : str, tuple or None
    mask : Tensor, array_like or None
        Which values count.

    Returns
    -------
    Tensor
        With the strides of PyTorch's batch norm.
    """
    weight, bias = layer.weight, layer.bias  # once: parametrizations compute them
    call = _Call.of(layer, x, weight, bias, residual, activation, mask)
    inputs = (x.resolve_neg(), weight, bias, residual)
    if checks.needs_gradient(*inputs):
        checks.check_savable(inputs[0], weight, None if activation is None else bias)
    y: Tensor = _OfBatches.apply(*inputs, call)
    call.write_back(layer)
    return y


class _Call(NamedTuple):
    """The checked options of a forward, and copies of the statistics that it moves."""

    eps: float
    activation: Activation
    mask: Array | None
    virtual_batch_size: int | None
    limits: Limits | None
    momentum: float | None
    moves: bool
    mean: Vector
    var: Vector
    counter: Vector

    @classmethod
    def of(
        cls,
        layer: BatchNormOnCPU,
        x: Any,
        weight: Any,
        bias: Any,
        residual: Any,
        activation: Any,
        mask: Any,
    ) -> _Call:
        """Read a layer's options and check all tensors."""
        if fused.is_transformed() or fused.is_recorded():
            raise RuntimeError(
                f"{type(layer).__name__} cannot be traced or transformed in training with a mask, "
                "virtual batches or renormalisation; call eval(), or leave these out"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"input is {_errors.described(x)}; expected a tensor")
        layer._check_input_dim(x)
        running = (layer.running_mean, layer.running_var)
        state = (weight, bias, *running)
        checks.check_tensors(layer.num_features, x.resolve_neg(), residual, state)
        moves = layer._moves_statistics()
        limits = layer._limits()
        momentum = None if layer.momentum is None else _options.real("momentum", layer.momentum)
        counter = layer.num_batches_tracked if moves else None
        if counter is not None and not fused.is_plain(counter, (torch.int64,)):
            raise TypeError(
                f"num_batches_tracked is of {counter.dtype} on {counter.device}; expected int64 in "
                "the CPU's memory"
            )
        if momentum is None and counter is None:
            momentum = 0.0
        if limits is not None and any(t is None for t in running):
            raise RuntimeError(
                f"{type(layer).__name__} in training needs running statistics; one is None"
            )
        return cls(
            _options.eps(layer.eps, training=True),
            checks.plain(activation),
            checks.mask_array(mask),
            layer.virtual_batch_size,
            limits,
            momentum,
            moves,
            _copied(running[0], checks.wide(x)),
            _copied(running[1], checks.wide(x)),
            _copied(counter, torch.int64),
        )

    def run(self, x: Tensor, y: Tensor, weight: Vector, bias: Vector, residual: Vector) -> _Kept:
        """Fill y and move the copies; return what the backward needs."""
        xs = tensors.array(x)
        gamma, beta = tensors.array(weight), tensors.array(bias)
        moments = correction = None
        if self.limits is not None:
            batch = Moments._made(*_core.moments(xs, 1, self.mask))
            if self.mask is not None:
                _masks.check_enough(self.mask, xs, 1)
            correction = Correction.of(
                batch, tensors.array(self.mean), tensors.array(self.var), self.eps, *self.limits
            )
            gamma, beta = correction.parameters(gamma, beta)
            moments = batch.count, batch.mean, batch.m2
        moves = self.moves
        _, (count, mean, _, inv_std) = _core.forward(
            xs,
            tensors.array(self.mean) if moves else None,
            tensors.array(self.var) if moves else None,
            gamma,
            beta,
            self.momentum if moves else 0.0,
            self.eps,
            1,
            1,
            tensors.array(residual),
            self.activation,
            tensors.array(y),
            tensors.array(self.counter) if moves else None,
            moments,
            self.mask,
            self.virtual_batch_size,
        )
        return _Kept(mean, inv_std, count, correction)

    @torch.no_grad()
    def write_back(self, layer: BatchNormOnCPU) -> None:
        """Copy the moved statistics into the layer, so that autograd sees the change."""
        if not self.moves:
            return
        own = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        moved = (self.mean, self.var, self.counter)
        pairs = [(t, new) for t, new in zip(own, moved, strict=True) if t is not None]
        for target, _ in pairs:
            target.copy_(target.clone())  # one that cannot be written to is refused before any is
        for target, new in pairs:
            target.copy_(new)


class _Kept(NamedTuple):
    mean: Array
    inv_std: Array
    count: float  # type: ignore[assignment]  # replaces the method tuple.count
    correction: Correction | None


def _copied(t: Vector, dtype: torch.dtype) -> Vector:
    return None if t is None else t.detach().to(dtype, copy=True).contiguous()


def _result_like(x: Tensor) -> Tensor:
    """Return memory for a result: contiguous, if x is that and in another format at once."""
    if x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return fused.empty_like(x)


class _OfBatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Vector,
        bias: Vector,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        y = _result_like(x)
        with tensors.torch_threads():
            kept = call.run(x, y, weight, bias, residual)
        beside = fused.beside(y, residual, call.activation)
        activated = call.activation is not None
        ctx.save_for_backward(x, weight, bias if activated else None, beside)
        ctx.call, ctx.kept = call, kept
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = ctx.needs_input_grad
        activated = needs[3] and ctx.call.activation is not None
        x, *others = ctx.saved_tensors  # read once: checkpoints refuse a second time
        dy = dy.resolve_neg()
        checks.check_readable("the output's gradient", dy)
        with tensors.torch_threads():
            needed = (*needs[:3], activated)
            dx, *parts, dresidual = _gradients(ctx.call, ctx.kept, dy, x, others, needed)
        made = [None if part is None else torch.from_numpy(part) for part in parts]
        if activated:
            dresidual = tensors.tensor(dresidual, x)
        elif needs[3]:  # the gradient of a sum is the gradient of each term
            dresidual = dy
        dx = None if dx is None else tensors.tensor(dx, x)
        return dx, *checks.typed(made, ctx.dtypes, needs), dresidual, None


def _gradients(
    call: _Call,
    kept: _Kept,
    dy: Tensor,
    x: Tensor,
    others: Sequence[Vector],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Any, ...]:
    weight, bias, beside = others
    checks.check_saved(input=x, weight=weight, bias=bias, output_or_residual=beside)
    mean, inv_std, count, correction = kept
    residual, y = fused.residual_and_output(tensors.array(beside), call.activation)
    gamma, beta = tensors.array(weight), tensors.array(bias)
    to_x, to_weight, to_bias, to_residual = needs
    if correction is not None:
        gamma, beta = correction.parameters(gamma, beta)
        to_bias = to_bias or to_weight
    dx, dweight, dbias, dresidual = _core.backward(
        tensors.array(dy),
        tensors.array(x),
        mean,
        inv_std,
        count,
        gamma,
        beta,
        1,
        residual,
        call.activation,
        y,
        None,
        (to_x, to_weight, to_bias, to_residual),
        None,
        call.mask,
        call.virtual_batch_size,
    )
    if correction is not None and dweight is not None and dbias is not None:
        dweight = np.asarray(correction.weight_gradient(dweight, dbias))
    return dx, dweight, dbias, dresidual
