"""bnfast.sklearn.StandardScaler over Dask arrays and data frames, beside itself on NumPy arrays."""

import importlib
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import SANITIZED
from clusters import array_of, assert_some_were_read_twice, kill_a_worker
from scaled import (
    FEATURES,
    FITTED,
    ROWS,
    assert_alike,
    assert_statistics,
    assert_transformed,
    table,
    with_gaps,
)

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
pytest.importorskip("sklearn", minversion="1.6")

from sklearn import config_context, preprocessing  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402

from bnfast.sklearn import StandardScaler  # noqa: E402

CHUNKS = {
    "rows": (37, FEATURES),
    "features too": (37, 3),
    "one block": (ROWS, FEATURES),
    "empty blocks": ((200, 0, 299, 1), (0, FEATURES)),
}
CHUNKED = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64])
METHOD = pytest.mark.parametrize("method", ["transform", "inverse_transform"])


@pytest.fixture(autouse=True)
def _one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def assert_same_kind(ours, dense):
    """The same attributes as those from the same values in an array, of the same types.

    Two variances at a mean of a million deviations may differ by a rounding of that mean.
    """
    assert_alike(ours, dense, rtol=1e-10)
    for name in FITTED:
        a, b = getattr(ours, name), getattr(dense, name)
        assert type(a) is type(b), name
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), name


def bits(scaler):
    return [np.asarray(getattr(scaler, name)).tobytes() for name in FITTED]


@DTYPE
@CHUNKED
class TestFit:
    @pytest.mark.parametrize("gaps", [False, True])
    def test_statistics_are_those_of_the_values(self, rng, dtype, chunks, gaps):
        x = with_gaps(rng, table(rng, dtype)) if gaps else table(rng, dtype)
        scaler = StandardScaler().fit(da.from_array(x, chunks))
        assert_statistics(scaler, x)
        np.testing.assert_array_equal(scaler.n_samples_seen_, (~np.isnan(x)).sum(axis=0))
        assert_same_kind(scaler, StandardScaler().fit(x))

    @pytest.mark.parametrize("gaps", [False, True])
    @pytest.mark.parametrize("given", ["NumPy", "other chunks"])
    def test_weights_count(self, rng, dtype, chunks, gaps, given):
        x = with_gaps(rng, table(rng, dtype)) if gaps else table(rng, dtype)
        weight = rng.uniform(0, 3, ROWS).astype(dtype)
        weight[::5] = 0
        weight[37:80] = 0  # a whole block
        weights = weight if given == "NumPy" else da.from_array(weight, 90)
        scaler = StandardScaler().fit(da.from_array(x, chunks), sample_weight=weights)
        assert_statistics(scaler, x, weight)
        assert_same_kind(scaler, StandardScaler().fit(x, sample_weight=weight))

    def test_batches_merge_with_those_of_arrays(self, rng, dtype, chunks):
        x = with_gaps(rng, table(rng, dtype))
        scaler = StandardScaler().partial_fit(da.from_array(x, chunks)).partial_fit(x[:100])
        scaler.partial_fit(da.from_array(x[::-1], chunks))
        assert_statistics(scaler, np.concatenate([x, x[:100], x]), batches=3)

    def test_same_bits_under_any_scheduler(self, rng, dtype, chunks):
        x = da.from_array(with_gaps(rng, table(rng, dtype)), chunks)
        weight = rng.uniform(0, 1, ROWS)
        one_by_one = bits(StandardScaler().fit(x, sample_weight=weight))
        for workers in (1, 2, 5):
            with dask.config.set(scheduler="threads", num_workers=workers):
                assert bits(StandardScaler().fit(x, sample_weight=weight)) == one_by_one

    @METHOD
    def test_a_result_is_lazy_and_has_the_bits_of_an_arrays(self, rng, dtype, chunks, method):
        x = with_gaps(rng, table(rng, dtype))
        scaler = StandardScaler(copy=False).fit(x)
        lazy = da.from_array(x, chunks)
        before = x.copy()
        y = getattr(scaler, method)(lazy)
        assert isinstance(y, da.Array)
        assert (y.chunks, y.dtype) == (lazy.chunks, dtype)
        got = y.compute()
        np.testing.assert_array_equal(x, before)
        np.testing.assert_array_equal(got, getattr(scaler, method)(x, copy=True))
        assert got.dtype == dtype


class TestFitsOf:
    """What needs one chunking only."""

    @pytest.mark.parametrize("with_mean", [False, True])
    @pytest.mark.parametrize("with_std", [False, True])
    def test_options(self, rng, with_mean, with_std):
        x = rng.normal(3, 2, (ROWS, FEATURES))
        x[::9, 2] = np.nan
        options = {"with_mean": with_mean, "with_std": with_std}
        lazy = da.from_array(x, (37, 3))
        ours = StandardScaler(**options).partial_fit(lazy).partial_fit(lazy)
        dense = StandardScaler(**options).partial_fit(x).partial_fit(x)
        theirs = preprocessing.StandardScaler(**options).partial_fit(x).partial_fit(x)
        assert_alike(ours, dense)
        assert_alike(ours, theirs)
        for method in ("transform", "inverse_transform"):
            np.testing.assert_allclose(
                getattr(ours, method)(lazy).compute(), getattr(theirs, method)(x), atol=1e-13
            )

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.longdouble, ">f4", np.float16])
    def test_other_numbers(self, rng, dtype):
        x = rng.integers(0, 50, (ROWS, 3)).astype(dtype)
        lazy = da.from_array(x, (37, 2))
        ours, dense = StandardScaler().fit(lazy), StandardScaler().fit(x)
        assert_same_kind(ours, dense)
        y, want = ours.transform(lazy), dense.transform(x)
        assert y.dtype == y.compute().dtype == want.dtype
        np.testing.assert_allclose(y.compute(), want, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_rows_of_unknown_number(self, rng, weighted):
        """As a filter leaves them; some blocks are empty."""
        x, weight = table(rng), rng.uniform(0, 3, ROWS)
        x[:100, 0] = -9
        kept = x[:, 0] > 0.5
        lazy, weights = da.from_array(x, (37, 3)), da.from_array(weight, 37)
        chosen = lazy[lazy[:, 0] > 0.5]
        assert np.isnan(chosen.shape[0])
        given = (weights[lazy[:, 0] > 0.5], weight[kept]) if weighted else (None, None)
        scaler = StandardScaler().fit(chosen, sample_weight=given[0])
        assert_statistics(scaler, x[kept], given[1])
        assert_same_kind(scaler, StandardScaler().fit(x[kept], sample_weight=given[1]))
        y = scaler.transform(chosen)
        assert np.isnan(y.shape[0])
        assert_transformed(y.compute(), x[kept], scaler)

    def test_a_feature_of_missing_values(self, rng):
        x = table(rng)
        x[100:400, 2] = np.nan  # several blocks in a row, between others
        x[:400, 3] = np.nan
        x[:, 4] = np.nan
        lazy = da.from_array(x, (37, 3))
        scaler = StandardScaler().fit(lazy)
        assert_same_kind(scaler, StandardScaler().fit(x))
        rest = np.delete(np.arange(FEATURES), 4)
        assert_statistics(StandardScaler().fit(lazy[:, rest]), x[:, rest])
        assert np.isnan([scaler.mean_[4], scaler.var_[4], scaler.scale_[4]]).all()

    @pytest.mark.parametrize("value", [0, 0.1, -1e6, 1e30])
    def test_a_constant_feature_is_not_scaled(self, value):
        lazy = da.full((1000, 3), value, chunks=(37, 2))
        scaler = StandardScaler().fit(lazy)
        assert (scaler.mean_ == value).all()
        assert (scaler.var_ == 0).all()
        assert (scaler.transform(lazy).compute() == 0).all()

    @pytest.mark.parametrize("weight", [2, [2.0] * ROWS])
    def test_the_same_weight_for_all(self, rng, weight):
        x = table(rng)
        scaler = StandardScaler().fit(da.from_array(x, (37, 3)), sample_weight=weight)
        assert_same_kind(scaler, StandardScaler().fit(x, sample_weight=weight))
        assert scaler.n_samples_seen_ == 2 * ROWS

    def test_fit_again_forgets(self, rng):
        x = da.from_array(table(rng), (37, 3))
        assert bits(StandardScaler().fit(x[:50] + 9).fit(x)) == bits(StandardScaler().fit(x))

    def test_in_a_pipeline(self, rng):
        x = table(rng)
        ours, theirs = (
            make_pipeline(kind(), kind(with_std=False))
            for kind in (StandardScaler, preprocessing.StandardScaler)
        )
        y = ours.fit_transform(da.from_array(x, (37, 3)))
        assert isinstance(y, da.Array)
        np.testing.assert_allclose(y.compute(), theirs.fit_transform(x), atol=1e-9)

    def test_under_array_api_dispatch(self, rng):
        x = table(rng)
        want = bits(StandardScaler().fit(da.from_array(x, 37)))
        try:
            with config_context(array_api_dispatch=True):
                got = bits(StandardScaler().fit(da.from_array(x, 37)))
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"dispatch is not there: {error}")
        assert got == want


class TestMemory:
    def lazy(self, read):
        def block(block_id=None):
            read.append(block_id)
            return np.random.default_rng(block_id[0]).normal(0, 1, (10_000, 10))

        return da.map_blocks(
            block, chunks=((10_000,) * 30, (10,)), dtype=float, meta=np.empty((0, 0))
        )

    @pytest.mark.skipif(SANITIZED, reason="keeps freed memory")
    def test_blocks_are_read_once_and_freed(self):
        read = []
        x = self.lazy(read)
        StandardScaler().fit(x[:10_000])
        read.clear()
        tracemalloc.start()
        scaler = StandardScaler().fit(x)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sorted(read) == [(i, 0) for i in range(30)]
        assert peak < 2.5 * 800_000, "of 30 blocks"
        read.clear()
        y = scaler.transform(x)
        assert not read
        assert abs(y[:10_000].compute().std() - 1) < 0.02
        assert read == [(0, 0)]


class TestDataFrames:
    @pytest.fixture
    def dd(self):
        try:
            return importlib.import_module("dask.dataframe")
        except ImportError as error:  # also of a Dask without them, which says what they need
            pytest.skip(str(error))

    @pytest.fixture
    def frame(self, rng):
        pd = pytest.importorskip("pandas")
        return pd.DataFrame(
            {
                "whole": rng.integers(0, 9, ROWS),
                "single": rng.random(ROWS, np.float32),
                "missing": pd.array([None, *range(ROWS - 1)], dtype="Int64"),
            },
            index=np.arange(ROWS) * 3,
        )

    def test_give_data_frames(self, dd, frame):
        lazy = dd.from_pandas(frame, npartitions=4)
        scaler, dense = StandardScaler().fit(lazy), StandardScaler().fit(frame)
        assert_same_kind(scaler, dense)
        assert list(scaler.feature_names_in_) == list(frame.columns)
        y = scaler.transform(lazy)
        assert isinstance(y, dd.DataFrame)
        assert (y.dtypes == np.float64).all()
        got = y.compute()
        assert list(got.index) == list(frame.index)
        assert list(got.columns) == list(frame.columns)
        np.testing.assert_allclose(got, dense.transform(frame), atol=1e-13)
        back = scaler.inverse_transform(y).compute()
        np.testing.assert_allclose(back, frame.astype(float), atol=1e-12)

    def test_weights_are_a_column(self, dd, frame):
        lazy = dd.from_pandas(frame, npartitions=4)
        scaler = StandardScaler().fit(lazy, sample_weight=lazy["whole"])
        assert_same_kind(scaler, StandardScaler().fit(frame, sample_weight=frame["whole"]))

    def test_names_are_those_of_the_fit(self, dd, frame):
        scaler = StandardScaler().fit(dd.from_pandas(frame, npartitions=4))
        other = dd.from_pandas(frame[["missing", "single", "whole"]], npartitions=4)
        for method in (scaler.transform, scaler.partial_fit):
            with pytest.raises(ValueError, match="feature names should match"):
                method(other)

    def test_words_are_refused(self, dd, frame):
        lazy = dd.from_pandas(frame.assign(word="no"), npartitions=4)
        with pytest.raises(ValueError, match="could not convert string to float"):
            StandardScaler().fit(lazy)


class TestRefusals:
    @pytest.fixture
    def x(self, rng):
        return da.from_array(table(rng), (37, 3))

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda x: x[:, 0], r"X has shape \(500,\); expected two dimensions"),
            (lambda x: x[None], "expected two dimensions"),
            (lambda x: x[:0], "0 sample"),
            (lambda x: x[:, :0], "0 feature"),
            (lambda x: x[x[:, 0] > 1e9], "X has 0 samples"),
            (lambda x: x[:, x[0] > 0], "unknown number of features"),
            (lambda x: x.astype(complex), "Complex data not supported"),
            (lambda x: da.where(x > 3, np.inf, x), r"X contains infinity .* dtype\('float64'\)"),
        ],
    )
    def test_of_arrays_change_nothing(self, x, make, words):
        fitted = StandardScaler().fit(x)
        before = bits(fitted)
        for scaler in (fitted, StandardScaler()):
            with pytest.raises(ValueError, match=words):
                scaler.partial_fit(make(x))
        assert bits(fitted) == before
        with pytest.raises(NotFittedError):
            scaler.transform(x)

    def test_infinities_when_transformed(self, x):
        scaler = StandardScaler().fit(x)
        y = scaler.transform(da.where(x > 3, np.inf, x))
        with pytest.raises(ValueError, match="contains infinity"):
            y.compute()

    @pytest.mark.parametrize(
        ("weight", "words"),
        [
            (np.ones(3), r"sample_weight has shape \(3,\); expected \(500,\)"),
            (da.ones(3), r"sample_weight has shape \(3,\); expected \(500,\)"),
            (np.ones((ROWS, 1)), r"sample_weight has shape \(500, 1\)"),
            (np.full(ROWS, np.nan), "sample_weight contains NaN"),
            (np.r_[np.ones(ROWS - 1), -0.5], "sample_weight has -0.5; expected 0 or more"),
            (np.zeros(ROWS), "0 samples of positive weight"),
        ],
    )
    def test_of_weights(self, x, weight, words):
        with pytest.raises(ValueError, match=words):
            StandardScaler().fit(x, sample_weight=weight)

    def test_weights_for_rows_of_unknown_number(self, x):
        chosen = x[x[:, 0] > 0]
        with pytest.raises(ValueError, match=r"sample_weight has 1 blocks for 14 of X"):
            StandardScaler().fit(chosen, sample_weight=np.ones(250))
        with pytest.raises(ValueError, match=r"sample_weight has shape \(37,\) for \d+ rows"):
            StandardScaler().fit(chosen, sample_weight=da.ones(ROWS, chunks=37))

    def test_blocks_that_are_not_what_the_array_says(self, x):
        halves = x[x[:, 0] > 0][:, :3], x[x[:, 1] > 2][:, 3:]
        both = da.concatenate(halves, axis=1, allow_unknown_chunksizes=True)
        with pytest.raises(ValueError, match=r"blocks of X have \d+ to \d+ rows in different"):
            StandardScaler().fit(both)
        wrong = da.map_blocks(lambda b: b[:, :2], x.rechunk((37, FEATURES)), dtype=float)
        with pytest.raises(ValueError, match="blocks of X have 2 features; expected the 7"):
            StandardScaler().fit(wrong)

    @METHOD
    def test_of_other_features(self, x, method):
        scaler = StandardScaler().fit(x)
        with pytest.raises(ValueError, match=r"X has 3 features|could not be broadcast"):
            getattr(scaler, method)(x[:, :3])
        with pytest.raises(NotFittedError):
            getattr(StandardScaler(), method)(x)

    def test_data_frames_in_memory_as_output(self, x):
        scaler = StandardScaler().set_output(transform="pandas").fit(x)
        with pytest.raises(ValueError, match=r"set to 'pandas', which is in memory"):
            scaler.transform(x)
        assert isinstance(scaler.inverse_transform(x), da.Array)

    def test_of_callbacks(self, x):
        scaler = StandardScaler()
        scaler._skl_callbacks = ["one"]
        with pytest.raises(ValueError, match="callbacks are set, which a Dask table does not call"):
            scaler.fit(x)


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("default")  # from the cluster's start and end
def test_a_worker_killed_during_fit_changes_no_bit(client, tmp_path):
    with ThreadPoolExecutor(1) as pool, dask.config.set(scheduler=client):
        fit = pool.submit(StandardScaler().fit, array_of(0.1, str(tmp_path)))
        kill_a_worker(tmp_path)
        scaler = fit.result(timeout=120)
        assert_some_were_read_twice(tmp_path)
        y = scaler.transform(array_of()).compute()
    with dask.config.set(scheduler="synchronous"):
        x = array_of().compute()
        assert bits(scaler) == bits(StandardScaler().fit(array_of()))
    assert_statistics(scaler, x)
    np.testing.assert_array_equal(y, scaler.transform(x))
