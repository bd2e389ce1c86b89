"""Bad values in place of a layer's attributes, and arguments that are no arrays."""

import numpy as np
import pytest
from cases import bits, make_problem, poisoned_like, read_only
from layer_cases import SHAPE, junk_like, layer_of, state_bits, trained, trained_gradients

from bnfast import BatchNorm, BatchNorm2d


class TestInvalidAttributes:
    """Found before anything is written."""

    @pytest.mark.parametrize(
        ("counter", "error", "message"),
        [
            (read_only(np.zeros((), np.int64)), ValueError, "read-only; expected a writeable"),
            (np.zeros((), np.int32), TypeError, "expected an array of int64 of shape"),
            (np.zeros(()), TypeError, "expected an array of int64 of shape"),
            (np.zeros(1, np.int64), TypeError, "expected an array of int64 of shape"),
            (3, TypeError, "3 of type int; expected an array of int64"),
            ("3", TypeError, "'3' of type str; expected an array of int64"),
            (np.array(-1), ValueError, "-1; expected 0 to"),
            (np.array(np.iinfo(np.int64).max), ValueError, "expected 0 to 9223372036854775806"),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_counter(self, counter, error, message, momentum):
        p = make_problem(SHAPE)
        layer = trained(p, momentum=momentum)
        layer.num_batches_tracked = counter
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises(error, match=f"num_batches_tracked .*{message}"):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()
        assert layer(p.x, update_stats=False).shape == p.x.shape

    def test_no_counter_for_the_cumulative_average(self):
        p = make_problem(SHAPE)
        layer = layer_of(p, momentum=None)
        layer.num_batches_tracked = None
        before = state_bits(layer)
        with pytest.raises(TypeError, match="num_batches_tracked is None; expected an array"):
            layer(p.x)
        assert state_bits(layer) == before
        layer.momentum = 0.5
        layer(p.x)
        assert state_bits(layer) != before

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    @pytest.mark.parametrize("junk", ["read-only", "shape", "type", "list"])
    def test_running_statistics(self, name, junk):
        p = make_problem(SHAPE)
        layer = trained(p)
        setattr(layer, name, junk_like(getattr(layer, name), junk))
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises((TypeError, ValueError), match=name):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()

    @pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
    @pytest.mark.parametrize("junk", ["read-only", "shape", "type", "list", "None"])
    def test_gradients(self, name, junk):
        p = make_problem(SHAPE)
        layer = trained(p)
        setattr(layer, name, None if junk == "None" else junk_like(getattr(layer, name), junk))
        before = state_bits(layer)
        with pytest.raises((TypeError, ValueError), match=name):
            layer.backward(p.dy)
        assert state_bits(layer) == before

    @pytest.mark.parametrize("axis", ["1", None, 1.0, np.array([1]), (1,)], ids=repr)
    @pytest.mark.parametrize("training", [True, False])
    def test_axis(self, axis, training):
        p = make_problem(SHAPE)
        layer = layer_of(p).train(training)
        layer.axis = axis
        with pytest.raises(TypeError, match=r"axis is .*expected an integer"):
            layer(p.x)

    @pytest.mark.parametrize("weight", [np.ones(4), np.ones(1), np.ones((1, 5)), "weight"])
    def test_weight(self, weight):
        layer = trained(make_problem(SHAPE))
        layer.weight = weight
        for use in (layer.freeze, lambda: layer(make_problem(SHAPE).x)):
            with pytest.raises((TypeError, ValueError), match="weight"):
                use()


class TestNotAnArray:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("x", [[[1.0, 2.0], [3.0]], None, "x", [["a", "b"]], 1.0], ids=repr)
    def test_is_named(self, x, training):
        layer = BatchNorm(2).train(training)
        with pytest.raises((TypeError, ValueError), match=r"^x "):
            layer(x)
        with pytest.raises((TypeError, ValueError), match=r"^x "):
            BatchNorm2d(2).train(training)(x)
        assert layer.num_batches_tracked == 0

    def test_lists_of_numpys_numbers(self):
        p = make_problem((4, 5), residual=True, activation="relu")
        want = trained_gradients(p)
        layer = layer_of(p)
        layer([list(row) for row in p.x], residual=[list(row) for row in p.residual])
        got = layer.backward(p.dy)
        assert [bits(a) for a in got] == [bits(a) for a in want]

    @pytest.mark.parametrize(
        "options",
        [
            {"dtype": "foo"},
            {"dtype": None},
            {"dtype": 3},
            {"dtype": ">f4"},
            {"axis": np.array([1])},
            {"affine": np.ones(2)},
            {"track_running_stats": np.ones(2)},
            {"momentum": np.array([0.1])},
            {"eps": [1e-5]},
            {"ddof": np.array([1])},
            {"num_features": np.array([5])},
        ],
        ids=str,
    )
    def test_options(self, options):
        (name,) = options
        with pytest.raises(TypeError, match=f"^{name} is .*; expected"):
            BatchNorm(**{"num_features": 5} | options)

    def test_modes(self):
        layer = BatchNorm(5)
        with pytest.raises(TypeError, match="mode is an array"):
            layer.train(np.ones(2))
        with pytest.raises(TypeError, match="update_stats is an array"):
            layer(make_problem(SHAPE).x, update_stats=np.ones(2))
        assert layer.training
        assert layer.num_batches_tracked == 0
