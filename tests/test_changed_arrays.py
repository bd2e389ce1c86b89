"""Arrays that change while a call reads its arguments.

Options and arrays may be objects whose `__float__`, `__index__` or `__array__` runs any code, and
finalizers and signal handlers run anywhere in Python. Such code may change the arrays of the call.
The call checks them after it: it uses them as they are then, or is refused. All tests run in
separate Pythons, since a mistake here is a crash.
"""

import gc
import hashlib
import random
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest
from cases import bits, make_problem
from processes import run_alone

import bnfast

# More than a kilobyte each: NumPy keeps smaller blocks, in which freed data could still be read.
P = make_problem((6, 300, 5), residual=True)
STATS = bnfast.batch_norm_forward(P.x)[1]
WRITTEN = ("out", "running_mean", "running_var", "counter")
REFUSALS = (TypeError, ValueError, RuntimeError)


# --- Changes of an array


def smaller(a):
    a.resize((1,) * a.ndim, refcheck=False)


def empty(a):
    a.resize((0,) * max(a.ndim, 1), refcheck=False)


def longer(a):
    a.resize((4 * len(a), *a.shape[1:]) if a.ndim else (4000,), refcheck=False)


def moved(a):
    shape = a.shape
    a.resize(64 * a.size + 7, refcheck=False)
    a.resize(shape, refcheck=False)


def in_bytes(a):
    a.dtype = np.uint8


def in_halves(a):
    a.dtype = np.float16


def of_integers(a):
    a.dtype = f"u{a.itemsize}"


def swapped(a):
    a.dtype = a.dtype.newbyteorder("S")


def flat(a):
    a.shape = (a.size,)


def turned(a):
    a.shape = a.shape[::-1]


def one_place(a):
    a.strides = (0,) * a.ndim


def read_only(a):
    a.flags.writeable = False


def other_memory(a):
    a.__setstate__((1, (1,) * a.ndim, a.dtype, False, bytes(a.itemsize)))


CHANGES = (smaller, empty, longer, moved, in_bytes, in_halves, of_integers, swapped, flat, turned,
           one_place, read_only, other_memory)  # fmt: skip


# --- Calls with arrays and options, all given by name


class Sub(np.ndarray):
    pass


def arrays():
    w = np.abs(P.weight)
    return {
        "x": P.x.copy(), "dy": P.dy.copy(), "residual": P.residual.copy(), "y": P.residual.copy(),
        "out": np.full_like(P.x, 7), "weight": w.copy(), "bias": P.bias.copy(),
        "running_mean": P.bias.copy(), "running_var": w.copy(), "mean": STATS.mean.copy(),
        "inv_std": STATS.inv_std.copy(), "counter": np.array(3),
        "sum_weight": STATS.mean.copy(), "sum_bias": STATS.inv_std.copy(),
    }  # fmt: skip


OPTIONS = {"eps": 1e-3, "momentum": 0.25, "ddof": 1, "axis": 1, "slope": 0.5, "training": True,
           "count": STATS.count}  # fmt: skip


def training(x, running_mean, running_var, weight, bias, residual, out, training, momentum, eps,
             axis, ddof, slope):  # fmt: skip
    return bnfast.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, axis=axis, ddof=ddof,
        residual=residual, activation=("leaky_relu", slope), out=out,
    )  # fmt: skip


def training_to_a_fresh_result(x, running_mean, running_var, weight, eps):
    return bnfast.batch_norm(x, running_mean, running_var, weight, training=True, eps=eps)


def inference(x, running_mean, running_var, weight, bias, residual, out, eps, axis, slope):
    return bnfast.batch_norm(
        x, running_mean, running_var, weight, bias, eps=eps, axis=axis, residual=residual,
        activation=("leaky_relu", slope), out=out,
    )  # fmt: skip


def forward(x, weight, bias, eps, axis):
    y, stats = bnfast.batch_norm_forward(x, weight, bias, eps=eps, axis=axis)
    return (y, *stats)


def backward(dy, x, mean, inv_std, weight, bias, residual, y, out, count, axis, slope):
    stats = bnfast.BatchStats(mean, None, inv_std, count)
    return bnfast.batch_norm_backward(
        dy, x, stats, weight, bias, axis=axis, residual=residual, y=y, out=out,
        activation=("leaky_relu", slope),
    )  # fmt: skip


def backward_of_a_part(dy, x, mean, inv_std, weight, sum_weight, sum_bias, count):
    stats = bnfast.BatchStats(mean, None, inv_std, count)
    sums = (sum_weight, sum_bias)
    return bnfast.batch_norm_backward(dy, x, stats, weight, sums=sums, needs=["x"])


def normalize(x, running_mean, running_var, weight, bias, out, eps, axis):
    return bnfast.normalize(x, running_mean, running_var, weight, bias, eps=eps, axis=axis, out=out)


def scale_shift(x, weight, bias, residual, axis):
    return bnfast.scale_shift(x, weight, bias, residual=residual, axis=axis)


def moments(x, axis):
    return bnfast.moments(x, axis=axis).mean


def layer_of(running_mean, running_var, weight, bias, counter, eps, axis, slope):
    layer = bnfast.BatchNorm(300)
    layer.running_mean, layer.running_var, layer.num_batches_tracked = (
        running_mean, running_var, counter)  # fmt: skip
    layer.weight, layer.bias, layer.eps, layer.axis = weight, bias, eps, axis
    layer.activation = ("leaky_relu", slope)
    return layer


def layer_in_training(x, residual, out, momentum, ddof, **state):
    layer = layer_of(**state)
    layer.momentum, layer.ddof = momentum, ddof
    return layer(x, residual, out)


def layer_of_averages(x, out, **state):
    layer = layer_of(**state)
    layer.momentum = None
    return layer(x, out=out)


def layer_in_evaluation(x, residual, out, **state):
    return layer_of(**state).eval()(x, residual, out)


def frozen(x, residual, out):
    return bnfast.FrozenBatchNorm(P.bias, P.weight, P.bias, 1, "relu")(x, residual, out)


LAYER = ("running_mean", "running_var", "weight", "bias", "counter", "eps", "axis", "slope")
CALLS = {
    f.__name__: (f, f.__code__.co_varnames[: f.__code__.co_argcount])
    for f in (training, training_to_a_fresh_result, inference, forward, backward,
              backward_of_a_part, normalize, scale_shift, moments, frozen)
} | {
    f.__name__: (f, (*f.__code__.co_varnames[: f.__code__.co_argcount], *LAYER))
    for f in (layer_in_training, layer_of_averages, layer_in_evaluation)
}  # fmt: skip


class Asked:
    """Runs this action once, when it is asked for its value: the first time, or a later one."""

    def __init__(self, value, action, times=1):
        self.value, self.action, self.times = value, action, times

    def answer(self, *args, **options):
        self.times -= 1
        if self.times == 0:
            self.action()
        return self.value

    __float__ = __index__ = __bool__ = __array__ = answer


def may_be_any_object(name):
    """Whether an argument is read through its methods. Written arguments must be arrays."""
    return name not in WRITTEN


# --- Expected results


def digest(a):
    """A hash of an array's bits, short enough for an assertion's message."""
    return hashlib.sha256(bits(a)).hexdigest()[:16]


def refusal_of(function, given):
    """The exception that refuses a call; None if it is accepted."""
    try:
        function(**given)
    except REFUSALS as refusal:
        return refusal
    return None


def outcome(function, given):
    """What a call returned and wrote, or the exception that refused it."""
    try:
        found = function(**given)
    except REFUSALS as refusal:
        return refusal
    results = found if isinstance(found, tuple) else (found,)
    written = (given[name] for name in WRITTEN if name in given)
    return [digest(a) for a in (*results, *written) if a is not None]


def copy_of(value):
    if not isinstance(value, np.ndarray):
        return value
    copy = value.copy(order="K")
    copy.flags.writeable = value.flags.writeable
    return copy


def judge(what, got, want, given, after):
    """The result is that of the changed arrays, or the call is refused and nothing changed."""
    if isinstance(got, Exception):
        for name in WRITTEN[1:]:
            assert name not in given or bits(given[name]) == bits(after[name]), (*what, name, got)
    else:
        assert got == want, (*what, want)


def attack(call):
    """Change each array from each argument that runs Python, and check the result."""
    warnings.simplefilter("ignore", DeprecationWarning)
    function, names = CALLS[call]
    for way in filter(may_be_any_object, names):
        for target in (name for name in names if name not in OPTIONS and name != way):
            for change in CHANGES:
                values = arrays() | OPTIONS
                given = {name: values[name] for name in names}
                after = {}

                def act(given=given, after=after, target=target, change=change):
                    with suppress(ValueError):  # raised by NumPy if such an array cannot be changed
                        change(given[target])
                    after.update({name: copy_of(value) for name, value in given.items()})

                plain, given[way] = given[way], Asked(given[way], act)
                got = outcome(function, given)
                after[way] = plain
                want = outcome(function, {name: copy_of(value) for name, value in after.items()})
                judge((call, way, target, change.__name__), got, want, given, after)


# --- Code that runs anywhere: finalizers, signal handlers, trace functions


class Meanwhile:
    """Runs this at the nth place where others' code may run: a line or a collection."""

    def __init__(self, n, action=lambda: None):
        self.n, self.action, self.places = n, action, 0

    def __enter__(self):
        self.threshold = gc.get_threshold()
        gc.callbacks.append(self.collect)
        gc.set_threshold(1, 10**6, 10**6)
        sys.settrace(self.trace)

    def __exit__(self, *raised):
        sys.settrace(None)
        gc.set_threshold(*self.threshold)
        gc.callbacks.remove(self.collect)

    def trace(self, frame, event, argument):
        self.reach()
        return self.trace

    def collect(self, phase, info):
        if phase == "start":
            self.reach()

    def reach(self):
        self.places += 1
        if self.places == self.n:
            self.action()


def view_of_more(a):
    store = np.zeros(a.size + 16, a.dtype)
    view = store[8 : 8 + a.size].reshape(a.shape)
    view[...] = a
    return view, store


def subclass(a):
    a = a.view(Sub).copy()
    return a, a


def view_of_subclass(a):
    view, _ = view_of_more(a)
    store = view.base.view(Sub).copy()
    return store[8 : 8 + a.size].reshape(a.shape).view(np.ndarray), store


def foreign_order(a):
    a = a.astype(a.dtype.newbyteorder("S"))
    return a, a


def subclass_of_foreign_order(a):
    return subclass(foreign_order(a)[0])


def channels_last(a):
    store = np.ascontiguousarray(np.moveaxis(a, 1, -1)) if a.ndim > 2 else a.copy()
    return (np.moveaxis(store, -1, 1) if a.ndim > 2 else store), store


# How the arrays are given: (array, the array that owns its memory).
KINDS = {
    "plain": lambda a: (a, a), "view": view_of_more, "subclass": subclass,
    "view of a subclass": view_of_subclass, "memoryview": lambda a: (memoryview(a), a),
    "foreign byte order": foreign_order, "channels last": channels_last,
    "subclass of foreign byte order": subclass_of_foreign_order,
}  # fmt: skip


def arranged(kind, names):
    """The arguments of a call, and the owner of each one's memory."""
    values, given, owners = arrays() | OPTIONS, {}, {}
    for name in names:
        given[name] = value = values[name]
        if isinstance(value, np.ndarray):
            takes = name not in WRITTEN or not (
                kind == "memoryview" or (name == "counter" and "foreign" in kind)
            )
            given[name], owners[name] = KINDS[kind if takes else "plain"](value)
    return given, owners


def attack_meanwhile(kind, cases):
    """Change arrays of each call at random places, the same ones each time."""
    warnings.simplefilter("ignore", DeprecationWarning)
    for call in CALLS:
        attack_at_random(call, kind, cases)


def attack_at_random(call, kind, cases):
    function, names = CALLS[call]
    given, owners = arranged(kind, names)
    counted = Meanwhile(0)
    with counted:
        function(**given)
    drawn = random.Random(f"{call} {kind}")
    for _ in range(cases):
        target, change = drawn.choice([*owners]), drawn.choice(CHANGES)
        given, owners = arranged(kind, names)
        statistics = {name: bits(given[name]) for name in WRITTEN[1:] if name in given}

        def act(change=change, owner=owners[target]):
            with suppress(ValueError):
                change(owner)

        place = drawn.randrange(1, counted.places + 1)
        with Meanwhile(place, act):
            refusal = refusal_of(function, given)
        if refusal:
            for name, before in statistics.items():
                what = (call, kind, target, change.__name__, place, name, refusal)
                assert name == target or bits(given[name]) == before, what


# --- Memory that is freed after it was found


def attack_tensor(kind):
    """Free the memory of x when the residual is asked for its array, which is after x."""
    function, names = CALLS["scale_shift"]
    given, owners = arranged(kind, names)
    given["residual"] = Asked(P.residual, lambda: empty(owners["x"]))
    assert refusal_of(function, given)


def attack_statistics(kind):
    for target in WRITTEN[1:]:
        attack_statistic(kind, target)


def attack_statistic(kind, target):
    """Free a statistic's memory when the weight is read, when only Python refers to the memory."""
    function, names = CALLS["layer_in_training"]
    given, owners = arranged(kind, names)
    given["weight"] = Asked(P.weight.copy(), lambda: empty(owners[target]), times=2)
    others = [name for name in WRITTEN if name != target]
    before = {name: bits(given[name]) for name in others}
    assert refusal_of(function, given)
    assert {name: bits(given[name]) for name in others} == before


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_changes_another(call):
    run_alone(attack, call)


@pytest.mark.parametrize("kind", KINDS)
def test_array_changed_at_any_time(kind):
    run_alone(attack_meanwhile, kind, 60)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_with_freed_memory(kind):
    run_alone(attack_tensor, kind)


@pytest.mark.parametrize("kind", ["view", "subclass", "view of a subclass"])
def test_statistic_with_freed_memory(kind):
    run_alone(attack_statistics, kind)
