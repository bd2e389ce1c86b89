"""The batch normalization defaults of other frameworks, as keyword arguments.

Each mapping holds ``eps``, ``momentum``, ``ddof`` and ``axis``. Pass it to a layer as it is, or
with one entry changed::

    BatchNorm(64, **conventions.KERAS)
    BatchNorm(64, **{**conventions.KERAS, "axis": 1})

``momentum`` is bnfast's (and PyTorch's): the weight of the *new* batch. In Keras, ONNX, Flax and
TensorFlow, momentum is the weight of the *old* average; their 0.99 is 0.01 here. ``ddof`` decides
which batch variance updates the running variance: the one over ``m - ddof``.

==========  =======  ========  ====  ====  =====================================================
framework   eps      momentum  ddof  axis  source
==========  =======  ========  ====  ====  =====================================================
PYTORCH     1e-5     0.1       1     1     ``torch.nn.BatchNorm2d``: "the unbiased estimator"
KERAS       1e-3     0.01      0     -1    Keras 3 ``BatchNormalization``: ``momentum=0.99``,
                                           its variance is ``ops.moments``'
ONNX        1e-5     0.1       0     1     operator ``BatchNormalization`` (opset 15):
                                           ``momentum=0.9``, "population variance"
FLAX        1e-5     0.01      0     -1    ``flax.linen.BatchNorm``, ``flax.nnx.BatchNorm``:
                                           ``momentum=0.99``
TENSORFLOW  1e-3     0.01      1     -1    ``tf.keras`` 2 ``BatchNormalization`` on images
==========  =======  ========  ====  ====  =====================================================

TensorFlow computes images with the kernel ``FusedBatchNorm``, which multiplies the variance that
it reports by ``m / (m - 1)`` (Bessel's correction). It computes everything else, such as dense
``(N, C)`` data, without the correction: use ``{**TENSORFLOW, "ddof": 0}`` there. Keras 3 never
applies the correction, on any backend.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TypedDict, cast

__all__ = ["FLAX", "KERAS", "ONNX", "PYTORCH", "TENSORFLOW", "Convention"]


class Convention(TypedDict):
    """The keywords whose defaults differ between frameworks.

    Attributes
    ----------
    eps : float
        Added to the variance.
    momentum : float
        The weight of the new batch in the running statistics.
    ddof : int
        1 or 0: the batch variance that updates the running one is divided by ``m - ddof``.
    axis : int
        The channel axis.
    """

    eps: float
    momentum: float
    ddof: int
    axis: int


def _convention(*, eps: float, momentum: float, ddof: int, axis: int) -> Convention:
    values = {"eps": eps, "momentum": momentum, "ddof": ddof, "axis": axis}
    # Read-only, so that no caller can change another's defaults. The type is the one that `**`
    # needs.
    return cast("Convention", MappingProxyType(values))


PYTORCH = _convention(eps=1e-5, momentum=0.1, ddof=1, axis=1)
KERAS = _convention(eps=1e-3, momentum=0.01, ddof=0, axis=-1)
ONNX = _convention(eps=1e-5, momentum=0.1, ddof=0, axis=1)
FLAX = _convention(eps=1e-5, momentum=0.01, ddof=0, axis=-1)
TENSORFLOW = _convention(eps=1e-3, momentum=0.01, ddof=1, axis=-1)
