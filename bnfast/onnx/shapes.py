"""The types and axes of a model's values, as far as they are known before it runs."""

from __future__ import annotations

from typing import TypeAlias

import onnx
from google.protobuf.message import EncodeError
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError, infer_shapes

# a str stands for one unknown number, None for any number
Dims: TypeAlias = "tuple[int | str | None, ...]"


class Shapes:
    """The results of shape inference, which runs when they are first needed.

    Parameters
    ----------
    model : onnx.ModelProto
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._inferred: dict[str, onnx.TypeProto.Tensor] | None = None

    def kind(self, name: str) -> int:
        """Return the element type of a value; 0, UNDEFINED, if it is not known."""
        return int(self._type(name).elem_type)

    def dims(self, name: str) -> Dims | None:
        """Return the axes of a value, if their number is known."""
        known = self._type(name)
        return tuple(map(_dim, known.shape.dim)) if known.HasField("shape") else None

    def _type(self, name: str) -> onnx.TypeProto.Tensor:
        if self._inferred is None:
            self._inferred = _inferred(self._model)
        return self._inferred.get(name, onnx.TypeProto.Tensor())


def _inferred(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    try:
        graph = infer_shapes(model, data_prop=True).graph
    except (ValueError, EncodeError, InferenceError, ValidationError):
        # inference failed (past 2 GB, or an error in the model): use what the model states
        graph = model.graph
    known = {
        tensor.name: onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
        for tensor in graph.initializer
    }
    values = (*graph.input, *graph.value_info, *graph.output)
    return known | {value.name: value.type.tensor_type for value in values}


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return dim.dim_param or None
