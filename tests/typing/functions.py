"""What a type checker sees of the functions: checked by mypy in `make lint`, never run.

A `type: ignore` is a mistake that has to be reported: mypy complains of one that it does not need.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import bnfast
from bnfast import BatchStats, Gradients, Moments

Values = NDArray[Any]
Channels = NDArray[np.float64]

x = np.ones((2, 3, 4), np.float32)
mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)

assert_type(bnfast.batch_norm(x, mean, var), Values)
assert_type(bnfast.batch_norm(x, training=True, activation="relu", residual=x, out=x), Values)
assert_type(bnfast.normalize(x, mean, var, activation=("leaky_relu", 0.1)), Values)
assert_type(bnfast.scale_shift([[1.0, 2.0]], [1.0, 2.0], None), Values)
bnfast.batch_norm(x, mean, var, None, None, True, 0.1, 1e-5, 1)  # type: ignore[call-arg]
bnfast.batch_norm(x, epsilon=1e-5)  # type: ignore[call-arg]
bnfast.batch_norm(x, out=[0.0])  # type: ignore[arg-type]
bnfast.batch_norm(x, eps="1e-5")  # type: ignore[arg-type]

y, stats = bnfast.batch_norm_forward(x)
assert_type(y, Values)
assert_type(stats, BatchStats)
assert_type(stats.mean, Channels)
assert_type(stats.inv_std, Channels)
assert_type(stats.count, float)
assert_type(BatchStats.from_population(mean, var), BatchStats)

gradients = bnfast.batch_norm_backward(y, x, stats)
assert_type(gradients, Gradients)
assert_type(gradients.x, Values | None)
assert_type(gradients.weight, Channels | None)
assert_type(gradients.bias, Channels | None)
assert_type(gradients.residual, Values | None)
dx, dweight, dbias, dresidual = gradients
assert_type(dbias, Channels | None)
gradients.y  # type: ignore[attr-defined]

of_x = bnfast.moments(x, axis=-1)
assert_type(of_x, Moments)
assert_type(of_x.count, float)
assert_type(of_x.mean, Channels)
assert_type(of_x.var(ddof=1), Channels)
assert_type(of_x + of_x, Moments)
assert_type(Moments.merge_all([of_x]), Moments)

assert_type(bnfast.get_num_threads(), int)
assert_type(bnfast.release_memory(), int)
with bnfast.num_threads(2):
    pass
bnfast.set_num_threads("2")  # type: ignore[arg-type]


@bnfast.num_threads(2)
def decorated(n: int) -> str:
    return str(n)


assert_type(decorated(3), str)

assert_type(bnfast.show_config(mode="dicts"), dict[str, Any])
bnfast.show_config(mode="json")  # type: ignore[call-overload]
assert_type(bnfast.__version__, str)
bnfast.batch_nrom  # type: ignore[attr-defined]
