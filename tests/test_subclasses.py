"""Subclasses of NumPy's array that state wrong properties, or raise when asked.

Each is used as the array that it is: results and written arrays have the bits of a plain one. All
tests run in separate Pythons, since believing a wrong shape is a crash.
"""

import numpy as np
import pytest
from cases import bits, make_problem
from processes import run_alone

import bnfast

P = make_problem((6, 300, 5), residual=True)
STATS = bnfast.batch_norm_forward(P.x)[1]


class Unwilling(Exception):
    """An exception that a subclass raises."""


def raises(self, *args, **options):
    raise Unwilling


def says(answer):
    return property(lambda self: answer)


# Wrong values of attributes.
LIES = {
    "shape": [(1,), (10**6,), (6, 300, 1000), (), None],
    "dtype": [np.dtype("f8"), np.dtype("u1"), np.dtype("i8"), np.dtype("O"), None],
    "strides": [(0, 0, 0), (2**40,), None],
    "ndim": [0, 1, 99, None],
    "size": [0, 2**40, None],
    "nbytes": [0, 2**40, None],
    "itemsize": [1, 64, None],
    "flags": [0, np.zeros(1).flags, None],
    "base": [3, None],
    "data": [None],
    "ctypes": [None],
    "T": [None],
    "__array_interface__": [{"shape": (10**6,), "typestr": "<f8", "data": (1, False)}, None],
    "__array_struct__": [3, None],
    "__array_priority__": [1e9, None],
    "__class__": [int, list, np.ndarray, type(None)],
}
METHODS = (
    "__array_ufunc__", "__array_function__", "__array_wrap__", "__getitem__", "__setitem__",
    "__eq__", "__ne__", "__bool__", "__len__", "__iter__", "__float__", "__index__", "__repr__",
    "__str__", "__array__", "__dlpack__", "__dlpack_device__", "__iadd__", "__add__", "__mul__",
    "__sub__", "__copy__", "__deepcopy__", "__reduce__", "__getattribute__", "astype", "copy",
    "reshape", "view", "transpose", "tobytes", "resize", "item", "any", "all", "fill", "setflags",
    "min", "max", "sum",
)  # fmt: skip
CLASSES = {
    f"{name} {answer!r}": type("Liar", (np.ndarray,), {name: says(answer)})
    for name, answers in LIES.items()
    for answer in answers
} | {
    f"{name} raises": type("Unwilling", (np.ndarray,), {name: how})
    for names, how in ((LIES, property(raises)), (METHODS, raises))
    for name in names
}


def arrays():
    w = np.abs(P.weight)
    return {
        "x": P.x.copy(), "dy": P.dy.copy(), "residual": P.residual.copy(), "y": P.residual.copy(),
        "out": np.full_like(P.x, 7), "weight": w.copy(), "bias": P.bias.copy(),
        "running_mean": P.bias.copy(), "running_var": w.copy(), "mean": STATS.mean.copy(),
        "inv_std": STATS.inv_std.copy(), "counter": np.array(3), "weight_grad": w.copy(),
        "bias_grad": w.copy(),
    }  # fmt: skip


# --- Calls, each of which returns arrays; written arrays are compared as well


def training(x, running_mean, running_var, weight, bias, residual, out):
    return bnfast.batch_norm(
        x, running_mean, running_var, weight, bias, True, residual=residual, activation="relu",
        out=out,
    )  # fmt: skip


def inference(x, running_mean, running_var, weight, bias, residual, out):
    return bnfast.batch_norm(x, running_mean, running_var, weight, bias, residual=residual, out=out)


def backward(dy, x, mean, inv_std, weight, bias, residual, y, out):
    return bnfast.batch_norm_backward(
        dy, x, STATS._replace(mean=mean, inv_std=inv_std), weight, bias, residual=residual, y=y,
        activation="relu", out=out,
    )  # fmt: skip


def moments(x, mean, running_var):
    total = bnfast.Moments(3, mean, running_var).update(x)
    return (total.mean, total.m2, bnfast.moments(x).m2)


def frozen(x, mean, inv_std, bias, residual, out):
    return bnfast.FrozenBatchNorm(mean, inv_std, bias, 1, "relu6")(x, residual, out)


def layer(x, dy, residual, running_mean, running_var, weight, bias, counter, weight_grad,
          bias_grad):  # fmt: skip
    layer = bnfast.BatchNorm(300, activation="relu")
    layer.running_mean, layer.running_var, layer.num_batches_tracked = (
        running_mean, running_var, counter)  # fmt: skip
    layer.weight, layer.bias, layer.weight_grad, layer.bias_grad = (
        weight, bias, weight_grad, bias_grad)  # fmt: skip
    y = layer(x, residual)
    found = (y, *layer.backward(dy), *layer.state_dict().values())
    return (*found, layer.eval()(x), layer.freeze()(x))


def load(running_mean, running_var, weight, bias, counter, mean, inv_std):
    """Load a state into the layer's own arrays, and these into another layer."""
    layer, other = bnfast.BatchNorm(300), bnfast.BatchNorm(300)
    layer.running_mean, layer.running_var, layer.num_batches_tracked = (
        running_mean, running_var, counter)  # fmt: skip
    state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": inv_std,
             "num_batches_tracked": np.array(8)}  # fmt: skip
    layer.load_state_dict(state)
    other.load_state_dict(vars(layer), strict=False)
    return (*layer.state_dict().values(), *other.state_dict().values())


def fold(bias, mean, inv_std):
    stats = bnfast.BatchStats.from_population(mean, inv_std)
    return bnfast.fold(P.x.swapaxes(0, 1), bias, bnfast.FrozenBatchNorm(*stats[:2], bias))


CALLS = {f.__name__: f for f in (training, inference, backward, moments, frozen, layer, load, fold)}


def outcome(function, given):
    found = function(**given)
    results = found if issubclass(type(found), tuple) else (found,)
    return [bits(a) for a in (*results, *given.values())]


def believe(call):
    """Print where a subclass, in place of one array or of all, made a difference."""
    function = CALLS[call]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    plain = {name: arrays()[name] for name in names}
    want = outcome(function, plain)
    for what, cls in CLASSES.items():
        for chosen in (*((name,) for name in names), names):
            given = {name: arrays()[name] for name in names}
            given |= {name: np.ndarray.view(given[name], cls) for name in chosen}
            try:
                differs = outcome(function, given) != want
            except Exception as error:  # noqa: BLE001
                differs = f"raised {type(error).__name__}"
            if differs:
                print(call, what, *chosen, differs)


@pytest.mark.parametrize("call", CALLS)
def test_subclass_used_as_plain_array(call):
    assert run_alone(believe, call) == ""


class Impostor:
    """Says that it is an array, and gives one when asked."""

    __class__ = property(lambda self: np.ndarray)

    def __array__(self, *dtype, **copy):
        return np.zeros(300, np.float32)


@pytest.mark.parametrize("name", ["out", "running_mean", "running_var"])
def test_fake_array_is_not_written(name):
    w = np.abs(P.weight)
    given = {"out": None, "running_mean": w, "running_var": w.copy(), name: Impostor()}
    with pytest.raises(TypeError, match=f"^{name} is .*Impostor; expected a NumPy array"):
        bnfast.batch_norm(P.x, training=True, **given)
