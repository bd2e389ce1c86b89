"""Read the protocol buffers of an ONNX model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bnfast._types import Array


_OLDEST_OPSET = 7  # BatchNormalization-6 and older use `is_test` and `consumed_inputs`
_DEEPEST = 100
_STANDARD = ("", "ai.onnx")  # the domains of ONNX's own operators
FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
_READ = (*FLOATS, "INT32", "INT64")


class LeftError(Exception):
    """Why a batch norm is not folded."""


# ---- models


def checked_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model if it is an ONNX model of an opset whose batch norms are known."""
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(
            f"model is of type {type(model).__name__}; expected an onnx.ModelProto, "
            "as onnx.load returns it"
        )
    if opset(model) < _OLDEST_OPSET:
        raise ValueError(
            f"model uses opset {opset(model)}; expected {_OLDEST_OPSET} or later "
            "(onnx.version_converter converts)"
        )
    _check_depth(model)
    return model


def _check_depth(model: onnx.ModelProto) -> None:
    """Refuse deep nesting: no file can hold it, and copying it would overflow the stack."""
    graphs: list[Any] = [model.graph, *model.functions]
    for _ in range(_DEEPEST):
        graphs = [inner for graph in graphs for node in graph.node for inner in subgraphs(node)]
        if not graphs:
            return
    raise ValueError(f"model has {_DEEPEST} subgraphs one in the other; expected fewer")


def opset(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that a model uses."""
    versions = [o.version for o in model.opset_import if o.domain in _STANDARD]
    return versions[0] if versions else 1


def inputs_are_settable(model: onnx.ModelProto) -> bool:
    """Whether a caller may set graph inputs that are also initializers.

    Before IR version 4 every initializer had to be a graph input. Being an input then means
    nothing, and runtimes treat initializers as constants.
    """
    return not 0 < model.ir_version < 4


def hidden_batch_norms(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield the names of the batch norms outside the main graph, and where they are."""
    for node in model.graph.node:
        why = f"it is in a subgraph of {node.op_type} {name_of(node)!r}"
        for graph in subgraphs(node):
            yield from ((name, why) for name in _batch_norms(graph.node))
    for function in model.functions:
        why = f"it is in the function {function.name!r}"
        yield from ((name, why) for name in _batch_norms(function.node))


def _batch_norms(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    return (name_of(node) for node in with_inner(nodes) if is_op(node, "BatchNormalization"))


# ---- nodes


def is_op(node: onnx.NodeProto, *kinds: str) -> bool:
    """Whether a node is one of these operators of ONNX's own."""
    return node.op_type in kinds and node.domain in _STANDARD


def first_output(node: onnx.NodeProto) -> str:
    """Return the first output of a node; an empty string if it has none."""
    return str(node.output[0]) if node.output else ""


def name_of(node: onnx.NodeProto) -> str:
    """Return a node's name, or another string that identifies it."""
    return node.name or first_output(node) or node.op_type


def attribute(node: onnx.NodeProto, name: str, kind: str, default: Any) -> Any:
    """Return an attribute of a node if it is of this kind, or the default if there is none."""
    found = [a for a in node.attribute if a.name == name]
    if not found:
        return default
    kinds = {onnx.AttributeProto.AttributeType.Name(a.type) for a in found}
    if kinds != {kind}:
        raise LeftError(f"the {name} of {node.op_type} is of type {min(kinds)}, not {kind}")
    if len(found) > 1 or found[0].ref_attr_name:
        raise LeftError(f"the {name} of {node.op_type} is not one value")
    return helper.get_attribute_value(found[0])


def looks(node: onnx.NodeProto) -> list[int]:
    """Return the inputs of which a node sees only the type or the shape, not the numbers."""
    positions = {"Shape": 0, "Size": 0, "CastLike": 1}
    if not is_op(node, *positions) or positions[node.op_type] >= len(node.input):
        return []
    return [positions[node.op_type]]


def reads(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of a node whose numbers it needs."""
    looking = looks(node)
    return [name for position, name in enumerate(node.input) if position not in looking]


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in a node's attributes."""
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            yield a.g
        yield from a.graphs


def with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, each before those of its subgraphs."""
    waiting = list(nodes)[::-1]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend([inner for graph in subgraphs(node) for inner in graph.node][::-1])


def names_inside(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names in a node's subgraphs: their own and those from outer graphs."""
    for outer in with_inner([node]):
        for graph in subgraphs(outer):
            yield from (value.name for value in (*graph.input, *graph.output))
            yield from constant_names(graph)
            for inner in graph.node:
                yield from (*inner.input, *inner.output)


# ---- tensors


def constant_names(graph: onnx.GraphProto) -> list[str]:
    """Return the names of a graph's initializers."""
    dense = [tensor.name for tensor in graph.initializer]
    return dense + [tensor.values.name for tensor in graph.sparse_initializer]


def kind_name(kind: int) -> str:
    """Return the name of an element type, or its number if it has none."""
    known = {number: name for name, number in onnx.TensorProto.DataType.items()}
    return str(known.get(kind, kind))


def to_array(tensor: onnx.TensorProto, what: str) -> Array:
    """Return the numbers of a tensor, if they are in the model and of a known type."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise LeftError(f"{what} is external data that is not loaded")
    kind = kind_name(tensor.data_type)
    if kind not in _READ:
        raise LeftError(f"{what} is of type {kind}")
    shape = tuple(tensor.dims)
    if min(shape, default=0) < 0:
        raise LeftError(f"{what} has the shape {shape}")
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except ValueError as error:
        raise LeftError(f"{what} of shape {shape} cannot be read: {error}") from error
