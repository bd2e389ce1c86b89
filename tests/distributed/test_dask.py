"""Moments and normalisation over Dask arrays, on threads and on a cluster of processes."""

import os

import numpy as np
import pytest
import reference
from cases import bits
from clusters import array_of, assert_some_were_read_twice, kill_a_worker
from tolerance import assert_within, moments_of

import bnfast

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

from bnfast.distributed import dask_moments, dask_normalize  # noqa: E402
from bnfast.distributed.dask_arrays import _merge_to_records  # noqa: E402

SHAPE, AXIS = (60, 6, 14), 1
CHUNKS = {
    "rows": (7, 6, 14),
    "channels too": (7, 4, 14),
    "every axis": (13, 5, 3),
    "one block": SHAPE,
    "empty blocks": ((20, 0, 39, 1), 6, (0, 14)),
}
CHUNKED = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)


@pytest.fixture
def values(rng):
    x = rng.standard_normal(SHAPE) * 2 + 3
    x[:, 1] += 1000
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@CHUNKED
class TestMoments:
    def test_are_those_of_the_whole(self, values, chunks, dtype):
        values = values.astype(dtype)
        s = moments_of(values, AXIS)
        got = dask_moments(da.from_array(values, chunks)).compute()
        assert isinstance(got, bnfast.Moments)
        assert got.count == values.size // SHAPE[AXIS]
        assert_within(got.mean, s.mean, s.mean_error, "mean")
        assert_within(got.var(), s.var, s.var_error, "variance")

    def test_have_the_same_bits_under_any_scheduler(self, values, chunks, dtype):
        x = da.from_array(values.astype(dtype), chunks)
        one_by_one = dask_moments(x).compute(scheduler="synchronous")
        for workers in (1, 2, 5):
            found = dask_moments(x).compute(scheduler="threads", num_workers=workers)
            assert found == one_by_one


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_moments_on_any_axis(values, axis):
    s = moments_of(values, axis)
    got = dask_moments(da.from_array(values, (13, 5, 3)), axis).compute()
    assert_within(got.mean, s.mean, s.mean_error, "mean")
    assert_within(got.var(), s.var, s.var_error, "variance")


def test_moments_of_unknown_number_of_rows(values):
    """As from a data frame or a filter."""
    x = da.from_array(values[:, :, 0], (7, 6))
    kept = x[x[:, 0] > 3]
    assert np.isnan(kept.shape[0])
    chosen = values[:, :, 0][values[:, 0, 0] > 3]
    s = moments_of(chosen, 1)
    got = dask_moments(kept).compute()
    assert got.count == len(chosen)
    assert_within(got.mean, s.mean, s.mean_error, "mean")


def test_moments_of_no_channels():
    assert dask_moments(da.zeros((4, 0))).compute() == bnfast.Moments.empty(0)


def test_block_is_freed_after_its_sum():
    """Making a block and summing it are one task, whose result is a few numbers."""
    x = da.map_blocks(lambda: None, chunks=((7,) * 20, (6,), (14,)), dtype=float)
    (optimized,) = dask.optimize(dask_moments(x))
    names = [str(key) for key in optimized.__dask_graph__()]
    assert sum("block_moments" in name for name in names) == 20
    others = [name for name in names if "block_moments" not in name and "merge" not in name]
    assert len(others) == 2, "neither the making of blocks nor the end of the tree"


@pytest.mark.parametrize("activation", [None, "relu"])
@CHUNKED
class TestNormalize:
    def test_is_the_function_block_by_block(self, values, chunks, activation, rng):
        mean, var = values.mean(axis=(0, 2)), values.var(axis=(0, 2))
        weight, bias = rng.standard_normal((2, SHAPE[AXIS]))
        options = {"eps": 0.01, "activation": activation}
        got = dask_normalize(da.from_array(values, chunks), mean, var, weight, bias, **options)
        assert isinstance(got, da.Array)
        assert got.chunks == da.from_array(values, chunks).chunks
        assert got.dtype == values.dtype
        want = bnfast.normalize(values, mean, var, weight, bias, **options)
        assert bits(got.compute()) == bits(want)

    def test_with_the_population_statistics(self, values, chunks, activation):
        x = da.from_array(values.astype(np.float32), chunks)
        m = dask_moments(x).compute()
        y = dask_normalize(x, m.mean, m.var(), activation=activation).compute()
        want = bnfast.normalize(values.astype(np.float32), m.mean, m.var(), activation=activation)
        assert y.dtype == np.float32
        assert bits(y) == bits(want)


def full_mask(kind, rng):
    """A mask of (60, 1, 14), or its like with other axes."""
    rows, columns = SHAPE[0], SHAPE[2]
    drawn = rng.integers(0, 9, (rows, columns)) / 4
    return {
        "bool": drawn > 0.5,
        "weights": drawn,
        "any weights": rng.uniform(0, 1, (rows, columns)) ** 8,
        "one channel": drawn[:, None] > 0.5,
        "rows": drawn[:, :1],
        "columns": drawn[None, :1].reshape(1, 1, columns),
        "nothing": np.zeros((rows, columns), bool),
        "halves": drawn.astype(np.float16),
    }[kind]


MASK_CHUNKS = {
    "NumPy": None,
    "the same rows": (7, 14),
    "others": (11, 4),
    "many": (9, 5),
    "one": (-1, -1),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kind",
    ["bool", "weights", "any weights", "one channel", "rows", "columns", "nothing", "halves"],
)
@CHUNKED
class TestMasks:
    @pytest.mark.parametrize("mask_chunks", MASK_CHUNKS.values(), ids=MASK_CHUNKS)
    def test_moments_are_those_of_the_whole(self, values, chunks, kind, dtype, mask_chunks, rng):
        x, mask = values.astype(dtype), full_mask(kind, rng)
        given = mask
        if mask_chunks is not None:
            size = (mask_chunks[0], mask_chunks[1]) if mask.ndim == 2 else (mask_chunks[0], 1, -1)
            given = da.from_array(mask, size)
        got = dask_moments(da.from_array(x, chunks), mask=given).compute(scheduler="synchronous")
        want = bnfast.moments(x, mask=mask)
        assert type(got.count) is type(want.count)
        np.testing.assert_allclose(got.count, want.count, rtol=1e-14)
        # Both are within `moments_of`'s limits of the exact values, whose largest is 1000.
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(got.m2, want.m2, rtol=1e-11)

    def test_garbage_is_not_read(self, values, chunks, kind, dtype, rng):
        x, mask = values.astype(dtype), full_mask(kind, rng)
        full = mask if mask.ndim == 3 else mask[:, None]
        clean = dask_moments(da.from_array(x, chunks), mask=mask).compute(scheduler="synchronous")
        x[np.broadcast_to(full == 0, x.shape)] = np.nan
        got = dask_moments(da.from_array(x, chunks), mask=mask).compute(scheduler="synchronous")
        assert got == clean
        assert np.isfinite(got.m2).all()


def test_masks_on_any_axis(values, rng):
    for axis in (0, 2, -1):
        mask = rng.uniform(0, 1, np.delete(SHAPE, axis)) > 0.4
        got = dask_moments(da.from_array(values, (13, 5, 3)), axis, mask).compute()
        want = bnfast.moments(values, axis=axis, mask=mask)
        assert got.count == want.count
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12)
        np.testing.assert_allclose(got.var(), want.var(), rtol=1e-11)


def test_masked_moments_have_the_same_bits_under_any_scheduler(values, rng):
    x = da.from_array(values, (13, 5, 3))
    mask = rng.uniform(0, 1, (60, 14))
    one_by_one = dask_moments(x, mask=mask).compute(scheduler="synchronous")
    for workers in (1, 2, 5):
        again = dask_moments(x, mask=da.from_array(mask, 9))
        assert again.compute(scheduler="threads", num_workers=workers) == one_by_one


def test_masks_of_no_channels():
    got = dask_moments(da.zeros((4, 0)), mask=np.ones(4)).compute()
    assert got == bnfast.Moments.empty(0)


def test_masks_of_dense_layers(values):
    x = values[:, :, 0]
    mask = np.arange(60) % 3 > 0
    got = dask_moments(da.from_array(x, (7, 4)), mask=mask).compute()
    want = bnfast.moments(x[mask])
    assert got.count == want.count
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-13)
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-11)


def test_a_mask_is_never_as_large_as_the_array():
    """Its blocks repeat one value for all channels."""
    x = da.zeros((64, 1000, 10), chunks=(64, 1000, 5))
    mask = da.ones((64, 10), chunks=(2, 1))
    from bnfast.distributed import dask_arrays

    full = dask_arrays._full_mask(mask, x, 1, da)
    for block in full.to_delayed().ravel():
        made = block.compute(scheduler="synchronous")
        assert made.shape == (64, 1000, 5)
        assert made.strides[1] == 0


class TestRefusals:
    @pytest.fixture
    def x(self, values):
        return da.from_array(values, (7, 6, 14))

    def test_not_a_dask_array(self, values):
        with pytest.raises(TypeError, match=r"(?s)x is .* expected a Dask array"):
            dask_moments(values)
        with pytest.raises(TypeError, match=r"(?s)x is .* expected a Dask array"):
            dask_normalize(values, np.ones(6), np.ones(6))

    @pytest.mark.parametrize("dtype", [np.int64, bool, complex])
    def test_of_another_dtype(self, x, dtype):
        with pytest.raises(TypeError, match="x has dtype"):
            dask_moments(x.astype(dtype))

    def test_of_a_vector(self, x):
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            dask_moments(x[0, 0])

    def test_missing_axis(self, x):
        with pytest.raises(ValueError, match="axis is 3; expected"):
            dask_moments(x, axis=3)
        with pytest.raises(TypeError, match="axis is"):
            dask_moments(x, axis=1.0)

    def test_of_unknown_channels(self, x):
        with pytest.raises(ValueError, match="unknown number of channels on axis 0"):
            dask_moments(x[x[:, 0, 0] > 3], axis=0)

    @pytest.mark.parametrize(
        ("mask", "kind", "words"),
        [
            (np.ones((60, 15)), ValueError, r"mask has shape \(60, 15\); expected \(60, 1, 14\)"),
            (np.ones((60, 6, 14)), ValueError, "mask has shape"),
            (np.ones(60), ValueError, "mask has shape"),
            (np.ones((60, 14), int), TypeError, "mask has dtype int64"),
            (da.ones((60, 14), dtype=int), TypeError, "mask has dtype int64"),
            (da.ones((60, 15)), ValueError, r"mask has shape \(60, 15\)"),
            (np.ma.ones((60, 14)), TypeError, "mask is a masked array"),
        ],
    )
    def test_masks_that_do_not_fit(self, x, mask, kind, words):
        with pytest.raises(kind, match=words):
            dask_moments(x, mask=mask)

    @pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
    def test_weights_of_wrong_values(self, x, weight):
        mask = np.ones((60, 14))
        mask[50, 3] = weight
        with pytest.raises(ValueError, match=f"mask has a weight of {weight}"):
            dask_moments(x, mask=mask).compute(scheduler="synchronous")

    def test_masks_beside_unknown_shapes(self, x):
        chosen = x[x[:, 0, 0] > 3]
        with pytest.raises(ValueError, match="beside a mask; expected a known one"):
            dask_moments(chosen, mask=np.ones((1, 14)))

    @pytest.mark.parametrize("name", ["mean", "var", "weight", "bias"])
    def test_vectors_of_wrong_shape(self, x, name):
        given = {"mean": np.ones(6), "var": np.ones(6), name: np.ones(5)}
        with pytest.raises(ValueError, match=rf"{name} has shape \(5,\); expected \(6,\)"):
            dask_normalize(x, **given)

    def test_of_options(self, x):
        with pytest.raises(ValueError, match="eps is -1"):
            dask_normalize(x, np.ones(6), np.ones(6), eps=-1)
        with pytest.raises(ValueError, match="activation is 'mish'"):
            dask_normalize(x, np.ones(6), np.ones(6), activation="mish")


class TestInvalidBlocks:
    """The contents of an array with unknown or wrong chunks are only known when it is computed."""

    def test_different_rows_per_channel_refused(self, values):
        x = da.from_array(values[:, :, 0], (7, 6))
        halves = x[x[:, 0] > 3][:, :3], x[x[:, 3] > 3][:, 3:]
        assert len(halves[0].compute()) != len(halves[1].compute())
        both = da.concatenate(halves, axis=1, allow_unknown_chunksizes=True)
        with pytest.raises(ValueError, match=r"blocks of x have \d+, \d+ values in channels"):
            dask_moments(both).compute()

    @pytest.mark.parametrize("channels", [5, 7, 0])
    def test_other_channel_count_than_shape_refused(self, channels):
        def block(numbers):
            return np.ones((len(numbers), channels))

        x = da.map_blocks(block, da.ones((20, 6), chunks=(7, 6)), dtype=float)
        with pytest.raises(
            ValueError, match=f"blocks of x have {channels} channels; expected the 6"
        ):
            dask_moments(x).compute()

    def test_blocks_with_different_channels_refused(self):
        def block(numbers, block_id=None):
            return np.ones((len(numbers), 6 + block_id[0]))

        x = da.map_blocks(block, da.ones((20, 6), chunks=(7, 6)), dtype=float)
        with pytest.raises(ValueError, match="have 7 channels; expected 6"):
            dask_moments(x).compute()

    def test_countable(self):
        """Blocks that repeat one value may have more rows than any memory."""
        many = bnfast.Moments(2**62, [0.0], [0.0])
        with pytest.raises(ValueError, match=f"count is {2**63}; expected at most"):
            _merge_to_records([[many], [many]], (0,), False)


# ---- A cluster of processes


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("default")  # from the cluster's start and end
class TestCluster:
    def test_moments_on_all_workers_same_bits_as_one_thread(self, client, tmp_path):
        got = client.compute(dask_moments(array_of(0.02, str(tmp_path)))).result()
        assert got == dask_moments(array_of()).compute(scheduler="synchronous")
        pids = {path.read_text() for path in tmp_path.iterdir()}
        assert len(pids) == 3
        assert str(os.getpid()) not in pids

    def test_normalized_blocks(self, client):
        x = array_of()
        m = dask_moments(x).compute(scheduler="synchronous")
        y = client.compute(dask_normalize(x, m.mean, m.var())).result()
        again = dask_normalize(x, m.mean, m.var()).compute(scheduler="synchronous")
        assert bits(y) == bits(again)
        z = reference.inference(
            x.compute(scheduler="synchronous"), m.mean, m.var(), np.ones(3), np.zeros(3), 1e-5
        )
        np.testing.assert_allclose(z.var(axis=0), m.var() / (m.var() + 1e-5))

    def test_killed_worker_changes_no_bit(self, client, tmp_path):
        """Killed after some blocks were summed; the bits are those of an undisturbed run."""
        future = client.compute(dask_moments(array_of(0.1, str(tmp_path))))
        kill_a_worker(tmp_path)
        got = future.result(timeout=120)
        assert got == dask_moments(array_of()).compute(scheduler="synchronous")
        assert_some_were_read_twice(tmp_path)
