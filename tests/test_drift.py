"""Moments as plain numbers, population statistics in layers, and drift."""

import io

import numpy as np
import pytest

import bnfast
from bnfast import Moments


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(3, 2, (500, 7)).astype(np.float32)


class TestFromStatistics:
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_mean_and_variance_give_the_moments_back(self, x, ddof):
        part = bnfast.moments(x)
        found = Moments.from_statistics(part.count, part.mean, part.var(ddof), ddof=ddof)
        assert found.count == part.count
        np.testing.assert_array_equal(found.mean, part.mean)
        np.testing.assert_allclose(found.m2, part.m2, rtol=4e-16)

    def test_clients_merge_to_the_moments_of_all_values(self, x):
        parts = [bnfast.moments(part) for part in np.split(x, [20, 300, 301])]
        told = [
            Moments.from_statistics(p.count, p.mean, p.var(), ddof=0) if p.count else p
            for p in parts
        ]
        merged, whole = Moments.merge_all(told), bnfast.moments(x)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-13)

    def test_count_may_be_a_sum_of_weights(self):
        found = Moments.from_statistics(2.5, [1.0], [2.0])
        assert isinstance(found.count, float)
        assert found.m2 == [5.0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((1, [0.0], [1.0], 1), r"count is 1; expected more than ddof, 1"),
            ((0, [0.0], [1.0]), r"count is 0; expected more than ddof, 0"),
            ((-1, [0.0], [1.0]), r"count is -1; expected 0 or more"),
            ((3, [0.0], [-1.0]), r"var is -1.0 in a channel; expected 0 or more"),
            ((3, [0.0], [1.0, 2.0]), r"m2 has shape \(2,\); expected that of mean"),
            ((3, [[0.0]], [[1.0]]), r"var has shape \(1, 1\); expected \(channels,\)"),
            ((float("nan"), [0.0], [1.0]), r"count is nan; expected a finite number"),
        ],
    )
    def test_values_that_are_no_statistics_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Moments.from_statistics(*arguments)


class TestDicts:
    @pytest.mark.parametrize("mask", [None, np.linspace(0, 1, 500)])
    def test_a_file_gives_the_same_moments_back(self, x, mask):
        part = bnfast.moments(x, mask=mask)
        file = io.BytesIO()
        np.savez(file, **part.to_dict())
        file.seek(0)
        found = Moments.from_dict(np.load(file))
        assert found == part
        assert type(found.count) is type(part.count)

    def test_arrays_are_copies(self, x):
        part = bnfast.moments(x)
        part.to_dict()["mean"][...] = 0
        assert part == bnfast.moments(x)

    def test_a_missing_entry_is_named(self):
        with pytest.raises(ValueError, match="values has no mean and no m2"):
            Moments.from_dict({"count": 3})
        with pytest.raises(TypeError, match=r"values is .*; expected a mapping"):
            Moments.from_dict([1, 2, 3])
        with pytest.raises(ValueError, match=r"count has shape \(2,\); expected one number"):
            Moments.from_dict({"count": [1, 2], "mean": [0.0], "m2": [0.0]})


class TestLoadStatistics:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_a_layer_gets_mean_and_unbiased_variance(self, x, dtype):
        layer = bnfast.BatchNorm(7, dtype=dtype)
        mean = layer.running_mean
        bnfast.load_statistics(layer, bnfast.moments(x))
        assert layer.running_mean is mean
        exact = x.astype(np.float64)
        # Rounded once to the layer's type, after sums of 500 values in float64.
        rtol = np.finfo(dtype).eps + 64 * np.finfo(float).eps
        np.testing.assert_allclose(mean, exact.mean(0), rtol=rtol)
        np.testing.assert_allclose(layer.running_var, exact.var(0, ddof=1), rtol=rtol)
        assert layer.num_batches_tracked == 0

    def test_a_layer_of_pytorch_gets_them_too(self, x):
        torch = pytest.importorskip("torch")
        layer = torch.nn.BatchNorm1d(7)
        version = layer.running_mean._version
        bnfast.load_statistics(layer, bnfast.moments(x))
        np.testing.assert_allclose(layer.running_mean, x.astype(float).mean(0), rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, x.astype(float).var(0, ddof=1), rtol=1e-6)
        assert layer.running_mean._version > version

    def test_what_does_not_fit_is_refused_and_nothing_is_written(self, x):
        layer, moments = bnfast.BatchNorm(6), bnfast.moments(x)
        with pytest.raises(ValueError, match=r"running_mean has shape \(6,\); expected \(7,\)"):
            bnfast.load_statistics(layer, moments)
        with pytest.raises(TypeError, match=r"layer is .*; expected a BatchNorm"):
            bnfast.load_statistics(object(), moments)
        with pytest.raises(TypeError, match=r"moments is .*; expected Moments"):
            bnfast.load_statistics(layer, x)
        with pytest.raises(ValueError, match="moments are of 1 values per channel"):
            bnfast.load_statistics(layer, Moments(1, np.zeros(6), np.zeros(6)))
        with pytest.raises(RuntimeError, match="has no running statistics to write"):
            bnfast.load_statistics(bnfast.BatchNorm(7, track_running_stats=False), moments)
        assert (layer.running_mean == 0).all()
        assert (layer.running_var == 1).all()

    def test_a_read_only_variance_leaves_the_mean_alone(self, x):
        layer = bnfast.BatchNorm(7)
        layer.running_var.flags.writeable = False
        with pytest.raises(ValueError, match="running_var is read-only"):
            bnfast.load_statistics(layer, bnfast.moments(x))
        assert (layer.running_mean == 0).all()


class TestDrift:
    def test_divergence_is_that_of_normal_distributions(self):
        old = Moments.from_statistics(10, [0.0, 1.0, 5.0], [1.0, 4.0, 0.25])
        new = Moments.from_statistics(99, [0.0, 2.0, 4.0], [2.0, 1.0, 0.25])
        rng = np.random.default_rng(0)
        found = bnfast.drift(old, new)
        # By its definition, over samples of the new distribution.
        z = rng.standard_normal((400_000, 3)) * np.sqrt(new.var()) + new.mean

        def log_density(m):
            return -(((z - m.mean) ** 2) / m.var() + np.log(m.var())) / 2

        estimate = (log_density(new) - log_density(old)).mean(0)
        np.testing.assert_allclose(found.kl_divergence, estimate, atol=0.02)
        np.testing.assert_allclose(found.mean_difference, [0, 1 / np.sqrt(2.5), -2])

    def test_equal_distributions_have_not_moved(self, x):
        found = bnfast.drift(bnfast.moments(x), bnfast.moments(x))
        assert (found.kl_divergence == 0).all()
        assert (found.mean_difference == 0).all()

    def test_divergence_is_never_negative(self, x):
        for scale in (1, 1 + 1e-9, 1 - 1e-12, 1e150):
            wide = x.astype(float)
            found = bnfast.drift(bnfast.moments(wide), bnfast.moments(wide * scale))
            assert (found.kl_divergence >= 0).all()

    def test_constant_channels(self):
        old = Moments(5, [1.0, 1.0, 1.0], [0.0, 0.0, 4.0])
        new = Moments(5, [1.0, 2.0, 1.0], [0.0, 0.0, 0.0])
        found = bnfast.drift(old, new)
        assert found.kl_divergence.tolist() == [0, np.inf, np.inf]
        assert found.mean_difference.tolist() == [0, np.inf, 0]

    def test_what_cannot_be_compared_is_refused(self, x):
        part = bnfast.moments(x)
        with pytest.raises(ValueError, match="new has 3 channels; expected 7"):
            bnfast.drift(part, Moments(1, np.zeros(3), np.zeros(3)))
        with pytest.raises(ValueError, match="old is of no values"):
            bnfast.drift(Moments.empty(7), part)
        with pytest.raises(TypeError, match=r"new is .*; expected Moments"):
            bnfast.drift(part, x)
