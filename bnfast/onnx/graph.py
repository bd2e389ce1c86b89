"""An ONNX model's graph as `bnfast.onnx` needs it: constants, who makes and who uses a value."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx.shape_inference
from google.protobuf.message import EncodeError
from onnx import numpy_helper

from bnfast.layers import BatchNorm

from .model import LeftError, attributes, is_op, opset, subgraphs, to_array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = "NDArray[Any]"

_GRAPH_OUTPUT = -1  # stands for the graph among the consumers of a value


class Graph:
    """A model's main graph, and who makes and who uses each value; nodes go by their index.

    Parameters
    ----------
    model : onnx.ModelProto
        What changes are made in. Nodes and initializers that they leave over are removed by
        `sweep`.
    original : onnx.ModelProto
        The model before any change, for shape inference.
    """

    def __init__(self, model: onnx.ModelProto, original: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self._graph, self._original = model.graph, original
        self._opset = opset(model)
        self._inputs = {value.name for value in model.graph.input}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {
            name: i for i, node in enumerate(self.nodes) for name in node.output if name
        }
        self._made = {*self._producers, *self._initializers}
        self._consumers: defaultdict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for name in (*node.input, *_names_inside(node)):
                self._consumers[name].append(i)
        for output in model.graph.output:
            self._consumers[output.name].append(_GRAPH_OUTPUT)
        names = Counter(node.name for node in self.nodes)
        self._called = [
            node.name if node.name and names[node.name] == 1 else node.output[0]
            for node in self.nodes
        ]
        self._taken = {*self._inputs, *self._initializers, *self._producers, *self._consumers}
        self._left_over: set[int] = set()
        self._ranks: dict[str, int] | None = None

    def batch_norms(self) -> list[int]:
        """Return the nodes that are batch norms."""
        return [i for i, node in enumerate(self.nodes) if is_op(node, "BatchNormalization")]

    def name(self, i: int) -> str:
        """Return what a node is called in dictionaries and messages."""
        return str(self._called[i])

    def described(self, i: int) -> str:
        """Return what a node is called in messages, with its operator."""
        return f"{self.nodes[i].op_type} {self.name(i)!r}"

    def layer(self, i: int, dtype: DTypeLike | None = None) -> BatchNorm:
        """Return a batch norm node as a layer, if all it needs is known."""
        node, options = self.nodes[i], attributes(self.nodes[i])
        if len(node.input) != 5:
            raise LeftError(f"it has {len(node.input)} inputs, not 5")
        if not options.get("spatial", 1):  # opsets 7 and 8: statistics of every pixel
            raise LeftError("it has statistics for each pixel: spatial is 0")
        numbers = [
            self.constant(name, f"its {what}")
            for name, what in zip(node.input[1:], ("scale", "B", "mean", "var"), strict=True)
        ]
        if dtype is None:
            dtype = np.float64 if all(a.dtype == np.float64 for a in numbers) else np.float32
        epsilon = options.get("epsilon", float(np.float32(1e-5)))
        momentum = options.get("momentum", float(np.float32(0.9)))
        try:
            layer = BatchNorm(numbers[0].size, epsilon, 1 - momentum, ddof=0, dtype=dtype)
            names = ("weight", "bias", "running_mean", "running_var")
            layer.load_state_dict(dict(zip(names, numbers, strict=True)))
        except (ValueError, TypeError, RuntimeError) as error:
            raise LeftError(f"as a layer, its {error}") from error
        return layer.train(self.is_training(i))

    def is_training(self, i: int) -> bool:
        """Whether a batch norm normalises by the batch."""
        node = self.nodes[i]
        if self._opset >= 14:
            return bool(attributes(node).get("training_mode", 0))
        return any(node.output[1:])

    # ---- values

    def constant(self, name: str, what: str) -> Array:
        """Return a value that is the same in every run, or say why it may not be."""
        if name in self._inputs:
            raise LeftError(f"{what}, {name!r}, is a graph input, which a caller may set")
        if name in self._initializers:
            return to_array(self._initializers[name], what)
        if name in self._producers:
            node = self.nodes[self._producers[name]]
            options = attributes(node)
            if is_op(node, "Constant") and "value" in options:
                return to_array(options["value"], what)
            if is_op(node, "Constant") and options.keys() & {"value_float", "value_floats"}:
                (value,) = options.values()
                return np.array(value, np.float32)
            if is_op(node, "Identity"):
                return self.constant(node.input[0], what)
            if is_op(node, "Transpose"):
                return np.transpose(self.constant(node.input[0], what), options.get("perm"))
        raise LeftError(f"{what}, {name!r}, is not a constant")

    def variable_and_constant(self, i: int) -> tuple[str, Array]:
        """Return what an Add adds a constant to, and the constant."""
        first, second = self.nodes[i].input
        for value, addend in ((first, second), (second, first)):
            if self._is_constant(addend):
                return value, self.constant(addend, f"the constant of {self.described(i)}")
        raise LeftError(f"{self.described(i)} adds no constant")

    def _is_constant(self, name: str) -> bool:
        try:
            self.constant(name, "")
        except LeftError:
            return False
        return True

    def producer(self, name: str) -> int:
        """Return the node that makes a value for one other alone."""
        if name not in self._producers:
            raise LeftError(f"nothing is before {name!r}")
        self.only_consumer(name)
        return self._producers[name]

    def only_consumer(self, name: str) -> int:
        """Return the one node that uses a value, or say who else does."""
        users = self._consumers[name]
        if _GRAPH_OUTPUT in users:
            raise LeftError(f"{name!r} is a graph output")
        if len(users) != 1:
            raise LeftError(f"{name!r} is used {len(users)} times")
        if name not in self.nodes[users[0]].input:
            raise LeftError(f"{name!r} is used in a subgraph of {self.described(users[0])}")
        return users[0]

    def rank(self, name: str) -> int | None:
        """Return how many axes a value has, where shape inference can tell."""
        if self._ranks is None:
            self._ranks = _inferred_ranks(self._original)
        return self._ranks.get(name)

    # ---- changes

    def set_constant(self, i: int, position: int, values: Array, name: str) -> None:
        """Give a node a constant: in the place of its old one, if nobody else uses that."""
        inputs = self.nodes[i].input
        old = inputs[position] if position < len(inputs) else ""
        if old in self._initializers and self._consumers[old] == [i]:
            self._initializers[old].CopyFrom(numpy_helper.from_array(values, old))
            return
        new = self._unused(old or name)
        self._initializers[new] = self._graph.initializer.add()
        self._initializers[new].CopyFrom(numpy_helper.from_array(values, new))
        self._consumers[new].append(i)
        if position < len(inputs):
            inputs[position] = new
            self._unlink(old, i)
        else:
            inputs.append(new)

    def take_over(self, i: int, later: int) -> None:
        """Let a node make what a later one made, and drop that."""
        made = self.nodes[later].output[0]
        self.drop(later)
        self._producers.pop(self.nodes[i].output[0])
        self.nodes[i].output[0] = made
        self._producers[made] = i

    def bypass(self, i: int, later: int) -> None:
        """Let a later node read a node's input instead of its output, and drop the node."""
        value, source = self.nodes[i].output[0], self.nodes[i].input[0]
        self.nodes[later].input[list(self.nodes[later].input).index(value)] = source
        self._consumers[source].append(later)
        self._consumers.pop(value)
        self.drop(i)

    def drop(self, i: int) -> None:
        """Take a node out of use, and the constants that only it used."""
        self._left_over.add(i)
        for name in self.nodes[i].output:
            self._producers.pop(name, None)
        for name in self.nodes[i].input:
            self._unlink(name, i)

    def _unlink(self, name: str, i: int) -> None:
        """Note that a node uses a value no more, and drop constants that nobody uses."""
        self._consumers[name].remove(i)
        if self._consumers[name] or not name:
            return
        self._initializers.pop(name, None)
        made_by = self._producers.get(name)
        if made_by is not None and is_op(self.nodes[made_by], "Constant", "Identity", "Transpose"):
            self.drop(made_by)

    def _unused(self, name: str) -> str:
        candidates = (f"{name}_folded{number or ''}" for number in itertools.count())
        new = next(candidate for candidate in candidates if candidate not in self._taken)
        self._taken.add(new)
        return new

    def sweep(self) -> None:
        """Remove from the model what the changes left over."""
        for i in sorted(self._left_over, reverse=True):
            del self._graph.node[i]
        gone = self._made - {*self._producers, *self._initializers}
        for values in (self._graph.initializer, self._graph.value_info):
            for i in reversed(range(len(values))):
                if values[i].name in gone:
                    del values[i]


def _names_inside(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names in a node's subgraphs: its own and those it takes from around it."""
    for graph in subgraphs(node):
        yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))
        for inner in graph.node:
            yield from (*inner.input, *inner.output, *_names_inside(inner))


def _inferred_ranks(model: onnx.ModelProto) -> dict[str, int]:
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (ValueError, EncodeError, onnx.shape_inference.InferenceError):
        graph = model.graph  # past 2 GB, or wrong somewhere: what the model says itself
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
