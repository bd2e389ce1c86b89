"""The types that signatures share, for people and type checkers; never imported at run time."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = np.ndarray[Any, Any]
Floats: TypeAlias = NDArray[np.floating[Any]]
Tensor: TypeAlias = NDArray[Any]  # of the shape of x
Vector: TypeAlias = NDArray[np.float64]  # one value per channel
# The names of src/activations.inc, which a type checker cannot read.
ActivationName: TypeAlias = Literal[
    "relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "tanh", "silu", "gelu"
]
Activation: TypeAlias = ActivationName | tuple[Literal["leaky_relu"], float] | None
