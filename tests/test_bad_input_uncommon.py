"""Bad input of the uncommon kinds: options that are arrays, tensors of others, memory orders."""

from types import SimpleNamespace

import numpy as np
import pytest
from bad_calls import (
    ALL,
    FORWARDS,
    PER_CHANNEL,
    RUNNING,
    STATS,
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
from cases import with_memory_order

import bnfast
from bnfast import _arrays


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

    @pytest.mark.parametrize(
        ("shape", "shown"),
        [((2, 3), " and shape (2, 3)"), (None, ""), ("ab", ""), ((), " and shape ()")],
    )
    def test_one_of_several_lines_is_named_by_type_and_shape(self, shape, shown):
        class Tall:
            def __repr__(self):
                return "Tall(\n  1\n)"

        tall = Tall()
        tall.shape = shape
        with pytest.raises(TypeError) as caught:
            bnfast.batch_norm_forward(np.ones((2, 3)), out=tall)
        assert str(caught.value) == f"out is an object of type Tall{shown}; expected a NumPy array"

    def test_a_shape_that_raises_is_no_matter(self):
        class Tall:
            shape = property(lambda self: 1 / 0)

            def __repr__(self):
                return "Tall(\n)"

        with pytest.raises(TypeError, match="out is an unprintable Tall of type Tall"):
            bnfast.batch_norm_forward(np.ones((2, 3)), out=Tall())

    def test_long_double_named_double(self):
        """As on systems where both have the same width: its type differs, and no kernel has it."""
        dtype = SimpleNamespace(name="float64", char="g", kind="f", type=np.longdouble)
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
