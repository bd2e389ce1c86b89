"""The batch norms of a model as layers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .graph import Graph
from .model import LeftError, checked_model, hidden_batch_norms

if TYPE_CHECKING:
    import onnx

    from bnfast.layers import BatchNorm

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
    graph = Graph(checked_model(model), model)
    layers = {}
    for i in graph.batch_norms():
        name = graph.name(i)
        try:
            layers[name] = graph.layer(i)
        except LeftError as left:
            warnings.warn(f"{name} is not read: {left}", UserWarning, stacklevel=2)
    for name, why in hidden_batch_norms(model):
        warnings.warn(f"{name} is not read: {why}", UserWarning, stacklevel=2)
    return layers
