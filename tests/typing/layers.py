"""What a type checker sees of layers and folding: checked by mypy in `make lint`, never run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import bnfast
from bnfast import BatchNorm, BatchNorm2d, FrozenBatchNorm, conventions

Values = NDArray[Any]
Channels = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

x = np.ones((2, 3, 4), np.float32)

layer = BatchNorm(3, momentum=None, activation="relu6", dtype=np.float64)
assert_type(layer, BatchNorm)
assert_type(layer(x), Values)
assert_type(layer(x, x, out=x), Values)
assert_type(layer.weight, Values | None)
assert_type(layer.running_mean, Values | None)
assert_type(layer.momentum, float | None)
assert_type(layer.training, bool)
assert_type(layer.eval(), BatchNorm)
assert_type(layer.state_dict(), dict[str, Values])
layer.load_state_dict(layer.state_dict(), strict=False, prefix="bn.")
layer.load_state_dict([1.0])  # type: ignore[arg-type]
BatchNorm("3")  # type: ignore[arg-type]
BatchNorm(3, eps=1e-5, epsilon=1e-5)  # type: ignore[call-arg]
assert_type(BatchNorm(3, **conventions.KERAS), BatchNorm)
assert_type(conventions.KERAS["ddof"], int)
assert_type(BatchNorm2d(3), BatchNorm2d)

frozen = layer.freeze()
assert_type(frozen, FrozenBatchNorm)
assert_type(frozen(x, residual=x), Values)
assert_type(frozen.scale, Channels)
assert_type(frozen.axis, int)
frozen.axis = 2  # type: ignore[misc]

weight, bias = bnfast.fold(np.ones((3, 3), np.float32), None, layer)
assert_type(weight, Floats)
assert_type(bias, Floats)
assert_type(bnfast.fold_before(weight, bias, frozen, padded=True), tuple[Floats, Floats])
bnfast.fold(weight, None, "bn")  # type: ignore[arg-type]


def forward(batch: Values) -> Values:
    return layer(batch)


bnfast.recompute_statistics(forward, [x], [layer], progress=print)
bnfast.recompute_statistics(forward, [x], [frozen])  # type: ignore[list-item]
bnfast.recompute_statistics(forward, ["x"], [layer])  # type: ignore[arg-type]
