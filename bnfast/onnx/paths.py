"""The nodes between batch norms and the layers beside them, and how a batch norm may pass them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnfast.layers import BatchNorm

from .linear import per_channel
from .model import LeftError, attribute, first_output, is_op

if TYPE_CHECKING:
    from bnfast._types import Array

    from .graph import Graph
    from .shapes import Dims

_MOST_NODES = 256  # the limit for one batch norm, so that many of them do not take quadratic time
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


class Stream(NamedTuple):
    """The channels of a value (axis 1) and the layers that make them.

    Attributes
    ----------
    rank : int
        The number of axes of the value.
    parts : tuple of tuple of int
        The nodes and the number of channels from each, in the order of the channels.
    """

    rank: int
    parts: tuple[tuple[int, int], ...]

    @property
    def channels(self) -> int:
        """Return the number of channels."""
        return sum(channels for _, channels in self.parts)


def nodes_before(graph: Graph, i: int) -> list[int]:
    """Return the nodes from the layers before a batch norm to it, each after its inputs.

    The output of each is used by the next one only.
    """
    found: list[int] = []
    waiting = [graph.nodes[i].input[0]]
    while waiting:
        if len(found) + len(waiting) > _MOST_NODES:
            raise LeftError(f"there are more than {_MOST_NODES} nodes between it and its layers")
        found.append(graph.producer(waiting.pop()))
        waiting.extend(_passed(graph, found[-1]))
    return found[::-1]


def _passed(graph: Graph, i: int) -> list[str]:
    """Return the inputs whose channels a node passes on; none if it should be a layer."""
    node = graph.nodes[i]
    if is_op(node, "Add", "Mul"):
        return [variable_and_constant(graph, i)[0]]
    if is_op(node, "Slice", *_RESHAPES):
        return list(node.input[:1])
    return list(node.input) if is_op(node, "Concat") else []


def passed_on(graph: Graph, i: int, streams: dict[str, Stream]) -> Stream | None:
    """Return the channels after a node that does not move them; None if it is a layer."""
    node, described = graph.nodes[i], graph.described(i)
    if not is_op(node, "Slice", "Concat", *_RESHAPES):
        return None
    if not node.input or len(node.output) != 1:
        raise LeftError(f"{described} has no input, or not one output")
    before = streams[node.input[0]]
    if is_op(node, "Slice"):
        if 1 in _sliced_axes(graph, i, before.rank):
            raise LeftError(f"{described} slices the channels")
        return before
    if is_op(node, "Concat"):
        joined = [streams[name] for name in node.input]
        return _joined(attribute(node, "axis", "INT", 0), described, joined)
    dims, made = graph.shapes.dims(node.input[0]), graph.shapes.dims(node.output[0])
    if dims is None or made is None or not _keeps_channels(dims, made, before.channels):
        raise LeftError(f"{described} does not surely keep axes 0 and 1, the channels")
    return before._replace(rank=len(made))


def _sliced_axes(graph: Graph, i: int, rank: int) -> set[int]:
    node, what = graph.nodes[i], f"of {graph.described(i)}"
    if len(node.input) == 1:  # before opset 10
        starts = attribute(node, "starts", "INTS", ())
        axes = attribute(node, "axes", "INTS", range(len(starts)))
    elif len(node.input) > 3 and node.input[3]:
        axes = graph.constants.integers(node.input[3], f"the axes {what}")
    else:
        axes = range(len(graph.constants.integers(node.input[1], f"the starts {what}")))
    if not all(-rank <= axis < rank for axis in axes):
        raise LeftError(f"the axes {what} are {list(axes)} of a value with {rank} axes")
    return {axis % rank for axis in axes}


def _joined(axis: int, described: str, streams: list[Stream]) -> Stream:
    ranks = {stream.rank for stream in streams}
    rank = min(ranks)
    if len(ranks) > 1 or axis not in (1, 1 - rank):
        raise LeftError(f"{described} does not join channels")
    return Stream(rank, tuple(part for stream in streams for part in stream.parts))


def _keeps_channels(dims: Dims, made: Dims, channels: int) -> bool:
    """Whether a reshape of a value keeps the same numbers in each channel."""
    if min(len(dims), len(made)) < 2 or made[1] != channels:
        return False
    if dims[0] is not None and dims[0] == made[0]:
        return True
    rest, kept = _product(dims[2:]), _product(made[2:])
    return rest is not None and rest == kept


def _product(dims: Dims) -> int | None:
    known = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(known) if len(known) == len(dims) else None


def is_affine(graph: Graph, i: int) -> bool:
    """Whether a node adds a constant, or multiplies by a constant."""
    node = graph.nodes[i]
    return (
        is_op(node, "Add", "Mul")
        and (len(node.input), len(node.output)) == (2, 1)
        and any(name in graph.constants for name in node.input)
    )


def variable_and_constant(graph: Graph, i: int) -> tuple[str, str]:
    """Return the variable input of an Add or a Mul, and its constant."""
    if not is_affine(graph, i):
        verb = "adds" if is_op(graph.nodes[i], "Add") else "multiplies by"
        raise LeftError(f"{graph.described(i)} {verb} no constant")
    first, second = graph.nodes[i].input
    return (first, second) if second in graph.constants else (second, first)


def data_input(graph: Graph, i: int) -> str:
    """Return the input that a batch norm, an Add or a Mul changes."""
    if is_op(graph.nodes[i], "Add", "Mul"):
        return variable_and_constant(graph, i)[0]
    return str(graph.nodes[i].input[0])


def affine_layer(graph: Graph, i: int, rank: int, channels: int) -> BatchNorm:
    """Return an Add or a Mul as a layer with mean 0 and variance 1."""
    what = f"the constant of {graph.described(i)}"
    numbers = graph.constants.array(variable_and_constant(graph, i)[1], what)
    each = per_channel(numbers, rank, channels, what)
    changed = "bias" if is_op(graph.nodes[i], "Add") else "weight"
    return _layer_with(channels, {changed: each})


def share(layer: BatchNorm, first: int, channels: int) -> BatchNorm:
    """Return a layer with some of the channels of another."""
    if (first, channels) == (0, layer.num_features):
        return layer
    state = {
        name: values[first : first + channels]
        for name, values in layer.state_dict().items()
        if np.ndim(values)
    }
    return _layer_with(channels, state, layer.eps)


def _layer_with(channels: int, state: dict[str, Array], eps: float = 0.0) -> BatchNorm:
    try:
        layer = BatchNorm(channels, eps, ddof=0, dtype=np.float64)
    except ValueError as error:
        raise LeftError(f"as a layer, its {error}") from error
    layer.load_state_dict(layer.state_dict() | state)
    return layer.eval()


def following(graph: Graph, value: str) -> list[int]:
    """Return the chain of Adds and Muls of constants that follows a value and alone uses it."""
    found: list[int] = []
    while True:
        try:
            i = graph.only_user(value)
        except LeftError:
            return found
        if not is_affine(graph, i):
            return found
        found.append(i)
        value = first_output(graph.nodes[i])
