"""Exact population statistics of a PyTorch model's batch norms."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from bnfast.distributed import Merging, ranks_of
from bnfast.inference import _iterator_of, _reporting
from bnfast.moments import Moments

from . import checks, fused, tensors
from .convert import _check_model
from .modules import BatchNormOnCPU
from .observing import observing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bnfast._types import Array
    from bnfast.distributed import Ranks


class _Layer(NamedTuple):
    """A layer whose statistics are wanted, and its name in the model."""

    name: str
    module: _BatchNorm


def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Iterable[nn.Module | str] | None = None,
    progress: bool | Callable[[int], object] = False,
    group: Any = None,
) -> None:
    """Give a model's batch norms the exact mean and variance of a whole data set.

    Algorithm 2 (steps 8 to 11) of Ioffe and Szegedy (2015), with the batches' moments merged in
    float64. The first layer gets the statistics of all batches as one, for any batch sizes and
    order. (`torch.optim.swa_utils.update_bn` averages the batches' variances. That loses the spread
    between their means and gives a small batch the same weight as a large one.)

    Parameters
    ----------
    model : torch.nn.Module
        Run once for every batch, without gradients. During the run the `layers` normalise by the
        batch, as in training; a `SyncBatchNorm` by this process' part. All other modules keep their
        mode: call ``model.eval()`` first for statistics without dropout, as in inference, or
        ``model.train()`` for those of training, as in `update_bn`.
    batches : iterable
        Iterated over once. A tensor is the model's only argument. Of a tuple or list, as from a
        data loader, only the first element is used, as in `update_bn`; but if `model` is itself one
        of bnfast's layers, a pair is its input and mask. A dict has the arguments by
        name: the input and its mask, say. What a layer's mask leaves out is not counted.
    layers : iterable of torch.nn.Module or str, optional
        The layers to update, or their names in the model. If None, all batch norms that have
        running statistics: PyTorch's, bnfast's, and classes derived from them.
    progress : bool or callable
        True counts batches on stderr; a callable is called with the number of batches done.
    group : torch.distributed.ProcessGroup or mpi4py.MPI.Comm, optional
        The data set is then the data of all ranks of this group together
        (``torch.distributed.group``'s ``WORLD`` for the default group). Each rank runs its own
        batches, any number of them. Their moments are merged at the end in the order of ranks, so
        all ranks get the same bits.

    Raises
    ------
    TypeError
        If `model` is not a `torch.nn.Module`, or one of the `layers` is not a batch norm.
    RuntimeError
        If a layer is called more than once for a batch, which would count it twice; if it has no
        running statistics, or was never called with values; if another rank could not take part.
    ValueError
        If there is no batch, if one of the `layers` is not in the model, or if a layer saw fewer
        than two values per channel.

    Notes
    -----
    Statistics are written after the last batch. If anything raises before that, they stay unchanged
    on all ranks. Modes, other buffers and ``num_batches_tracked`` are always restored. The variance
    is the unbiased one, over ``count - 1``.

    See Also
    --------
    bnfast.recompute_statistics : the same for bnfast's own layers over NumPy arrays.
    """
    _check_model(model)
    exchange = None if group is None else _MergingAll(ranks_of(group))
    with exchange or nullcontext():
        targets = _checked_layers(model, layers)
        if not targets and exchange is None:
            return
        totals = _totals(model, batches, targets, progress, alone=exchange is None)
        if exchange is None:
            _check_totals(targets, totals)
            _write(targets, totals)
        else:
            exchange.write_merged(targets, totals)


# ---- Which layers


def _checked_layers(model: nn.Module, layers: Iterable[nn.Module | str] | None) -> Sequence[_Layer]:
    names = {id(module): name or "(model)" for name, module in model.named_modules()}
    if layers is None:
        found = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
        ]
    else:
        found = _listed(model, layers, names)
    targets = {id(module): _Layer(names[id(module)], module) for module in found}
    for target in targets.values():
        _check_updatable(target)
    return list(targets.values())


def _listed(
    model: nn.Module, layers: Iterable[nn.Module | str], names: dict[int, str]
) -> list[_BatchNorm]:
    if isinstance(layers, (str, nn.Module)):
        raise TypeError(f"layers is {layers!r:.60}; expected an iterable of modules or names")
    by_name = dict(model.named_modules(remove_duplicate=False))
    found = []
    for i, given in enumerate(layers):
        if isinstance(given, str) and given not in by_name:
            raise ValueError(f"layers[{i}] is {given!r}; expected the name of a layer in the model")
        module = by_name[given] if isinstance(given, str) else given
        if not isinstance(module, _BatchNorm):
            raise TypeError(
                f"layers[{i}] is {given!r:.60} of type {type(module).__name__}; expected a batch "
                "norm, or its name in the model"
            )
        if id(module) not in names:
            raise ValueError(f"layers[{i}] is a {type(module).__name__} that is not in the model")
        found.append(module)
    return found


def _check_updatable(target: _Layer) -> None:
    name, module = target
    if isinstance(module, _LazyNormBase) and module.has_uninitialized_params():
        raise RuntimeError(f"{name} has not seen its first input; run the model once before")
    if module.running_mean is None or module.running_var is None:
        raise RuntimeError(
            f"{name} has no running statistics to update; expected a layer with "
            "track_running_stats=True"
        )
    for which in ("running_mean", "running_var"):
        tensor = getattr(module, which)
        if not tensor.is_floating_point() or tensor.is_meta:
            raise TypeError(
                f"{name}.{which} is of {tensor.dtype} on {tensor.device}; expected floats in memory"
            )


# ---- Their inputs


def _totals(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[_Layer],
    progress: bool | Callable[[int], object],
    alone: bool,
) -> list[Moments]:
    """Run the model on all batches; return the moments of each layer's inputs."""
    iterator = _iterator_of(batches)
    done = 0
    watched = [_Watched(target) for target in targets]
    with (
        _reporting(progress, batches) as report,
        observing(model, {layer.module: layer for layer in watched}),
    ):
        for batch in iterator:
            _run(model, batch)
            for layer in watched:
                layer.end_batch()
            done += 1
            report(done)
    if done == 0 and alone:
        raise ValueError("batches is empty; expected at least one batch")
    return [layer.total for layer in watched]


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("a batch is empty; expected its first element to be the model's input")
        if isinstance(model, BatchNormOnCPU) and len(batch) == 2:
            model(batch[0], mask=batch[1])
        else:
            model(batch[0])
    else:
        model(batch)


class _Watched:
    """A layer, and the moments of its inputs so far."""

    def __init__(self, target: _Layer) -> None:
        self.name, self.module = target
        self.total = Moments.empty(self.module.num_features)
        self._calls = 0

    def __call__(self, module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        """Add the input of a call to the moments. This is the forward pre-hook."""
        self._calls += 1
        x = args[0] if args else options.get("input")
        if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == len(self.total.mean):
            # the layer itself reports what is wrong with other inputs
            # a mask of another class's forward may mean anything
            mask = options.get("mask") if isinstance(module, BatchNormOnCPU) else None
            self.total = self.total.merge(_moments(x, checks.mask_array(mask)))

    def end_batch(self) -> None:
        if self._calls > 1:
            raise RuntimeError(
                f"{self.name} is called {self._calls} times for one batch, and its statistics "
                "would count the batch so often; expected layers that are called once, or `layers` "
                "without it"
            )
        self._calls = 0


def _moments(x: Tensor, mask: Array | None) -> Moments:
    """Return the moments of each channel of a tensor, in float64."""
    if x.numel() == 0:
        return Moments.empty(x.shape[1])
    x = x.detach()
    if not fused.is_plain(x):  # on another device, lazily negated, or a subclass
        x = x.resolve_neg().to("cpu").as_subclass(Tensor)
        if x.layout is not torch.strided:
            x = x.to_dense()
        if x.dtype not in fused.DTYPES and x.is_floating_point():
            x = x.float()  # exact for the half types
    return tensors.moments(x, mask)


# ---- Their new statistics


def _check_totals(targets: Sequence[_Layer], totals: Sequence[Moments]) -> None:
    for (name, _), total in zip(targets, totals, strict=True):
        if total.count == 0:
            raise RuntimeError(f"{name} saw no values; expected the model to call every layer")
        if total.count == 1 and isinstance(total.count, int):
            raise ValueError(
                f"{name} saw one value per channel in all batches; expected at least two, for a "
                "variance"
            )
        if total.count <= 1:
            raise ValueError(
                f"{name} saw values whose weights sum to {total.count:g} in all batches; expected "
                "more than 1, for a variance over count - 1"
            )


@torch.no_grad()
def _write(targets: Sequence[_Layer], totals: Sequence[Moments]) -> None:
    for (_, module), total in zip(targets, totals, strict=True):
        for target, values in (
            (module.running_mean, total.mean),
            (module.running_var, total.var(ddof=1)),
        ):
            cast("Tensor", target).copy_(torch.from_numpy(values))


class _MergingAll(Merging):
    """Merge all ranks' moments of many layers, each with a count of its own.

    To `Merging` they look like one layer, whose means are all means, then all counts, then all
    numbers of channels. Its `Exchange` tells the other ranks of any error raised on this one.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._targets: Sequence[_Layer] = ()
        self._totals: Sequence[Moments] = ()

    def write_merged(self, targets: Sequence[_Layer], totals: Sequence[Moments]) -> None:
        """Merge and write the statistics, on every rank or on none."""
        self._targets = targets
        sizes = [total.count for total in totals] + [len(total.mean) for total in totals]
        means = np.concatenate([*(total.mean for total in totals), np.array(sizes, np.float64)])
        m2 = np.concatenate([np.zeros(len(sizes)), *(total.m2 for total in totals)])
        self.merged(Moments._made(0, means, m2))
        _check_totals(targets, self._totals)

    def _finish(self) -> Moments:
        layers = len(self._targets)
        if not layers:
            return Moments.empty(0)
        means, m2 = self._numbers[:, 0], self._numbers[:, 1, 2 * layers :]
        counts, channels = np.split(means[:, m2.shape[1] :], 2, axis=1)
        channels = channels.astype(np.int64)
        if (channels != channels[0]).any():
            raise ValueError(
                f"the layers have {channels.tolist()} channels, by rank; expected the same on all"
            )
        ends = np.cumsum(channels[0])[:-1]
        parts = zip(np.split(means[:, : m2.shape[1]], ends, 1), np.split(m2, ends, 1), strict=True)
        self._totals = [
            Moments.merge_all(
                Moments(int(count) if count.is_integer() else float(count), mean, squares)
                for count, mean, squares in zip(counts[:, i], *part, strict=True)
            )
            for i, part in enumerate(parts)
        ]
        if all(total.count > 1 for total in self._totals):
            _write(self._targets, self._totals)
        return Moments.empty(0)
