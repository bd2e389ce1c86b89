"""bnfast.sklearn.StandardScaler beside exact numbers, and beside scikit-learn's own."""

import pickle
import tracemalloc

import numpy as np
import pytest
from cases import SANITIZED
from processes import run_python
from scaled import (
    FEATURES,
    FITTED,
    ROWS,
    assert_alike,
    assert_statistics,
    assert_transformed,
    exact,
    table,
    with_gaps,
)
from tolerance import assert_within, tiny, unit

import bnfast

pytest.importorskip("sklearn", minversion="1.6")

from sklearn import config_context, preprocessing
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from wide import wide

from bnfast.sklearn import StandardScaler

DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ORDER = pytest.mark.parametrize("order", ["C", "F"])


class TestStatistics:
    @DTYPE
    @ORDER
    def test_are_those_of_the_values(self, isa, rng, dtype, order):
        x = table(rng, dtype, order)
        scaler = StandardScaler().fit(x)
        assert_statistics(scaler, x)
        assert scaler.n_samples_seen_ == ROWS
        assert isinstance(scaler.n_samples_seen_, np.integer)

    @DTYPE
    def test_float32_at_a_mean_of_a_million_is_right_to_the_contract(self, rng, dtype):
        x = rng.normal(1e6, 1, (10_000, 3)).astype(dtype)
        mean, var = exact(x)
        scaler = StandardScaler().fit(x)
        np.testing.assert_allclose(scaler.var_, var.astype(np.float64), rtol=1e-12)
        np.testing.assert_allclose(scaler.mean_, mean.astype(np.float64), rtol=1e-15)

    @DTYPE
    @ORDER
    def test_missing_values_are_left_out_of_their_features(self, rng, dtype, order):
        x = with_gaps(rng, table(rng, dtype, order))
        scaler = StandardScaler().fit(x)
        assert_statistics(scaler, x)
        counts = (~np.isnan(x)).sum(axis=0)
        np.testing.assert_array_equal(scaler.n_samples_seen_, counts)
        assert scaler.n_samples_seen_.dtype == np.int64

    @DTYPE
    @ORDER
    @pytest.mark.parametrize("gaps", [False, True])
    def test_weights_count(self, rng, dtype, order, gaps):
        x = table(rng, dtype, order)
        x = with_gaps(rng, x) if gaps else x
        weight = rng.uniform(0, 3, ROWS).astype(dtype)
        weight[::5] = 0
        scaler = StandardScaler().fit(x, sample_weight=weight)
        assert_statistics(scaler, x, weight)
        counts = (weight[:, None].astype(np.float64) * ~np.isnan(x)).sum(axis=0)
        np.testing.assert_allclose(scaler.n_samples_seen_, counts, rtol=1e-14)
        assert np.ndim(scaler.n_samples_seen_) == gaps

    def test_whole_weights_are_repeated_rows(self, rng):
        x, weight = table(rng), rng.integers(0, 4, ROWS)
        weighted = StandardScaler().fit(x, sample_weight=weight)
        repeated = StandardScaler().fit(np.repeat(x, weight, axis=0))
        assert weighted.n_samples_seen_ == repeated.n_samples_seen_ == weight.sum()
        np.testing.assert_allclose(weighted.mean_, repeated.mean_, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(weighted.var_, repeated.var_, rtol=1e-12)

    def test_a_row_of_weight_0_takes_no_part(self, rng):
        x, weight = table(rng), np.ones(ROWS)
        without = StandardScaler().fit(x[3:], sample_weight=weight[3:])
        x[:2], x[2], weight[:3] = 1e300, np.nan, 0
        scaler = StandardScaler().fit(x, sample_weight=weight)
        assert scaler.n_samples_seen_ == without.n_samples_seen_ == ROWS - 3
        np.testing.assert_allclose(scaler.mean_, without.mean_, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(scaler.var_, without.var_, rtol=1e-12)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("gaps", [False, True])
    @pytest.mark.parametrize("splits", [[250], [1, 2, 499], list(range(1, ROWS))])
    def test_batches_merge_to_those_of_all_values(self, rng, gaps, weighted, splits):
        x = with_gaps(rng, table(rng)) if gaps else table(rng)
        weight = rng.uniform(0.5, 3, ROWS) if weighted else None
        scaler = StandardScaler()
        for rows in np.split(np.arange(ROWS), splits):
            scaler.partial_fit(x[rows], sample_weight=None if weight is None else weight[rows])
        assert_statistics(scaler, x, weight, batches=len(splits) + 1)
        whole = StandardScaler().fit(x, sample_weight=weight)
        np.testing.assert_allclose(scaler.n_samples_seen_, whole.n_samples_seen_, rtol=1e-13)
        assert np.asarray(scaler.n_samples_seen_).dtype.kind == ("f" if weighted else "i")

    def test_a_feature_may_begin_with_missing_values(self, rng):
        """scikit-learn's stays NaN."""
        x = table(rng)
        x[:100, 2] = np.nan
        scaler = StandardScaler().partial_fit(x[:100])
        assert np.isnan([scaler.mean_[2], scaler.var_[2], scaler.scale_[2]]).all()
        assert np.isfinite(np.delete(scaler.scale_, 2)).all()
        scaler.partial_fit(x[:50]).partial_fit(x[100:])
        x = np.concatenate([x[:50], x])
        assert_statistics(scaler, x, batches=3)
        np.testing.assert_array_equal(scaler.n_samples_seen_, (~np.isnan(x)).sum(axis=0))

    @DTYPE
    @pytest.mark.parametrize("value", [0, 0.1, -1e6, 1e30])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_a_constant_feature_is_not_scaled(self, dtype, value, weighted):
        x = np.full((1000, 3), value, dtype)
        weight = np.linspace(0, 1, 1000) if weighted else None
        scaler = StandardScaler().partial_fit(x, sample_weight=weight)
        scaler.partial_fit(x[:10])
        assert (scaler.mean_ == dtype(value)).all()
        assert (scaler.var_ == 0).all()
        assert (scaler.scale_ == 1).all()
        assert (scaler.transform(x) == 0).all()

    def test_a_nearly_constant_feature_is_one_where_scikit_learn_says_so(self):
        x = np.full((1000, 30), 1.0)
        x[::2] += 10.0 ** -np.arange(30)
        ours, theirs = (kind().fit(x) for kind in (StandardScaler, preprocessing.StandardScaler))
        np.testing.assert_array_equal(ours.scale_ == 1, theirs.scale_ == 1)
        assert 0 < (ours.scale_ == 1).sum() < 30

    @DTYPE
    def test_same_bits_for_any_number_of_threads(self, rng, dtype):
        x = with_gaps(rng, table(rng, dtype, rows=40_000))
        found = []
        for threads in (1, 2, 3):
            with bnfast.num_threads(threads):
                scaler = StandardScaler().fit(x)
                found.append((scaler.mean_, scaler.var_, scaler.transform(x)))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert a.tobytes() == b.tobytes()


class TestTransform:
    @DTYPE
    @ORDER
    def test_is_within_its_limits(self, isa, rng, dtype, order):
        x = table(rng, dtype, order)
        before = x.copy()
        scaler = StandardScaler().fit(x)
        y = scaler.transform(x)
        assert_transformed(y, x, scaler)
        assert not np.shares_memory(x, y)
        assert y.flags.f_contiguous == (order == "F")
        np.testing.assert_array_equal(x, before)
        np.testing.assert_array_equal(scaler.fit_transform(x), y)

    @pytest.mark.parametrize(("dtype", "contract"), [(np.float32, 1e-6), (np.float64, 1e-12)])
    def test_is_the_exact_one_or_nearer_to_it_than_scikit_learns(self, rng, dtype, contract):
        x = table(rng, dtype, rows=5000)
        mean, var = exact(x)
        right = (wide(x) - mean) / np.sqrt(var)
        errors = [
            np.abs(kind().fit_transform(x) - right).max(axis=0)
            for kind in (StandardScaler, preprocessing.StandardScaler)
        ]
        limit = contract * np.abs(right).max(axis=0)
        assert (errors[0] <= np.maximum(limit, errors[1])).all()
        if dtype == np.float32:  # at every mean, which scikit-learn 1.8 rounds to float32
            assert (errors[0] <= limit).all()

    @DTYPE
    @ORDER
    @pytest.mark.parametrize("with_mean", [False, True])
    @pytest.mark.parametrize("with_std", [False, True])
    def test_options_are_scikit_learns(self, rng, dtype, order, with_mean, with_std):
        x = np.array(rng.normal(3, 2, (ROWS, FEATURES)), dtype, order=order)
        ours = StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
        theirs = preprocessing.StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
        assert_alike(ours, theirs)
        u = unit(dtype)
        for method in ("transform", "inverse_transform"):
            a, b = getattr(ours, method)(x), getattr(theirs, method)(x)
            # Both within some roundings of the exact value, a sum of terms below 20.
            np.testing.assert_allclose(a, b, rtol=0, atol=10 * 20 * u)
            assert a.dtype == b.dtype
            assert a.flags.f_contiguous == b.flags.f_contiguous

    @DTYPE
    @ORDER
    def test_there_and_back(self, rng, dtype, order):
        x = table(rng, dtype, order)
        scaler = StandardScaler().fit(x)
        y = scaler.transform(x)
        back = scaler.inverse_transform(y)
        assert not np.shares_memory(y, back)
        assert back.dtype == dtype
        # Five roundings of y, which are scaled; three of terms and sum on the way back.
        size = np.abs(x) + np.abs(scaler.mean_) + np.abs(y) * scaler.scale_
        assert_within(back, wide(x), 8 * unit(dtype) * size, "inverse_transform")

    @DTYPE
    def test_missing_values_stay(self, rng, dtype):
        x = with_gaps(rng, table(rng, dtype))
        x[:, 6] = np.nan
        scaler = StandardScaler().fit(x[:, :6])
        assert_transformed(scaler.transform(x[:, :6]), x[:, :6], scaler)
        y = StandardScaler().fit_transform(x)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))

    @DTYPE
    @ORDER
    @pytest.mark.parametrize("own", [False, True])
    def test_in_place(self, rng, dtype, order, own):
        x = table(rng, dtype, order)
        scaler = StandardScaler(copy=not own).fit(x)
        given = {} if own else {"copy": False}
        want = scaler.transform(x, copy=True)
        y = scaler.transform(x, **given)
        assert y is x
        np.testing.assert_array_equal(y, want)
        want = scaler.inverse_transform(y, copy=True)
        assert scaler.inverse_transform(y, **given) is y
        np.testing.assert_array_equal(y, want)

    def test_in_place_in_a_part_of_an_array(self, rng):
        whole = table(rng)
        before = whole.copy()
        part = whole[::2, 1:5]
        scaler = StandardScaler().fit(part)
        want = scaler.transform(part)
        scaler.transform(part, copy=False)
        np.testing.assert_array_equal(whole[::2, 1:5], want)
        before[::2, 1:5] = want
        np.testing.assert_array_equal(whole, before)

    @ORDER
    def test_read_only_data_are_copied(self, rng, order):
        x = table(rng, order=order)
        x.flags.writeable = False
        before = x.copy()
        scaler = StandardScaler(copy=False).fit(x)
        y = scaler.transform(x)
        back = scaler.inverse_transform(x)
        assert y.flags.writeable
        assert back.flags.writeable
        np.testing.assert_array_equal(x, before)
        assert_transformed(y, x, scaler)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.longdouble, ">f4", ">f8"])
    def test_other_numbers_are_converted_as_by_scikit_learn(self, rng, dtype):
        x = rng.integers(0, 50, (ROWS, 3)).astype(dtype)
        ours, theirs = (kind().fit(x) for kind in (StandardScaler, preprocessing.StandardScaler))
        assert_alike(ours, theirs)
        a, b = ours.transform(x), theirs.transform(x)
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)

    def test_halves_are_rounded_once(self, rng):
        x = rng.normal(100, 1, (ROWS, 3)).astype(np.float16)
        scaler = StandardScaler().fit(x)
        y = scaler.transform(x)
        right = (wide(x) - scaler.mean_) / scaler.scale_
        assert y.dtype == np.float16
        bound = (unit(np.float16) + 6 * unit(np.float32)) * np.abs(right) + tiny(np.float16)
        assert_within(y, right, bound, "float16")

    def test_a_factor_beyond_float32_is_left_to_scikit_learn(self, rng):
        x = (rng.normal(0, 1, (ROWS, 3)) * 1e-40).astype(np.float32)
        ours, theirs = (
            kind().fit_transform(x) for kind in (StandardScaler, preprocessing.StandardScaler)
        )
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)

    def test_the_way_back_of_one_feature_may_be_broadcast(self, rng):
        x = table(rng)
        ours, theirs = StandardScaler().fit(x[:, :1]), preprocessing.StandardScaler()
        vars(theirs).update(vars(ours))
        np.testing.assert_array_equal(ours.inverse_transform(x), theirs.inverse_transform(x))


ARRAY_API = """
import numpy as np
from sklearn import config_context, preprocessing

from bnfast import _core
from bnfast.sklearn import StandardScaler

x = np.random.default_rng(0).normal(1e3, 1, (50, 3))
with config_context(array_api_dispatch=True):
    ours, theirs = (k().fit(x) for k in (StandardScaler, preprocessing.StandardScaler))
    for method in ("transform", "inverse_transform"):
        np.testing.assert_array_equal(getattr(ours, method)(x), getattr(theirs, method)(x))
assert not _core.dispatches()
print("same")
"""


class TestPath:
    """Which code ran."""

    @DTYPE
    @ORDER
    def test_dense_floats_run_on_our_kernels(self, rng, dispatches, dtype, order):
        x = table(rng, dtype, order)
        layout = "interleaved" if order == "C" else "planar"
        name = np.dtype(dtype).name
        dispatches()
        scaler = StandardScaler().fit(x)
        assert [key[:3] for key in dispatches()] == [("moments", name, layout)]
        for method in (scaler.transform, scaler.inverse_transform):
            method(x)
            assert [key[:3] for key in dispatches()] == [("inference", name, layout)]

    @pytest.mark.parametrize("kind", ["csr_array", "csc_array"])
    def test_sparse_data_run_scikit_learns_code(self, rng, dispatches, kind):
        sparse = pytest.importorskip("scipy.sparse")
        x = getattr(sparse, kind)(rng.integers(0, 2, (ROWS, 5)) * rng.random((ROWS, 5)))
        dispatches()
        ours = StandardScaler(with_mean=False).partial_fit(x).partial_fit(x)
        theirs = preprocessing.StandardScaler(with_mean=False).partial_fit(x).partial_fit(x)
        for name in FITTED:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        y = ours.transform(x)
        assert sparse.issparse(y)
        np.testing.assert_array_equal(y.toarray(), theirs.transform(x).toarray())
        np.testing.assert_allclose(ours.inverse_transform(y).toarray(), x.toarray(), rtol=1e-15)
        assert not dispatches()

    def test_sparse_and_dense_batches_may_alternate(self, rng):
        sparse = pytest.importorskip("scipy.sparse")
        x = rng.integers(0, 2, (ROWS, FEATURES)) * rng.random((ROWS, FEATURES))
        scaler = StandardScaler(with_mean=False)
        for rows, make in ((slice(100), np.asarray), (slice(100, 300), sparse.csr_array),
                           (slice(300, None), np.asarray)):  # fmt: skip
            scaler.partial_fit(make(x[rows]))
        assert_statistics(scaler, x, batches=3)
        assert scaler.n_samples_seen_ == ROWS

    def test_array_api_runs_scikit_learns_code(self):
        """Dispatch is decided before SciPy is imported, hence in a process of its own."""
        done = run_python(ARRAY_API, SCIPY_ARRAY_API="1")
        if "ImportError" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        assert (done.stdout, done.stderr) == ("same\n", "")

    @pytest.mark.skipif(SANITIZED, reason="keeps freed memory")
    @ORDER
    def test_no_copy_of_the_data_is_made(self, rng, order):
        x = table(rng, np.float32, order, rows=100_000)
        scaler = StandardScaler().fit(x)
        for call, most in (
            (lambda: scaler.fit(x), 0.1),
            (lambda: scaler.transform(x, copy=False), 0.1),
            (lambda: scaler.transform(x), 1.1),
        ):
            tracemalloc.start()
            call()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < most * x.nbytes


class TestRefusals:
    @DTYPE
    @ORDER
    @pytest.mark.parametrize("weighted", [False, True])
    def test_infinities_are_refused_and_change_nothing(self, rng, dtype, order, weighted):
        x = table(rng, dtype, order)
        bad = x.copy(order="K")
        bad[10, 3], bad[11, 3], bad[12, 4] = np.inf, np.nan, -np.inf
        weight = np.ones(ROWS) if weighted else None
        if weighted:
            weight[10:13] = 0
        message = r"Input (X )?contains infinity or a value too large for dtype\('float"
        scaler = StandardScaler()
        with pytest.raises(ValueError, match=message):
            scaler.fit(bad, sample_weight=weight)
        with pytest.raises(NotFittedError):
            scaler.transform(x)
        scaler.fit(x)
        before = pickle.dumps(scaler)
        for method in (scaler.partial_fit, scaler.transform, scaler.inverse_transform):
            with pytest.raises(ValueError, match=message):
                method(bad)
        assert pickle.dumps(scaler) == before

    def test_infinities_leave_data_in_place_alone(self, rng):
        x = table(rng)
        scaler = StandardScaler(copy=False).fit(x)
        x[-1, -1] = np.inf
        before = x.copy()
        with pytest.raises(ValueError, match="infinity"):
            scaler.transform(x)
        np.testing.assert_array_equal(x, before)

    def test_what_scikit_learn_says(self, rng):
        """The same exception, to the letter, from both."""
        x = table(rng)
        strings = np.array([["a", "b"], ["c", "d"]])

        def cases(kind):
            fitted = kind().fit(x)
            yield lambda: kind().transform(x)
            yield lambda: kind().inverse_transform(x)
            methods = [kind().fit, kind().partial_fit, fitted.transform, fitted.inverse_transform]
            for method in methods:
                yield lambda m=method: m(x[:, 0])
                yield lambda m=method: m(x[:0])
                yield lambda m=method: m(x[:, :0])
                yield lambda m=method: m(x[None])
                yield lambda m=method: m(x.astype(complex))
                yield lambda m=method: m(strings)
            yield lambda: fitted.transform(x[:, :3])
            yield lambda: fitted.partial_fit(x[:, :3])
            yield lambda: fitted.inverse_transform(x[:, :3])
            yield lambda: kind().fit(x, sample_weight=np.ones(3))
            yield lambda: kind().fit(x, sample_weight=np.ones((ROWS, 1)))
            yield lambda: kind().fit(x, sample_weight=np.full(ROWS, np.nan))
            yield lambda: kind(with_std="no").fit(x)
            yield lambda: kind(copy=3).partial_fit(x)

        ours, theirs = list(cases(StandardScaler)), list(cases(preprocessing.StandardScaler))
        assert len(ours) == len(theirs) > 30
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            with pytest.raises(Exception) as wanted:  # noqa: PT011  # whichever it is
                b()
            with pytest.raises(type(wanted.value)) as got:
                a()
            assert str(got.value) == str(wanted.value), number

    def test_negative_weights_are_scikit_learns(self, rng):
        x, weight = table(rng), rng.uniform(1, 2, ROWS)
        weight[3] = -0.5
        ours = StandardScaler().fit(x, sample_weight=weight)
        theirs = preprocessing.StandardScaler().fit(x, sample_weight=weight)
        for name in FITTED:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))

    def test_a_batch_of_other_features_changes_nothing(self, rng):
        x = table(rng)
        scaler = StandardScaler().fit(x)
        before = pickle.dumps(scaler)
        with pytest.raises(ValueError, match="X has 3 features, but StandardScaler is expecting 7"):
            scaler.partial_fit(x[:, :3])
        assert pickle.dumps(scaler) == before


class TestEcosystem:
    @pytest.mark.parametrize("gaps", [False, True])
    def test_each_class_continues_from_the_others_state(self, rng, gaps):
        x = with_gaps(rng, table(rng)) if gaps else table(rng)
        kinds = (StandardScaler, preprocessing.StandardScaler)
        for first, second in (kinds, kinds[::-1]):
            state = vars(pickle.loads(pickle.dumps(first().fit(x[:200]))))
            scaler = second()
            vars(scaler).update(state)
            scaler.partial_fit(x[200:])
            counts = (~np.isnan(x)).sum(axis=0) if gaps else ROWS
            np.testing.assert_array_equal(scaler.n_samples_seen_, counts)
            np.testing.assert_allclose(scaler.var_, exact(x)[1].astype(float), rtol=1e-9)

    def test_pickled_and_loaded(self, rng):
        x = table(rng)
        scaler = StandardScaler(with_mean=False).fit(x)
        loaded = pickle.loads(pickle.dumps(scaler))
        assert type(loaded) is StandardScaler
        np.testing.assert_array_equal(loaded.transform(x), scaler.transform(x))

    def test_attributes_may_be_set(self, rng):
        x = table(rng)
        scaler = StandardScaler().fit(x)
        scaler.mean_, scaler.scale_ = np.zeros(FEATURES), np.full(FEATURES, 2.0)
        np.testing.assert_array_equal(scaler.transform(x), x / 2)
        scaler.mean_, scaler.var_, scaler.n_samples_seen_ = np.zeros(FEATURES), np.ones(FEATURES), 3
        scaler.partial_fit(np.zeros((1, FEATURES)))
        assert (scaler.n_samples_seen_, *scaler.var_[:2]) == (4, 0.75, 0.75)

    def test_clone_and_parameters(self):
        scaler = StandardScaler(with_std=False)
        copy = clone(scaler)
        assert type(copy) is StandardScaler
        assert copy.get_params() == {"copy": True, "with_mean": True, "with_std": False}
        assert repr(copy) == "StandardScaler(with_std=False)"

    def test_pipeline(self, rng):
        x = table(rng)
        y = x[:, 1] > 1
        ours, theirs = (
            make_pipeline(kind(), KNeighborsClassifier()).fit(x, y)
            for kind in (StandardScaler, preprocessing.StandardScaler)
        )
        np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))

    def test_metadata_routing(self, rng):
        x, weight = table(rng), rng.uniform(0, 1, ROWS)
        y = x[:, 1] > 1
        with config_context(enable_metadata_routing=True):
            scaler = StandardScaler().set_fit_request(sample_weight=True)
            model = make_pipeline(scaler, KNeighborsClassifier())
            model.fit(x, y, sample_weight=weight)
        assert_statistics(model[0], x, weight)

    def test_data_frames(self, rng, dispatches):
        pd = pytest.importorskip("pandas")
        x = with_gaps(rng, table(rng))
        frame = pd.DataFrame(x, columns=list("abcdefg"))
        dispatches()
        scaler = StandardScaler().set_output(transform="pandas").fit(frame)
        y = scaler.transform(frame)
        assert {key[0] for key in dispatches()} == {"moments", "inference"}
        assert list(scaler.feature_names_in_) == list(y.columns) == list("abcdefg")
        assert list(y.index) == list(frame.index)
        assert_transformed(y.to_numpy(), x, scaler)
        np.testing.assert_array_equal(frame.to_numpy(), x)
        assert list(scaler.get_feature_names_out()) == list("abcdefg")
        with pytest.raises(ValueError, match="feature names should match"):
            scaler.transform(frame[list("gfedcba")])
        with pytest.raises(ValueError, match="feature names should match"):
            scaler.partial_fit(frame[list("gfedcba")])

    def test_data_frames_of_mixed_numbers(self, rng):
        pd = pytest.importorskip("pandas")
        frame = pd.DataFrame(
            {
                "whole": rng.integers(0, 9, ROWS),
                "single": rng.random(ROWS, np.float32),
                "missing": pd.array([None, *range(ROWS - 1)], dtype="Int64"),
            }
        )
        ours, theirs = (
            kind().set_output(transform="pandas").fit(frame)
            for kind in (StandardScaler, preprocessing.StandardScaler)
        )
        assert_alike(ours, theirs)
        np.testing.assert_allclose(
            ours.transform(frame), theirs.transform(frame), rtol=0, atol=1e-13
        )

    def test_sparse_data_frames(self, rng, dispatches):
        pd = pytest.importorskip("pandas")
        dense = rng.integers(0, 2, (ROWS, 3)) * 1.5
        frame = pd.DataFrame(dense).astype(pd.SparseDtype(float, 0))
        dispatches()
        ours = StandardScaler(with_mean=False).fit(frame)
        theirs = preprocessing.StandardScaler(with_mean=False).fit(frame)
        np.testing.assert_array_equal(ours.var_, theirs.var_)
        np.testing.assert_array_equal(
            ours.transform(frame).toarray(), theirs.transform(frame).toarray()
        )
        assert not dispatches()

    def test_a_memory_map(self, rng, tmp_path):
        x = table(rng, np.float32)
        np.save(tmp_path / "x.npy", x)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        scaler = StandardScaler().fit(mapped)
        assert_statistics(scaler, x)
        np.testing.assert_array_equal(scaler.transform(mapped), scaler.transform(x))
