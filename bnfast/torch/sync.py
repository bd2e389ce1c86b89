"""`SyncBatchNorm`: batch norm over the parts of a batch that the ranks of a group have."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnfast import _arrays
from bnfast.distributed import (
    Ranks,
    merged_batch,
    no_moments,
    no_sums,
    ranks_of,
    summed,
    taking_part,
)
from bnfast.moments import Moments

from . import autograd, kernels
from .convert import OURS
from .modules import BatchNormOnCPU

if TYPE_CHECKING:
    from .kernels import Activation

_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_Model = TypeVar("_Model", bound=nn.Module)


class SyncBatchNorm(BatchNormOnCPU):
    """PyTorch's `torch.nn.SyncBatchNorm` for tensors on the CPU, over gloo.

    In training the batch is that of all ranks of the process group: each brings a part of it, of
    any size, none included. Outputs and gradients are those of one process with the parts
    concatenated, to rounding, and statistics are the same bits on every rank. In evaluation, and
    without a process group, it is a plain layer. On another device it is PyTorch's.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in `torch.nn.SyncBatchNorm`.
    process_group : torch.distributed.ProcessGroup, optional
        Whose ranks; the default group at the time of a call if None.

    Notes
    -----
    No subclass of `torch.nn.SyncBatchNorm`: `DistributedDataParallel` refuses every model on the
    CPU that has one of those. Constructor, state and rules are the same, and both are
    `torch.nn.modules.batchnorm._BatchNorm`.

    In training all ranks must make the same calls, backwards included, also a rank without
    values. One whose input is refused tells the others, which raise RuntimeError, so that nobody
    is left waiting. There are no second derivatives, and `torch.compile` leaves the layer out of
    its graphs in training, as both would have to exchange numbers.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            **options,
        )
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # its ranks stay the ones they are
        copied = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def forward(
        self,
        input: Tensor,  # noqa: A002, PyTorch's name for it
        residual: Tensor | None = None,
        activation: Activation = None,
    ) -> Tensor:
        """Normalise: by the batch of all ranks in training, else by the running statistics.

        Parameters
        ----------
        input : Tensor
            This rank's part of the batch, ``(N, C, ...)``, in any memory format.
        residual, activation
            As in `BatchNorm2d`.

        Returns
        -------
        Tensor
            In the memory format of `input`.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual, activation)
        if not self._synchronises():
            return super().forward(input, residual, activation)
        if input.device.type == "cpu":
            return self._over_ranks(input, residual, activation)
        y = nn.SyncBatchNorm.forward(self, input)
        return autograd.activate(y if residual is None else y + residual, activation)

    def _synchronises(self) -> bool:
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) != 1
        )

    @torch.compiler.disable
    def _over_ranks(self, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        ranks = ranks_of(self.process_group)
        with taking_part(ranks, no_moments()):
            x = x.resolve_neg()
            self._check_call(x, residual, activation)
            mine = kernels.moments(x)
        batch = merged_batch(ranks, mine)
        tensors = (x, self.weight, self.bias, residual)
        y: Tensor = _SyncBatchNorm.apply(*tensors, batch, self.eps, activation, ranks)
        if self._moves_statistics():
            self._move_towards(batch)
        return y

    def _move_towards(self, batch: Moments) -> None:
        if batch.count:
            mean, var = (torch.from_numpy(numbers) for numbers in (batch.mean, batch.var()))
            self._move_statistics(mean, var, batch.count)
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def _check_call(self, x: Tensor, residual: Tensor | None, activation: Activation) -> None:
        """Refuse what cannot be computed, before anything is exchanged."""
        if kernels.is_transformed() or kernels.is_recorded():
            raise RuntimeError(
                "SyncBatchNorm in training exchanges numbers with other processes, which is not "
                "possible under transforms, tracing or fake tensors; call eval(), or use BatchNorm"
            )
        self._check_input_dim(x)
        self._check_non_zero_input_channels(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got input {tuple(x.shape)}")
        own = {name: getattr(self, name) for name in _PARAMETERS if getattr(self, name) is not None}
        for name, tensor in {"input": x, "residual": residual, **own}.items():
            if tensor is not None and not kernels.is_plain(tensor):
                accepted = ", ".join(sorted(str(dtype) for dtype in kernels.DTYPES))
                raise TypeError(
                    f"{name} is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}; "
                    f"expected a dense tensor on the CPU, of {accepted}"
                )
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        for name, tensor in own.items():
            if tensor.dtype is not wide:
                raise TypeError(
                    f"{name} has dtype {tensor.dtype}; expected {wide} beside input of {x.dtype}"
                )
            if tensor.shape != (self.num_features,):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected ({self.num_features},)"
                )
        if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
            raise ValueError(
                f"residual is of {residual.dtype} and shape {tuple(residual.shape)}; expected "
                f"those of input, {x.dtype} and {tuple(x.shape)}"
            )
        _arrays.eps(self.eps, training=True)
        if activation is not None:
            _arrays.activation(activation)

    @classmethod
    def convert_sync_batchnorm(cls, module: _Model, process_group: Any = None) -> _Model:
        """Make every batch norm of a model one over all ranks: `convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)


OURS[nn.SyncBatchNorm] = SyncBatchNorm  # for convert and revert


def convert_sync_batchnorm(model: _Model, process_group: Any = None) -> _Model:
    """Make every batch norm of a model a `SyncBatchNorm`, in place.

    Layers stay the objects they are, with their parameters, buffers, hooks and modes; only their
    class changes. As with `convert`, classes that were derived from PyTorch's are left alone.

    Parameters
    ----------
    model : torch.nn.Module
        Or a single batch norm: PyTorch's or bnfast's ``BatchNorm1d``, ``2d`` and ``3d``, and
        PyTorch's ``SyncBatchNorm``.
    process_group : torch.distributed.ProcessGroup, optional
        Whose ranks; the default group if None.

    Returns
    -------
    torch.nn.Module
        `model`.

    See Also
    --------
    torch.nn.SyncBatchNorm.convert_sync_batchnorm : makes new layers, for GPUs only.
    """
    kinds = {*OURS, *OURS.values()}
    for module in model.modules():
        if type(module) in kinds and "forward" not in vars(module):
            module.__class__ = SyncBatchNorm
            module.process_group = process_group
    return model


class _SyncBatchNorm(torch.autograd.Function):
    """A training forward on a part of a batch whose moments are known."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        batch: Moments,
        eps: float,
        activation: Activation,
        ranks: Ranks,
    ) -> Tensor:
        var = batch.var()
        inv_std = torch.from_numpy(1 / np.sqrt(var + eps))
        mean = torch.from_numpy(batch.mean)
        y = kernels.normalize(
            x, mean, torch.from_numpy(var), weight, bias, residual, eps, activation
        )
        autograd.save(ctx, x, weight, bias, residual, y, mean, inv_std, True, activation)
        ctx.count, ctx.ranks = batch.count, ranks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, y, mean, inv_std = ctx.saved_tensors
        needs = ctx.needs_input_grad
        masked = needs[3] and ctx.activation is not None
        given = (dy.resolve_neg(), x, mean, inv_std, weight, bias, y)
        activation = ctx.activation
        if needs[0]:
            with taking_part(ctx.ranks, no_sums(len(mean))):
                parts = kernels.backward(*given, False, activation, (False, True, True, False))
            sums = summed(ctx.ranks, (parts[1], parts[2]))
            dx, _, _, dresidual = kernels.backward(
                *given, True, activation, (True, False, False, masked), ctx.count, sums
            )
        else:  # nothing of it is the other ranks' business
            parts = kernels.backward(*given, False, activation, (False, *needs[1:3], masked))
            dx, dresidual = None, parts[3]
        dweight, dbias = (
            part.to(dtype) if needed and part is not None else None
            for part, dtype, needed in zip(parts[1:3], ctx.dtypes, needs[1:3], strict=True)
        )
        if needs[3] and not masked:  # the gradient of a sum is that of its terms
            dresidual = dy
        return dx, dweight, dbias, dresidual, None, None, None, None
