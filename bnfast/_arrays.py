"""Arrays that need more than the common case: conversions, copies, and error messages.

`_core` takes arrays of a supported type that are dense in some order of their axes, and calls this
module for all others. `Canonical` copies the tensors of a call into that form; the functions below
it do the same for parameters. What cannot be converted is refused here with an exception, before
anything is written.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from . import _options
from ._errors import described, is_array, is_from_here, is_its_own, listed, shown, type_names

if TYPE_CHECKING:
    from ._types import Array

DATA_NAMES = ("float32", "float64", "float16", "bfloat16")
# The types in which per-channel numbers are kept; those of other types are converted.
_KEPT = (np.float32, np.float64)
_DLPACK_CPU = 1
MOST_BATCHES = 2**63 - 1  # the largest int64
# NumPy's limit of work, after which two interleaved views count as overlapping.
_MAX_OVERLAP_WORK = 10_000


class Canonical:
    """The tensors of one call, dense and in one memory order; `write_back` returns the result.

    A tensor that has this form is used as it is; others are copied.

    Parameters
    ----------
    x : array_like
        The input.
    axis : int
        Its channel axis.
    residual, dy, y : array_like, optional
        Tensors of the same shape and dtype.
    out : ndarray, optional
        Where the caller wants the result.
    out_may_be : tuple of str
        Names of the inputs that `out` may be: the kernels read each value of these before they
        write it.
    """

    def __init__(
        self,
        x: Any,
        axis: Any,
        *,
        residual: Any = None,
        dy: Any = None,
        y: Any = None,
        out: Any = None,
        out_may_be: tuple[str, ...] = ("x", "residual"),
    ) -> None:
        given = {"residual": residual, "dy": dy, "y": y}
        arrays = {"x": array("x", x)} | {
            name: array(name, value) for name, value in given.items() if value is not None
        }
        source = arrays["x"]
        _check_tensor("x", source)
        self.axis = _axis(axis, source)
        for name, value in arrays.items():
            _check_like(name, value, source)
        if out is not None:
            _check_out(out, source, arrays, out_may_be)
        self.shape, self.given = source.shape, arrays
        self._out_asked = out
        self.x = source if is_dense(source) else _copy(source, _native(source.dtype), "K")
        self.residual = self._alike(arrays.get("residual"))
        self.dy = self._alike(arrays.get("dy"))
        self.y = self._alike(arrays.get("y"))
        self.out = None if out is None else self._target(out)

    def write_back(self, result: Array) -> Any:
        """Return the result, in the caller's `out` if there is one."""
        if self._out_asked is None:
            return result
        if not np.may_share_memory(result, self._out_asked):
            _write(np.asarray(self._out_asked), result)
        return self._out_asked

    def _alike(self, other: Array | None) -> Array | None:
        """Return a tensor in the memory order of x."""
        if other is None or _is_alike(other, self.x):
            return other
        return in_order_of(self.x, other)

    def _target(self, out: Array) -> Array:
        plain = np.asarray(out)
        return plain if _is_alike(plain, self.x) else np.empty_like(self.x)


def in_order_of(x: Array, result: Array | None) -> Array | None:
    """Return a result in the memory order of x."""
    if result is None:
        return None
    copy = np.empty_like(x)
    _write(copy, result)
    return copy


def is_dense(a: Array) -> bool:
    """Whether an array is in this machine's byte order and contiguous in some order of axes."""
    return _is_native(a) and a.transpose(memory_order(a)).flags.c_contiguous


def _is_alike(a: Array, x: Array) -> bool:
    """Whether an array has the memory order of `x`, which is dense."""
    return _is_native(a) and all(
        n == 1 or stride == wanted
        for n, stride, wanted in zip(x.shape, a.strides, x.strides, strict=True)
    )


def memory_order(x: Array) -> tuple[int, ...]:
    """Return the order of the axes of `x` in memory: longest strides first."""
    if x.flags.c_contiguous:
        return tuple(range(x.ndim))
    return tuple(sorted(range(x.ndim), key=lambda i: (x.shape[i] != 1, -abs(x.strides[i]))))


def _is_native(a: Array) -> bool:
    return a.flags.aligned and a.dtype.isnative


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("=")


def _copy(a: Array, dtype: np.dtype[Any], order: Literal["C", "K"] = "C") -> Array:
    copy = np.empty_like(a, dtype, order)
    _write(copy, a)
    return copy


def _write(target: Array, source: Array) -> None:
    with np.errstate(invalid="ignore"):  # of a signalling NaN, on some processors at any copy
        copy_into(target, source)


def copied(a: Array) -> Array:
    """Return a copy in this machine's byte order."""
    return _copy(a, _native(a.dtype))


def copy_into(target: Array, source: Array) -> None:
    """Write an array's values into another of its shape; `_core` replaces this by a checked one."""
    target[...] = source


def _is_masked(value: Any) -> bool:
    """Whether it is a masked array; one can exist only where `numpy.ma` has been imported."""
    return issubclass(type(value), getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def array(name: str, value: Any) -> Array:
    """Return an argument as a plain array, without a copy if possible, or raise."""
    if type(value) is np.ndarray:
        return value
    if _is_masked(value):
        raise TypeError(
            f"{name} is a masked array; expected a plain array: the mask would be lost "
            "(fill it, or leave the masked values out)"
        )
    if is_array(value):  # a subclass, for any `__class__` or `__array__` it has
        return np.asarray(value)
    return _converted(name, value)


def _converted(name: str, value: Any) -> Array:
    """Convert another object to an array; an error of its own methods becomes a TypeError."""
    try:
        if hasattr(value, "__dlpack__") and not _speaks_numpy(value):
            return _from_dlpack(name, value)
        return np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:
        if not is_its_own(error, value):
            raise
        raise TypeError(
            f"{name} is {described(value)}, which NumPy cannot read as an array: {error}"
        ) from error


def target(name: str, value: Any) -> Array:
    """Return an array that is to be written to, as a plain array of the same memory."""
    if not is_array(value):
        raise TypeError(f"{name} is {described(value)}; expected a NumPy array")
    return array(name, value)


def _speaks_numpy(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _from_dlpack(name: str, value: Any) -> Array:
    device, number = value.__dlpack_device__()
    if device != _DLPACK_CPU:
        raise TypeError(f"it is on DLPack device ({int(device)}, {number}), not on the CPU")
    return np.from_dlpack(value)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is `ml_dtypes.bfloat16`: the type itself, since others may have its name.

    An array of it can exist only where `ml_dtypes` has been imported.
    """
    return dtype.type is getattr(sys.modules.get("ml_dtypes"), "bfloat16", None)


def is_data_type(dtype: np.dtype[Any]) -> bool:
    return dtype.type in (np.float32, np.float64, np.float16) or is_bfloat16(dtype)


def check_type(name: str, a: Array) -> None:
    """Refuse an array of a type that data cannot have."""
    if not is_data_type(a.dtype):
        hint = " (convert it: .astype(np.float32))" if a.dtype.kind in "iub" else ""
        raise TypeError(f"{name} has dtype {a.dtype}; expected {listed(DATA_NAMES)}{hint}")


def _check_tensor(name: str, a: Array) -> None:
    check_type(name, a)
    if a.ndim < 2:
        raise ValueError(
            f"{name} has shape {a.shape}; expected at least 2 dimensions, one of them channels"
        )


def _check_like(name: str, a: Array, x: Array) -> None:
    if _native(a.dtype) != _native(x.dtype):
        raise TypeError(f"{name} has dtype {a.dtype}; expected that of x, {x.dtype}")
    if a.shape != x.shape:
        raise ValueError(f"{name} has shape {a.shape}; expected that of x, {x.shape}")


def _axis(axis: Any, x: Array) -> int:
    number = _options.integer("axis", axis)
    if not -x.ndim <= number < x.ndim:
        raise ValueError(
            f"axis is {shown(number)}; expected {-x.ndim} to {x.ndim - 1} for x of shape {x.shape}"
        )
    return number % x.ndim


def _check_out(out: Any, x: Array, tensors: dict[str, Array], out_may_be: tuple[str, ...]) -> None:
    plain = target("out", out)
    _check_like("out", plain, x)
    if not plain.flags.writeable:
        raise ValueError(f"out of shape {plain.shape} is read-only; expected a writeable array")
    if _overlaps_itself(plain):
        raise ValueError(
            f"out has strides {plain.strides} for shape {plain.shape}, so that values of it share "
            "memory; expected each to have its own"
        )
    for name, tensor in tensors.items():
        if name in out_may_be and _is_same(plain, tensor):
            continue
        if _share_memory(plain, tensor):
            raise ValueError(
                f"out overlaps {name} in memory; expected it to be {listed(out_may_be)} exactly, "
                "or to be apart from all inputs"
            )


def _is_same(a: Array, b: Array) -> bool:
    places = [(v.__array_interface__["data"][0], v.shape, v.strides) for v in (a, b)]
    return places[0] == places[1]


def _share_memory(a: Array, b: Array) -> bool:
    a, b = np.asarray(a), np.asarray(b)  # a subclass may have functions of its own
    try:
        # NumPy's stub knows only two of the numbers it documents.
        return np.shares_memory(a, b, max_work=_MAX_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(a: Array) -> bool:
    if a.size == 0:
        return False
    reach = a.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


# ---- Per-channel arrays


def parameter(name: str, value: Any, channels: int, out: Array | None = None) -> Array:
    """Return a per-channel parameter as a plain float32 or float64 array."""
    a = vector(name, value, out)
    _check_channels(name, a, channels)
    return a


def vector(name: str, value: Any, out: Array | None = None) -> Array:
    """Return a copy of a per-channel parameter, float32 or float64, of any length."""
    a = array(name, value)
    check_type(name, a)
    if out is not None and _share_memory(a, out):
        refuse_overlap(name)
    kept = _native(a.dtype) if a.dtype.type in _KEPT else np.dtype(np.float32)
    return _copy(a, kept)


def rows(name: str, value: Any, out: Array | None, runs: int) -> Array:
    """Return statistics of so many virtual batches, (runs, channels), as one float64 vector."""
    a = array(name, value)
    check_type(name, a)
    if a.ndim != 2 or len(a) != runs:
        raise ValueError(
            f"{name} has shape {a.shape}; expected ({runs}, channels), a row for each virtual batch"
        )
    if out is not None and _share_memory(a, out):
        refuse_overlap(name)
    return _copy(a, np.dtype(np.float64)).reshape(-1)


def refuse_rows(name: str, a: Array, runs: int, channels: int) -> NoReturn:
    """Refuse statistics that do not have one row for each virtual batch."""
    raise ValueError(
        f"{name} has {a.size} values; expected shape ({runs}, {channels}), a row for each run of "
        "virtual_batch_size rows"
    )


def refuse_vector(name: str, a: Array, channels: int) -> NoReturn:
    """Refuse a per-channel parameter that does not have one value per channel."""
    _check_channels(name, a, channels)
    refuse_uncommon()


def refuse_overlap(name: str) -> NoReturn:
    """Refuse an `out` that shares memory with a parameter or running statistic."""
    raise ValueError(f"out overlaps {name} in memory; expected {name} to have memory of its own")


def constant(name: str, value: Any, channels: int | None = None) -> Array:
    """Return a read-only float64 copy of a per-channel parameter."""
    a = vector(name, value)
    if channels is not None:
        _check_channels(name, a, channels)
    elif a.ndim != 1:
        raise ValueError(f"{name} has shape {a.shape}; expected (channels,)")
    # An array over bytes, so that it cannot be made writeable again.
    return np.frombuffer(_copy(a, np.dtype(np.float64)).tobytes(), np.float64)


def running_statistic(name: str, value: Any, channels: int, x_dtype: np.dtype[Any]) -> Array:
    """Return a plain copy of a running statistic that is to be updated and written back."""
    a = running_copy(name, value)
    refuse_running(name, a, channels, x_dtype)
    return a


def running_copy(name: str, value: Any) -> Array:
    """Return a plain copy of a running statistic of any length."""
    a = _updatable(name, value)
    return copied(a)


def check_updatable(name: str, value: Any, channels: int) -> None:
    """Refuse all but a writeable float array with one value per channel."""
    _updatable(name, value, channels)


def _updatable(name: str, value: Any, channels: int | None = None) -> Array:
    if not is_array(value):
        raise TypeError(f"{name} is {described(value)}; expected a NumPy array to update in place")
    a = array(name, value)
    if a.dtype.type not in _KEPT:
        raise TypeError(f"{name} has dtype {a.dtype}; expected {listed(type_names(_KEPT))}")
    if channels is not None:
        _check_channels(name, a, channels)
    if not a.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writeable array to update in place")
    if _overlaps_itself(a):
        raise ValueError(
            f"{name} has stride {a.strides[0]}, so that channels share memory; expected each "
            "to have its own"
        )
    return a


def refuse_running(name: str, a: Array, channels: int, x_dtype: np.dtype[Any]) -> None:
    """Refuse a running statistic that does not fit this data, or cannot be written to."""
    _check_channels(name, a, channels)
    check_running_type(name, a, x_dtype)
    _updatable(name, a, channels)


def check_running_type(name: str, value: Any, x_dtype: np.dtype[Any]) -> None:
    """Refuse a running statistic of a type that does not go with this data."""
    if value is None:
        raise TypeError(f"{name} is None; expected one value per channel")
    a = array(name, value)
    accepted = _KEPT if x_dtype == np.float64 else _KEPT[:1]
    if a.dtype.type not in accepted:
        expected = listed(type_names(accepted))
        raise TypeError(f"{name} has dtype {a.dtype}; expected {expected} beside x of {x_dtype}")


def check_running_apart(running_mean: Any, running_var: Any, *tensors: Any) -> None:
    """Refuse running statistics that share memory with each other or another argument."""
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        others = [running_var, *tensors] if name == "running_mean" else tensors
        for other in others:
            if is_array(value) and _touches(value, other):
                raise ValueError(
                    f"{name} overlaps another argument in memory; expected memory of its own, "
                    "since it is updated in place"
                )


def check_parameters_apart(out: Any, **parameters: Any) -> None:
    """Refuse an `out` that is written through a copy and shares memory with a parameter."""
    for name, value in parameters.items():
        if out is not None and _touches(out, value):
            refuse_overlap(name)


def _touches(a: Array, other: Any) -> bool:
    if other is None:
        return False
    try:
        memory = array("", other)
    except TypeError as error:
        if not is_from_here(error):
            raise
        return False  # it is refused with its name where it is read
    return _share_memory(a, memory)


def check_counter(counter: Any) -> None:
    """Refuse a batch counter that cannot be written."""
    name = "num_batches_tracked"
    if not is_array(counter):
        raise TypeError(f"{name} is {described(counter)}; expected an array of int64 of shape ()")
    a = array(name, counter)
    if a.dtype != np.int64 or a.shape != ():
        raise TypeError(f"{name} is {described(a)}; expected an array of int64 of shape ()")
    if not a.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writeable array to count in")


def check_room(counter: Array, batches: int = 1) -> None:
    """Refuse a counter whose value is not a count, or to which so many cannot be added."""
    number = int(np.asarray(counter))
    if not 0 <= number <= MOST_BATCHES - batches:
        raise ValueError(f"num_batches_tracked is {number}; expected 0 to {MOST_BATCHES - batches}")


def _check_channels(name: str, a: Array, channels: int) -> None:
    if a.shape != (channels,):
        raise ValueError(
            f"{name} has shape {a.shape}; expected ({channels},), one value per channel of x"
        )


def wrong_channels(shape: tuple[int, ...], axis: int, expected: int) -> str:
    """Return the message for a tensor with another number of channels than the layer has."""
    return f"x has shape {shape} with {shape[axis]} channels on axis {axis}; expected {expected}"


def check_channels(shape: tuple[int, ...], axis: int, expected: int) -> None:
    """Refuse a tensor with another number of channels than the layer has."""
    if shape[axis] != expected:
        raise ValueError(wrong_channels(shape, axis, expected))


# ---- Errors that the core finds


def refuse_one_value(shape: tuple[int, ...], rows: int) -> NoReturn:
    """Refuse a batch of one value per channel, which has no variance."""
    found = f"got input size {tuple(shape)}"
    if rows:
        found += f", of which a virtual batch, of at most {rows} rows, has one value"
    raise ValueError(f"Expected more than 1 value per channel when training, {found}")


def refuse_batch_size(count: float, m: int, is_part: bool) -> NoReturn:
    """Refuse statistics of a batch of another size than `x`; size 0 means constants.

    If `x` is a part of the batch, the batch has at least as many values.
    """
    if is_part:
        raise ValueError(
            f"stats.count is {count:.17g}; expected at least the {m:.17g} values per channel of x, "
            "which is a part of the batch that sums are of"
        )
    raise ValueError(
        f"stats.count is {count:.17g}; expected the {m:.17g} values per channel of x, "
        "or 0 for constant statistics"
    )


def refuse_output(name: str) -> NoReturn:
    """Refuse `y` in place of the residual: the activation's derivative needs the input."""
    raise ValueError(
        f"y is given without residual, but the derivative of {name} is not told by the output; "
        "expected the forward's residual, or no y where it had none"
    )


def refuse_part(count: float, m: int) -> NoReturn:
    """Refuse moments that cannot be those of a batch that `x` is a part of."""
    if count == 1:
        raise ValueError("Expected more than 1 value per channel when training, got moments of one")
    if count == 0:
        raise ValueError("moments.count is 0; expected the weight of a batch")
    raise ValueError(
        f"moments.count is {count:.0f}; expected at least the {m} values per channel of x, which "
        "is a part of that batch"
    )


def refuse_uncommon() -> NoReturn:
    """Raise for arrays that were checked and converted and still are not the common case."""
    raise RuntimeError(
        "Canonical left arrays that are not the common case: another thread or a finalizer "
        "changed them during the call, or this is a defect of bnfast"
    )
