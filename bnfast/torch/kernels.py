"""bnfast's kernels over PyTorch tensors: which tensors they take, and how they read them.

Tensors are read and written as NumPy arrays over the same memory; nothing that is dense is copied.
Between a small call of a layer and its kernel, what Python looks up costs more than the kernel:
`bench/torch_calls.py` counts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnfast import _core, _threads
from bnfast.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Order = tuple[int, ...] | None

Activation = str | tuple[str, float] | None
# What a training forward moves: mean, variance and number of batches, as far as a layer has them.
Running = tuple[Tensor | None, Tensor | None, Tensor | None]
# Of x, weight, bias and residual; None where nobody asked.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# PyTorch's types that the kernels take, and NumPy's name for each.
_NUMPY_TYPES = {
    getattr(torch, name): np.dtype(name) for name in _core.TYPE_NAMES if name != "bfloat16"
}
try:
    import ml_dtypes
except ModuleNotFoundError:
    pass
else:
    _NUMPY_TYPES[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)

DTYPES = frozenset(_NUMPY_TYPES)
_TYPE_NUMBERS = {dtype: known.num for dtype, known in _NUMPY_TYPES.items()}
_CLASSES = (Tensor, torch.nn.Parameter)


# ---- Who runs a call


def is_plain(x: Any) -> bool:
    """Whether x is an ordinary dense tensor whose numbers the kernels can read now.

    One without memory, as a symbolic zero or a parameter whose storage was freed, is not.
    """
    return (
        type(x) in _CLASSES
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in DTYPES
        and not x.is_neg()
        and (x.data_ptr() != 0 or x.numel() == 0)
    )


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all that are given are plain."""
    for x in tensors:  # noqa: SIM110, a generator costs as much as the checks
        if x is not None and not is_plain(x):
            return False
    return True


def is_transformed() -> bool:
    """Whether tensors may stand for more than their numbers: functorch, forward mode, jit."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_recorded() -> bool:
    """Whether a mode wants to see every operation: fake tensors, proxies, counters."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


# ---- Tensors as arrays


def _array(x: Tensor | None, order: Order = None) -> Array | None:
    """Return x's memory as an array, its axes in the given order, to be used while x is there."""
    if x is None:
        return None
    if order is None:
        if x.is_contiguous():
            return _core.over_memory(x.data_ptr(), x.shape, _TYPE_NUMBERS[x.dtype])
    elif _is_channels_last(x, order):
        n, c, *space = x.shape
        return _core.over_memory(x.data_ptr(), (n, *space, c), _TYPE_NUMBERS[x.dtype])
    x = x.detach()
    half = x.dtype is torch.bfloat16
    array = x.view(torch.int16).numpy().view(_NUMPY_TYPES[x.dtype]) if half else x.numpy()
    return array if order is None else array.transpose(order)


def _is_channels_last(x: Tensor, order: tuple[int, ...]) -> bool:
    """Whether x's memory, its axes in channels_last's order, is one run of values."""
    known = _CHANNELS_LAST.get(x.dim())
    if known is not None:
        return x.is_contiguous(memory_format=known)
    return x.detach().permute(order).is_contiguous()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _storage_order(x: Tensor) -> Order:
    """Return channels_last's order of axes if x lies so; all else is `_arrays`' to find out."""
    if x.is_contiguous() or x.dim() < 3:
        return None
    order = (0, *range(2, x.dim()), 1)
    return order if _is_channels_last(x, order) else None


def _axis(order: Order) -> int:
    return 1 if order is None else -1


def _tensor(array: Array, x: Tensor, order: Order) -> Tensor:
    """Return a result as a tensor with the strides of `torch.empty_like(x)`, and no view.

    Autograd does not let anybody change a view in place that a function returned.
    """
    if order is not None:
        array = array.transpose(0, -1, *range(1, x.dim() - 1))
    y = torch.from_numpy(array.view(np.int16) if x.dtype is torch.bfloat16 else array)
    wanted = x.stride()
    if wanted == y.stride() and y.dtype is x.dtype:
        return y
    if wanted != y.stride():
        wanted = torch.empty_like(x, device="meta").stride()
        if not _same_order(x.shape, y.stride(), wanted):
            return torch.empty_like(x).copy_(y)
    with torch.no_grad():
        return x.new_empty(0).set_(y.untyped_storage(), 0, x.shape, wanted)


def _same_order(shape: torch.Size, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether strides lead to the same places; where there is one value they lead nowhere."""
    return all(n < 2 or p == q for n, p, q in zip(shape, a, b, strict=True))


def _on_torch_threads(call: Callable[..., Any], *args: Any) -> Any:
    """Call the core with the number of threads that PyTorch would use here."""
    token = _threads._asked_here.set(min(torch.get_num_threads(), _threads.MAX_THREADS))
    try:
        return call(*args)
    finally:
        _threads._asked_here.reset(token)


# ---- The kernels


def moments(x: Tensor) -> Moments:
    """Return the moments of each channel."""
    order = _storage_order(x)
    return Moments(*_on_torch_threads(_core.moments, _array(x, order), _axis(order)))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running | None,
    momentum: float,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, tuple[Array, Array, Array]]:
    """Return y, and the batch's mean, biased variance and 1 / sqrt(var + eps) in float64."""
    order = _storage_order(x)
    running_mean, running_var, batches = running or (None, None, None)
    if batches is not None:
        batches.add_(1)  # refused where nothing may be changed, hence before all that is
    try:
        y, (_, *stats) = _on_torch_threads(
            _core.forward,
            _array(x, order),
            _array(running_mean),
            _array(running_var),
            _array(weight),
            _array(bias),
            momentum,
            eps,
            _axis(order),
            1,
            _array(residual, order),
            activation,
            None,
        )
    except BaseException:
        if batches is not None:
            batches.sub_(1)
        raise
    return _tensor(y, x, order), tuple(stats)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Return x normalised with a given mean and variance."""
    order = _storage_order(x)
    y = _on_torch_threads(
        _core.normalize,
        _array(x, order),
        _array(mean),
        _array(var),
        _array(weight),
        _array(bias),
        eps,
        _axis(order),
        _array(residual, order),
        activation,
        None,
    )
    return _tensor(y, x, order)


def backward(
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
    count: int | None = None,
    sums: tuple[Any, Any] | None = None,
    vectors: type[np.floating[Any]] = np.float64,
) -> Gradients:
    """Return the gradients of x, weight, bias and residual, None where not needed.

    Those of weight and bias are of the type `vectors`.

    `through` says that mean and inv_std are the batch's, and hence functions of x. Where x is a
    part of a batch, `count` is that batch's and `sums` are its gradients of weight and bias.
    """
    order = _storage_order(x)
    if count is None:
        count = x.numel() // x.shape[1] if through else 0
    dx, dweight, dbias, dresidual = _on_torch_threads(
        _core.backward,
        _array(dy, order),
        _array(x, order),
        _array(mean),
        _array(inv_std),
        count,
        _array(weight),
        _array(bias),
        _axis(order),
        None,
        activation,
        _array(y, order),
        None,
        needs,
        sums,
    )
    return (
        None if dx is None else _tensor(dx, x, order),
        None if dweight is None else torch.from_numpy(dweight.astype(vectors, copy=False)),
        None if dbias is None else torch.from_numpy(dbias.astype(vectors, copy=False)),
        None if dresidual is None else _tensor(dresidual, x, order),
    )
