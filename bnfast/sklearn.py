"""scikit-learn's `StandardScaler`, computed by bnfast.

This module needs the extra ``bnfast[sklearn]`` and must be imported by name.

The class derives from scikit-learn's and has no state of its own: statistics are in scikit-learn's
attributes, so that each class continues from the other's. Whatever scikit-learn's validation turns
into a dense NumPy array of floats is computed here. scikit-learn's own methods do the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .functional import normalize, scale_shift
from .moments import moments

try:
    from scipy import sparse
    from sklearn import get_config, preprocessing
    from sklearn.base import _fit_context
    from sklearn.preprocessing._data import _handle_zeros_in_scale, _is_constant_feature
    from sklearn.utils import assert_all_finite, check_array
    from sklearn.utils.validation import (
        FLOAT_DTYPES,
        _check_sample_weight,
        check_is_fitted,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        "bnfast.sklearn needs scikit-learn 1.6 or later, which the extra bnfast[sklearn] installs: "
        f"{error}"
    ) from error

if TYPE_CHECKING:
    from ._types import Array, Vector

__all__ = ["StandardScaler"]

# A factor beyond this one would be infinite where float32 data are computed.
_LARGEST_FACTOR = float(np.finfo(np.float32).max)


class StandardScaler(preprocessing.StandardScaler):
    """Subtract each feature's mean and divide by its standard deviation.

    This is `sklearn.preprocessing.StandardScaler` with the same parameters, attributes, answers
    and errors. Dense data are read once to fit and once to transform, on bnfast's threads. Sparse
    data and arrays of other libraries run scikit-learn's code.

    Parameters
    ----------
    copy : bool
        If False, `transform` and `inverse_transform` write into a float array that they are given.
    with_mean : bool
        Subtract the mean.
    with_std : bool
        Divide by the standard deviation.

    Attributes
    ----------
    mean_, var_ : ndarray of float64, shape (n_features,), or None
        Of all values seen; the variance is the biased one.
    scale_ : ndarray of float64, shape (n_features,), or None
        What is divided by: the root of `var_`, and 1 for a constant feature.
    n_samples_seen_ : int, float, or ndarray of them, shape (n_features,)
        The number of values or the sum of their weights; an array if features differ by NaN.
    n_features_in_ : int
        The number of features.
    feature_names_in_ : ndarray of str, shape (n_features,)
        Their names, after data that had some.

    Notes
    -----
    NaN is a missing value: left out of the statistics, and NaN in the result. `fit`,
    `fit_transform` and all other methods are scikit-learn's.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast.sklearn import StandardScaler
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, np.nan]])
    >>> scaler = StandardScaler().fit(x[:2]).partial_fit(x[2:])
    >>> scaler.mean_, scaler.n_samples_seen_
    (array([ 3., 10.]), array([3, 2]))
    >>> scaler.transform(x).round(4)
    array([[-1.2247,  0.    ],
           [ 0.    ,  0.    ],
           [ 1.2247,     nan]])
    """

    mean_: Any
    var_: Any
    scale_: Any
    n_samples_seen_: Any

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> StandardScaler:
        """Add the values of `X` to the statistics.

        Parameters
        ----------
        X : array_like or sparse matrix, shape (n_samples, n_features)
        y : None
            Not used.
        sample_weight : array_like, shape (n_samples,), optional
            Weights of the samples.

        Returns
        -------
        StandardScaler
            This scaler.
        """
        found = self._moments_of(X, sample_weight)
        if found is None:
            return super().partial_fit(X, y, sample_weight)
        first = not hasattr(self, "n_samples_seen_")
        validate_data(self, X, reset=first, skip_check_array=True)  # names and number of features
        if not first:
            m2 = self.var_ * self.n_samples_seen_ if self.with_std else 0.0
            found = _merged((self.n_samples_seen_, self.mean_, m2), found)
        count, mean, m2 = found
        self.n_samples_seen_ = count[0] if (count == count[0]).all() else count
        self.mean_, self.var_, self.scale_ = mean, None, None
        if self.with_std:
            with np.errstate(invalid="ignore"):  # 0 / 0 without values
                self.var_ = m2 / count
            constant = _is_constant_feature(self.var_, mean, self.n_samples_seen_)
            deviation = np.sqrt(self.var_)
            self.scale_ = _handle_zeros_in_scale(deviation, copy=False, constant_mask=constant)
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Subtract the mean and divide by the standard deviation.

        Parameters
        ----------
        X : array_like or sparse matrix, shape (n_samples, n_features)
        copy : bool, optional
            Instead of the scaler's own.

        Returns
        -------
        ndarray or sparse matrix, shape (n_samples, n_features)
            With the dtype of `X` if that is float.
        """
        if _is_foreign(X):
            return super().transform(X, copy)
        check_is_fitted(self)
        in_place = not (self.copy if copy is None else copy)
        x = validate_data(self, X, reset=False, **_checks(in_place))
        mean = self.mean_ if self.with_mean else None
        factor = 1 / self.scale_ if self.with_std else None
        if not _fit(x, mean, factor) or (factor is not None and (factor > _LARGEST_FACTOR).any()):
            return super().transform(X, copy)
        if mean is None:
            mean = np.zeros(x.shape[1])
        one = np.ones(x.shape[1])
        return normalize(x, mean, one, factor, eps=0, out=_target(x, X, in_place))

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Multiply by the standard deviation and add the mean.

        Parameters
        ----------
        X : array_like or sparse matrix, shape (n_samples, n_features)
        copy : bool, optional
            Instead of the scaler's own.

        Returns
        -------
        ndarray or sparse matrix, shape (n_samples, n_features)
            With the dtype of `X` if that is float.
        """
        if _is_foreign(X):
            return super().inverse_transform(X, copy)
        check_is_fitted(self)
        in_place = not (self.copy if copy is None else copy)
        x = check_array(X, **_checks(in_place))
        mean = self.mean_ if self.with_mean else None
        scale = self.scale_ if self.with_std else None
        if not _fit(x, mean, scale):
            return super().inverse_transform(X, copy)
        return scale_shift(x, scale, mean, out=_target(x, X, in_place))

    def _moments_of(self, X: Any, weight: Any) -> tuple[Any, Vector, Vector] | None:
        """Return count, mean and M2 of each feature, or None if scikit-learn's code is to run."""
        # Callbacks, which scikit-learn has since 1.9, are called by its own method.
        callbacks = getattr(self, "_skl_callbacks", None)
        if _is_foreign(X) or callbacks or not (self.with_mean or self.with_std):
            return None
        checks = _checks(False)
        if weight is None:  # the moments show what is not finite
            checks["ensure_all_finite"] = False
        x = check_array(X, estimator=self, input_name="X", **checks)
        if sparse.issparse(x):
            return None
        if weight is not None:
            weight = _check_sample_weight(weight, x, dtype=x.dtype)
            if weight.min() < 0 or not weight.any():
                return None
        part = moments(x, mask=weight)
        count, mean, m2 = np.full(x.shape[1], part.count), part.mean, part.m2
        doubtful = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
        if doubtful.size:
            # scikit-learn's check copies what is in Fortran's order.
            values = x.ravel(order="K")
            assert_all_finite(
                values, allow_nan=True, estimator_name=type(self).__name__, input_name="X"
            )
        for i in doubtful:
            column = np.ascontiguousarray(x[:, i])
            there = ~np.isnan(column)
            w = None if weight is None else weight[there]
            part = moments(column[there][:, None], mask=w)
            count[i], mean[i], m2[i] = part.count, part.mean[0], part.m2[0]
        return count, np.where(count > 0, mean, np.nan), m2


def _is_foreign(X: Any) -> bool:
    """Whether this is sparse, or may be an array of another library that is to stay one."""
    return bool(sparse.issparse(X) or get_config()["array_api_dispatch"])


def _checks(in_place: bool) -> dict[str, Any]:
    """Return the options of scikit-learn's validation."""
    return {
        "accept_sparse": "csr",
        "dtype": FLOAT_DTYPES,
        "force_writeable": in_place,
        "ensure_all_finite": "allow-nan",
    }


def _fit(x: Any, *parameters: Any) -> bool:
    """Whether this is a dense array and there is a number per feature, of one kind or more."""
    given = [p for p in parameters if p is not None]
    return bool(given) and not sparse.issparse(x) and all(np.shape(p) == x.shape[1:] for p in given)


def _target(x: Array, X: Any, in_place: bool) -> Array | None:
    """Return where to write: `x`, if the caller says so or it was converted from another array."""
    converted = isinstance(X, np.ndarray) and not np.may_share_memory(x, X)
    return x if in_place or converted else None


def _merged(
    old: tuple[Any, Vector, Any], new: tuple[Any, Vector, Vector]
) -> tuple[Vector, Vector, Vector]:
    """Merge count, mean and M2 as `Moments.merge` does, with a count for each feature."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = old, new
    count = n_a + n_b
    mean_a = np.where(n_a > 0, mean_a, mean_b)  # NaN without values
    mean_b = np.where(n_b > 0, mean_b, mean_a)
    delta = mean_b - mean_a
    with np.errstate(all="ignore"):
        share = n_b / count
        m2 = np.where(n_a > 0, m2_a, 0.0) + m2_b + delta * delta * (n_a * share)
        return count, mean_a + delta * share, m2
