"""Fold batch norms into the convolutions and linear layers beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx

from bnfast import _errors, inference

from .graph import Graph
from .linear import read_linear, write_linear
from .model import LeftError, attribute, checked_model, first_output, hidden_batch_norms
from .paths import (
    Stream,
    affine_layer,
    data_input,
    following,
    is_affine,
    nodes_before,
    passed_on,
    share,
)
from .reading import is_training, layer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnfast.layers import BatchNorm

    from .linear import Linear

__all__ = ["Outcome", "fold"]


class Outcome(NamedTuple):
    """What `fold` did with one batch norm.

    Attributes
    ----------
    name : str
        The node's name. If it has none, or another node is named so, the name of its output.
    folded : bool
    why : str
        The layer that it was folded into, or the reason why it was not folded.
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

    A batch norm in inference is folded into the Conv, ConvTranspose, Gemm or MatMul before it, or
    into several that a Concat joins. Otherwise it is folded into the layer after it, unless zero
    padding makes that inexact (`bnfast.fold`, `bnfast.fold_before`). Adds and Muls of one constant
    per channel are folded with it, if they are in between, or directly after a batch norm that is
    folded into a layer before it. Slices and reshapes that keep the channels may come before the
    batch norm. No other node may use the values in between.

    Parameters
    ----------
    model : onnx.ModelProto
        A model with its weights loaded. It is not changed.
    report : callable, optional
        Called with an `Outcome` for every batch norm of the model: ``report=print``.

    Returns
    -------
    onnx.ModelProto
        A copy with the same inputs and outputs (before IR version 4, the initializers among the
        inputs are the new ones). Folded weights keep their type. They are computed in float64 and
        rounded once, even if several batch norms are folded into them. A MatMul becomes a Gemm,
        which has a bias.

    Raises
    ------
    TypeError
        If `model` is not an `onnx.ModelProto`, or `report` cannot be called.
    ValueError
        If the model uses an opset before 7, has ``training_info``, makes a value twice, or makes
        one from itself.

    Notes
    -----
    Constants are initializers; the outputs of Constant, ConstantOfShape, Expand, Cast, CastLike,
    Reshape, Squeeze, Unsqueeze, Transpose, Concat and Identity, computed from constants; and Shape
    of a known shape.

    Not folded: anything computed from other values; from IR version 4 on, initializers that are
    also graph inputs, since a caller may override them; subgraphs (If, Loop, Scan) and functions;
    batch norms in training mode; weights that would overflow their type; a batch norm or a layer
    beside it that is malformed.
    """
    if report is not None and not callable(report):
        raise TypeError(f"report is {_errors.shown(report)}; expected a callable taking an Outcome")
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
    """Folds the batch norms of a graph into its convolutions and linear layers.

    Changed layers are written at the end, so that their numbers are rounded once, even if several
    batch norms are folded into them.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._layers: dict[int, BatchNorm] = {}
        self._changed: dict[int, Linear] = {}

    def run(self) -> list[Outcome]:
        """Fold what can be folded, and return the outcome for every batch norm."""
        graph, outcomes = self._graph, dict[int, Outcome]()
        norms = {*graph.batch_norms()}
        # A folded batch norm no longer stands between another one and its layer. So batch norms
        # with a layer before them are folded from the inputs on, and the rest from the outputs
        # back.
        order = [i for i in graph.order if i in norms]
        for i in order:
            outcomes[i] = self._fold_one(i, self._into_those_before)
        for i in reversed(order):
            if i in self._layers and not outcomes[i].folded:
                after = self._fold_one(i, self._into_the_one_after)
                why = after.why if after.folded else f"{outcomes[i].why}; {after.why}"
                outcomes[i] = after._replace(why=why)
        for i, linear in self._changed.items():
            write_linear(graph, i, linear)
        graph.sweep()
        return [outcomes[i] for i in sorted(outcomes)]

    def _fold_one(self, i: int, into: Callable[[int, BatchNorm], str]) -> Outcome:
        """Fold a batch norm into neighbours; return which they are, or why it was not folded."""
        try:
            return Outcome(self._graph.name(i), True, into(i, self._layer(i)))
        except LeftError as left:
            return Outcome(self._graph.name(i), False, str(left))

    def _into_those_before(self, i: int, layer: BatchNorm) -> str:
        graph = self._graph
        changed: dict[int, Linear] = {}
        streams: dict[str, Stream] = {}
        affine = []
        for j in nodes_before(graph, i):
            stream = passed_on(graph, j, streams)
            if stream is None and is_affine(graph, j):
                affine.append(j)
                stream = streams[data_input(graph, j)]
                self._fold_affine(j, stream, changed)
            elif stream is None:
                changed[j] = linear = self._linear(j)
                stream = Stream(linear.rank, ((j, linear.channels),))
            streams[first_output(graph.nodes[j])] = stream
        stream = streams[graph.nodes[i].input[0]]
        _fold_behind(layer, stream, changed)
        self._change(changed)
        for j in (*affine, i):
            graph.take_over(graph.producer(data_input(graph, j)), j)
        self._fold_following(first_output(graph.nodes[i]), stream)
        return f"{', '.join(graph.described(j) for j, _ in stream.parts)} before it"

    def _fold_affine(self, j: int, stream: Stream, changed: dict[int, Linear]) -> None:
        layer = affine_layer(self._graph, j, stream.rank, stream.channels)
        _fold_behind(layer, stream, changed)

    def _fold_following(self, value: str, stream: Stream) -> None:
        """Also fold the constants added to the folded batch norm's output or multiplied with it."""
        graph = self._graph
        for j in following(graph, value):
            changed = {part: self._changed[part] for part, _ in stream.parts}
            try:
                self._fold_affine(j, stream, changed)
                self._change(changed)
            except LeftError:
                return  # it stays, after the folded batch norm
            graph.take_over(graph.producer(data_input(graph, j)), j)

    def _into_the_one_after(self, i: int, layer: BatchNorm) -> str:
        graph = self._graph
        nodes = [i, *following(graph, first_output(graph.nodes[i]))]
        after = graph.only_user(first_output(graph.nodes[nodes[-1]]))
        linear = self._linear(after)
        if attribute(graph.nodes[after], "transA", "INT", 0):
            raise LeftError(f"{graph.described(after)} transposes it")
        layers = [affine_layer(graph, j, linear.rank, layer.num_features) for j in nodes[1:]]
        for each in reversed([layer, *layers]):
            try:
                weight, bias = inference.fold_before(
                    linear.weight,
                    linear.bias,
                    each,
                    in_axis=linear.in_axis,
                    groups=linear.groups,
                    padded=linear.padded,
                )
            except ValueError as error:
                raise LeftError(f"{graph.described(after)}: {error}") from error
            linear = linear._replace(weight=weight, bias=bias)
        self._change({after: linear})
        for j in reversed(nodes):
            graph.bypass(j, data_input(graph, j), after)
        return f"{graph.described(after)} after it"

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

    def _change(self, changed: dict[int, Linear]) -> None:
        for i, linear in changed.items():
            if not all(np.isfinite(a).all() for a in linear.numbers()):
                raise LeftError(
                    f"the folded numbers of {self._graph.described(i)} are not finite "
                    f"in {linear.dtype}"
                )
        self._changed |= changed


def _fold_behind(layer: BatchNorm, stream: Stream, changed: dict[int, Linear]) -> None:
    """Fold a layer into all layers that make its channels."""
    if len(stream.parts) > 1 and stream.channels != layer.num_features:
        raise LeftError(
            f"the layers before it have {stream.channels} channels; expected {layer.num_features}"
        )
    first = 0
    for i, channels in stream.parts:
        linear = changed[i]
        own = share(layer, first, channels) if len(stream.parts) > 1 else layer
        try:
            weight, bias = inference.fold(
                linear.weight, linear.bias, own, out_axis=linear.out_axis, groups=linear.groups
            )
        except ValueError as error:
            raise LeftError(str(error)) from error
        changed[i] = linear._replace(weight=weight, bias=bias)
        first += channels
