"""Which values of a graph are the same in every run, and what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import helper

from .evaluation import MOST_NUMBERS, OPERATORS, evaluate, integers, is_evaluated
from .model import FLOATS, LeftError, inputs_are_settable, is_op, kind_name, reads, to_array

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from bnfast._types import Array

    from .shapes import Shapes


_TOO_MANY = f"is not computed: constants would have more than {MOST_NUMBERS:,} numbers"


class Constants:
    """The constants of a graph: initializers, and values that `OPERATORS` compute from constants.

    Parameters
    ----------
    model : onnx.ModelProto
    nodes : iterable of onnx.NodeProto
        The nodes of its graph, each after the nodes that make its inputs.
    shapes : Shapes
        The shapes of the model.
    """

    def __init__(
        self, model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], shapes: Shapes
    ) -> None:
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {value.name for value in model.graph.input}
        if not inputs_are_settable(model):
            self._inputs -= {*self._initializers}
        self._shapes = shapes
        self._nodes: dict[str, onnx.NodeProto] = {}  # by their output
        self._constant = {*self._initializers} - self._inputs - {""}
        for node in nodes:
            if is_op(node, *OPERATORS) and is_evaluated(node):
                self._nodes[node.output[0]] = node
                if self._constant.issuperset(reads(node)):
                    self._constant.add(node.output[0])
        # outputs of nodes, computed when first needed
        self._known: dict[str, Array | LeftError] = {}
        self._room = MOST_NUMBERS

    def __contains__(self, name: str) -> bool:
        """Whether a value is computed only from constants and shapes."""
        return name in self._constant

    def array(self, name: str, what: str) -> Array:
        """Return the numbers of a value, or raise LeftError if they may differ between runs."""
        numbers = self._numbers(name, what)
        kind = kind_name(helper.np_dtype_to_tensor_dtype(numbers.dtype))
        if kind not in FLOATS:
            raise LeftError(f"{what}, {name!r}, is of type {kind}")
        if name in self._nodes:
            self._room -= numbers.size
            if self._room < 0:
                raise LeftError(f"{what}, {name!r}, {_TOO_MANY}")
        return numbers

    def integers(self, name: str, what: str) -> list[int]:
        """Return the numbers of a list of integers, such as axes."""
        try:
            return integers(self._numbers(name, what))
        except ValueError as error:
            raise LeftError(f"{what}, {name!r}, is not axes: {error}") from error

    def _numbers(self, name: str, what: str) -> Array:
        if not name:
            raise LeftError(f"{what} is missing")
        waiting = [name]
        while waiting:
            top = waiting.pop()
            if not self._is_missing(top):
                continue
            missing = [made for made in reads(self._nodes[top]) if self._is_missing(made)]
            if missing:
                waiting += [top, *missing]
            else:
                self._known[top] = self._made(self._nodes[top])
        value = self._value(name)
        if isinstance(value, LeftError):
            raise LeftError(f"{what}, {value}")
        return value

    def _is_missing(self, name: str) -> bool:
        return name in self._nodes and name not in self._known

    def _made(self, node: onnx.NodeProto) -> Array | LeftError:
        inputs = []
        for name in reads(node):
            value = self._value(name)
            if isinstance(value, LeftError):
                return value
            inputs.append(value)
        if self._room < 0:
            return LeftError(f"{node.output[0]!r}, {_TOO_MANY}")
        try:
            numbers = evaluate(node, inputs, self._shapes)
        except LeftError as left:
            return left
        if is_op(node, "Cast", "CastLike", "Concat", "Reshape"):  # they may copy
            self._room -= numbers.size
        return numbers

    def _value(self, name: str) -> Array | LeftError:
        if name in self._known:
            return self._known[name]
        if name in self._inputs:
            return LeftError(f"{name!r}, is a graph input, which a caller may set")
        if name not in self._initializers:
            return LeftError(f"{name!r}, is not a constant")
        try:
            return to_array(self._initializers[name], f"{name!r},")
        except LeftError as left:
            return left
