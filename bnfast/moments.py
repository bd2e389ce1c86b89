"""`Moments`: count, mean and M2 per channel, which can be merged.

The running state of Welford's method is a monoid: batches, threads, processes and machines are all
combined by the same formula (Chan, Golub and LeVeque, 1979). The order of merging changes the
result by rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _core, _errors, _options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from ._types import Vector


class Moments:
    """The number of values per channel, their mean, and the sum of squared deviations from it.

    Parameters
    ----------
    count : int or float
        Values per channel, or the sum of their weights; 0 or more.
    mean : array_like of numbers, shape (channels,)
        Their mean.
    m2 : array_like of numbers, shape (channels,)
        The sum of squared deviations from the mean; 0 or more.

    Attributes
    ----------
    count : int or float
    mean, m2 : ndarray of float64, shape (channels,)

    Raises
    ------
    TypeError, ValueError
        If an argument has a type, shape or value that is not accepted.

    Examples
    --------
    >>> import bnfast
    >>> first = bnfast.Moments(2, mean=[1.0], m2=[0.5])
    >>> second = bnfast.Moments(2, mean=[3.0], m2=[0.5])
    >>> both = first + second
    >>> both.count, both.mean, both.var()
    (4, array([2.]), array([1.25]))
    """

    __slots__ = ("count", "m2", "mean")
    __hash__ = None  # type: ignore[assignment]  # update() changes it

    def __init__(self, count: float, mean: ArrayLike, m2: ArrayLike) -> None:
        self.count: float = _options.weight("count", count)
        self.mean: Vector = _vector("mean", mean)
        self.m2: Vector = _vector("m2", m2)
        if self.mean.shape != self.m2.shape:
            raise ValueError(
                f"m2 has shape {self.m2.shape}; expected that of mean, {self.mean.shape}"
            )
        negative = np.flatnonzero(self.m2 < 0)
        if negative.size:
            raise ValueError(
                f"m2 is {self.m2[negative[0]]} in channel {negative[0]}; expected 0 or more, "
                "a sum of squares"
            )

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Return the moments of no values, the neutral element of `merge`.

        Parameters
        ----------
        channels : int

        Returns
        -------
        Moments
            With ``count`` 0, and mean and M2 of zeros.
        """
        number = _options.channel_count("channels", channels)
        return cls._made(0, np.zeros(number), np.zeros(number))

    @classmethod
    def from_statistics(
        cls, count: float, mean: ArrayLike, var: ArrayLike, ddof: float = 0
    ) -> Moments:
        """Return the moments that others computed as a mean and a variance.

        Parameters
        ----------
        count : int or float
            Values per channel, or the sum of their weights; above `ddof`.
        mean : array_like of numbers, shape (channels,)
            Their mean: a layer's running mean, say.
        var : array_like of numbers, shape (channels,)
            Their variance; 0 or more.
        ddof : float
            What was subtracted from `count` to divide by: 0 for the biased variance, 1 for the
            unbiased one, as PyTorch's running variance is.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            If an argument has a type, shape or value that is not accepted.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.Moments.from_statistics(5, [2.0], [1.5], ddof=1)
        Moments(count=5, mean=array([2.]), m2=array([6.]))
        """
        number, less = _options.weight("count", count), _options.real("ddof", ddof)
        if not number > less:
            raise ValueError(f"count is {_errors.shown(count)}; expected more than ddof, {less:g}")
        variance = _vector("var", var)
        if (variance < 0).any():
            raise ValueError(f"var is {variance.min()} in a channel; expected 0 or more")
        with np.errstate(all="ignore"):
            return cls(number, mean, variance * (number - less))

    def to_dict(self) -> dict[str, Any]:
        """Return plain arrays for any file format: ``numpy.savez(file, **moments.to_dict())``.

        Returns
        -------
        dict of str to ndarray
            Copies of ``count`` (int64, or float64 if it is a float, shape ()), ``mean`` and ``m2``.
        """
        kind = np.int64 if isinstance(self.count, int) else np.float64
        return {
            "count": np.array(self.count, kind),
            "mean": self.mean.copy(),
            "m2": self.m2.copy(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Moments:
        """Return the moments of what `to_dict` returned.

        Parameters
        ----------
        values : mapping of str to array_like
            With ``count``, ``mean`` and ``m2``; what ``numpy.load`` returns is one.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            If `values` is no mapping, an entry is missing, or one is not what `Moments` accepts.

        Examples
        --------
        >>> import bnfast
        >>> part = bnfast.Moments(3, [1.0], [2.0])
        >>> bnfast.Moments.from_dict(part.to_dict()) == part
        True
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values is {_errors.described(values)}; expected a mapping")
        missing = [name for name in ("count", "mean", "m2") if name not in values]
        if missing:
            raise ValueError(f"values has no {' and no '.join(missing)}; expected count, mean, m2")
        count = np.asarray(values["count"])
        if count.shape != ():
            raise ValueError(f"count has shape {count.shape}; expected one number")
        return cls(count.item(), values["mean"], values["m2"])

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """Merge moments in pairs, so that rounding grows only with the logarithm of their number.

        Parameters
        ----------
        parts : iterable of Moments
            One or more, with the same number of channels.

        Returns
        -------
        Moments
            Of the values of all parts together.

        Raises
        ------
        ValueError
            If there are none: the number of channels is then unknown.
        """
        row = [moments_of(f"parts[{i}]", part) for i, part in enumerate(_listed(parts))]
        if not row:
            raise ValueError("parts is empty; expected at least one Moments")
        while len(row) > 1:
            pairs = [a.merge(b) for a, b in zip(row[::2], row[1::2], strict=False)]
            row = pairs + row[2 * len(pairs) :]
        return row[0].merge(cls.empty(len(row[0].mean)))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together, exact to rounding: ``a + b``.

        Parameters
        ----------
        other : Moments
            With the same number of channels.

        Returns
        -------
        Moments
        """
        other = moments_of("other", other)
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"the other moments have {len(other.mean)} channels; expected {len(self.mean)}"
            )
        if not self.count or not other.count:
            kept = self if self.count else other
            return self._made(kept.count, kept.mean.copy(), kept.m2.copy())
        count = self.count + other.count
        share = other.count / count
        with np.errstate(all="ignore"):  # an infinite channel does not affect others
            delta = other.mean - self.mean
            mean = self.mean + delta * share
            m2 = self.m2 + (other.m2 + delta * delta * (self.count * share))
        return self._made(count, mean, m2)

    @classmethod
    def _made(cls, count: float, mean: Vector, m2: Vector) -> Moments:
        """Return moments of arrays that have no other user, without checks."""
        made = cls.__new__(cls)
        made.count, made.mean, made.m2 = count, mean, m2
        return made

    def update(self, x: ArrayLike, axis: int = 1, *, mask: ArrayLike | None = None) -> Moments:
        """Add the values of `x` to these moments, in place, and return self.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            Rank 2 or more; every axis except `axis` is reduced.
        axis : int
            The channel axis.
        mask : array_like of bool, or of any of the types of `x`, optional
            Which values count, or their weights: see `batch_norm`.

        Returns
        -------
        Moments
            These moments.
        """
        merged = self.merge(moments(x, axis=axis, mask=mask))
        self.count, self.mean, self.m2 = merged.count, merged.mean, merged.m2
        return self

    def var(self, ddof: float = 0) -> Vector:
        """Return the variance, M2 / (count - ddof).

        Parameters
        ----------
        ddof : float
            0 for the biased variance, 1 for the unbiased one.

        Returns
        -------
        ndarray of float64, shape (channels,)
            NaN if ``count <= ddof``.
        """
        values = self.count - _options.real("ddof", ddof)
        with np.errstate(all="ignore"):
            return self.m2 / values if values > 0 else np.full_like(self.m2, np.nan)

    def std(self, ddof: float = 0) -> Vector:
        """Return the standard deviation, the square root of `var`.

        Parameters
        ----------
        ddof : float
            0 for the biased variance, 1 for the unbiased one.

        Returns
        -------
        ndarray of float64, shape (channels,)
        """
        return np.sqrt(self.var(ddof))

    def __add__(self, other: object) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> Moments:
        # sum() starts with the integer 0.
        return self.merge(self.empty(len(self.mean))) if other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.m2, other.m2, equal_nan=True)
        )

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean!r}, m2={self.m2!r})"


def moments(x: ArrayLike, *, axis: int = 1, mask: ArrayLike | None = None) -> Moments:
    """Return the moments of each channel of `x`, in one pass over memory.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Rank 2 or more.
    axis : int
        The channel axis; all others are reduced.
    mask : array_like of bool, or of any of the types of `x`, optional
        Which values count, or their weights, 0 or more: the shape of `x` with 1 on the channel
        axis, or without that axis; any other axis may have length 1, too. What has weight 0 is not
        a part of the moments, whatever it holds. Weights are rounded to float32 unless `x` is
        float64.

    Returns
    -------
    Moments
        ``count`` values per channel, their mean and M2 in float64. The variance of float32
        data is accurate to 1e-7 relative for any mean and any order of the data. With a mask,
        ``count`` is the sum of its weights: a float unless the mask is of bool.

    Raises
    ------
    TypeError
        If `x` or `mask` has another dtype.
    ValueError
        If `x` has fewer than two dimensions, or no such axis; if `mask` does not fit `x`, or has a
        weight that is negative or not finite.

    Notes
    -----
    This is the mini-batch mean and variance of the paper's Algorithm 1, computed in blocks. Each
    block is summed in float64 around one of its own values, and blocks are merged as Welford's
    states are.

    Examples
    --------
    >>> import numpy as np
    >>> import bnfast
    >>> x = np.array([[1.0, 2.0], [3.0, 2.0]])
    >>> bnfast.moments(x)
    Moments(count=2, mean=array([2., 2.]), m2=array([2., 0.]))
    >>> bnfast.moments(x, mask=np.array([1.0, 3.0]))
    Moments(count=4.0, mean=array([2.5, 2. ]), m2=array([3., 0.]))
    """
    return Moments._made(*_core.moments(x, axis, mask))


def moments_of(name: str, value: Any) -> Moments:
    """Return an argument that must be `Moments`, or raise."""
    if not isinstance(value, Moments):
        raise TypeError(f"{name} is {_errors.described(value)}; expected Moments")
    return value


def _listed(parts: Any) -> list[Any]:
    try:
        row = iter(parts)
    except TypeError:
        raise TypeError(
            f"parts is of type {type(parts).__name__}; expected an iterable of Moments"
        ) from None
    return list(row)  # its errors are passed on


def _vector(name: str, value: ArrayLike) -> Vector:
    vector = _arrays.array(name, value)
    if vector.dtype.kind not in "fiu" and not _arrays.is_bfloat16(vector.dtype):
        raise TypeError(f"{name} has dtype {vector.dtype}; expected numbers that float64 holds")
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}; expected (channels,)")
    with np.errstate(all="ignore"):  # a long double may exceed float64
        return vector.astype(np.float64)
