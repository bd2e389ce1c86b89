"""Batch norms folded into the convolutions and linear layers beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import onnx

from bnfast import inference

from .graph import Graph
from .model import LeftError, attributes, checked_model, hidden_batch_norms, is_op

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bnfast.layers import BatchNorm

__all__ = ["Outcome", "fold"]

Array: TypeAlias = "NDArray[Any]"

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Outcome(NamedTuple):
    """What became of one batch norm in `fold`.

    Attributes
    ----------
    name : str
        The node's name, or its output's where the name is empty or not the only one of its kind.
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
        replace, computed in float64 and rounded once. A MatMul becomes a Gemm, which has a bias.

    Raises
    ------
    TypeError
        If `model` is no `onnx.ModelProto`, or `report` cannot be called.
    ValueError
        If the model uses an opset before 7, or has ``training_info``.

    Notes
    -----
    Left alone: what is computed from anything but constants; initializers that are graph inputs
    too, since a caller may override them; subgraphs (If, Loop, Scan) and functions; batch norms
    in training mode; weights that would overflow their type.
    """
    if report is not None and not callable(report):
        raise TypeError(f"report is {report!r}; expected a callable taking an Outcome")
    if checked_model(model).training_info:
        raise ValueError("model has training_info, which may change any weight; expected none")
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = Graph(folded, model)
    outcomes = {i: Outcome(graph.name(i), False, "") for i in graph.batch_norms()}
    done = True
    while done:  # again, since what is folded may have stood between two others
        done = False
        for i in [i for i, outcome in outcomes.items() if not outcome.folded]:
            outcomes[i] = _attempt(graph, i)
            done = done or outcomes[i].folded
    graph.sweep()
    if report is not None:
        hidden = (Outcome(name, False, why) for name, why in hidden_batch_norms(model))
        for outcome in (*outcomes.values(), *hidden):
            report(outcome)
    return folded


# ---- folding one


class _Linear(NamedTuple):
    """A layer that a batch norm may be folded into, its numbers in float64.

    Attributes
    ----------
    weight : ndarray
    bias : ndarray of shape (out,), or None
    dtype : dtype
        Of the weight in the model.
    rank : int
        Of the output.
    out_axis, in_axis : int
        Of the weight.
    groups : int
    padded : bool
        Whether it pads with zeros.
    """

    weight: Array
    bias: Array | None
    dtype: np.dtype[Any]
    rank: int = 2
    out_axis: int = 1
    in_axis: int = 0
    groups: int = 1
    padded: bool = False


def _attempt(graph: Graph, i: int) -> Outcome:
    try:
        return Outcome(graph.name(i), True, _fold_one(graph, i))
    except LeftError as left:
        return Outcome(graph.name(i), False, str(left))


def _fold_one(graph: Graph, i: int) -> str:
    """Fold a batch norm into a neighbour, and say into which, or why into none."""
    if graph.is_training(i):
        raise LeftError("it is in training mode and normalises by the batch")
    if any(graph.nodes[i].output[1:]):
        raise LeftError("it has the outputs of training mode")
    layer = graph.layer(i, np.float64)
    try:
        return _into_the_one_before(graph, i, layer)
    except LeftError as before:
        try:
            return _into_the_one_after(graph, i, layer)
        except LeftError as after:
            raise LeftError(f"{before}; {after}") from None


def _into_the_one_before(graph: Graph, i: int, layer: BatchNorm) -> str:
    before = graph.producer(graph.nodes[i].input[0])
    adding = before if is_op(graph.nodes[before], "Add") else None
    addend = None
    if adding is not None:
        value, addend = graph.variable_and_constant(adding)
        before = graph.producer(value)
    linear = _linear(graph, before)
    bias = linear.bias
    if addend is not None:
        channels = linear.weight.shape[linear.out_axis] * (linear.groups if linear.out_axis else 1)
        addend = _one_a_channel(addend, linear.rank, channels)
        bias = addend if bias is None else bias + addend
    try:
        weight, bias = inference.fold(
            linear.weight, bias, layer, out_axis=linear.out_axis, groups=linear.groups
        )
    except ValueError as error:
        raise LeftError(str(error)) from error
    described = graph.described(before)
    _replace(graph, before, linear, weight, bias)
    if adding is not None:
        graph.drop(adding)
    graph.take_over(before, i)
    return f"{described} before it"


def _into_the_one_after(graph: Graph, i: int, layer: BatchNorm) -> str:
    after = graph.only_consumer(graph.nodes[i].output[0])
    linear = _linear(graph, after)
    if attributes(graph.nodes[after]).get("transA", 0):
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
    described = graph.described(after)
    _replace(graph, after, linear, weight, bias)
    graph.bypass(i, after)
    return f"{described} after it"


def _linear(graph: Graph, i: int) -> _Linear:
    """Read a convolution or linear layer whose numbers are constants."""
    node, described = graph.nodes[i], graph.described(i)
    if not is_op(node, *_LINEAR):
        raise LeftError(f"{described} is no convolution or linear layer")
    weight = graph.constant(node.input[1], f"the weight of {described}")
    if weight.dtype.name not in _FLOATS:
        raise LeftError(f"the weight of {described} is of {weight.dtype}")
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = graph.constant(node.input[2], f"the bias of {described}").astype(np.float64)
    dtype, weight = weight.dtype, weight.astype(np.float64)
    options = attributes(node)
    if is_op(node, "MatMul"):
        rank = graph.rank(node.output[0])
        if rank != 2 or weight.ndim != 2:
            known = "an unknown number of" if rank is None else rank
            raise LeftError(f"{described} gives {known} axes, its channels not surely axis 1")
        return _Linear(weight, None, dtype)
    if is_op(node, "Gemm"):
        if bias is not None:
            channels = weight.shape[0 if options.get("transB", 0) else 1]
            bias = _one_a_channel(options.get("beta", 1.0) * bias, 2, channels)
        axes = (0, 1) if options.get("transB", 0) else (1, 0)
        return _Linear(options.get("alpha", 1.0) * weight, bias, dtype, 2, *axes)
    groups = options.get("group", 1)
    if is_op(node, "ConvTranspose"):
        return _Linear(weight, bias, dtype, weight.ndim, 1, 0, groups)
    auto = options.get("auto_pad", b"NOTSET")
    padded = auto.startswith(b"SAME") or (auto == b"NOTSET" and any(options.get("pads", ())))
    return _Linear(weight, bias, dtype, weight.ndim, 0, 1, groups, padded)


def _replace(graph: Graph, i: int, linear: _Linear, weight: Array, bias: Array) -> None:
    """Give a layer other numbers, and a MatMul the bias that it cannot have."""
    with np.errstate(over="ignore"):
        numbers = [a.astype(linear.dtype) for a in (weight, bias)]
    if not all(np.isfinite(a).all() for a in numbers):
        raise LeftError(
            f"the folded numbers of {graph.described(i)} are not finite in {linear.dtype}"
        )
    node, name = graph.nodes[i], graph.name(i)
    for position, (values, role) in enumerate(zip(numbers, ("weight", "bias"), strict=True), 1):
        graph.set_constant(i, position, values, f"{name}.{role}")
    if is_op(node, "MatMul"):
        node.op_type = "Gemm"
    elif is_op(node, "Gemm"):
        kept = [a for a in node.attribute if a.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)


def _one_a_channel(values: Array, rank: int, channels: int) -> Array:
    """Return what is broadcast to an output as one float64 value a channel."""
    shape = (1,) * (rank - values.ndim) + values.shape
    if len(shape) != rank or values.size not in (1, channels) or shape[1] != values.size:
        raise LeftError(f"a constant of shape {values.shape} is added, not one value a channel")
    return np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))
