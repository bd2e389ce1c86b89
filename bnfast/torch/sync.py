"""`SyncBatchNorm`: batch norm over a batch whose parts are on the ranks of a group."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnfast import _core, _errors, _options
from bnfast.distributed import Counted, Merging, Move, Ranks, Summing, ranks_of

from . import checks, fused, tensors
from .convert import OURS
from .modules import BatchNormOnCPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bnfast._types import Activation, Array
    from bnfast.moments import Moments

    from .fused import Gradients, Vector

    State = tuple[Vector, ...]

_Model = TypeVar("_Model", bound=nn.Module)


class SyncBatchNorm(BatchNormOnCPU):
    """PyTorch's `torch.nn.SyncBatchNorm` for tensors on the CPU, over gloo.

    In training the batch is that of all ranks of the process group. Each rank has a part of it, of
    any size; the part may be empty. Outputs and gradients are those of one process with the parts
    concatenated, to rounding, and statistics are the same bits on every rank. In evaluation, and
    without a process group, it is a plain layer. On another device it is PyTorch's.

    Parameters
    ----------
    num_features : int
        The number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of a new batch in the running statistics; None for the cumulative average.
    affine : bool
        Whether the layer has `weight` and `bias`.
    track_running_stats : bool
        Whether the layer has running statistics. If False, batches are normalised with their own
        statistics in both modes.
    process_group : torch.distributed.ProcessGroup, optional
        The group of ranks. If None, the default group at the time of a call.
    device : torch.device or str, optional
        The device of parameters and buffers.
    dtype : torch.dtype, optional
        Their type.
    **options
        Further options of `torch.nn.SyncBatchNorm`, such as ``bias=False``.

    Notes
    -----
    It is not a subclass of `torch.nn.SyncBatchNorm`: `DistributedDataParallel` refuses every model
    on the CPU that contains one. Constructor, state and rules are the same, and both are
    `torch.nn.modules.batchnorm._BatchNorm`.

    In training all ranks must make the same calls, backwards included. This holds for a rank
    without values, too. A backward exchanges numbers if the input needs a gradient, which must be
    so on all ranks or on none. If one rank cannot do a call, it raises before the exchange and
    tells the other ranks, which raise RuntimeError. Statistics and counters are then unchanged on
    all ranks, no rank is left waiting, and the next call works. Autograd's own hooks
    (`torch.autograd.graph.saved_tensors_hooks`) run after statistics have changed, on all ranks.
    There are no second derivatives, and `torch.compile` leaves the layer out of its graphs in
    training: both would have to exchange numbers.
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
        memo[id(self.process_group)] = self.process_group  # the group of ranks is not copied
        copied = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def forward(
        self,
        input: Tensor,  # noqa: A002, PyTorch's name for it
        residual: Tensor | None = None,
        activation: Activation = None,
        *,
        mask: Any = None,
    ) -> Tensor:
        """Normalise: by the batch of all ranks in training, else by the running statistics.

        Parameters
        ----------
        input : Tensor
            This rank's part of the batch, ``(N, C, ...)``, in any memory format.
        residual : Tensor, optional
            Added to the result, in the same pass; shape and dtype of `input`.
        activation : str, ("leaky_relu", float) or None
            Applied last, in the same pass: one of the names that `bnfast.batch_norm` takes.
        mask : Tensor or array_like of bool or floats, optional
            Which values of this rank's part count in training, or their weights: see
            `bnfast.batch_norm`. It may count none of them; a rank without a mask counts all.

        Returns
        -------
        Tensor
            In the memory format of `input`.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual, activation, mask)
        if not self._synchronises():
            return super().forward(input, residual, activation, mask=mask)
        if not isinstance(input, Tensor) or input.device.type in ("cpu", "meta"):
            over_ranks = self._over_ranks
            if torch.compiler.is_compiling():  # a decorator would import Dynamo at import time
                over_ranks = torch.compiler.disable(over_ranks)
            return over_ranks(input, residual, activation, mask)
        if mask is not None:
            raise ValueError(f"mask is given for input on {input.device}; expected it on the CPU")
        y = nn.SyncBatchNorm.forward(self, input)
        return fused.rest(y, residual, checks.plain(activation))

    def _synchronises(self) -> bool:
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) != 1
        )

    def _over_ranks(
        self, x: Tensor, residual: Tensor | None, activation: Activation, mask: Any
    ) -> Tensor:
        ranks = ranks_of(self.process_group)
        exchange = Merging(ranks, training=True)
        with exchange:
            call = self._forward_call(x, residual, activation, mask)
            mine = tensors.moments(call.x, call.mask)
            counted = None
            if call.mask is not None:
                counted = Counted.of(call.mask, tensors.array(call.x), 1)
            batch = exchange.merged(mine, call.move, counted)
        mean, inv_std = call.normalize(batch)
        if not call.wants_gradient:
            return call.y
        inputs = (call.x, call.weight, call.bias, call.residual)
        y: Tensor = _SyncBatchNorm.apply(*inputs, call, mean, inv_std, batch.count, ranks)
        return y

    def _forward_call(
        self, x: Tensor, residual: Tensor | None, activation: Activation, mask: Any
    ) -> _ForwardCall:
        """Read the arguments of a training forward, and refuse those that do not fit.

        After the exchange an error could not be told to the other ranks. So nothing is read again,
        and the output is already allocated.
        """
        if fused.is_transformed() or fused.is_recorded():
            raise RuntimeError(
                "SyncBatchNorm in training exchanges numbers with other processes, which is not "
                "possible under transforms, tracing or fake tensors; call eval(), or use BatchNorm"
            )
        if self.virtual_batch_size is not None:
            raise RuntimeError(
                "virtual_batch_size is set; SyncBatchNorm takes the batch of all processes"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"input is {_errors.described(x)}; expected a tensor")
        if x.device.type != "cpu":
            raise ValueError(
                f"SyncBatchNorm expected input tensor to be on GPU, or on the CPU, got {x.device}"
            )
        state = (self.weight, self.bias, self.running_mean, self.running_var)
        eps = _options.eps(self.eps, training=True)
        x = x.resolve_neg()
        self._check_input_dim(x)
        self._check_non_zero_input_channels(x)
        checks.check_tensors(self.num_features, x, residual, state)
        weight, bias, *running = state
        move = self._move(running) if self._moves_statistics() else None
        wants_gradient = checks.needs_gradient(x, weight, bias, residual)
        if wants_gradient:
            checks.check_savable(x, weight, None if activation is None else bias)
        with torch.no_grad():
            y = torch.empty_like(x)
        activation = checks.plain(activation)
        masked = checks.mask_array(mask)
        return _ForwardCall(
            x, weight, bias, residual, eps, activation, move, wants_gradient, y, masked
        )

    @torch.no_grad()
    def _move(self, running: Sequence[Tensor | None]) -> Move:
        """Return what moves the running statistics, known to be able to."""
        momentum = _options.real("momentum", self._momentum())
        pairs = []
        for tensor in running:
            if tensor is not None:
                write, old = partial(_write, tensor), tensor.to(torch.float64, copy=True).numpy()
                write(old)  # whatever cannot be written is refused
                pairs.append((write, old))
        tracked, count = self.num_batches_tracked, None
        if tracked is not None:
            tracked.copy_(tracked.clone())
            count = partial(_copy, tracked, tracked.clone().add_(1))
        return Move(pairs, momentum, 1, count)

    @classmethod
    def convert_sync_batchnorm(cls, module: _Model, process_group: Any = None) -> _Model:
        """Make every batch norm of a model a `SyncBatchNorm`, in place.

        Parameters
        ----------
        module : torch.nn.Module
            A model or a single batch norm.
        process_group : torch.distributed.ProcessGroup, optional
            The group of ranks; the default group if None.

        Returns
        -------
        torch.nn.Module
            `module`.

        See Also
        --------
        bnfast.torch.convert_sync_batchnorm : the same function; it documents which layers change.
        """
        return convert_sync_batchnorm(module, process_group)


OURS[nn.SyncBatchNorm] = SyncBatchNorm  # for convert and revert


def convert_sync_batchnorm(model: _Model, process_group: Any = None) -> _Model:
    """Make every batch norm of a model a `SyncBatchNorm`, in place.

    Layers stay the same objects, with their parameters, buffers, hooks and modes. Only their class
    changes. As in `convert`, classes that were derived from PyTorch's are not changed.

    Parameters
    ----------
    model : torch.nn.Module
        A model or a single batch norm: PyTorch's or bnfast's ``BatchNorm1d``, ``2d`` and ``3d``,
        and PyTorch's ``SyncBatchNorm``.
    process_group : torch.distributed.ProcessGroup, optional
        The group of ranks; the default group if None.

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


@torch.no_grad()
def _copy(target: Tensor, values: Tensor) -> None:
    target.copy_(values)


def _write(target: Tensor, values: NDArray[np.float64]) -> None:
    _copy(target, torch.from_numpy(values))


class _ForwardCall(NamedTuple):
    """A training forward: its checked arguments, and the memory for its output."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    activation: Activation
    move: Move | None
    wants_gradient: bool
    y: Tensor
    mask: Array | None

    def normalize(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """Fill y; return the mean and 1 / sqrt(var + eps) that it was normalised with."""
        with tensors.torch_threads():
            _, (_, mean, _, inv_std) = _core.forward(
                tensors.array(self.x),
                None,
                None,
                tensors.array(self.weight),
                tensors.array(self.bias),
                0.0,
                self.eps,
                1,
                1,
                tensors.array(self.residual),
                self.activation,
                tensors.array(self.y),
                moments=(batch.count, batch.mean, batch.m2),
                mask=self.mask,
            )
        return torch.from_numpy(mean), torch.from_numpy(inv_std)


class _SyncBatchNorm(torch.autograd.Function):
    """The gradient of a training forward that was already computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _ForwardCall,
        mean: Tensor,
        inv_std: Tensor,
        count: float,
        ranks: Ranks,
    ) -> Tensor:
        y, activation = call.y, call.activation
        activated = activation is not None
        beside = fused.beside(y, residual, activation)
        ctx.save_for_backward(x, weight, bias if activated else None, beside, mean, inv_std)
        ctx.activation = activation
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        ctx.count, ctx.ranks, ctx.channels = count, ranks, len(mean)
        ctx.mask = call.mask
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = ctx.needs_input_grad
        activated = needs[3] and ctx.activation is not None
        dx = dresidual = None
        if needs[0]:
            exchange = Summing(ctx.ranks, ctx.channels)
            with exchange:
                call = _backward_call(ctx, dy)
                parts = call.over_part((False, True, True, False))[1:3]
                gradients = checks.typed(parts, ctx.dtypes, needs)
                dx = torch.empty_like(call.x)
                sums = exchange.summed(*map(np.asarray, parts))
            dresidual = call.through_batch(dx, ctx.count, activated, sums)
        else:  # this needs no other rank
            call = _backward_call(ctx, dy)
            _, *others, dresidual = call.over_part((False, *needs[1:3], activated))
            gradients = checks.typed(others, ctx.dtypes, needs)
        if needs[3] and not activated:  # the gradient of a sum is the gradient of each term
            dresidual = call.dy
        return dx, *gradients, dresidual, None, None, None, None, None


def _backward_call(ctx: Any, dy: Tensor) -> _BackwardCall:
    """Read the arguments of a backward, and refuse those that the kernels cannot read."""
    x, weight, bias, beside, mean, inv_std = ctx.saved_tensors
    call = _BackwardCall(
        dy.resolve_neg(), x, mean, inv_std, weight, bias, beside, ctx.activation, ctx.mask
    )
    checks.check_readable("the output's gradient", call.dy)
    checks.check_saved(
        input=x, weight=weight, bias=bias, mean=mean, std=inv_std, output_or_residual=beside
    )
    return call


class _BackwardCall(NamedTuple):
    """A backward and its checked arguments."""

    dy: Tensor
    x: Tensor
    mean: Tensor
    inv_std: Tensor
    weight: Tensor | None
    bias: Tensor | None
    beside: Tensor | None  # see fused.beside
    activation: Activation
    mask: Array | None

    def over_part(self, needs: tuple[bool, ...]) -> Gradients:
        """Return gradients for mean and variance taken as constants."""
        dx, dweight, dbias, dresidual = self._run(0, None, needs, None)
        return (
            None if dx is None else tensors.tensor(dx, self.x),
            None if dweight is None else torch.from_numpy(dweight),
            None if dbias is None else torch.from_numpy(dbias),
            None if dresidual is None else tensors.tensor(dresidual, self.x),
        )

    def through_batch(
        self, dx: Tensor, count: float, activated: bool, sums: tuple[Any, Any]
    ) -> Tensor | None:
        """Fill x's gradient, of a batch that x is a part of; return the residual's if activated."""
        *_, dresidual = self._run(count, dx, (True, False, False, activated), sums)
        return None if dresidual is None else tensors.tensor(dresidual, self.x)

    def _run(self, count: float, dx: Tensor | None, needs: tuple[bool, ...], sums: Any) -> Any:
        beside = tensors.array(self.beside)
        residual, y = fused.residual_and_output(beside, self.activation)
        with tensors.torch_threads():
            return _core.backward(
                tensors.array(self.dy),
                tensors.array(self.x),
                tensors.array(self.mean),
                tensors.array(self.inv_std),
                count,
                tensors.array(self.weight),
                tensors.array(self.bias),
                1,
                residual,
                self.activation,
                y,
                tensors.array(dx),
                needs,
                sums,
                self.mask,
            )
