"""`recompute_statistics` with masks: the population is what they count."""

import numpy as np
import pytest
import reference
from tolerance import unit
from wide import wide

import bnfast

SHAPE = (9, 4, 6)
CUTS = ((0, 5), (5, 6), (6, 9))


def population(x, weights):
    """Mean and variance over count - 1 of weighted values."""
    w = wide(np.broadcast_to(weights[:, None], x.shape))
    x = wide(np.where(w > 0, x, 0))
    total = w[:, 0].sum()
    mean = (w * x).sum((0, 2)) / total
    d = np.where(w > 0, x - mean[:, None], 0)
    return mean, (w * d * d).sum((0, 2)) / (total - 1)


def batches(dtype, weights):
    """Batches of different values, with garbage where nothing is counted."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(SHAPE) * 2 + np.arange(9).reshape(9, 1, 1)).astype(dtype)
    if weights:
        mask = rng.integers(0, 9, (9, 6)) / 4
    else:
        mask = bnfast.lengths_mask([3, 6, 2, 5, 4, 1, 6, 2, 3], 6)
        mask[5, 3] = True
    x[np.broadcast_to(mask[:, None] == 0, SHAPE)] = np.nan
    return x, mask


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weights", [False, True], ids=["bool", "weights"])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchRenorm1d", "virtual batches"])
@pytest.mark.parametrize("itself", [False, True], ids=["a function", "the layer itself"])
def test_population_is_what_masks_count(itself, kind, weights, dtype):
    x, mask = batches(dtype, weights)
    if kind == "virtual batches":
        layer = bnfast.BatchNorm(4, dtype=dtype, virtual_batch_size=3)
    else:
        layer = getattr(bnfast, kind)(4, dtype=dtype)
    layer.eval()
    pairs = [(x[i:j], mask[i:j]) for i, j in CUTS]
    forward = layer if itself else lambda pair: layer(pair[0], mask=pair[1])
    bnfast.recompute_statistics(forward, pairs, [layer])
    mean, var = population(x, mask)
    # A batch's statistics in training pass up to 16 roundings of float32.
    limit = 24 * unit(dtype)
    np.testing.assert_allclose(layer.running_mean, mean.astype(float), limit, limit * 8)
    np.testing.assert_allclose(layer.running_var, var.astype(float), limit)
    assert layer.num_batches_tracked == 0
    assert not layer.training


def test_batches_with_and_without_masks():
    x, mask = batches(np.float64, False)
    whole = np.where(np.isnan(x), 1.5, x)
    layer = bnfast.BatchNorm1d(4, dtype=np.float64)
    pairs = [(x[:5], mask[:5]), (whole[5:], None)]
    bnfast.recompute_statistics(lambda pair: layer(pair[0], mask=pair[1]), pairs, [layer])
    kept = np.concatenate([mask[:5], np.ones((4, 6))])
    mean, var = population(np.concatenate([x[:5], whole[5:]]), kept)
    np.testing.assert_allclose(layer.running_mean, mean.astype(float), 1e-12)
    np.testing.assert_allclose(layer.running_var, var.astype(float), 1e-12)


def test_a_mask_of_ones_is_the_whole_population():
    x = np.random.default_rng(0).standard_normal(SHAPE)
    layer = bnfast.BatchNorm1d(4, dtype=np.float64)
    bnfast.recompute_statistics(lambda part: layer(part, mask=np.ones(6)[None]), [x[:4], x[4:]],
                                [layer])  # fmt: skip
    mean, var = reference.population([x[:4], x[4:]])
    np.testing.assert_allclose(layer.running_mean, mean, 1e-12, 1e-14)
    np.testing.assert_allclose(layer.running_var, var, 1e-12)


def test_too_little_weight_is_refused():
    """Of 0.5 together no variance over count - 1 is left."""
    x = np.random.default_rng(0).standard_normal((2, 4, 5))
    layer = bnfast.BatchNorm1d(4, dtype=np.float64)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="layers\\[0\\] saw"):
        bnfast.recompute_statistics(
            lambda part: layer(part, mask=np.full((2, 5), 0.05)), [x], [layer]
        )
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
