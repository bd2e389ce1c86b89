"""Bad input: an exception that names the argument, its value and what was
expected, before anything is written.
"""

import numpy as np
import pytest
from bad_calls import (
    ALL,
    DATA_TYPES,
    FORWARDS,
    OUT,
    PER_CHANNEL,
    RUNNING,
    B,
    R,
    W,
    X,
    backward,
    copied,
    each,
    forward,
    inference,
    mentions,
    normalize,
    training,
    zero_stride,
)
from cases import poisoned_like, read_only

import bnfast


@each(*ALL)
def test_good_arguments_accepted(call):
    """Otherwise the refusals below would prove nothing."""
    arguments = {k: copied(v) for k, v in call.named.items()}
    positional = [arguments.pop(name) for name in call.given]
    call.function(*positional, **arguments)
    assert "out" not in arguments or not np.isnan(arguments["out"]).any()


class TestX:
    @each(*ALL)
    @pytest.mark.parametrize(
        "dtype", ["int32", "int64", "uint8", "bool", "complex64", "longdouble", "uint16", "O"]
    )
    def test_dtype(self, call, dtype):
        name = np.dtype(dtype).name
        call.refuses(TypeError, ("x", name, *DATA_TYPES), x=X.astype(dtype))

    @each(*ALL)
    @pytest.mark.parametrize("value", ["text", [["a"]], object(), [[1, 2], [3, 4]]])
    def test_no_array_of_floats(self, call, value):
        call.refuses(TypeError, ("x",), x=value)

    @each(*ALL)
    def test_none(self, call):
        call.refuses(TypeError, ("x",), x=None)

    @each(*ALL)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_rank(self, call, rank):
        call.refuses(ValueError, ("x", "shape", "2"), x=X[0, 0] if rank else X[0, 0, 0])

    @each(*ALL)
    def test_masked(self, call):
        call.refuses((TypeError, ValueError), ("x", "masked"), x=np.ma.masked_array(X, X > 1))

    @each(*ALL)
    @pytest.mark.parametrize("axis", [3, -4, 100, 2**70])
    def test_axis_out_of_range(self, call, axis):
        call.refuses((ValueError, OverflowError), ("axis", axis), axis=axis)

    @each(*ALL)
    @pytest.mark.parametrize("axis", [1.0, "1", None, (1,)])
    def test_axis_of_another_type(self, call, axis):
        call.refuses(TypeError, ("axis", "integer"), axis=axis)


@pytest.mark.parametrize(("call", "name"), PER_CHANNEL, ids=repr)
class TestPerChannel:
    @pytest.mark.parametrize("shape", [(5,), (3,), (0,), (1,), (4, 1), (1, 4), ()], ids=str)
    def test_shape(self, call, name, shape):
        call.refuses(ValueError, (name, shape, 4), **{name: np.ones(shape, np.float32)})

    @pytest.mark.parametrize("dtype", ["int64", "bool", "complex128", "O"])
    def test_dtype(self, call, name, dtype):
        call.refuses(TypeError, (name,), **{name: np.ones(4, dtype)})

    def test_masked(self, call, name):
        masked = np.ma.masked_array(np.ones(4, np.float32), [True, False, False, False])
        call.refuses((TypeError, ValueError), (name, "masked"), **{name: masked})

    def test_text(self, call, name):
        call.refuses(TypeError, (name,), **{name: "four"})


class TestRunningStatistics:
    @pytest.mark.parametrize("name", RUNNING)
    @each(training, inference)
    def test_one_alone(self, call, name):
        call.refuses(ValueError, ("running_mean", "running_var"), **{name: None})

    def test_none_in_inference(self):
        inference.refuses(
            ValueError, ("running_mean", "running_var"), running_mean=None, running_var=None
        )

    @pytest.mark.parametrize("name", RUNNING)
    def test_read_only(self, name):
        training.refuses(ValueError, (name, "read-only"), **{name: read_only(W)})

    @pytest.mark.parametrize("name", RUNNING)
    @pytest.mark.parametrize("value", [[0.0] * 4, (0.0,) * 4], ids=["list", "tuple"])
    def test_list_cannot_be_updated(self, name, value):
        """A converted copy would take the update and be lost."""
        training.refuses((TypeError, ValueError), (name,), **{name: value})

    @pytest.mark.parametrize("name", ["mean", "var"])
    def test_missing_from_normalize(self, name):
        normalize.refuses(TypeError, (name,), **{name: None})


class TestScalars:
    @each(forward, training, inference, normalize)
    @pytest.mark.parametrize("eps", [np.nan, -1e-5, -1.0])
    def test_eps(self, call, eps):
        call.refuses(ValueError, ("eps", eps), eps=eps)

    @each(forward, training)
    def test_eps_zero_in_training(self, call):
        call.refuses(ValueError, ("eps", 0), eps=0.0)

    @each(forward, inference, normalize)
    @pytest.mark.parametrize("eps", ["small", None, [1e-5, 1e-5]])
    def test_eps_of_another_type(self, call, eps):
        call.refuses(TypeError, ("eps",), eps=eps)

    @pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf])
    @each(training, inference)
    def test_momentum(self, call, momentum):
        call.refuses(ValueError, ("momentum", momentum), momentum=momentum)

    @pytest.mark.parametrize("ddof", [-1, 2])
    def test_ddof(self, ddof):
        training.refuses(ValueError, ("ddof", ddof), ddof=ddof)

    @pytest.mark.parametrize("eps", [np.nan, -1.0])
    def test_eps_of_a_population(self, eps):
        with pytest.raises(ValueError, match=mentions("eps", eps)):
            bnfast.BatchStats.from_population(W, B**2, eps)


class TestResidual:
    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("shape", [(6, 4, 4), (5, 4, 5), (6, 4), (4, 5), (1, 4, 5)], ids=str)
    def test_shape(self, call, shape):
        call.refuses(
            ValueError,
            ("residual", shape, X.shape),
            residual=np.ones(shape, np.float32),
        )

    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("dtype", ["float64", "int32", "float16"])
    def test_dtype(self, call, dtype):
        call.refuses(
            TypeError,
            ("residual", dtype, "float32"),
            residual=R.astype(dtype),
        )

    @each(*FORWARDS, backward)
    def test_masked(self, call):
        call.refuses(
            (TypeError, ValueError), ("residual", "masked"), residual=np.ma.masked_array(R, R > 0)
        )


class TestActivation:
    @each(*FORWARDS, backward)
    @pytest.mark.parametrize(
        "activation", ["mish", "ReLU", "", ("relu", 0.1), ("leaky_relu",), ("leaky_relu", 1, 2)]
    )
    def test_unknown(self, call, activation):
        call.refuses(
            ValueError, ("activation", "relu", "relu6", "leaky_relu"), activation=activation
        )

    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("slope", [0.0, -0.1, 1.5, np.nan, np.inf])
    def test_slope(self, call, slope):
        call.refuses(
            ValueError,
            ("activation", "slope", slope),
            activation=("leaky_relu", slope),
        )

    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("activation", [1, np.tanh, ["relu"], ("leaky_relu", "steep")])
    def test_of_another_type(self, call, activation):
        call.refuses((TypeError, ValueError), ("activation",), activation=activation)

    def test_of_a_layer(self):
        with pytest.raises(ValueError, match=mentions("activation", "mish")):
            bnfast.BatchNorm(4, activation="mish")


class TestOut:
    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("shape", [(6, 4, 4), (6, 4), (6, 4, 5, 1), (4, 6, 5)], ids=str)
    def test_shape(self, call, shape):
        call.refuses(
            ValueError,
            ("out", shape, X.shape),
            out=np.full(shape, np.nan, np.float32),
        )

    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("dtype", ["float64", "int32", "float16"])
    def test_dtype(self, call, dtype):
        call.refuses((TypeError, ValueError), ("out", "float32"), out=np.zeros(X.shape, dtype))

    @each(*FORWARDS, backward)
    def test_read_only(self, call):
        call.refuses(ValueError, ("out", "read-only"), out=read_only(OUT))

    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("out", [OUT.tolist(), "y", 1.0], ids=["list", "text", "number"])
    def test_no_array(self, call, out):
        call.refuses(TypeError, ("out",), out=out)

    @each(*FORWARDS, backward)
    def test_masked(self, call):
        call.refuses((TypeError, ValueError), ("out", "masked"), out=np.ma.masked_array(X, X > 1))

    @each(*FORWARDS, backward)
    def test_out_overlaps_itself(self, call):
        call.refuses(ValueError, ("out", "share memory"), out=zero_stride(X.shape))

    @each(*FORWARDS, backward)
    @pytest.mark.parametrize("name", ["x", "residual", "dy"])
    @pytest.mark.parametrize("offset", [1, 4, 20, 100])
    def test_partly_overlapping(self, call, name, offset):
        if name not in call.named:
            return
        store = np.zeros(X.size + offset, np.float32)
        a, out = (store[i : i + X.size].reshape(X.shape) for i in (0, offset))
        for one, other in ((a, out), (out, a)):
            one[...] = call.named[name]
            call.refuses(ValueError, ("out", "overlaps", name), **{name: one, "out": other})

    @each(*FORWARDS, backward)
    def test_reversed_x(self, call):
        """The same memory, but not the same elements in the same places."""
        x = X.copy()
        call.refuses(ValueError, ("out", "overlaps", "x"), x=x, out=x[::-1])

    @pytest.mark.parametrize(("call", "name"), PER_CHANNEL, ids=repr)
    def test_out_overlaps_parameter(self, call, name):
        out = np.ones(X.shape, np.float32)
        call.refuses(ValueError, ("overlaps", name), **{name: out[0, 0, :4], "out": out})

    def test_out_overlaps_residual_in_backward(self):
        r = R.copy()
        backward.refuses(ValueError, ("out", "overlaps", "residual"), residual=r, out=r)


class TestTooFewValues:
    @pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)], ids=str)
    @pytest.mark.parametrize("call", [forward, training], ids=repr)
    def test_one_value_per_channel_in_training(self, call, shape):
        x = np.ones(shape, np.float32)
        call.refuses(
            ValueError,
            ("Expected more than 1 value per channel when training, got input size", shape),
            x=x,
            residual=None,
            out=poisoned_like(x),
        )

    def test_one_value_per_channel_in_inference(self):
        x = np.ones((1, 4), np.float32)
        y = bnfast.batch_norm(x, W, B**2, eps=0.5)
        assert y.shape == (1, 4)
        assert bnfast.moments(x).count == 1
