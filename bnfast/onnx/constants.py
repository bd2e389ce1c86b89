"""Which values of a graph are the same in every run, and their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx

from .model import LeftError, attribute, is_op, to_array

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"


class Constants:
    """The constants of a graph: initializers, Constant nodes, and these passed on or transposed.

    Parameters
    ----------
    graph : onnx.GraphProto
    nodes : iterable of onnx.NodeProto
        Those of the graph, each after the ones that it takes values from.
    """

    def __init__(self, graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
        self._inputs = {value.name for value in graph.input}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes: dict[str, onnx.NodeProto] = {}  # Constant and Transpose, by their output
        self._passed: dict[str, str] = {}  # an Identity's output: what is at the start of the row
        for node in nodes:
            if len(node.output) != 1:
                continue
            if is_op(node, "Constant") or (is_op(node, "Transpose") and len(node.input) == 1):
                self._nodes[node.output[0]] = node
            elif is_op(node, "Identity") and len(node.input) == 1:
                self._passed[node.output[0]] = self._start(node.input[0])

    def __contains__(self, name: str) -> bool:
        start, _ = self._traced(name)
        return start not in self._inputs and self._source(start) is not None

    def array(self, name: str, what: str) -> Array:
        """Return the numbers of a value, or say why they may not be the same in every run."""
        if not name:
            raise LeftError(f"{what} is missing")
        start, transposes = self._traced(name)
        what = f"{what}, {start!r},"
        if start in self._inputs:
            raise LeftError(f"{what} is a graph input, which a caller may set")
        source = self._source(start)
        if source is None:
            raise LeftError(f"{what} is not a constant")
        numbers = _numbers(source, what)
        for node in reversed(transposes):
            axes = attribute(node, "perm", "INTS", list(range(numbers.ndim))[::-1])
            if sorted(axes) != list(range(numbers.ndim)):
                raise LeftError(f"{what} of shape {numbers.shape} is transposed by {axes}")
            numbers = np.transpose(numbers, axes)
        return numbers

    def _start(self, name: str) -> str:
        return self._passed.get(name, name)

    def _traced(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """Return the value that another one is, passed on and transposed, and the Transposes."""
        transposes = []
        name = self._start(name)
        while name in self._nodes and is_op(self._nodes[name], "Transpose"):
            transposes.append(self._nodes[name])
            name = self._start(self._nodes[name].input[0])
        return name, transposes

    def _source(self, start: str) -> onnx.TensorProto | onnx.NodeProto | None:
        return self._initializers.get(start, self._nodes.get(start))


def _numbers(source: onnx.TensorProto | onnx.NodeProto, what: str) -> Array:
    if isinstance(source, onnx.TensorProto):
        return to_array(source, what)
    names = [a.name for a in source.attribute]
    if names == ["value"]:
        return to_array(attribute(source, "value", "TENSOR", None), what)
    if names == ["value_float"]:
        return np.array(attribute(source, "value_float", "FLOAT", None), np.float32)
    if names == ["value_floats"]:
        return np.array(attribute(source, "value_floats", "FLOATS", None), np.float32)
    raise LeftError(f"{what} is a Constant without floating-point numbers")
