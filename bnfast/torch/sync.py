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
from bnfast.distributed import Merging, Move, Ranks, Summing, ranks_of

from . import fused, tensors
from .convert import OURS
from .modules import BatchNormOnCPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bnfast._types import Activation
    from bnfast.moments import Moments

    from .fused import Gradients, Vector

    State = tuple[Vector, ...]

_STATE = ("weight", "bias", "running_mean", "running_var")
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

        Returns
        -------
        Tensor
            In the memory format of `input`.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual, activation)
        if not self._synchronises():
            return super().forward(input, residual, activation)
        if not isinstance(input, Tensor) or input.device.type in ("cpu", "meta"):
            over_ranks = self._over_ranks
            if torch.compiler.is_compiling():  # a decorator would import Dynamo at import time
                over_ranks = torch.compiler.disable(over_ranks)
            return over_ranks(input, residual, activation)
        y = nn.SyncBatchNorm.forward(self, input)
        return fused.rest(y, residual, _plain(activation))

    def _synchronises(self) -> bool:
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) != 1
        )

    def _over_ranks(self, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        ranks = ranks_of(self.process_group)
        exchange = Merging(ranks, training=True)
        with exchange:
            call = self._forward_call(x, residual, activation)
            batch = exchange.merged(tensors.moments(call.x), call.move)
        mean, inv_std = call.normalize(batch)
        if not call.wants_gradient:
            return call.y
        inputs = (call.x, call.weight, call.bias, call.residual)
        y: Tensor = _SyncBatchNorm.apply(*inputs, call, mean, inv_std, batch.count, ranks)
        return y

    def _forward_call(
        self, x: Tensor, residual: Tensor | None, activation: Activation
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
        self._check_tensors(x, residual, state)
        weight, bias, *running = state
        move = self._move(running) if self._moves_statistics() else None
        wants_gradient = _needs_gradient(x, weight, bias, residual)
        kept = (x, weight, None if activation is None else bias)
        if wants_gradient and any(t is not None and t.is_inference() for t in kept):
            raise RuntimeError(
                "Inference tensors cannot be saved for backward; expected clones of those made in "
                "inference mode"
            )
        with torch.no_grad():
            y = torch.empty_like(x)
        activation = _plain(activation)
        return _ForwardCall(x, weight, bias, residual, eps, activation, move, wants_gradient, y)

    def _check_tensors(self, x: Tensor, residual: Tensor | None, state: State) -> None:
        """Refuse tensors that the kernels cannot read, or that do not fit x."""
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got input {tuple(x.shape)}")
        own = {name: t for name, t in zip(_STATE, state, strict=True) if t is not None}
        for name, tensor in {"input": x, "residual": residual, **own}.items():
            if tensor is not None:
                _check_readable(name, tensor)
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


def _plain(activation: Any) -> Activation:
    return _options.plain_activation(activation, _core.ACTIVATIONS)


def _check_readable(name: str, tensor: Any) -> None:
    if fused.is_plain(tensor):
        return
    if isinstance(tensor, Tensor):  # PyTorch's repr crashes for a tensor whose memory was freed
        found = f"a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
    else:
        found = _errors.described(tensor)
    accepted = ", ".join(sorted(str(dtype) for dtype in fused.DTYPES))
    raise TypeError(
        f"{name} is {found}; expected a dense tensor in the CPU's memory, of {accepted}"
    )


def _needs_gradient(*inputs: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    given = [t for t in inputs if t is not None]
    # As in PyTorch, there is no gradient if all tensors were made in inference mode.
    return any(t.requires_grad for t in given) and not all(t.is_inference() for t in given)


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
        count: int,
        ranks: Ranks,
    ) -> Tensor:
        y, activation = call.y, call.activation
        activated = activation is not None
        beside = fused.beside(y, residual, activation)
        ctx.save_for_backward(x, weight, bias if activated else None, beside, mean, inv_std)
        ctx.activation = activation
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        ctx.count, ctx.ranks, ctx.channels = count, ranks, len(mean)
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
                gradients = _typed(parts, ctx.dtypes, needs)
                dx = torch.empty_like(call.x)
                sums = exchange.summed(*map(np.asarray, parts))
            dresidual = call.through_batch(dx, ctx.count, activated, sums)
        else:  # this needs no other rank
            call = _backward_call(ctx, dy)
            _, *others, dresidual = call.over_part((False, *needs[1:3], activated))
            gradients = _typed(others, ctx.dtypes, needs)
        if needs[3] and not activated:  # the gradient of a sum is the gradient of each term
            dresidual = call.dy
        return dx, *gradients, dresidual, None, None, None, None, None


def _backward_call(ctx: Any, dy: Tensor) -> _BackwardCall:
    """Read the arguments of a backward, and refuse those that the kernels cannot read."""
    x, weight, bias, beside, mean, inv_std = ctx.saved_tensors
    call = _BackwardCall(dy.resolve_neg(), x, mean, inv_std, weight, bias, beside, ctx.activation)
    _check_readable("the output's gradient", call.dy)
    saved = {"input": x, "weight": weight, "bias": bias, "mean": mean, "std": inv_std}
    saved["output or residual"] = beside
    for name, tensor in saved.items():
        if tensor is not None and not fused.is_plain(tensor):
            raise RuntimeError(f"the {name}'s memory was freed; expected it for the backward")
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
        self, dx: Tensor, count: int, activated: bool, sums: tuple[Any, Any]
    ) -> Tensor | None:
        """Fill x's gradient, of a batch that x is a part of; return the residual's if activated."""
        *_, dresidual = self._run(count, dx, (True, False, False, activated), sums)
        return None if dresidual is None else tensors.tensor(dresidual, self.x)

    def _run(self, count: int, dx: Tensor | None, needs: tuple[bool, ...], sums: Any) -> Any:
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
            )


def _typed(
    parts: Sequence[Tensor | None], dtypes: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of weight and bias in these types, None where not needed."""
    return [
        part.to(dtype) if needed and part is not None else None
        for part, dtype, needed in zip(parts, dtypes, needs[1:3], strict=True)
    ]
