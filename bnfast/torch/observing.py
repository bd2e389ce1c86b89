"""Run a model to see the inputs of its batch norms, then restore its state."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def observing(model: nn.Module, hooks: Mapping[_BatchNorm, Callable[..., None]]) -> Iterator[None]:
    """Let layers normalise by their batches and run pre-hooks on their inputs; then restore all."""
    with ExitStack() as stack:
        for context in (_modes_kept(model), _buffers_kept(model), torch.no_grad(), _eager()):
            stack.enter_context(cast("Any", context))
        for layer, hook in hooks.items():
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(_by_its_batch(layer))
        yield


@contextmanager
def _by_its_batch(layer: Any) -> Iterator[None]:
    """Let a layer normalise by this process' batch and keep its running statistics."""
    tracks, own = layer.track_running_stats, vars(layer).get("forward")
    kinds: tuple[Any, ...] = type(layer).__mro__
    synchronised = next((kind for kind in kinds if kind.__name__ == "SyncBatchNorm"), None)
    layer.training, layer.track_running_stats = True, False
    if synchronised is not None and own is None:
        layer.forward = kinds[kinds.index(synchronised) + 1].forward.__get__(layer)
    try:
        yield
    finally:
        layer.track_running_stats = tracks
        if synchronised is not None and own is None:
            vars(layer).pop("forward", None)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore buffers that forwards change: other batch norms' statistics, counters."""
    kept = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, values in kept:
                buffers[name] = buffer
                if not torch.equal(buffer, values):  # a buffer without changes may be read-only
                    buffer.copy_(values)


def _eager() -> Any:
    """Let compiled models run eagerly, so that hooks see real tensors."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
