"""Read the batch norms of a model as layers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from bnfast.layers import BatchNorm

from .graph import Graph
from .model import LeftError, attribute, checked_model, first_output, hidden_batch_norms

if TYPE_CHECKING:
    import onnx
    from numpy.typing import DTypeLike

__all__ = ["read"]


def read(model: onnx.ModelProto) -> dict[str, BatchNorm]:
    """Read the batch norms of a model's main graph into layers.

    Parameters
    ----------
    model : onnx.ModelProto
        Not changed.

    Returns
    -------
    dict of str to BatchNorm
        Keyed by the node's name, or by its output's if the name is empty or another node has it, in
        the order of the graph. The layers have ONNX's ``ddof=0``, the node's ``eps``, the node's
        momentum in our sense (``1 - momentum``), and float32 numbers, or float64 if all of the
        node's are. They are in evaluation mode, except where the node's ``training_mode`` is 1.

    Warns
    -----
    UserWarning
        For each batch norm that is not read, with the reason: its numbers are not constants, or
        it is inside a subgraph or a function.

    Raises
    ------
    TypeError
        If `model` is not an `onnx.ModelProto`.
    ValueError
        If it uses an opset before 7, makes a value twice, or makes one from itself.
    """
    graph = Graph(checked_model(model), model)
    layers = {}
    for i in graph.batch_norms():
        name = graph.name(i)
        try:
            layers[name] = layer_of(graph, i)
        except LeftError as left:
            warnings.warn(f"{name} is not read: {left}", UserWarning, stacklevel=2)
    for name, why in hidden_batch_norms(model):
        warnings.warn(f"{name} is not read: {why}", UserWarning, stacklevel=2)
    return layers


def layer_of(graph: Graph, i: int, dtype: DTypeLike | None = None) -> BatchNorm:
    """Return a batch norm node as a layer, if everything that it needs is known."""
    node = graph.nodes[i]
    if len(node.input) != 5 or not first_output(node):
        raise LeftError(
            f"it has {len(node.input)} inputs and {len(node.output)} outputs; expected 5 and 1"
        )
    if not attribute(node, "spatial", "INT", 1):  # opsets 7 and 8: statistics per pixel
        raise LeftError("it has statistics for each pixel: spatial is 0")
    roles = ("scale", "B", "mean", "var")
    numbers = [
        graph.constants.array(name, f"its {role}")
        for role, name in zip(roles, node.input[1:], strict=True)
    ]
    channels = numbers[0].size
    for role, a in zip(roles, numbers, strict=True):
        if a.shape != (channels,):
            raise LeftError(f"its {role} has shape {a.shape}; expected ({channels},)")
    if dtype is None:
        dtype = np.float64 if all(a.dtype == np.float64 for a in numbers) else np.float32
    epsilon = attribute(node, "epsilon", "FLOAT", float(np.float32(1e-5)))
    momentum = attribute(node, "momentum", "FLOAT", float(np.float32(0.9)))
    try:
        layer = BatchNorm(channels, epsilon, 1 - momentum, ddof=0, dtype=dtype)
    except ValueError as error:
        raise LeftError(f"as a layer, its {error}") from error
    names = ("weight", "bias", "running_mean", "running_var")
    with np.errstate(all="ignore"):
        layer.load_state_dict(dict(zip(names, numbers, strict=True)))
    return layer.train(is_training(graph, i))


def is_training(graph: Graph, i: int) -> bool:
    """Whether a batch norm normalises by the batch."""
    node = graph.nodes[i]
    if graph.opset >= 14:
        return bool(attribute(node, "training_mode", "INT", 0))
    return any(node.output[1:])
