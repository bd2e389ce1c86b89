"""Batch norm layers that are PyTorch's own and call its operators, on bnfast's kernels."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfast import _core, _options

from . import _aten, batches, checks, fused, process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from bnfast._types import Activation

    from .fused import Vector

_paused: ContextVar[bool] = ContextVar("bnfast_statistics_paused", default=False)


@contextmanager
def paused_statistics() -> Iterator[None]:
    """Do not change running statistics and batch counts inside a ``with`` block.

    Layers in training normalise by their batch as always. Use it for a forward that is not a new
    batch: the same batch again, or one recomputed by checkpointing (see `checkpoint_contexts`). It
    applies to the calling thread and to layers of this module. A graph that `torch.compile` made
    does not check it.
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
    statistics. PyTorch's layers count it twice.

    Returns
    -------
    tuple of two context managers
        One for the forward, which does nothing, and `paused_statistics` for its recomputation.
    """
    return nullcontext(), paused_statistics()


class BatchNormOnCPU(_BatchNorm):
    """The forward that the layers of this module share.

    It is PyTorch's forward with PyTorch's operator, which runs on bnfast during the call. A
    recorded graph contains nothing of bnfast.

    Attributes
    ----------
    virtual_batch_size : int or None
        In training, rows are normalised in runs of so many, each with its own statistics. It is
        also an option of the constructor.
    """

    virtual_batch_size: int | None = None

    def __init__(self, *args: Any, virtual_batch_size: int | None = None, **options: Any) -> None:
        if virtual_batch_size is not None:
            _options.run_length("virtual_batch_size", virtual_batch_size)
        super().__init__(*args, **options)
        if virtual_batch_size is not None:
            self.virtual_batch_size = virtual_batch_size
        process.replace_kernels()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        process.replace_kernels()

    def forward(
        self,
        input: Tensor,  # noqa: A002, PyTorch's name for it
        residual: Tensor | None = None,
        activation: Activation = None,
        *,
        mask: Any = None,
    ) -> Tensor:
        """Normalise: by the batch in training, by the running statistics in evaluation.

        Parameters
        ----------
        input : Tensor
            Of the rank that PyTorch's layer of the same name takes, with its channels on axis 1, in
            any memory format.
        residual : Tensor, optional
            Added to the result, in the same pass; shape and dtype of `input`.
        activation : str, ("leaky_relu", float) or None
            Applied last, in the same pass: one of the names that `bnfast.batch_norm` takes.
        mask : Tensor or array_like of bool or floats, optional
            Which values count in training, or their weights, 0 or more: the shape of `input` with 1
            channel, or without channels, as in `bnfast.batch_norm`. It gets no gradient.

        Returns
        -------
        Tensor
            With the strides that PyTorch's layer gives.

        Notes
        -----
        With a mask or virtual batches, a training forward has first derivatives only, takes plain
        tensors on the CPU, and is left out of graphs that `torch.compile` makes.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual, activation, mask)
        if mask is not None or self.virtual_batch_size is not None:
            if self.training or (self.running_mean is None and self.running_var is None):
                return self._by_batches(input, residual, activation, mask)
            self._check_unused(mask)
        recorded = torch.compiler.is_compiling()
        if residual is not None or activation is not None:
            activation = _options.plain_activation(activation, _core.ACTIVATIONS)
            _check_residual(input, residual)
            state = None if recorded else self._fusable(input, residual)
            if state is not None:
                return self._fused(input, residual, activation, state)
        y: Tensor
        if recorded:
            y = super().forward(input)
        elif self.training and _paused.get():
            y = _aten.run_here(self._with_statistics_paused, input)
        else:
            y = self._counted(input)
        return fused.rest(y, residual, activation)

    def _check_unused(self, mask: Any) -> None:
        """Refuse a mask of a wrong type in evaluation, which does not read it."""
        check = checks.check_mask
        if torch.compiler.is_compiling() and not isinstance(mask, Tensor):
            check = torch.compiler.disable(check)
        if mask is not None:
            check(mask)

    def _by_batches(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: Activation,
        mask: Any,
    ) -> Tensor:
        """Run a training forward that PyTorch's operator does not know."""
        run = batches.forward
        if torch.compiler.is_compiling():  # a decorator would import Dynamo at import time
            run = torch.compiler.disable(run)
        return run(self, x, residual, activation, mask)

    def _limits(self) -> batches.Limits | None:
        """Return those of a renormalisation; None for a plain batch norm."""
        return None

    def _counted(self, x: Tensor) -> Tensor:
        """Run PyTorch's forward here; undo its batch count on error: it counts before it checks."""
        try:
            y: Tensor = _aten.run_here(_BatchNorm.forward, self, x)
        except (RuntimeError, ValueError):
            self._uncount(x)
            raise
        return y

    def _uncount(self, x: Tensor) -> None:
        try:
            self._check_input_dim(x)
        except ValueError:
            return  # which comes before the count
        if self._moves_statistics() and self.num_batches_tracked is not None:
            self.num_batches_tracked.sub_(1)

    def _with_statistics_paused(self, x: Tensor) -> Tensor:
        """Give the operator copies of the statistics, so that autograd saves the usual values."""
        self._check_input_dim(x)
        running = (self.running_mean, self.running_var)
        mean, var = (None if v is None else v.clone() for v in running)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, 0.0, self.eps)

    def _fusable(self, x: Tensor, residual: Tensor | None) -> tuple[Vector, ...] | None:
        """Return weight, bias, running_mean and running_var if one operator can do the call."""
        state = (self.weight, self.bias, self.running_mean, self.running_var)
        training = self.training or state[2] is None
        options = (
            (state[2] is None) == (state[3] is None)
            and type(self.eps) is float
            and 0 < self.eps < inf
            and (self.momentum is None or -inf < self.momentum < inf)
        )
        return state if options and fused.takes(x, residual, state, training) else None

    def _fused(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: Activation,
        state: tuple[Vector, ...],
    ) -> Tensor:
        self._check_input_dim(x)
        weight, bias, mean, var = state
        training = self.training or mean is None
        moves = self._moves_statistics()
        if training and not moves:
            mean = var = None
        momentum = float(self._momentum()) if moves else 0.0
        y = fused.batch_norm_act(
            x, weight, bias, mean, var, training, momentum, self.eps, residual, activation
        )
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y

    def _as_leaf(self, x: Any, residual: Any, activation: Activation, mask: Any = None) -> Any:
        """Emit the leaf node ourselves: `torch.fx` treats only torch.nn classes as leaf modules."""
        options = {"residual": residual, "activation": activation, "mask": mask}
        given = {name: value for name, value in options.items() if value is not None}
        path = x.tracer.path_of_module(self)
        return x.tracer.create_proxy("call_module", path, (x,), given)

    def _momentum(self) -> Any:
        """Return the momentum of a training forward."""
        if self.momentum is not None:
            return self.momentum
        tracked = self.num_batches_tracked  # the cumulative average
        return 0.0 if tracked is None else 1 / (tracked.double() + 1)

    def _moves_statistics(self) -> bool:
        return self.training and self.track_running_stats and not _paused.get()

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        runs = self.virtual_batch_size
        added = "" if runs is None else f", virtual_batch_size={runs}"
        return super().extra_repr() + added


def _check_residual(x: Any, residual: Any) -> None:
    """Refuse a residual that cannot be added, before statistics change."""
    if isinstance(residual, Tensor) and isinstance(x, Tensor):
        missing = x.dim() - residual.dim()
        fits = missing >= 0 and all(
            r in (1, n) for r, n in zip(residual.shape, x.shape[missing:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; expected that of input, "
                f"{tuple(x.shape)}"
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
