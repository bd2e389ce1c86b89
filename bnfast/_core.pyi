"""Types of the compiled core; `tests/test_stubs.py` holds them against it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._options import ActivationFacts

DIRECTION_NAMES: tuple[str, ...]
TYPE_NAMES: tuple[str, ...]
LAYOUT_NAMES: tuple[str, ...]
VARIANT_NAMES: tuple[str, ...]
ACTIVATIONS: Mapping[str, ActivationFacts]
RESIDUAL_NAMES: tuple[str, ...]
SUMS_NAMES: tuple[str, str]
MOMENTS_NAMES: tuple[str, str]

driver: Any  # a capsule over src/driver.h's bnf_driver_table

Vector = NDArray[np.float64]
Stats = tuple[float, Vector, Vector, Vector]

def dispatches() -> dict[tuple[str, str, str, str, str], int]: ...
def reset_dispatches() -> None: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def set_caches(l2: int, l3: int) -> None: ...
def config() -> dict[str, Any]: ...
def threads() -> tuple[int, str]: ...
def get_num_threads() -> int: ...
def pool_started() -> bool: ...
def at_work() -> tuple[int, int]: ...
def plan(
    shape: tuple[int, int, int],
    itemsize: int,
    gathers: bool,
    reads: int,
    writes: int,
    l2: int,
    l3: int,
    threads: int,
) -> dict[str, Any]: ...
def new_output(x: NDArray[Any]) -> NDArray[Any]: ...
def release_memory() -> int: ...
def kept_memory() -> tuple[int, int]: ...
def physical_memory() -> int: ...
def copy_into(target: NDArray[Any], source: NDArray[Any]) -> None: ...
def over_memory(address: int, shape: tuple[int, ...], type_number: int) -> NDArray[Any]: ...
def moments(
    x: ArrayLike, axis: int, mask: ArrayLike | None = ...
) -> tuple[float, Vector, Vector]: ...
def normalize(
    x: ArrayLike,
    mean: ArrayLike | None,
    var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    axis: int,
    residual: ArrayLike | None,
    activation: Any,
    out: NDArray[Any] | None,
    names: tuple[str, str, str, str] = ...,
    running: bool = ...,
) -> NDArray[Any]: ...
def forward(
    x: ArrayLike,
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float | None,
    eps: float,
    axis: int,
    ddof: int,
    residual: ArrayLike | None,
    activation: Any,
    out: NDArray[Any] | None,
    counter: NDArray[np.int64] | None = ...,
    moments: tuple[float, ArrayLike, ArrayLike] | None = ...,
    mask: ArrayLike | None = ...,
    virtual_batch_size: int | None = ...,
) -> tuple[NDArray[Any], Stats]: ...
def moved_average(old: ArrayLike, new: ArrayLike, momentum: float) -> Vector: ...
def inv_std(var: ArrayLike, eps: float) -> Vector: ...
def backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    count: float,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    axis: int,
    residual: ArrayLike | None,
    activation: Any,
    y: ArrayLike | None,
    out: NDArray[Any] | None,
    needs: tuple[bool, ...],
    sums: tuple[ArrayLike, ArrayLike] | None = ...,
    mask: ArrayLike | None = ...,
    virtual_batch_size: int | None = ...,
) -> tuple[NDArray[Any] | None, Vector | None, Vector | None, NDArray[Any] | None]: ...

class FixedMap:
    @property
    def mean(self) -> Vector: ...
    @property
    def scale(self) -> Vector: ...
    @property
    def shift(self) -> Vector: ...
    @property
    def axis(self) -> int: ...
    @property
    def activation(self) -> Any: ...
    def __init__(
        self, mean: ArrayLike, scale: ArrayLike, shift: ArrayLike, axis: int, activation: Any
    ) -> None: ...
    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]: ...
