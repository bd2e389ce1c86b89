"""An ONNX model's graph for `bnfast.onnx`: names, and which nodes make and use a value."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import onnx
from onnx import helper, numpy_helper

from .constants import Constants
from .model import (
    LeftError,
    constant_names,
    first_output,
    inputs_are_settable,
    is_op,
    looks,
    name_of,
    names_inside,
    opset,
    reads,
)
from .shapes import Shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnfast._types import Array


_GRAPH_OUTPUT = -1  # stands for the graph's output among the users of a value


class Graph:
    """A model's main graph, and the makers and users of each value. Nodes are given by their index.

    Parameters
    ----------
    model : onnx.ModelProto
        The model that changes are made in. `sweep` removes the nodes and initializers that are no
        longer used.
    original : onnx.ModelProto
        The model before any change, for shape inference.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
    opset : int
        The version of ONNX's own operators.
    order : list of int
        The nodes, each after those that make its inputs.
    shapes : Shapes
    constants : Constants
        Both belong to the model before any change.

    Raises
    ------
    ValueError
        If a value is made twice, or from itself.
    """

    def __init__(self, model: onnx.ModelProto, original: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.opset = opset(model)
        self._graph, self._settable = model.graph, inputs_are_settable(model)
        _check_made_once(model.graph)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._initializers.pop("", None)  # the empty name means an omitted input
        self._producers = {
            name: i for i, node in enumerate(self.nodes) for name in node.output if name
        }
        self._called = _names(self.nodes)
        self.order, self.shapes = self._sorted(), Shapes(original)
        self.constants = Constants(original, [self.nodes[i] for i in self.order], self.shapes)
        self._made = {*self._producers, *self._initializers}
        self._users: defaultdict[str, Counter[int]] = defaultdict(Counter)
        # they see the type or the shape
        self._lookers: defaultdict[str, set[int]] = defaultdict(set)
        for i, node in enumerate(self.nodes):
            for name in (*reads(node), *names_inside(node)):
                self._users[name][i] += 1
            for position in looks(node):
                self._lookers[node.input[position]].add(i)
        for output in model.graph.output:
            self._users[output.name][_GRAPH_OUTPUT] += 1
        inputs = (value.name for value in model.graph.input)
        self._taken = {*inputs, *constant_names(model.graph), *self._producers, *self._users}
        self._numbered: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        self._moved: dict[str, str] = {}  # a removed value: another value of its type and shape
        self._left_over: set[int] = set()

    def _sorted(self) -> list[int]:
        """Return the nodes, each after those that make its inputs."""
        before = {
            i: {self._producers[name] for name in node.input if name in self._producers}
            for i, node in enumerate(self.nodes)
        }
        try:
            return list(TopologicalSorter(before).static_order())
        except CycleError as error:
            row = " -> ".join(self.described(i) for i in error.args[1][:4])
            raise ValueError(
                f"model computes a value from itself: {row}; expected a graph without cycles"
            ) from None

    # ---- nodes

    def batch_norms(self) -> list[int]:
        """Return the nodes that are batch norms."""
        return [i for i, node in enumerate(self.nodes) if is_op(node, "BatchNormalization")]

    def name(self, i: int) -> str:
        """Return a node's name in dictionaries and messages."""
        return self._called[i]

    def described(self, i: int) -> str:
        """Return a node's name in messages, with its operator."""
        return f"{self.nodes[i].op_type} {self.name(i)!r}"

    def producer(self, name: str) -> int:
        """Return the node that makes a value, if only one other node uses the value."""
        if name not in self._producers:
            raise LeftError(f"nothing is before {name!r}")
        self.only_user(name)
        return self._producers[name]

    def only_user(self, name: str) -> int:
        """Return the only node that uses a value, or raise LeftError naming the other uses."""
        users = self._users[name]
        if _GRAPH_OUTPUT in users:
            raise LeftError(f"{name!r} is a graph output")
        if len(users) != 1 or users.total() != 1:
            raise LeftError(f"{name!r} is used {users.total()} times")
        (user,) = users
        if name not in self.nodes[user].input:
            raise LeftError(f"{name!r} is used in a subgraph of {self.described(user)}")
        return user

    # ---- changes

    def set_constant(self, i: int, position: int, values: Array, name: str) -> None:
        """Give a node a constant: in place of its old one, if no other node uses that."""
        inputs = self.nodes[i].input
        old = inputs[position] if position < len(inputs) else ""
        if self._is_own(i, old) and tuple(self._initializers[old].dims) == values.shape:
            self._initializers[old].CopyFrom(numpy_helper.from_array(values, old))
            return
        new = self._unused(old or name)
        self._initializers[new] = self._graph.initializer.add()
        self._initializers[new].CopyFrom(numpy_helper.from_array(values, new))
        if not self._settable:  # in IR versions where initializers must be inputs, too
            kind = self._initializers[new].data_type
            self._graph.input.append(helper.make_tensor_value_info(new, kind, values.shape))
        self._users[new][i] += 1
        if position < len(inputs):
            inputs[position] = new
            for j in self._unlink(old, i):
                self.drop(j)
        else:
            inputs.append(new)

    def _is_own(self, i: int, name: str) -> bool:
        return name in self._initializers and self._users[name] == {i: 1}

    def take_over(self, i: int, later: int) -> None:
        """Let a node make the output of a later one, and drop the later one."""
        old, made = self.nodes[i].output[0], self.nodes[later].output[0]
        self._producers.pop(old)
        self.drop(later)
        self._moved[old] = made
        self.nodes[i].output[0] = made
        self._producers[made] = i

    def bypass(self, i: int, source: str, later: int) -> None:
        """Let a later node take a node's input in place of its output, and drop the node."""
        value = self.nodes[i].output[0]
        self.nodes[later].input[0] = source
        self._users[source][later] += 1
        del self._users[value]
        self._moved[value] = source
        self.drop(i)

    def drop(self, i: int) -> None:
        """Remove a node, and the constants that only it used."""
        waiting = [i]
        while waiting:
            i = waiting.pop()
            self._left_over.add(i)
            for name in self.nodes[i].output:
                self._producers.pop(name, None)
            for name in reads(self.nodes[i]):
                waiting.extend(self._unlink(name, i))
            for position in looks(self.nodes[i]):
                name = self.nodes[i].input[position]
                self._lookers[name].discard(i)
                waiting.extend(self._left_without_use(name))

    def _unlink(self, name: str, i: int) -> list[int]:
        """Remove a node from a value's users; return the value's node if it is now unused."""
        users = self._users[name]
        users[i] -= 1
        if not users[i]:
            del users[i]
        return self._left_without_use(name)

    def _left_without_use(self, name: str) -> list[int]:
        if self._users[name] or self._lookers[name] or not name:
            return []
        self._initializers.pop(name, None)
        return [self._producers[name]] if name in self._producers and name in self.constants else []

    def _unused(self, name: str) -> str:
        candidates = (f"{name}_folded{number or ''}" for number in self._numbered[name])
        new = next(candidate for candidate in candidates if candidate not in self._taken)
        self._taken.add(new)
        return new

    def _current(self, name: str) -> str:
        passed = []
        while name in self._moved:
            passed.append(name)
            name = self._moved[name]
        self._moved.update(dict.fromkeys(passed, name))
        return name

    def sweep(self) -> None:
        """Remove unused nodes and values from the model, and the references to them."""
        for name in [*self._moved]:
            for i in self._lookers[name]:
                for position in looks(self.nodes[i]):
                    self.nodes[i].input[position] = self._current(name)
        for i in sorted(self._left_over, reverse=True):
            del self._graph.node[i]
        gone = self._made - {*self._producers, *self._initializers}
        lists = [self._graph.initializer, self._graph.value_info]
        for values in lists if self._settable else [*lists, self._graph.input]:
            for i in reversed(range(len(values))):
                if values[i].name in gone:
                    del values[i]


def _check_made_once(graph: onnx.GraphProto) -> None:
    constants = constant_names(graph)
    known = set(constants)
    inputs = [value.name for value in graph.input if value.name not in known]
    outputs = [name for node in graph.node for name in node.output]
    made = Counter(name for name in (*inputs, *constants, *outputs) if name)
    for name, times in made.items():
        if times > 1:
            raise ValueError(f"model makes the value {name!r} {times} times; expected once")


def _names(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Return a name for each node: its own if it is unique, else that of its first output.

    If the name of a batch norm is the output name by which another one is called, it is called by
    its own output, too. So all names differ.
    """
    counts = Counter(node.name for node in nodes)
    called = [
        node.name if node.name and counts[node.name] == 1 else first_output(node) or name_of(node)
        for node in nodes
    ]
    norms = [i for i, node in enumerate(nodes) if is_op(node, "BatchNormalization")]
    by_name = {called[i]: i for i in norms if called[i] == nodes[i].name}
    by_output = [i for i in norms if called[i] != nodes[i].name]
    while by_output:
        clashing = by_name.pop(called[by_output.pop()], None)
        if clashing is not None:
            called[clashing] = first_output(nodes[clashing]) or called[clashing]
            by_output.append(clashing)
    return called
