"""Batch norms of ONNX models: read into layers, folded into their neighbours, evaluated.

This module needs the extra ``bnfast[onnx]`` and must be imported by name. Models are
`onnx.ModelProto`, as `onnx.load` returns them. The operator's rules are those of
https://onnx.ai/onnx/operators/onnx__BatchNormalization.html, from opset 7 on.

In ONNX, momentum is the weight of the *old* running value, and the running variance is updated with
the population variance (divided by m): `bnfast.conventions.ONNX`.
"""

from .folding import Outcome, fold
from .operator import batch_normalization
from .reading import read

__all__ = ["Outcome", "batch_normalization", "fold", "read"]
