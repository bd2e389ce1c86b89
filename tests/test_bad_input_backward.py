"""Bad input of `batch_norm_backward`: what it refuses, before anything is written."""

import numpy as np
import pytest
from bad_calls import DY, STATS, B, W, X, backward, copied, mentions
from cases import bits, poisoned_like

import bnfast


class TestBackward:
    @pytest.mark.parametrize("shape", [(6, 4, 4), (6, 4), (5, 4, 5)], ids=str)
    def test_dy_shape(self, shape):
        backward.refuses(ValueError, ("dy", shape, X.shape), dy=np.ones(shape, np.float32))

    @pytest.mark.parametrize("dtype", ["float64", "int32", "float16"])
    def test_dy_dtype(self, dtype):
        backward.refuses(TypeError, ("dy", dtype, "float32"), dy=DY.astype(dtype))

    @pytest.mark.parametrize("stats", [None, (STATS.mean, STATS.var), "stats", W])
    def test_stats_of_another_type(self, stats):
        backward.refuses(TypeError, ("stats", "BatchStats"), stats=stats)

    def test_stats_of_other_channels(self):
        other = bnfast.batch_norm_forward(X[:, :3].copy())[1]
        backward.refuses(ValueError, ("stats", 3, 4), stats=other)

    def test_stats_of_another_batch(self):
        """m divides the sums: another batch's m would silently give wrong gradients."""
        other = bnfast.batch_norm_forward(X[:5], W, B)[1]
        backward.refuses(ValueError, ("stats", 25, 30), stats=other)

    @pytest.mark.parametrize("needs", [["y"], ["x", "gamma"], "weights", [1]], ids=str)
    def test_needs(self, needs):
        backward.refuses((TypeError, ValueError), ("needs",), needs=needs)

    @pytest.mark.parametrize("shape", [(6, 4, 4), (6, 4)], ids=str)
    def test_y_shape(self, shape):
        backward.refuses(
            ValueError,
            ("y", shape, X.shape),
            y=np.ones(shape, np.float32),
            activation="relu",
        )

    def test_y_dtype(self):
        backward.refuses(
            TypeError, ("y", "float64", "float32"), y=X.astype(np.float64), activation="relu"
        )

    def test_population_with_mean_and_var_of_two_shapes(self):
        with pytest.raises(ValueError, match=mentions("var", (3,), (4,))):
            bnfast.BatchStats.from_population(W, B[:3])


class TestGradients:
    @pytest.mark.parametrize("x", [X, X[::-1]], ids=["common", "strided"])
    def test_dy_none(self, x):
        backward.refuses(TypeError, ("dy", "None", "gradient"), dy=None, x=x)

    @pytest.mark.parametrize("name", ["mean", "inv_std"])
    def test_missing_statistics(self, name):
        """The core would take 0 and 1 for None."""
        backward.refuses(TypeError, (f"stats.{name}", "None"), stats=STATS._replace(**{name: None}))

    @pytest.mark.parametrize("count", [None, "30", np.array([30]), np.float32(30), True], ids=repr)
    def test_count_of_another_type(self, count):
        backward.refuses(TypeError, ("stats.count", "integer"), stats=STATS._replace(count=count))

    @pytest.mark.parametrize(
        "count", [np.int64(30), np.int64(0), np.array(30), 30.0, np.float64(30)], ids=repr
    )
    def test_count_of_other_numbers(self, count):
        arguments = {k: copied(v) for k, v in backward.named.items()}
        arguments["stats"] = STATS._replace(count=count)
        want = arguments | {"stats": STATS._replace(count=int(count)), "out": poisoned_like(X)}
        got = bnfast.batch_norm_backward(**arguments)
        assert bits(got.x) == bits(bnfast.batch_norm_backward(**want).x)

    @pytest.mark.parametrize("needs", [1, 2.5, [["x"]], [{}], object()])
    def test_needs_of_another_type(self, needs):
        backward.refuses(TypeError, ("needs", "names of gradients"), needs=needs)

    def test_needs_of_mixed_types(self):
        backward.refuses(ValueError, ("needs", "1", "'y'"), needs=["x", "y", 1])
