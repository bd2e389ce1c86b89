"""Batch norm layers that are PyTorch's own, run by bnfast where it can."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import autograd, kernels, operators

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    Activation = str | tuple[str, float] | None
    # weight, bias, running_mean and running_var
    State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_paused: ContextVar[bool] = ContextVar("bnfast_statistics_paused", default=False)


@contextmanager
def paused_statistics() -> Iterator[None]:
    """Leave running statistics and batch counts alone inside a ``with`` block.

    Layers in training normalise by their batch as always. For forwards that are not a new batch:
    a second look at one, or one recomputed by checkpointing (see `checkpoint_contexts`). It holds
    for the calling thread and for layers of this module; a graph that `torch.compile` made does
    not look.
    """
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed forward and of its recomputation.

    ``torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False,
    context_fn=bnfast.torch.checkpoint_contexts)`` counts each batch once in the running
    statistics, where PyTorch's layers count it twice.
    """
    return nullcontext(), paused_statistics()


class BatchNormOnCPU(_BatchNorm):
    """What the layers of this module have in common: their forward.

    A call runs on bnfast if its tensors are dense ones on the CPU, of a type that the kernels
    take; any other is PyTorch's.
    """

    def forward(
        self,
        input: Tensor,  # noqa: A002, PyTorch's name for it
        residual: Tensor | None = None,
        activation: Activation = None,
    ) -> Tensor:
        """Normalise: by the batch in training, by the running statistics in evaluation.

        Parameters
        ----------
        input : Tensor
            As PyTorch's layer takes it, in any memory format.
        residual : Tensor, optional
            Added to the result, in the same pass; shape and dtype of `input`.
        activation : {None, "relu", "relu6", "leaky_relu"} or ("leaky_relu", slope)
            Applied last, in the same pass.

        Returns
        -------
        Tensor
            In the memory format of `input`.
        """
        if torch.compiler.is_compiling():
            return self._by_operator(input, residual, activation)
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual, activation)
        if kernels.is_transformed():
            return self._by_torch(input, residual, activation)
        if kernels.is_recorded() or isinstance(input, torch._subclasses.FakeTensor):
            return self._by_operator(input, residual, activation)
        self._check_input_dim(input)
        state = self._state()
        if kernels.are_plain(input, residual, *state) and self._suits(input, residual, state):
            return self._by_kernels(input, residual, activation, state)
        return self._by_torch(input, residual, activation)

    def _by_kernels(
        self, x: Tensor, residual: Tensor | None, activation: Activation, state: State
    ) -> Tensor:
        if torch.compiler.is_compiling():  # from here on, its caller having been too much for it
            return self._by_operator(x, residual, activation)
        weight, bias, *running = state
        if running[0] is not None and not self.training:
            return autograd.normalize(x, *running, weight, bias, self.eps, residual, activation)
        moves = self._moves_statistics()
        return autograd.batch_norm(
            x,
            weight,
            bias,
            (*running, self.num_batches_tracked) if moves else None,
            float(self._momentum()) if moves else 0.0,
            self.eps,
            residual,
            activation,
        )

    def _by_operator(self, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        """Compute the same by operators that can be recorded."""
        self._check_input_dim(x)
        state = (self.weight, self.bias, self.running_mean, self.running_var)
        here = all(t is None or t.device.type == "cpu" for t in (x, residual, *state))
        if not (here and x.dtype in kernels.DTYPES and self._suits(x, residual, state)):
            return self._by_torch(x, residual, activation)
        weight, bias, *running = state
        tensors = (x, weight, bias, residual)
        options = (self.eps, *autograd.name_and_slope(activation))
        if running[0] is not None and not self.training:
            normalised: Tensor = operators.normalize(*tensors, *running, *options)
            return normalised
        if x.numel() == x.shape[1]:
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size {tuple(x.shape)}"
            )
        y: Tensor
        y, mean, var, _ = operators.batch_norm(*tensors, *options)
        if self._moves_statistics():
            self._move_statistics(mean, var, x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor, m: int) -> None:
        """Do what the kernels do where they are given the running statistics."""
        momentum = self._momentum()
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        batch = (mean, var * m / (m - 1))
        for old, new in zip((self.running_mean, self.running_var), batch, strict=True):
            if old is not None:
                old.copy_((1 - momentum) * old.double() + momentum * new)

    def _by_torch(self, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        if self.training and _paused.get():
            y = F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            y = super().forward(x)
        return autograd.activate(y if residual is None else y + residual, activation)

    def _as_leaf(self, x: Any, residual: Any, activation: Activation) -> Any:
        """Stay one node in a graph of `torch.fx`, which sees only PyTorch's own classes so."""
        options = {"residual": residual, "activation": activation}
        given = {name: value for name, value in options.items() if value is not None}
        path = x.tracer.path_of_module(self)
        return x.tracer.create_proxy("call_module", path, (x,), given)

    def _state(self) -> State:
        """Return weight, bias, running_mean and running_var, each looked up once."""
        try:  # where `nn.Module.__getattr__` would find them, after a search of all classes
            parameters, buffers = self._parameters, self._buffers
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
            )
        except KeyError:  # kept elsewhere, as by parametrizations
            return self.weight, self.bias, self.running_mean, self.running_var

    def _moves_statistics(self) -> bool:
        if not (self.training and self.track_running_stats):
            return False
        return torch.compiler.is_compiling() or not _paused.get()  # which cannot be traced

    def _momentum(self) -> Any:
        if self.momentum is not None:
            return self.momentum
        tracked = self.num_batches_tracked
        return 0.0 if tracked is None else 1 / (tracked.double() + 1)  # the cumulative average

    def _suits(self, x: Tensor, residual: Tensor | None, state: State) -> bool:
        """Whether the kernels take this call; what is wrong with another, PyTorch says."""
        channels = x.shape[1]
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        for p in state:
            if p is not None and (p.dtype is not wide or p.dim() != 1 or p.numel() != channels):
                return False
        _, _, running_mean, running_var = state
        return (
            x.numel() > 0
            and (running_mean is None) == (running_var is None)
            # PyTorch refuses them a gradient, which nobody would notice the lack of.
            and not (running_mean is not None and running_mean.requires_grad)
            and not (running_var is not None and running_var.requires_grad)
            and (residual is None or (residual.shape == x.shape and residual.dtype is x.dtype))
            and type(self.eps) is float
            and 0 < self.eps < inf
            and (self.momentum is None or -inf < self.momentum < inf)
        )


class BatchNorm1d(BatchNormOnCPU, nn.BatchNorm1d):
    """PyTorch's `torch.nn.BatchNorm1d`, of (N, C) or (N, C, L), run by bnfast on CPUs.

    The constructor, state and rules are PyTorch's.
    """


class BatchNorm2d(BatchNormOnCPU, nn.BatchNorm2d):
    """PyTorch's `torch.nn.BatchNorm2d`, of (N, C, H, W), run by bnfast on CPUs.

    The constructor, state and rules are PyTorch's.
    """


class BatchNorm3d(BatchNormOnCPU, nn.BatchNorm3d):
    """PyTorch's `torch.nn.BatchNorm3d`, of (N, C, D, H, W), run by bnfast on CPUs.

    The constructor, state and rules are PyTorch's.
    """
