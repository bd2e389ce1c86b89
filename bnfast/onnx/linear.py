"""The convolutions and linear layers of a graph, into which batch norms fold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnfast.inference import rounded

from .model import LeftError, attribute, is_op

if TYPE_CHECKING:
    import onnx

    from bnfast._types import Array

    from .graph import Graph


_MOST_INPUTS = {"Conv": 3, "ConvTranspose": 3, "Gemm": 3, "MatMul": 2}


class Linear(NamedTuple):
    """A layer that a batch norm may be folded into, with its numbers in float64.

    Attributes
    ----------
    weight : ndarray
    bias : ndarray of shape (channels,), or None
    dtype : dtype
        The type of the weight in the model.
    rank : int
        The rank of the output.
    out_axis, in_axis : int
        Axes of the weight.
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

    @property
    def channels(self) -> int:
        """Return the number of output channels."""
        repeats = self.groups if self.out_axis else 1
        return int(self.weight.shape[self.out_axis]) * repeats

    def numbers(self) -> list[Array]:
        """Return weight and bias in the type of the model's weight."""
        return [rounded(a, self.dtype) for a in (self.weight, self.bias) if a is not None]


def per_channel(values: Array, rank: int, channels: int, what: str) -> Array:
    """Return a constant that is broadcast to this rank as one float64 number per channel."""
    shape = (1,) * (rank - values.ndim) + values.shape
    size = values.size
    if len(shape) != rank or size not in (1, channels) or shape[1] != size:
        raise LeftError(f"{what} has shape {values.shape}, not one value a channel")
    return np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))


def read_linear(graph: Graph, i: int) -> Linear:
    """Read a convolution or linear layer whose numbers are constants."""
    node, described = graph.nodes[i], graph.described(i)
    if not is_op(node, *_MOST_INPUTS):
        raise LeftError(f"{described} is no convolution or linear layer")
    if not 2 <= len(node.input) <= _MOST_INPUTS[node.op_type] or len(node.output) != 1:
        raise LeftError(
            f"{described} has {len(node.input)} inputs and {len(node.output)} outputs; "
            f"expected 2 to {_MOST_INPUTS[node.op_type]} and 1"
        )
    weight = graph.constants.array(node.input[1], f"the weight of {described}")
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = graph.constants.array(node.input[2], f"the bias of {described}")
    if is_op(node, "MatMul"):
        return _matmul(graph, i, weight)
    if is_op(node, "Gemm"):
        return _gemm(node, described, weight, bias)
    return _convolution(node, described, weight, bias)


def _matmul(graph: Graph, i: int, weight: Array) -> Linear:
    dims = graph.shapes.dims(graph.nodes[i].output[0])
    if dims is None or len(dims) != 2 or weight.ndim != 2:
        known = "an unknown number of" if dims is None else len(dims)
        raise LeftError(f"{graph.described(i)} gives {known} axes, its channels not surely axis 1")
    return Linear(weight.astype(np.float64), None, weight.dtype)


def _gemm(node: onnx.NodeProto, described: str, weight: Array, bias: Array | None) -> Linear:
    _check_axes(described, weight, weight.ndim == 2, "2")
    alpha, beta = (attribute(node, name, "FLOAT", 1.0) for name in ("alpha", "beta"))
    axes = (0, 1) if attribute(node, "transB", "INT", 0) else (1, 0)
    linear = Linear(alpha * weight.astype(np.float64), None, weight.dtype, 2, *axes)
    if bias is None:
        return linear
    one_each = per_channel(bias, 2, linear.channels, f"the bias of {described}")
    return linear._replace(bias=beta * one_each)


def _convolution(node: onnx.NodeProto, described: str, weight: Array, bias: Array | None) -> Linear:
    _check_axes(described, weight, weight.ndim >= 3, "3 or more")
    groups = attribute(node, "group", "INT", 1)
    if groups < 1:
        raise LeftError(f"{described} has {groups} groups; expected 1 or more")
    wide, transposed = weight.astype(np.float64), is_op(node, "ConvTranspose")
    axes = (1, 0) if transposed else (0, 1)
    padded = not transposed and _pads(node)
    linear = Linear(wide, None, weight.dtype, weight.ndim, *axes, groups, padded)
    if bias is None:
        return linear
    if bias.shape != (linear.channels,):
        raise LeftError(
            f"the bias of {described} has shape {bias.shape}; expected ({linear.channels},)"
        )
    return linear._replace(bias=bias.astype(np.float64))


def _check_axes(described: str, weight: Array, fits: bool, expected: str) -> None:
    if not fits:
        raise LeftError(
            f"the weight of {described} has shape {weight.shape}; expected {expected} axes"
        )


def _pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution pads with zeros."""
    auto = attribute(node, "auto_pad", "STRING", b"NOTSET")
    if auto in (b"NOTSET", b""):
        return any(attribute(node, "pads", "INTS", ()))
    if auto not in (b"SAME_UPPER", b"SAME_LOWER", b"VALID"):
        raise LeftError(f"the auto_pad of {node.op_type} is {auto!r}")
    return bool(auto != b"VALID")


def write_linear(graph: Graph, i: int, linear: Linear) -> None:
    """Write a layer's new numbers; a MatMul becomes a Gemm to have a bias."""
    node, name = graph.nodes[i], graph.name(i)
    for position, (values, role) in enumerate(
        zip(linear.numbers(), ("weight", "bias"), strict=True), 1
    ):
        graph.set_constant(i, position, values, f"{name}.{role}")
    if is_op(node, "MatMul"):
        node.op_type = "Gemm"
    elif is_op(node, "Gemm"):
        kept = [a for a in node.attribute if a.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)
