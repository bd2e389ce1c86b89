"""Batch norm, addition and activation as one operator of PyTorch's: what `backend` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Results = tuple[Tensor | None, ...]

_aten = torch.ops.aten
_library = torch.library.Library("bnfast", "FRAGMENT")

# activation(batch_norm(x) + residual). Running statistics move in training, if given; save_mean
# and save_invstd are as aten::native_batch_norm has them: without elements in evaluation.
_library.define(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, bool training, float momentum, float eps, Tensor? residual,"
    " str? activation, float slope) -> (Tensor y, Tensor save_mean, Tensor save_invstd)"
)
# Where the activation was flat is found out by x again, or by y where there was a residual. What
# `needs`, of x, weight, bias and residual, leaves out is not there.
_library.define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_invstd,"
    " bool training, float eps, Tensor? y, str? activation, float slope, bool[4] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)

_ACTIVATIONS: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda z, slope: z,
    "relu": lambda z, slope: _aten.relu(z),
    "relu6": lambda z, slope: _aten.hardtanh(z, 0, 6),
    "leaky_relu": _aten.leaky_relu,
}
_DERIVATIVES: dict[str | None, Callable[[Tensor, Tensor, float], Tensor]] = {
    None: lambda dy, z, slope: dy,
    "relu": lambda dy, z, slope: _aten.threshold_backward(dy, z, 0),
    "relu6": lambda dy, z, slope: _aten.hardtanh_backward(dy, z, 0, 6),
    "leaky_relu": lambda dy, z, slope: _aten.leaky_relu_backward(dy, z, slope, False),
}


@torch.library.impl(_library, "batch_norm_act", "CPU")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
) -> Results:
    y, *saved = _aten.native_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if residual is not None:
        y = y + residual
    return (_ACTIVATIONS[activation](y, slope), *saved)


@torch.library.impl(_library, "batch_norm_act_backward", "CPU")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    y: Tensor | None,
    activation: str | None,
    slope: float,
    needs: Sequence[bool],
) -> Results:
    if activation is not None and y is None:
        statistics = (running_mean, running_var)
        y, *_ = _aten.native_batch_norm(x, weight, bias, *statistics, training, 0.0, eps)
    dz = dy if y is None else _DERIVATIVES[activation](dy, y, slope)
    found = _aten.native_batch_norm_backward(
        dz,
        x,
        weight,
        running_mean,
        running_var,
        save_mean,
        save_invstd,
        training,
        eps,
        list(needs[:3]),
    )
    return (*found, dz if needs[3] else None)


def _like(x: Tensor) -> Tensor:
    """Return a tensor with the strides that PyTorch's batch norm gives its results."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _parameter_type(x: Tensor, *vectors: Tensor | None) -> torch.dtype:
    return next((v.dtype for v in vectors if v is not None), x.dtype)


@torch.library.register_fake("bnfast::batch_norm_act", lib=_library)
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *others: object,
) -> Results:
    dtype = _parameter_type(x, weight, bias, running_mean)
    saved = (x.new_empty(x.shape[1] if training else 0, dtype=dtype) for _ in range(2))
    return (_like(x), *saved)


@torch.library.register_fake("bnfast::batch_norm_act_backward", lib=_library)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    *others: object,
) -> Results:
    needs = others[-1]
    assert isinstance(needs, (list, tuple))
    dtype = _parameter_type(x, weight, bias, running_mean, save_mean)
    vectors = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    all_of_them = (_like(x), *vectors, _like(x))
    return tuple(g if needed else None for g, needed in zip(all_of_them, needs, strict=True))


batch_norm_act = torch.ops.bnfast.batch_norm_act.default
batch_norm_act_backward = torch.ops.bnfast.batch_norm_act_backward.default


def functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
) -> Results:
    """`batch_norm_act` that returns the moved statistics and leaves those it was given alone.

    Graphs hold it while operations may still be left out, moved or done twice.
    """
    statistics = [None if s is None else s.clone() for s in (running_mean, running_var)]
    results = batch_norm_act(
        x, weight, bias, *statistics, training, momentum, eps, residual, activation, slope
    )
    return (*results, *statistics)
