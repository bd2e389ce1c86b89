"""Batch norms folded into the convolutions and linear layers beside them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import onnx

from bnfast import _arrays, inference

from .graph import Graph
from .linear import Linear, read_linear, write_linear
from .model import LeftError, attribute, checked_model, hidden_batch_norms, is_op
from .reading import is_training, layer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bnfast.layers import BatchNorm

__all__ = ["Outcome", "fold"]

Array: TypeAlias = "NDArray[Any]"


class Outcome(NamedTuple):
    """What became of one batch norm in `fold`.

    Attributes
    ----------
    name : str
        The node's name, or its output's where the name is empty or another node goes by it.
    folded : bool
    why : str
        The layer that it was folded into, or what is in the way.
    """

    name: str
    folded: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {'folded into' if self.folded else 'left:'} {self.why}"


def fold(
    model: onnx.ModelProto, *, report: Callable[[Outcome], object] | None = None
) -> onnx.ModelProto:
    """Fold the batch norms of a model into the convolutions and linear layers beside them.

    A batch norm in inference is folded into the Conv, ConvTranspose, Gemm or MatMul before it,
    with a constant Add in between or not, and otherwise into the one after it, where zero padding
    does not make that inexact (`bnfast.fold`, `bnfast.fold_before`). Nothing else may use the
    value between the two.

    Parameters
    ----------
    model : onnx.ModelProto
        With its weights loaded. Not changed.
    report : callable, optional
        Called with an `Outcome` for every batch norm of the model: ``report=print``.

    Returns
    -------
    onnx.ModelProto
        A copy with the same inputs and outputs. Folded weights have the type of those they
        replace, computed in float64 and rounded once, however many batch norms go into them. A
        MatMul becomes a Gemm, which has a bias.

    Raises
    ------
    TypeError
        If `model` is no `onnx.ModelProto`, or `report` cannot be called.
    ValueError
        If the model uses an opset before 7, has ``training_info``, makes a value twice, or makes
        one from itself.

    Notes
    -----
    Left alone: what is computed from anything but constants; initializers that are graph inputs
    too, since a caller may override them; subgraphs (If, Loop, Scan) and functions; batch norms
    in training mode; weights that would overflow their type; whatever is malformed in the batch
    norm or the layer beside it.
    """
    if report is not None and not callable(report):
        raise TypeError(f"report is {_arrays.shown(report)}; expected a callable taking an Outcome")
    if checked_model(model).training_info:
        raise ValueError("model has training_info, which may change any weight; expected none")
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    with np.errstate(all="ignore"):
        outcomes = _Folding(Graph(folded, model)).run()
    if report is not None:
        hidden = (Outcome(name, False, why) for name, why in hidden_batch_norms(model))
        for outcome in (*outcomes, *hidden):
            report(outcome)
    return folded


class _Folding:
    """The batch norms of a graph on their way into its convolutions and linear layers.

    The layers that change are written when all is done, so that their numbers are rounded once,
    however many batch norms go into them.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._layers: dict[int, BatchNorm] = {}
        self._changed: dict[int, Linear] = {}

    def run(self) -> list[Outcome]:
        """Fold what can be folded, and say of every batch norm what became of it."""
        graph, outcomes = self._graph, dict[int, Outcome]()
        waiting = deque(graph.batch_norms())
        while waiting:
            i = waiting.popleft()
            if i in outcomes and outcomes[i].folded:
                continue
            try:
                into, where = self._fold_one(i)
            except LeftError as left:
                outcomes[i] = Outcome(graph.name(i), False, str(left))
            else:
                outcomes[i] = Outcome(graph.name(i), True, f"{graph.described(into)} {where} it")
                # Again, since what is folded may have stood between two others.
                waiting.extend(j for j in graph.beside(into) if j in outcomes)
        for i, linear in self._changed.items():
            write_linear(graph, i, linear)
        graph.sweep()
        return list(outcomes.values())

    def _fold_one(self, i: int) -> tuple[int, str]:
        """Fold a batch norm into a neighbour, and say into which, or why into none."""
        layer = self._layer(i)
        try:
            return self._into_the_one_before(i, layer), "before"
        except LeftError as before:
            try:
                return self._into_the_one_after(i, layer), "after"
            except LeftError as after:
                raise LeftError(f"{before}; {after}") from None

    def _into_the_one_before(self, i: int, layer: BatchNorm) -> int:
        graph = self._graph
        before, adding, addend = graph.producer(graph.nodes[i].input[0]), None, None
        if is_op(graph.nodes[before], "Add"):
            adding = before
            value, addend = _variable_and_constant(graph, adding)
            before = graph.producer(value)
        linear = self._linear(before)
        try:
            weight, bias = inference.fold(
                linear.weight,
                linear.bias_and(addend),
                layer,
                out_axis=linear.out_axis,
                groups=linear.groups,
            )
        except ValueError as error:
            raise LeftError(str(error)) from error
        self._change(before, linear, weight, bias)
        if adding is not None:
            graph.drop(adding)
        graph.take_over(before, i)
        return before

    def _into_the_one_after(self, i: int, layer: BatchNorm) -> int:
        graph = self._graph
        after = graph.only_user(graph.nodes[i].output[0])
        linear = self._linear(after)
        if attribute(graph.nodes[after], "transA", "INT", 0):
            raise LeftError(f"{graph.described(after)} transposes it")
        try:
            weight, bias = inference.fold_before(
                linear.weight,
                linear.bias,
                layer,
                in_axis=linear.in_axis,
                groups=linear.groups,
                padded=linear.padded,
            )
        except ValueError as error:
            raise LeftError(f"{graph.described(after)}: {error}") from error
        self._change(after, linear, weight, bias)
        graph.bypass(i, after)
        return after

    def _layer(self, i: int) -> BatchNorm:
        if i not in self._layers:
            if is_training(self._graph, i):
                raise LeftError("it is in training mode and normalises by the batch")
            if any(self._graph.nodes[i].output[1:]):
                raise LeftError("it has the outputs of training mode")
            self._layers[i] = layer_of(self._graph, i, np.float64)
        return self._layers[i]

    def _linear(self, i: int) -> Linear:
        return self._changed[i] if i in self._changed else read_linear(self._graph, i)

    def _change(self, i: int, linear: Linear, weight: Array, bias: Array) -> None:
        changed = linear._replace(weight=weight, bias=bias)
        if not all(np.isfinite(a).all() for a in changed.numbers()):
            raise LeftError(
                f"the folded numbers of {self._graph.described(i)} are not finite in {linear.dtype}"
            )
        self._changed[i] = changed


def _variable_and_constant(graph: Graph, i: int) -> tuple[str, Array]:
    """Return what an Add adds a constant to, and the constant."""
    inputs = graph.nodes[i].input
    if len(inputs) == 2:
        for value, addend in (inputs, reversed(inputs)):
            if addend in graph.constants:
                return value, graph.constants.array(addend, f"the constant of {graph.described(i)}")
    raise LeftError(f"{graph.described(i)} adds no constant")
