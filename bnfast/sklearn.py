"""scikit-learn's `StandardScaler`, computed by bnfast.

This module needs the extra ``bnfast[sklearn]`` and must be imported by name.

The class derives from scikit-learn's and has no state of its own: statistics are in scikit-learn's
attributes, so that each class continues from the other's. Whatever scikit-learn's validation turns
into a dense NumPy array of floats is computed here, and the blocks of Dask arrays and data frames.
scikit-learn's own methods do the rest.
"""

from __future__ import annotations

import sys
from functools import partial
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
    from sklearn.utils._set_output import _get_output_config
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
    from collections.abc import Sequence

    from ._types import Array, Vector

__all__ = ["StandardScaler"]

# A factor beyond this one would be infinite where float32 data are computed.
_LARGEST_FACTOR = float(np.finfo(np.float32).max)


class StandardScaler(preprocessing.StandardScaler):
    """Subtract each feature's mean and divide by its standard deviation.

    This is `sklearn.preprocessing.StandardScaler` with the same parameters, attributes, answers
    and errors. Dense data are read once to fit and once to transform, on bnfast's threads. Dask
    arrays and data frames are fitted in one pass, on Dask's current scheduler, and transformed
    lazily. Sparse data and arrays of other libraries run scikit-learn's code.

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
        X : array_like, sparse matrix, Dask array or data frame, shape (n_samples, n_features)
        y : None
            Not used.
        sample_weight : array_like, or Dask array or series, shape (n_samples,), optional
            Weights of the samples.

        Returns
        -------
        StandardScaler
            This scaler.
        """
        tables = _dask_tables(X)
        if tables is None:
            found = self._moments_of(X, sample_weight)
            if found is None:
                return super().partial_fit(X, y, sample_weight)
        else:
            found = self._moments_of_table(tables, X, sample_weight)
            X = tables.sample_of(X)
        first = not hasattr(self, "n_samples_seen_")
        validate_data(self, X, reset=first, skip_check_array=True)  # names and number of features
        if not first:
            mean = 0.0 if self.mean_ is None else self.mean_
            m2 = self.var_ * self.n_samples_seen_ if self.with_std else 0.0
            found = _merged((self.n_samples_seen_, mean, m2), found)
        count, mean, m2 = found
        self.n_samples_seen_ = count[0] if (count == count[0]).all() else count
        self.mean_, self.var_, self.scale_ = mean, None, None
        if not (self.with_mean or self.with_std):
            self.mean_ = None
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
        X : array_like, sparse matrix, Dask array or data frame, shape (n_samples, n_features)
        copy : bool, optional
            Instead of the scaler's own. Dask's data are never written into.

        Returns
        -------
        ndarray, sparse matrix, Dask array or data frame, shape (n_samples, n_features)
            With the dtype of `X` if that is float.
        """
        tables = _dask_tables(X)
        if tables is not None:
            return self._transformed_table(tables, X, "transform")
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
        X : array_like, sparse matrix, Dask array or data frame, shape (n_samples, n_features)
        copy : bool, optional
            Instead of the scaler's own. Dask's data are never written into.

        Returns
        -------
        ndarray, sparse matrix, Dask array or data frame, shape (n_samples, n_features)
            With the dtype of `X` if that is float.
        """
        tables = _dask_tables(X)
        if tables is not None:
            return self._transformed_table(tables, X, "inverse_transform")
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
        return _features_of(x, weight)

    def _moments_of_table(self, tables: Any, X: Any, weight: Any) -> tuple[Vector, Vector, Vector]:
        """Return the same of a Dask array or data frame, computed on the current scheduler."""
        if getattr(self, "_skl_callbacks", None):
            raise ValueError("callbacks are set, which a Dask table does not call; expected none")
        check_array(tables.sample_of(X), estimator=self, input_name="X", **_checks(False))
        found = tables.reduce_rows(
            X, weight, _dense_block, _records_of_block, _merged_records, _RECORD
        )
        rows = found["rows"]
        if rows.min() < rows.max():
            raise ValueError(
                f"the blocks of X have {rows.min():.0f} to {rows.max():.0f} rows in different "
                "features; expected as many in each"
            )
        if not rows[0]:
            kind = "samples" if weight is None else "samples of positive weight"
            raise ValueError(f"X has 0 {kind}; expected at least one")
        count = found["count"] if weight is not None else found["count"].astype(np.int64)
        return count, found["mean"].copy(), found["m2"].copy()

    def _transformed_table(self, tables: Any, X: Any, method: str) -> Any:
        """Return the table that a method makes of a Dask array or data frame, lazily."""
        check_is_fitted(self)
        x = tables.sample_of(X)
        if method == "transform":
            kind = _get_output_config("transform", self)["dense"]
            if kind != "default":
                raise ValueError(
                    f"the output of transform is set to {kind!r}, which is in memory; expected "
                    "'default' for a Dask array or data frame, which gives another one"
                )
            x = validate_data(self, x, reset=False, **_checks(False))
        x = check_array(x, **_checks(False))
        options = {"with_mean": self.with_mean, "with_std": self.with_std}
        used = (self.mean_ if self.with_mean else None, self.scale_ if self.with_std else None)
        vectors = tuple(None if v is None else np.broadcast_to(v, x.shape[1:]) for v in used)
        block = partial(_block_of, method=method, options=options)
        return tables.map_rows(X, block, vectors, x.dtype)


def _features_of(x: Array, weight: Array | None) -> tuple[Vector, Vector, Vector]:
    """Return count, mean and M2 of each feature, without NaN; raise if a value is infinite."""
    part = moments(x, mask=weight)
    # The sum of weights has the same bits beside any number of features.
    total = part.count if weight is None else weight.sum(dtype=np.float64)
    count, mean, m2 = np.full(x.shape[1], total), part.mean, part.m2
    doubtful = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
    if doubtful.size:
        # scikit-learn's check copies what is in Fortran's order.
        values = x.ravel(order="K")
        assert_all_finite(
            values, allow_nan=True, estimator_name=StandardScaler.__name__, input_name="X"
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


def _merged(old: Sequence[Any], new: Sequence[Any]) -> tuple[Vector, Vector, Vector]:
    """Merge count, mean and M2 as `Moments.merge` does, with a count for each feature."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = old, new
    count = n_a + n_b
    mean_a = np.where(n_a > 0, mean_a, mean_b)  # NaN without values
    mean_b = np.where(n_b > 0, mean_b, mean_a)
    delta = mean_b - mean_a
    with np.errstate(all="ignore"):
        share = n_b / count
        between = np.where(count > 0, delta * delta * (n_a * share), 0.0)
        m2 = np.where(n_a > 0, m2_a, 0.0) + m2_b + between
        return count, mean_a + delta * share, m2


# ---- Dask: what `distributed.dask_tables` does with a block

_RECORD = np.dtype([(name, np.float64) for name in ("rows", "count", "mean", "m2")])


def _dask_tables(X: Any) -> Any:
    """Return the module for Dask arrays and data frames if this is one, or None."""
    if "dask" not in sys.modules:
        return None
    from .distributed import dask_tables

    return dask_tables if dask_tables.is_table(X) else None


def _dense_block(x: Any) -> Array:
    """Return a block, which may be empty, as floats."""
    return check_array(
        x, dtype=FLOAT_DTYPES, ensure_all_finite=False, ensure_min_samples=0, ensure_min_features=0
    )


def _records_of_block(x: Any, weight: Any) -> Array:
    """Return the moments of a block, which may have no rows, or none of positive weight."""
    x = _dense_block(x)
    if np.ndim(weight) and np.shape(weight) != x.shape[:1]:
        raise ValueError(f"sample_weight has shape {np.shape(weight)} for {len(x)} rows of a block")
    records = np.zeros(x.shape[1], _RECORD)
    if x.size and (weight is None or np.any(weight)):
        if weight is not None:
            weight = _check_sample_weight(weight, x, dtype=x.dtype)
            if weight.min() < 0:
                raise ValueError(f"sample_weight has {weight.min()}; expected 0 or more")
        records["rows"] = len(x) if weight is None else weight.sum(dtype=np.float64)
        records["count"], records["mean"], records["m2"] = _features_of(x, weight)
    return records


def _merged_records(a: Array, b: Array) -> Array:
    both = np.empty_like(a)
    both["rows"] = a["rows"] + b["rows"]
    names = ("count", "mean", "m2")
    merged = _merged([a[name] for name in names], [b[name] for name in names])
    for name, values in zip(names, merged, strict=True):
        both[name] = values
    return both


def _block_of(
    x: Any, mean: Vector | None, scale: Vector | None, method: str, options: dict[str, bool]
) -> Array:
    x = _dense_block(x)
    if not x.size:
        return x
    scaler = StandardScaler(**options).set_output(transform="default")
    scaler.mean_, scaler.scale_, scaler.n_features_in_ = mean, scale, x.shape[1]
    return getattr(scaler, method)(x)
