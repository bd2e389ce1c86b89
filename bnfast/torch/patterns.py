"""What batch norms and activations look like in AOTAutograd's graphs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bnfast import _core

if TYPE_CHECKING:
    from torch._ops import OpOverload

_aten = torch.ops.aten

SLOPE = object()  # in a pattern: the argument that is read as the slope
ANY = object()


@dataclass(frozen=True)
class Activation:
    """An activation by its name in bnfast and by PyTorch's operators.

    `forward` and `backward` are an operator each and what must follow its tensors: the input of
    the forward; the gradient and the input (or output) of the backward.
    """

    name: str
    forward: tuple[Any, ...]
    backward: tuple[Any, ...]
    from_output: bool
    takes_slope: bool


# Activations whose operators in these graphs have other names than their function, or arguments.
_SPECIAL: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "relu": ((_aten.relu.default,), (_aten.threshold_backward.default, 0)),
    "relu6": ((_aten.hardtanh.default, 0, 6), (_aten.hardtanh_backward.default, 0, 6)),
    "leaky_relu": (
        (_aten.leaky_relu.default, SLOPE),
        (_aten.leaky_relu_backward.default, SLOPE, ANY),
    ),
}


def _operators(name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the patterns of an activation: its function's operators, with their defaults."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    forward, backward = getattr(_aten, name).default, getattr(_aten, f"{name}_backward").default
    return (forward, *_defaults(forward, 1)), (backward, *_defaults(backward, 2))


def _defaults(operator: OpOverload, tensors: int) -> list[Any]:
    return [argument.default_value for argument in operator._schema.arguments[tensors:]]


ACTIVATIONS = tuple(
    Activation(name, *_operators(name), facts.from_output, facts.slope > 0)
    for name, facts in _core.ACTIVATIONS.items()
)


def activation_of(node: Node) -> tuple[Activation, float] | None:
    """Return the activation that a node computes, and its slope; None for any other operation."""
    for activation in ACTIVATIONS:
        slope = _slope(node, activation.forward, 1)
        if slope is not None:
            return activation, slope
    return None


def is_backward_of(node: Node, activation: Activation, slope: float) -> bool:
    """Whether a node is the gradient of an activation."""
    return _slope(node, activation.backward, 2) == slope


def _slope(node: Node, pattern: tuple[Any, ...], tensors: int) -> float | None:
    """Return the slope if a node fits a pattern (0 where it has none), else None."""
    target, *wanted = pattern
    if node.target is not target:
        return None
    slope = 0.0
    for want, value in zip(wanted, constants(node)[tensors:], strict=True):
        if want is SLOPE and isinstance(value, (int, float)):
            slope = float(value)
        elif want is not ANY and (isinstance(value, Node) or value != want):
            return None
    return slope


def constants(node: Node) -> list[Any]:
    """Return all arguments of an operator's call, with the schema's defaults for those left out."""
    overload: Any = node.target
    declared = overload._schema.arguments
    given = dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in declared]


# ---- Batch norms

_FUNCTIONAL = _aten._native_batch_norm_legit_functional.default
_NO_STATISTICS = _aten._native_batch_norm_legit.no_stats
_EVALUATION = _aten._native_batch_norm_legit_no_training.default
BACKWARD = _aten.native_batch_norm_backward.default
NORMS: frozenset[OpOverload] = frozenset((_FUNCTIONAL, _NO_STATISTICS, _EVALUATION))

MOST_AXES = 8  # the kernels' limit (aten_tensors.h)
_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *_HALVES)


class Norm:
    """A batch norm in a graph: its arguments and results, for any of its operators."""

    def __init__(self, node: Node) -> None:
        self.node = node
        given = list(node.args)
        self.x, self.weight, self.bias = given[:3]
        self.running_mean = self.running_var = None
        self.training = node.target is not _EVALUATION
        if node.target is not _NO_STATISTICS:
            self.running_mean, self.running_var = given[3:5]
        self.momentum, self.eps = given[-2:]
        self.results = {u.args[1]: u for u in node.users if u.target is operator.getitem}

    @property
    def moves(self) -> bool:
        """Whether running statistics are among the results."""
        return self.node.target is _FUNCTIONAL

    @property
    def statistics(self) -> tuple[Any, Any]:
        """The statistics that evaluation and its backward normalise by; None in training."""
        return (None, None) if self.training else (self.running_mean, self.running_var)

    def refused(self) -> str | None:
        """Return why the kernels do not take it; None if they do."""
        trains = self.node.target is not _FUNCTIONAL or self.node.args[5] is True
        if self.node.kwargs or not trains or len(self.results) != len(self.node.users):
            return "an operator that is called in an unknown way"
        tensors = [self.x, self.weight, self.bias, self.running_mean, self.running_var]
        x, *vectors = [t.meta["val"] for t in tensors if t is not None]
        if any(t.device.type != "cpu" for t in (x, *vectors)):
            return f"tensors on {x.device.type}"
        if x.dtype not in _DTYPES or x.layout is not torch.strided:
            return f"{x.dtype} tensors"
        if x.dim() > MOST_AXES or any(statically_known_true(size == 0) for size in x.shape):
            return "no values, or more axes than the kernels take"
        if not all(_is_vector(v, x.shape[1]) for v in vectors):
            return "parameters of another shape, or with gaps"
        kinds = {v.dtype for v in vectors}
        if len(kinds) > 1 or kinds - {x.dtype, torch.float32 if x.dtype in _HALVES else x.dtype}:
            return f"parameters of {', '.join(sorted(map(str, kinds)))} beside {x.dtype}"
        return None

    def gradients(self) -> list[Node]:
        """Return the nodes that compute its gradients."""
        saved = self.results.get(1)
        users = () if saved is None else saved.users
        return [u for u in users if u.target is BACKWARD and u.args[1] is self.x]


def _is_vector(v: Tensor, channels: Any) -> bool:
    if v.dim() != 1 or not statically_known_true(v.shape[0] == channels):
        return False
    return statically_known_true(v.stride(0) == 1) or statically_known_true(v.shape[0] == 1)


def value(node: Node) -> Tensor | None:
    """Return the tensor, without values, that was recorded for a node."""
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def has_strides(x: Tensor, y: Tensor) -> bool:
    """Whether y has the strides of the kernels' result for x."""
    made = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return all(
        statically_known_true(a == b) for a, b in zip(made.stride(), y.stride(), strict=True)
    )


def alike(a: Node, b: Node) -> bool:
    """Whether two nodes certainly have the same shape, type and memory order."""
    x, y = value(a), value(b)
    if x is None or y is None or x.dtype is not y.dtype or x.device != y.device:
        return False
    if x.dim() != y.dim() or x.layout is not y.layout:
        return False
    sizes = zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True)
    return all(statically_known_true(p == q) for p, q in sizes)
