"""Evaluate the operators that make constants, on arrays.

An array here may be a view that repeats its numbers. If a model of a few bytes describes a large
array, it takes no memory before it is used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from .model import FLOATS, LeftError, attribute, first_output, kind_name, reads, to_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnfast._types import Array

    from .shapes import Dims, Shapes


MOST_NUMBERS = 2**27  # the limit for one constant, and for all computed ones together
_MOST_AXES = 32  # NumPy's limit for broadcasting


def evaluate(node: onnx.NodeProto, inputs: Sequence[Array], shapes: Shapes) -> Array:
    """Evaluate one of the `OPERATORS` on the values that it `reads`, or raise LeftError."""
    try:
        for x in inputs:
            _check_axes(x.ndim)
        seen: list[Any] = []
        if node.op_type == "Shape":
            seen = [shapes.dims(node.input[0])]
        elif node.op_type == "CastLike":
            seen = [shapes.kind(node.input[1])]
        with np.errstate(all="ignore"):
            return OPERATORS[node.op_type][1](node, *inputs, *seen)
    except (ValueError, OverflowError) as error:
        raise LeftError(f"{first_output(node)!r}, cannot be computed: {error}") from error


def _check_axes(count: int) -> None:
    if count > _MOST_AXES:
        raise ValueError(f"there are {count} axes; expected {_MOST_AXES} or fewer")


def is_evaluated(node: onnx.NodeProto) -> bool:
    """Whether a node is one of the `OPERATORS`, with a valid number of inputs and outputs."""
    counts = OPERATORS[node.op_type][0]
    return len(node.output) == 1 and len(node.input) in counts and all(reads(node))


def _constant(node: onnx.NodeProto) -> Array:
    names = [a.name for a in node.attribute]
    if names == ["value"]:
        value = attribute(node, "value", "TENSOR", None)
        return to_array(value, f"{first_output(node)!r},")
    for name, kind, dtype in (
        ("value_float", "FLOAT", np.float32),
        ("value_floats", "FLOATS", np.float32),
        ("value_int", "INT", np.int64),
        ("value_ints", "INTS", np.int64),
    ):
        if names == [name]:
            return np.array(attribute(node, name, kind, None), dtype)
    raise LeftError(f"{first_output(node)!r}, is a Constant without numbers")


def _identity(node: onnx.NodeProto, x: Array) -> Array:
    return x


def _transpose(node: onnx.NodeProto, x: Array) -> Array:
    axes = attribute(node, "perm", "INTS", list(range(x.ndim))[::-1])
    if sorted(axes) != list(range(x.ndim)):
        raise LeftError(f"{node.input[0]!r}, of shape {x.shape} is transposed by {axes}")
    return np.transpose(x, axes)


def _shape(node: onnx.NodeProto, dims: Dims | None) -> Array:
    start, end = (attribute(node, name, "INT", None) for name in ("start", "end"))
    if dims is None or any(not isinstance(dim, int) or dim < 0 for dim in dims[start:end]):
        raise LeftError(f"{first_output(node)!r}, is the shape of {node.input[0]!r}, not known yet")
    return np.array(dims[start:end], np.int64)


def _cast_like(node: onnx.NodeProto, x: Array, kind: int) -> Array:
    if kind_name(kind) not in FLOATS and (kind_name(kind), x.dtype.kind) != ("INT64", "i"):
        raise ValueError(f"it is cast to the type {kind_name(kind)}")
    return x.astype(helper.tensor_dtype_to_np_dtype(kind))


def _cast(node: onnx.NodeProto, x: Array) -> Array:
    return _cast_like(node, x, attribute(node, "to", "INT", 0))


def _expand(node: onnx.NodeProto, x: Array, target: Array) -> Array:
    return _repeated(x, np.broadcast_shapes(x.shape, _lengths(target)))


def _constant_of_shape(node: onnx.NodeProto, target: Array) -> Array:
    zero = helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [0.0])
    value = to_array(attribute(node, "value", "TENSOR", zero), "value")
    if value.size != 1:
        raise ValueError(f"its value has the shape {value.shape}; expected (1,)")
    return _repeated(value.reshape(()), _lengths(target))


def _repeated(x: Array, shape: Sequence[int]) -> Array:
    return np.broadcast_to(x, _bounded(shape))


def _lengths(target: Array) -> tuple[int, ...]:
    return _bounded(integers(target))


def _bounded(shape: Sequence[int]) -> tuple[int, ...]:
    _check_axes(len(shape))
    if min(shape, default=0) < 0 or math.prod(shape) > MOST_NUMBERS:
        raise ValueError(f"the shape {list(shape[:9])} is negative or too large")
    return tuple(shape)


def integers(x: Array) -> list[int]:
    """Return the numbers of a list of integers."""
    if x.ndim > 1 or x.dtype.kind != "i" or x.size > _MOST_AXES:
        raise ValueError(f"{x.dtype} of shape {x.shape} is no short row of integers")
    return [int(number) for number in x.reshape(-1)]


def _reshape(node: onnx.NodeProto, x: Array, target: Array) -> Array:
    lengths = integers(target)
    if not attribute(node, "allowzero", "INT", 0):
        lengths = [
            x.shape[axis] if not length and axis < x.ndim else length
            for axis, length in enumerate(lengths)
        ]
    return x.reshape(lengths)


def _axes(node: onnx.NodeProto, given: tuple[Array, ...]) -> tuple[int, ...]:
    return tuple(integers(given[0]) if given else attribute(node, "axes", "INTS", ()))


def _unsqueeze(node: onnx.NodeProto, x: Array, *axes: Array) -> Array:
    return np.expand_dims(x, _axes(node, axes))


def _squeeze(node: onnx.NodeProto, x: Array, *axes: Array) -> Array:
    return np.squeeze(x, _axes(node, axes) or None)


def _concat(node: onnx.NodeProto, *parts: Array) -> Array:
    if len({part.dtype for part in parts}) > 1:
        raise ValueError("its parts are of different types")
    if sum(part.size for part in parts) > MOST_NUMBERS:
        raise ValueError("it has too many numbers")
    return np.concatenate(parts, attribute(node, "axis", "INT", 0))


# Per operator: the possible numbers of inputs, and a function that computes the output. The
# function takes the node, the inputs that it `reads`, and then the axes or the type of the input
# that it only `looks` at.
OPERATORS: dict[str, tuple[range, Callable[..., Array]]] = {
    "Constant": (range(1), _constant),
    "Identity": (range(1, 2), _identity),
    "Transpose": (range(1, 2), _transpose),
    "Shape": (range(1, 2), _shape),
    "Cast": (range(1, 2), _cast),
    "CastLike": (range(2, 3), _cast_like),
    "Expand": (range(2, 3), _expand),
    "ConstantOfShape": (range(1, 2), _constant_of_shape),
    "Reshape": (range(2, 3), _reshape),
    "Unsqueeze": (range(1, 3), _unsqueeze),
    "Squeeze": (range(1, 3), _squeeze),
    "Concat": (range(1, 2**16), _concat),
}
