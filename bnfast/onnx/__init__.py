"""The batch norms of ONNX models: read into layers, folded into their neighbours, evaluated.

Needs the extra ``bnfast[onnx]`` and is imported by name. Models are `onnx.ModelProto`, as
`onnx.load` returns them; the operator's rules are those of
https://onnx.ai/onnx/operators/onnx__BatchNormalization.html, from opset 7 on.

ONNX calls momentum the weight of the *old* running value, and feeds the running variance with the
population's (divided by m): `bnfast.conventions.ONNX`.
"""

from .folding import Outcome, fold
from .operator import batch_normalization
from .reading import read

__all__ = ["Outcome", "batch_normalization", "fold", "read"]
