"""Options of a call that are not arrays: converted, or refused with their name."""

from __future__ import annotations

import sys
from math import isfinite
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._errors import described, is_its_own, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._types import Activation

# The kinds of dtype that are not read as numbers: bool, complex, durations, dates, strings.
_NO_NUMBERS = tuple("bcmMSU")
# The size in bytes of as many float64 numbers fits in ptrdiff_t.
_MOST_CHANNELS = sys.maxsize // 8


class ActivationFacts(NamedTuple):
    """The entry of an activation in src/activations.inc."""

    code: int  # its bnf_activation
    from_output: bool  # whether the derivative can be computed from the output
    slope: float  # the default; 0 for an activation that takes none


def activation(value: Any, known: Mapping[str, ActivationFacts]) -> tuple[str, float]:
    """Return an activation's name and slope; `known` is `_core.ACTIVATIONS`."""
    name, slope = value, None
    if isinstance(value, tuple) and len(value) == 2 and _takes_slope(value[0], known):
        name, slope = value[0], real("activation slope", value[1])
        if not 0 < slope <= 1:
            raise ValueError(f"activation slope is {slope}; expected 0 < slope <= 1")
    if not isinstance(name, str) or name not in known:
        error = ValueError if isinstance(name, str | tuple) else TypeError
        sloped = [f"({name!r}, slope)" for name in known if _takes_slope(name, known)]
        expected = ", ".join(["None", *map(repr, known)]) + " or " + ", ".join(sloped)
        raise error(f"activation is {shown(value)}; expected {expected}")
    return name, known[name].slope if slope is None else slope


def is_from_output(value: Activation, known: Mapping[str, ActivationFacts]) -> bool:
    """Whether the derivative of a checked activation can be computed from its output."""
    name = value[0] if isinstance(value, tuple) else value
    return name is None or known[name].from_output


def plain_activation(value: Any, known: Mapping[str, ActivationFacts]) -> Activation:
    """Return an activation in Python's own types, whose use runs no code of the caller."""
    if value is None:
        return None
    name, slope = activation(value, known)
    plain: Any = str(name)
    return (plain, slope) if known[name].slope > 0 else plain


def _takes_slope(name: Any, known: Mapping[str, ActivationFacts]) -> bool:
    return isinstance(name, str) and name in known and known[name].slope > 0


def real(name: str, value: Any) -> float:
    """Return an option that must be a finite number."""
    number: float = value if type(value) is float else _answer(name, value, "a number", _as_real)
    if not isfinite(number):
        raise ValueError(f"{name} is {number}; expected a finite number")
    return number


def integer(name: str, value: Any, expected: str = "an integer") -> int:
    """Return an option that must be an integer."""
    if type(value) is int:
        return value
    number: int = _answer(name, value, expected, _as_integer)
    return number


def _as_real(value: Any) -> float:
    if _is_no_number(value) or not hasattr(value, "__float__"):
        raise TypeError
    if getattr(value, "shape", ()) != ():  # NumPy also converts an array of one value
        raise TypeError
    return float.__float__(float(value))


def _as_integer(value: Any) -> int:
    if _is_no_number(value):
        raise TypeError
    return int.__int__(index(value))  # index() may return a subclass


def _is_no_number(value: Any) -> bool:
    """Whether it is a string, a bool or a duration, which Python or NumPy would convert."""
    kind_of_dtype = getattr(getattr(value, "dtype", None), "kind", "f")
    return isinstance(value, str | bytes | bool) or kind_of_dtype in _NO_NUMBERS


def _answer(name: str, value: Any, expected: str, question: Callable[[Any], Any]) -> Any:
    """Convert an option; if the conversion raises, raise TypeError naming the option."""
    try:
        return question(value)
    except MemoryError:
        raise
    except Exception as error:
        if not is_its_own(error, value):
            raise
        raise TypeError(f"{name} is {described(value)}; expected {expected}") from error


def decimal(text: str) -> int | None:
    """Return an environment variable's text as an int; None if it is not a decimal of 64 bits."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def channel_count(name: str, value: Any) -> int:
    """Return a number of channels; there may still be too little memory for so many."""
    number = integer(name, value)
    if not 0 <= number <= _MOST_CHANNELS:
        raise ValueError(f"{name} is {shown(number)}; expected 0 to {_MOST_CHANNELS}")
    return number


def truth(name: str, value: Any) -> bool:
    """Return an option that is true or false."""
    answer: bool = _answer(name, value, "True or False", bool)
    return answer


def dtype(name: str, value: Any, expected: str) -> np.dtype[Any]:
    """Return an option that NumPy can convert to a dtype."""
    try:
        found: np.dtype[Any] = np.dtype(value)
    except Exception as error:
        if not is_its_own(error, value):
            raise
        raise TypeError(f"{name} is {shown(value)}; expected {expected}") from error
    return found


def eps(value: Any, training: bool) -> float:
    """Return eps: above 0 in training, where a variance can be 0; at least 0 in inference."""
    number = real("eps", value)
    if number < 0 or (training and number == 0):
        bound = "> 0 in training" if training else ">= 0"
        raise ValueError(f"eps is {number}; expected {bound}")
    return number


def ddof(value: Any) -> int:
    """Return ddof, 0 or 1: the running variance divides by ``m - ddof``."""
    number = integer("ddof", value)
    if number not in (0, 1):
        raise ValueError(f"ddof is {shown(number)}; expected 0 or 1")
    return number


def run_length(name: str, value: Any) -> int:
    """Return how many rows are normalised together."""
    number = integer(name, value)
    if not 0 < number < 2**63:
        raise ValueError(f"{name} is {shown(number)}; expected 1 to {2**63 - 1}")
    return number


def check_runs(x: Any, axis: int, beside: str | None) -> None:
    """Refuse virtual batches of x if its axis 0 has channels, or beside another batch's numbers."""
    if beside is not None:
        raise ValueError(f"virtual_batch_size is given beside {beside}; expected one of them")
    if axis == 0 or axis == -np.ndim(x):
        raise ValueError(
            "axis is 0, which is the batch's for virtual_batch_size; expected another one"
        )


def batch_size(name: str, count: Any) -> float:
    """Return the values per channel of a batch, exact for any that fits in memory."""
    number = weight(name, count)
    if isinstance(number, int) and number >= 2**63:
        raise ValueError(f"{name} is {shown(number)}; expected 0 to {2**63 - 1}")
    return float(number)


def weight(name: str, count: Any) -> float:
    """Return a number of values as an int, or the sum of their weights as a float."""
    number = real(name, float(count)) if isinstance(count, float) else integer(name, count)
    if number < 0:
        raise ValueError(f"{name} is {shown(number)}; expected 0 or more")
    return number
