"""Bad input: an exception that names the argument, its value and what was
expected, before anything is written.
"""

import pickle
import re
import warnings
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from cases import bits, make_problem, poisoned_like, read_only, with_memory_order

import bnfast
from bnfast import _arrays

P = make_problem((6, 4, 5), residual=True)
X, DY, W, B, R = P.x, P.dy, P.weight, P.bias, P.residual
STATS = bnfast.batch_norm_forward(X, W, B)[1]
POPULATION = bnfast.BatchStats.from_population(STATS.mean, STATS.var)


def mentions(*words):
    """A pattern for all of these words in any order."""
    escaped = (re.escape(str(word)) for word in words)
    return "(?is)" + "".join(rf"(?=.*(?<!\w){word}(?!\w))" for word in escaped)


DATA_TYPES = ("float32", "float64", "float16", "bfloat16")
PARAMETER_TYPES = ("float32", "float64")


def zero_stride(shape):
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))


class Call:
    """A call of one function with good arguments, some of which are replaced.

    Arrays that the call may write are poisoned or known, and are compared
    afterwards with their former contents.
    """

    def __init__(self, function, *given, **named):
        self.function, self.given, self.named = function, given, named

    def __repr__(self):
        return self.function.__name__

    def refuses(self, error, words, **changes):
        arguments = {k: copied(v) for k, v in self.named.items()} | changes
        positional = [arguments.pop(name) for name in self.given]
        held = {id(a): a for a in (*positional, *arguments.values()) if type(a) is np.ndarray}
        before = {key: bits(a) for key, a in held.items()}
        counted = bnfast._core.dispatches()
        with pytest.raises(error, match=mentions(*words)):
            self.function(*positional, **arguments)
        assert {key: bits(a) for key, a in held.items()} == before
        assert bnfast._core.dispatches() == counted


def copied(value):
    return value.copy() if isinstance(value, np.ndarray) else value


OUT = poisoned_like(X)
AFFINE = {"weight": W, "bias": B}
RUNNING = {"running_mean": W, "running_var": B**2}
FUSED = {"residual": R, "out": OUT}

forward = Call(bnfast.batch_norm_forward, "x", x=X, **AFFINE, **FUSED)
training = Call(bnfast.batch_norm, "x", x=X, **RUNNING, **AFFINE, **FUSED, training=True)
inference = Call(bnfast.batch_norm, "x", x=X, **RUNNING, **AFFINE, **FUSED)
normalize = Call(bnfast.normalize, "x", "mean", "var", x=X, mean=W, var=B**2, **AFFINE, **FUSED)
scale_shift = Call(bnfast.scale_shift, "x", "scale", "shift", x=X, scale=W, shift=B, **FUSED)
backward = Call(
    bnfast.batch_norm_backward, "dy", "x", "stats", dy=DY, x=X, stats=STATS, **AFFINE, **FUSED
)
moments = Call(bnfast.moments, "x", x=X)

FORWARDS = (forward, training, inference, normalize, scale_shift)
NORMALIZING = FORWARDS[:-1]
ALL = (*FORWARDS, backward, moments)


def each(*calls):
    return pytest.mark.parametrize("call", calls, ids=repr)


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


PER_CHANNEL = [
    *(
        (c, name)
        for c in (forward, training, inference, normalize, backward)
        for name in ("weight", "bias")
    ),
    *((c, name) for c in (training, inference) for name in RUNNING),
    (normalize, "mean"),
    (normalize, "var"),
    (scale_shift, "scale"),
    (scale_shift, "shift"),
]


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
        "activation", ["tanh", "ReLU", "", ("relu", 0.1), ("leaky_relu",), ("leaky_relu", 1, 2)]
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
        with pytest.raises(ValueError, match=mentions("activation", "tanh")):
            bnfast.BatchNorm(4, activation="tanh")


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


class TestLayers:
    """A refused call changes no statistic, counter or output."""

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"x": X[:, :3]}, ValueError, ("x", "channels", 3, 4)),
            ({"x": X.astype(np.uint16)}, TypeError, DATA_TYPES),
            ({"x": X.astype(int)}, TypeError, DATA_TYPES),
            ({"x": X[0, 0]}, ValueError, ("x",)),
            ({"x": X[:1, :, :1]}, ValueError, ("Expected more than 1 value per channel",)),
            ({"x": X, "residual": R[:5]}, ValueError, ("residual",)),
            ({"x": X, "out": OUT[:5]}, ValueError, ("out",)),
            ({"x": X, "out": read_only(OUT)}, ValueError, ("out",)),
        ],
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_refused_call(self, arguments, error, words, momentum):
        layer = bnfast.BatchNorm(4, momentum=momentum)
        layer(DY)
        before = {k: bits(a) for k, a in layer.state_dict().items()}
        with pytest.raises(error, match=mentions(*words)):
            layer(**arguments)
        assert {k: bits(a) for k, a in layer.state_dict().items()} == before
        assert np.isnan(OUT).all()

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"num_features": -1}, ValueError, ("num_features", "-1")),
            ({"num_features": 2.5}, TypeError, ("num_features", "integer")),
            ({"num_features": "4"}, TypeError, ("num_features", "integer")),
            ({"num_features": 4, "eps": np.nan}, ValueError, ("eps", "nan")),
            ({"num_features": 4, "eps": -1.0}, ValueError, ("eps", "-1.0")),
            ({"num_features": 4, "momentum": np.inf}, ValueError, ("momentum", "inf")),
            ({"num_features": 4, "ddof": 3}, ValueError, ("ddof", "3")),
            ({"num_features": 4, "dtype": np.float16}, TypeError, PARAMETER_TYPES),
            ({"num_features": 4, "dtype": int}, TypeError, PARAMETER_TYPES),
            ({"num_features": 4, "axis": 1.5}, TypeError, ("axis", "integer")),
        ],
        ids=str,
    )
    def test_constructor(self, arguments, error, words):
        with pytest.raises(error, match=mentions(*words)):
            bnfast.BatchNorm(**arguments)

    def test_frozen(self):
        frozen = bnfast.BatchNorm(4).freeze()
        for arguments, error, words in (
            ({"x": X[:, :3]}, ValueError, ("x", "channels", 3, 4)),
            ({"x": X.astype(int)}, TypeError, DATA_TYPES),
            ({"x": X, "residual": R[:5]}, ValueError, ("residual",)),
            ({"x": X, "out": OUT[:5]}, ValueError, ("out",)),
        ):
            with pytest.raises(error, match=mentions(*words)):
                frozen(**arguments)
        assert np.isnan(OUT).all()


class TestOptionsThatAreArrays:
    """Cases where Python's own message would not name the argument."""

    @each(forward, training, inference, normalize)
    @pytest.mark.parametrize("value", [np.array([1e-5]), np.array([1e-5, 1e-5])], ids=["1", "2"])
    def test_eps(self, call, value):
        call.refuses(TypeError, ("eps", "an array of float64", "a number"), eps=value)

    @each(training, inference)
    @pytest.mark.parametrize("value", [np.array([0.1]), np.array([0.1, 0.1])], ids=["1", "2"])
    def test_momentum(self, call, value):
        call.refuses(TypeError, ("momentum", "an array of float64", "a number"), momentum=value)

    def test_ddof(self):
        training.refuses(TypeError, ("ddof", "an array of int64"), ddof=np.array([1]))

    @each(*ALL)
    def test_axis(self, call):
        call.refuses(TypeError, ("axis", "an array of int64", "integer"), axis=np.array([1]))

    @each(training, inference)
    @pytest.mark.parametrize("value", [np.array([True, False]), X], ids=["2", "x"])
    def test_training(self, call, value):
        call.refuses(TypeError, ("training", "True or False"), training=value)

    @each(*FORWARDS, backward)
    def test_activation(self, call):
        call.refuses(ValueError, ("activation", "relu6"), activation=(X, 0.1))

    @each(forward, training)
    def test_numbers_of_numpys_are_numbers(self, call):
        arguments = {k: copied(v) for k, v in call.named.items()}
        x = arguments.pop("x")
        call.function(x, **arguments, eps=np.float32(1e-5), axis=np.int8(1))
        call.function(x, **arguments, eps=np.array(1e-5), axis=np.array(1))


class TestForeignTensors:
    def test_a_tensor_on_another_device(self):
        class Elsewhere:
            def __dlpack__(self, **options):
                raise AssertionError("nobody should ask for the data")

            def __dlpack_device__(self):
                return (2, 0)

        for call in ALL:
            call.refuses(TypeError, ("x", "device", 2, "CPU"), x=Elsewhere())
        for call in (*FORWARDS, backward):
            call.refuses(TypeError, ("residual", "device", "CPU"), residual=Elsewhere())

    @each(*ALL)
    def test_array_that_raises(self, call):
        class Broken:
            def __array__(self, *dtype, **copy):
                raise ValueError("no data")

            def __repr__(self):
                raise RuntimeError("no name")

        call.refuses(TypeError, ("x", "of type Broken", "no data"), x=Broken())

    def test_long_double_named_double(self):
        """As on systems where both have the same width: its type differs, and no kernel has it."""
        dtype = SimpleNamespace(name="float64", char="g", type=np.longdouble)
        with pytest.raises(TypeError, match=mentions("x", "expected", "float64")):
            _arrays.check_type("x", SimpleNamespace(dtype=dtype))
        with pytest.raises(TypeError, match=mentions("mean", "expected", "float64")):
            _arrays.check_type("mean", SimpleNamespace(dtype=dtype))


@each(*ALL)
def test_failed_conversion_raises_instead_of_looping(call, monkeypatch):
    """Without a check it would be converted again and again."""

    class Unconverted(_arrays.Canonical):
        def __init__(self, x, axis, **others):
            super().__init__(x, axis, **others)
            self.x = self.x.astype(np.longdouble)

    monkeypatch.setattr(_arrays, "Canonical", Unconverted)
    call.refuses(RuntimeError, ("Canonical", "defect"), x=X[::-1])


class TestUnusualArrays:
    """Overlaps that must be found although unusual memory orders are converted to a copy."""

    @pytest.mark.parametrize("name", RUNNING)
    @pytest.mark.parametrize("tensor", ["x", "residual", "out"])
    def test_running_statistics_inside_a_strided_tensor(self, name, tensor):
        store = np.zeros((6, 4, 10), np.float32)
        view = store[:, :, ::2]
        view[...] = X
        inside = store.reshape(-1)[8:16:2]
        training.refuses(
            ValueError, (name, "overlaps"), **{"x": X[::-1], tensor: view, name: inside}
        )

    @pytest.mark.parametrize("x", [X, X[::-1]], ids=["common", "strided"])
    @pytest.mark.parametrize("step", [1, 2])
    @pytest.mark.parametrize("parameter", ["weight", "bias", "running_var"])
    def test_running_statistics_inside_a_parameter(self, x, step, parameter):
        store = np.ones(16, np.float32)
        inside, beside = store[: 4 * step : step], store[step : 5 * step : step]
        training.refuses(
            ValueError,
            ("running_mean", "overlaps"),
            x=x,
            **{"running_mean": inside, parameter: beside},
        )

    @pytest.mark.parametrize("x", [X, X[::-1]], ids=["common", "strided"])
    def test_running_statistics_inside_foreign_array(self, x):
        """The overlap is found through the protocol that the array is read by."""
        store = np.ones(5, np.float32)
        for name in ("weight", "bias"):
            training.refuses(
                ValueError,
                ("running_mean", "overlaps"),
                **{"x": x, "running_mean": store[:4], name: memoryview(store[1:])},
            )
        x = np.ascontiguousarray(x)
        training.refuses(
            ValueError, ("running_mean", "overlaps"), x=memoryview(x), running_mean=x[0, 0, :4]
        )

    @pytest.mark.parametrize("x", [X, X[::-1]], ids=["common", "strided"])
    def test_running_statistics_without_strides(self, x):
        """All channels would be updated in one place."""
        for name in RUNNING:
            training.refuses(
                ValueError, (name, "stride 0", "share memory"), x=x, **{name: zero_stride((4,))}
            )

    @pytest.mark.parametrize(("call", "name"), PER_CHANNEL, ids=repr)
    def test_parameter_inside_a_strided_out(self, call, name):
        """It is written at the end, from a copy: the parameter would be read in time, then lost."""
        store = np.ones((6, 4, 10), np.float32)
        call.refuses(
            ValueError,
            ("overlaps", name),
            **{name: store.reshape(-1)[:8:2], "out": store[:, :, ::2]},
        )

    @pytest.mark.parametrize("name", ["mean", "inv_std"])
    def test_statistics_inside_a_strided_out(self, name):
        store = np.ones((6, 4, 10), np.float32)
        inside = store.reshape(-1)[:8].view(np.float64)
        backward.refuses(
            ValueError,
            ("overlaps", f"stats.{name}"),
            stats=STATS._replace(**{name: inside}),
            out=store[:, :, ::2],
        )

    def test_statistics_of_one_alone(self):
        """running_mean None with a running_var is refused, in layers as well."""
        for given in (None, X[::-1]):
            layer = bnfast.BatchNorm(4)
            layer.running_mean = None
            with pytest.raises(TypeError, match=mentions("running_mean", "None")):
                layer(X if given is None else given)
            assert layer.running_var.tolist() == [1] * 4
            assert layer.num_batches_tracked == 0

    @pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)], ids=str)
    def test_one_value_per_channel(self, shape):
        x = np.ones((*shape[:-1], 2 * shape[-1]), np.float32)[..., ::2]
        for call in (forward, training):
            call.refuses(
                ValueError,
                ("Expected more than 1 value per channel when training, got input size", shape),
                x=x,
                residual=None,
                out=None,
                axis=1,
            )

    def test_frozen_channels(self):
        frozen = bnfast.BatchNorm(4).freeze()
        x = with_memory_order(2, 0, 1)(X[:, :3])
        with pytest.raises(ValueError, match=mentions("x", (6, 3, 5), "3 channels", "axis 1", 4)):
            frozen(x)


@pytest.mark.parametrize("shape", [(0, 2**58), (0, 2**61 - 1), (0, 2**40, 3)], ids=str)
@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: x[::-1]], ids=["common", "strided"])
def test_too_many_channels(shape, arrange):
    """Only an array without values can have so many."""
    x = arrange(np.empty(shape, np.float32))
    ones = np.broadcast_to(np.float32(1), shape[1:2])
    for call in (
        lambda: bnfast.batch_norm_forward(x),
        lambda: bnfast.batch_norm(x, training=True),
        lambda: bnfast.moments(x),
        lambda: bnfast.scale_shift(x, None, None),
        lambda: bnfast.normalize(x, ones, ones),
        lambda: bnfast.batch_norm_backward(x, x, bnfast.BatchStats(ones, ones, ones, 0)),
    ):
        with pytest.raises(MemoryError):
            call()


class TestGradients:
    @pytest.mark.parametrize("x", [X, X[::-1]], ids=["common", "strided"])
    def test_dy_none(self, x):
        backward.refuses(TypeError, ("dy", "None", "gradient"), dy=None, x=x)

    @pytest.mark.parametrize("name", ["mean", "inv_std"])
    def test_missing_statistics(self, name):
        """The core would take 0 and 1 for None."""
        backward.refuses(TypeError, (f"stats.{name}", "None"), stats=STATS._replace(**{name: None}))

    @pytest.mark.parametrize(
        "count", [30.0, None, "30", np.float64(30), np.array([30]), True], ids=repr
    )
    def test_count_of_another_type(self, count):
        backward.refuses(TypeError, ("stats.count", "integer"), stats=STATS._replace(count=count))

    @pytest.mark.parametrize("count", [np.int64(30), np.int64(0), np.array(30)], ids=repr)
    def test_count_of_numpys(self, count):
        arguments = {k: copied(v) for k, v in backward.named.items()}
        arguments["stats"] = STATS._replace(count=count)
        want = arguments | {"stats": STATS._replace(count=int(count)), "out": poisoned_like(X)}
        got = bnfast.batch_norm_backward(**arguments)
        assert bits(got.x) == bits(bnfast.batch_norm_backward(**want).x)

    @pytest.mark.parametrize("needs", [1, 2.5, [["x"]], [{}], object()], ids=str)
    def test_needs_of_another_type(self, needs):
        backward.refuses(TypeError, ("needs", "names of gradients"), needs=needs)

    def test_needs_of_mixed_types(self):
        backward.refuses(ValueError, ("needs", "1", "'y'"), needs=["x", "y", 1])


class TestFrozen:
    def make(self):
        layer = bnfast.BatchNorm(4, activation="relu")
        layer(X)
        return layer.freeze()

    @pytest.mark.parametrize("name", ["mean", "scale", "shift"])
    def test_arrays_cannot_be_changed(self, name):
        """A read-only array that owns its memory can be made writeable, and any can be reshaped."""
        frozen = self.make()
        y = frozen(X)
        held = getattr(frozen, name)
        with pytest.raises(ValueError, match=r"(?i)writeable"):
            held.flags.writeable = True
        with pytest.raises(ValueError, match=r"(?i)writeable"):
            held.base.flags.writeable = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            held.shape = (2, 2)
            held.dtype = np.int32
        assert getattr(frozen, name).shape == (4,)
        assert getattr(frozen, name).dtype == np.float64
        assert bits(frozen(X)) == bits(y)

    @pytest.mark.parametrize("name", ["mean", "scale", "shift"])
    def test_returned_arrays_do_not_expose_memory(self, name):
        """This holds for such an array, for its base, and so on."""
        frozen, y = self.make(), self.make()(X)
        changes = (
            lambda a: setattr(a, "dtype", np.uint8),
            lambda a: setattr(a, "shape", (2, a.size // 2)),
            lambda a: a.setflags(write=True),
            lambda a: a.resize(1, refcheck=False),
            lambda a: a.__setstate__((1, (1,), np.dtype(np.float64), False, bytes(8))),
        )
        for change in changes:
            held = getattr(frozen, name)
            while isinstance(held, np.ndarray):
                with suppress(ValueError, AttributeError), warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    change(held)
                held = held.base
            assert getattr(frozen, name).shape == (4,)
            assert bits(frozen(X)) == bits(y)

    def test_population_statistics_cannot_be_changed(self):
        with pytest.raises(ValueError, match=r"(?i)writeable"):
            POPULATION.mean.flags.writeable = True

    def test_second_init_refused(self):
        frozen = self.make()
        with pytest.raises(RuntimeError, match="immutable"):
            frozen.__init__(W, W, W)

    @pytest.mark.parametrize("way", range(3))
    def test_init_inside_init_refused(self, way):
        """From an argument whose `__array__` calls it: the first call that completes counts."""
        frozen = bnfast.FrozenBatchNorm.__new__(bnfast.FrozenBatchNorm)

        class Starting:
            def __array__(self, *dtype, **copy):
                bnfast.FrozenBatchNorm.__init__(frozen, W[:3], W[:3], W[:3], 2)
                return W

        arguments = [W, W, W]
        arguments[way] = Starting()
        with pytest.raises(RuntimeError, match="immutable"):
            frozen.__init__(*arguments)
        assert frozen.mean.tolist() == W[:3].tolist()
        assert frozen(X[..., :3]).shape == (6, 4, 3)

    def test_object_without_init(self):
        frozen = bnfast.FrozenBatchNorm.__new__(bnfast.FrozenBatchNorm)
        assert repr(frozen) == "FrozenBatchNorm(never initialised)"
        for use in (
            lambda: frozen(X),
            lambda: frozen.mean,
            lambda: frozen.scale,
            lambda: frozen.shift,
            lambda: pickle.dumps(frozen),
            lambda: bnfast.fold(np.ones((4, 4)), None, frozen),
        ):
            with pytest.raises(RuntimeError, match="never initialised"):
                use()

    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"mean": W[None]}, ValueError, ("mean", (1, 4))),
            ({"mean": np.float32(1)}, ValueError, ("mean", "()")),
            ({"mean": None}, TypeError, ("mean", "object")),
            ({"scale": W[:3]}, ValueError, ("scale", (3,), (4,))),
            ({"shift": "four"}, TypeError, ("shift",)),
            ({"shift": np.ma.masked_array(W, W > 0)}, TypeError, ("shift", "masked")),
            ({"axis": "1"}, TypeError, ("axis", "integer")),
            ({"activation": "tanh"}, ValueError, ("activation", "tanh")),
        ],
        ids=str,
    )
    def test_constructor(self, changes, error, words):
        arguments = {"mean": W, "scale": W, "shift": B, "axis": 1, "activation": None}
        with pytest.raises(error, match=mentions(*words)):
            bnfast.FrozenBatchNorm(**arguments | changes)
