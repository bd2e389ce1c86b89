"""The batch norms of ONNX models: read into layers, folded into their neighbours, evaluated.

Needs the extra ``bnfast[onnx]`` and is imported by name. Models are `onnx.ModelProto`, as
`onnx.load` returns them; the operator's rules are those of
https://onnx.ai/onnx/operators/onnx__BatchNormalization.html, from opset 7 on.

ONNX calls momentum the weight of the *old* running value, and feeds the running variance with the
population's (divided by m): `bnfast.conventions.ONNX`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import onnx

from . import _arrays, inference
from ._onnx_graph import Graph, LeftError, attributes, is_op, opset, subgraphs
from .functional import BatchStats, batch_norm_forward, normalize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import ArrayLike, NDArray

    from .layers import BatchNorm

__all__ = ["Outcome", "batch_normalization", "fold", "read"]

Array: TypeAlias = "NDArray[Any]"

_OLDEST_OPSET = 7  # BatchNormalization-6 and older decide by `is_test` and `consumed_inputs`
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


# ---- what users call


def batch_normalization(
    x: ArrayLike,
    scale: ArrayLike,
    B: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Any:
    """Evaluate ONNX's operator BatchNormalization (opset 15).

    Parameters
    ----------
    x : array_like, shape (N, C, ...) or (N,)
        Of any type that bnfast takes. Rank 1 is one channel.
    scale, B : array_like, shape (C,)
        Gamma and beta.
    mean, var : array_like, shape (C,)
        The statistics to normalise with or, in training, the running ones. Not changed.
    epsilon : float
        Added to the variance; above 0 in training.
    momentum : float
        The weight of the *old* running value.
    training_mode : {0, 1}
        Whether to normalise with the batch.

    Returns
    -------
    y : ndarray
        Shape and dtype of `x`.
    running_mean, running_var : ndarray, shape (C,)
        In training alone: then the three are returned as a tuple. Dtype of `mean` and of `var`;
        ``running = running * momentum + batch * (1 - momentum)``, computed in float64, the batch
        variance divided by m. An empty batch changes neither.

    Raises
    ------
    TypeError, ValueError
        As `normalize` and `batch_norm_forward`; if `training_mode` is neither 0 nor 1, or
        `momentum` not finite.
    """
    if training_mode not in (0, 1):
        raise ValueError(f"training_mode is {training_mode!r}; expected 0 or 1")
    x = np.asanyarray(x)
    batch = x[:, None] if x.ndim == 1 else x
    if not training_mode:
        return normalize(batch, mean, var, scale, B, eps=epsilon).reshape(x.shape)
    old = _arrays.real("momentum", momentum)
    if batch.ndim > 1 and batch.size == batch.shape[1] > 0:
        # One value a channel is its own mean, and the operator, unlike PyTorch, takes it.
        own = batch.reshape(-1)
        y = normalize(batch, own, np.zeros_like(own), scale, B, eps=_arrays.eps(epsilon, True))
        stats = BatchStats.from_population(own, np.zeros_like(own), epsilon)
    else:
        y, stats = batch_norm_forward(batch, scale, B, eps=epsilon)
    moved = []
    for name, value, new in (("mean", mean, stats.mean), ("var", var, stats.var)):
        running = _arrays.parameter(name, value, len(new))
        if batch.size:
            running = running.astype(np.float64) * old + new * (1 - old)
        with np.errstate(over="ignore"):
            moved.append(running.astype(np.asarray(value).dtype))
    return y.reshape(x.shape), *moved


def read(model: onnx.ModelProto) -> dict[str, BatchNorm]:
    """Read the batch norms of a model's main graph into layers.

    Parameters
    ----------
    model : onnx.ModelProto
        Not changed.

    Returns
    -------
    dict of str to BatchNorm
        By the node's name, or its output's where the name is empty or not the only one of its
        kind, in the order of the graph. With ONNX's ``ddof=0``, the node's ``eps``, the node's
        momentum in our sense (``1 - momentum``), and float32 numbers, or float64 where all of the
        node's are. In evaluation mode, except where the node's ``training_mode`` is 1.

    Warns
    -----
    UserWarning
        For each batch norm that is not read, with the reason: its numbers are not constants, or
        it is inside a subgraph or a function.

    Raises
    ------
    TypeError
        If `model` is no `onnx.ModelProto`.
    ValueError
        If it uses an opset before 7.
    """
    graph = Graph(_checked_model(model), model)
    layers = {}
    for i in graph.batch_norms():
        name = graph.name(i)
        try:
            layers[name] = graph.layer(i)
        except LeftError as left:
            warnings.warn(f"{name} is not read: {left}", UserWarning, stacklevel=2)
    for hidden in _hidden_batch_norms(model):
        warnings.warn(f"{hidden.name} is not read: {hidden.why}", UserWarning, stacklevel=2)
    return layers


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
    if _checked_model(model).training_info:
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
        for outcome in (*outcomes.values(), *_hidden_batch_norms(model)):
            report(outcome)
    return folded


def _checked_model(model: onnx.ModelProto) -> onnx.ModelProto:
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


def _hidden_batch_norms(model: onnx.ModelProto) -> Iterator[Outcome]:
    """Yield the batch norms that are not in the main graph."""
    for node in model.graph.node:
        for graph in subgraphs(node):
            where = f"{node.op_type} {node.name or node.output[0]!r}"
            yield from _hidden(graph.node, f"it is in a subgraph of {where}")
    for function in model.functions:
        yield from _hidden(function.node, f"it is in the function {function.name!r}")


def _hidden(nodes: Iterable[onnx.NodeProto], why: str) -> Iterator[Outcome]:
    for node in nodes:
        if is_op(node, "BatchNormalization"):
            yield Outcome(node.name or node.output[0], False, why)
        for graph in subgraphs(node):
            yield from _hidden(graph.node, why)


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
