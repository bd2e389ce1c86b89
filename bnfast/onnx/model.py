"""What the protocol buffers of an ONNX model say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

_OLDEST_OPSET = 7  # BatchNormalization-6 and older decide by `is_test` and `consumed_inputs`
_STANDARD = ("", "ai.onnx")  # domains of ONNX's own operators


class LeftError(Exception):
    """Why a batch norm is left as it is."""


def checked_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that is one, and of an opset whose batch norms are known."""
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
    return model


def hidden_batch_norms(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield the names of the batch norms that are not in the main graph, and where they are."""
    for node in model.graph.node:
        for graph in subgraphs(node):
            where = f"{node.op_type} {node.name or node.output[0]!r}"
            yield from _hidden(graph.node, f"it is in a subgraph of {where}")
    for function in model.functions:
        yield from _hidden(function.node, f"it is in the function {function.name!r}")


def _hidden(nodes: Iterable[onnx.NodeProto], why: str) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if is_op(node, "BatchNormalization"):
            yield node.name or node.output[0], why
        for graph in subgraphs(node):
            yield from _hidden(graph.node, why)


def opset(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that a model uses."""
    versions = [o.version for o in model.opset_import if o.domain in _STANDARD]
    return versions[0] if versions else 1


def is_op(node: onnx.NodeProto, *kinds: str) -> bool:
    """Whether a node is one of these operators of ONNX's own."""
    return node.op_type in kinds and node.domain in _STANDARD


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def to_array(tensor: onnx.TensorProto, what: str) -> Array:
    """Return the numbers of a tensor."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise LeftError(f"{what}, {tensor.name!r}, is external data that is not loaded")
    return np.asarray(numpy_helper.to_array(tensor))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node has in its attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
