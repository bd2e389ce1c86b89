"""Error messages: the description of an argument, and where an exception comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from ._types import Array

# Types whose conversions and reprs run no Python code of a user, except for objects in containers.
_PLAIN = frozenset(
    {*np.ScalarType, *(bytearray, dict, list, range, set, tuple, type), type(None), np.ndarray}
)
_SUMMARY = "an object of type "
# The modules that convert arguments: an error raised in one of them is ours.
_OURS = frozenset(f"{__package__}.{name}" for name in ("_arrays", "_errors", "_options"))


def is_array(value: Any) -> TypeGuard[Array]:
    """Whether an argument is an array by its type; its `__class__` may be anything."""
    return issubclass(type(value), np.ndarray)


def is_its_own(error: Exception, value: Any) -> bool:
    """Whether an error comes from converting a value to a number, a bool or an array.

    It does if the value's class is a user's. Plain types are converted in C, so an error that was
    raised in other Python code comes from a signal handler or from an object in a list.
    """
    if type(value) not in _PLAIN:
        return True
    return is_from_here(error) and not isinstance(error, RecursionError)


def is_from_here(error: Exception) -> bool:
    """Whether an error was raised by the modules that convert arguments, or by C they called."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__") in _OURS


def described(value: Any) -> str:
    """Return the description of an argument for an error message."""
    text = shown(value)
    if is_array(value) or text.startswith(_SUMMARY):
        return text
    return f"{text} of type {type(value).__name__}"


def shown(value: Any) -> str:
    """Return the beginning of an argument's repr; a user's repr may raise, which is no error."""
    if is_array(value):
        return f"an array of {value.dtype}"
    try:
        text = repr(value)
        return _summary(value) if "\n" in text else f"{text:.60}"
    except Exception as error:
        if type(value) in _PLAIN and not is_from_here(error):
            raise
        return f"an unprintable {type(value).__name__}"


def _summary(value: Any) -> str:
    """Return type and shape of an object whose repr has several lines: a tensor, a module."""
    shape = getattr(value, "shape", None)
    of_shape = f" and shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return f"{_SUMMARY}{type(value).__name__}{of_shape:.60}"


def type_names(types: tuple[type, ...]) -> tuple[str, ...]:
    return tuple(kind.__name__ for kind in types)


def listed(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
