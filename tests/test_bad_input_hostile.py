"""Objects that raise, or give nonsense, when they are used: for every argument.

An error names the argument, and everything else stays unchanged. What the object itself raised is
the cause. The caller's iterators and callables are different: what they raise is passed on.
"""

import inspect
import re

import numpy as np
import pytest
from cases import bits
from numpy.lib.stride_tricks import as_strided

import bnfast

X = np.random.default_rng(4).standard_normal((6, 4, 5)).astype(np.float32)
STATS = bnfast.batch_norm_forward(X)[1]


class Raises:
    """Raises this exception whenever it is used."""

    def __init__(self, error):
        object.__setattr__(self, "error", error)

    def __getattribute__(self, name):
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        raise object.__getattribute__(self, "error")(name)

    def answer(self, *args, **options):
        raise object.__getattribute__(self, "error")("asked")

    __array__ = __float__ = __index__ = __bool__ = __len__ = __getitem__ = __repr__ = answer
    __eq__ = __dlpack__ = __dlpack_device__ = answer
    __hash__ = None


class OnDevice:
    """States its device, and gives the capsule that it was made with."""

    def __init__(self, device, capsule=None):
        self.device, self.capsule = device, capsule

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        return self.capsule


class Interface:
    def __init__(self, **changes):
        self.__array_interface__ = {
            "shape": X.shape, "typestr": "<f4", "version": 3, "data": (X.ctypes.data, False),
        } | changes  # fmt: skip


class Answers:
    """Gives this answer when asked for a number, a truth value or an array."""

    def __init__(self, answer):
        self.answer = answer

    def __float__(self):
        return self.answer

    __index__ = __bool__ = __float__

    def __array__(self, *dtype, **copy):
        return self.answer


class WithoutTruth(np.ndarray):
    def __bool__(self):
        raise RuntimeError("no truth")


def array_of(something):
    array = np.empty(X.shape, object)
    array[0, 0, 0] = something
    return array


ERRORS = (RuntimeError, ValueError, KeyError, OSError, ZeroDivisionError, RecursionError)
NOBODY = {
    **{f"raises {error.__name__}": lambda error=error: Raises(error) for error in ERRORS},
    "answers text": lambda: Answers("text"),
    "answers None": lambda: Answers(None),
    "answers an object": lambda: Answers(object()),
    "an array without truth": lambda: np.ones(3, int).view(WithoutTruth),
    "an array of complex": lambda: np.array(1j),
    "an array of text": lambda: np.array("1"),
    "a complex": lambda: np.complex64(1),
    "a duration": lambda: np.timedelta64(1, "s"),
    "an endless integer": lambda: 10**400,
}
NO_ARRAY = {
    "a device unknown": lambda: OnDevice((2, 0)),
    "a device of text": lambda: OnDevice(("cpu", "0")),
    "no device": lambda: OnDevice(None),
    "no capsule": lambda: OnDevice((1, 0), object()),
    "an empty interface": lambda: Interface(shape=None),
    "a negative shape": lambda: Interface(shape=(6, -4, 5)),
    "no type": lambda: Interface(typestr="?!"),
    "no memory": lambda: Interface(data=None),
    "a class": lambda: np.ndarray,
    "a function": lambda: len,
    "objects": lambda: array_of(Raises(RuntimeError)),
    "records": lambda: np.zeros(X.shape, [("a", "f4")]),
    "as large as can be": lambda: as_strided(X[:1], (2**40, 4, 5), (0, *X.strides[1:]))[..., :3],
    "65 lists": lambda: eval("[" * 65 + "1.0" + "]" * 65),
}
NO_TARGET = {
    "an interface": Interface,
    "answers an array": lambda: Answers(X),
    "a memoryview": lambda: memoryview(X.copy()),
}

NUMBERS = {"eps", "momentum", "ddof", "axis", "out_axis", "in_axis", "groups", "n", "count",
           "num_features", "channels", "virtual_batch_size", "size", "rmax", "dmax"}  # fmt: skip
TRUTHS = {"training", "affine", "track_running_stats", "update_stats", "mode", "strict", "padded"}
CHOICES = {"activation", "stats", "sums", "moments", "bn", "dtype", "prefix", "state", "forward",
           "progress", "other"}  # fmt: skip
TARGETS = {"out", "running_mean", "running_var"}
# Truth values and numbers that are valid.
GOOD = {
    "training": {"an array of complex", "a complex", "an array of text", "a duration",
                 "an endless integer"},
    "axis": {"an endless integer"},  # for a layer, until it gets an array
    "channels": set(),
}  # fmt: skip


def trained():
    layer = bnfast.BatchNorm(4)
    layer(X)
    return layer


def calls():
    """{name: (function, good arguments)}, made new for each use."""
    w = np.ones(4, np.float32)
    good = {
        "x": X.copy(), "dy": X + 1, "residual": X * 2, "y": None, "out": np.full_like(X, 7),
        "training": True, "momentum": 0.1, "eps": 1e-5, "axis": 1, "ddof": 1, "activation": "relu",
        "stats": STATS, "needs": None, "sums": None, "moments": None, "mask": None,
        "virtual_batch_size": None,
        **{name: w.copy() for name in ("weight", "bias", "scale", "shift", "mean", "var",
                                       "running_mean", "running_var", "m2")},
    }  # fmt: skip
    layer, renorm, moments = trained(), bnfast.BatchRenorm(4), bnfast.Moments(3, w, w)
    kernel = np.ones((4, 4, 3), np.float32)
    functions = (
        bnfast.batch_norm, bnfast.batch_norm_forward, bnfast.batch_norm_backward, bnfast.normalize,
        bnfast.scale_shift, bnfast.moments, bnfast.BatchStats.from_population,
        bnfast.FrozenBatchNorm,
    )  # fmt: skip
    special = [
        (bnfast.Moments, {"count": 3, "mean": w.copy(), "m2": w.copy()}),
        (bnfast.Moments.empty, {"channels": 4}),
        (moments.merge, {"other": moments}),
        (moments.update, {"x": X.copy(), "axis": 1, "mask": None}),
        (moments.var, {"ddof": 0}),
        (layer.freeze(), {"x": X.copy(), "residual": X * 2, "out": np.full_like(X, 7)}),
        (layer, {"x": X.copy(), "residual": X * 2, "out": np.full_like(X, 7), "mask": None,
                 "update_stats": True}),
        (renorm, {"x": X.copy(), "residual": X * 2, "out": np.full_like(X, 7), "mask": None,
                  "update_stats": True}),
        (trained().backward, {"dy": X + 1}),
        (trained().train, {"mode": True}),
        (layer.load_state_dict, {"state": layer.state_dict(), "strict": True, "prefix": ""}),
        (bnfast.BatchNorm, {"num_features": 4, "eps": 1e-5, "momentum": 0.1, "affine": True,
                            "track_running_stats": True, "axis": 1, "ddof": 1,
                            "activation": "relu", "dtype": np.float32,
                            "virtual_batch_size": 2}),
        (bnfast.BatchRenorm, {"num_features": 4, "eps": 1e-5, "momentum": 0.1, "affine": True,
                              "rmax": 3.0, "dmax": 5.0, "axis": 1, "ddof": 1,
                              "activation": "relu", "dtype": np.float32}),
        (bnfast.lengths_mask, {"lengths": [1, 2], "size": 3}),
        (bnfast.fold, {"weight": kernel, "bias": w.copy(), "bn": trained(), "out_axis": 0,
                       "groups": 1}),
        (bnfast.fold_before, {"weight": kernel, "bias": w.copy(), "bn": trained(), "in_axis": 1,
                              "groups": 1, "padded": False}),
        (bnfast.recompute_statistics, {"forward": layer, "batches": [X], "layers": [layer],
                                       "progress": False}),
        (bnfast.set_num_threads, {"n": 1}),
        (bnfast.num_threads, {"n": 1}),
    ]  # fmt: skip
    plain = [(f, {n: good[n] for n in inspect.signature(f).parameters}) for f in functions]
    both = plain + special
    return {
        getattr(f, "__qualname__", f"a call of {type(f).__name__}"): (f, given) for f, given in both
    }


def nonsense_for(name):
    if name == "lengths":  # integers of any kind are lengths
        return {k: make for k, make in NOBODY.items() if k != "an array without truth"} | NO_ARRAY
    if name in TRUTHS:
        # Python converts any object to a truth value, unless it raises.
        return {k: make for k, make in NOBODY.items() if k.startswith("raises")} | {
            "an array without truth": NOBODY["an array without truth"],
            "answers text": NOBODY["answers text"],
        }
    if name in NUMBERS:
        return NOBODY | NO_ARRAY | NO_TARGET
    if name in CHOICES:
        return NOBODY | NO_TARGET
    return NOBODY | NO_ARRAY | (NO_TARGET if name in TARGETS else {})


def cases():
    for call, (_, given) in calls().items():
        for name in given:
            if name in ("needs", "batches", "layers"):
                continue
            for what in nonsense_for(name):
                if what != "an endless integer" or name not in ("axis", "count", "ddof"):
                    yield call, name, what


def watched(given):
    """The bytes of all given arrays, including those in layers."""
    found = {}
    for name, value in given.items():
        if type(value) is np.ndarray:
            found[name] = bits(value)
        if isinstance(value, bnfast.BatchNorm):
            found[name] = {n: bits(a) for n, a in value.state_dict().items()}
    return found


@pytest.mark.parametrize(("call", "name", "what"), [*cases()])
def test_is_refused_by_name(call, name, what):
    function, given = calls()[call]
    layer = function if isinstance(function, bnfast.BatchNorm) else getattr(function, "__self__", 0)
    before_layer = watched({"self": layer})
    given[name] = nonsense_for(name)[what]()
    rest = {n: value for n, value in given.items() if n != name}
    before = watched(rest)
    with pytest.raises((TypeError, ValueError, MemoryError)) as caught:
        function(**given)
    if not isinstance(caught.value, MemoryError):
        assert name in re.findall(r"\w+", str(caught.value)), caught.value
    assert watched(rest) == before
    assert watched({"self": layer}) == before_layer


def test_foreign_memory_errors_pass_through():
    class Large:
        def __array__(self, *dtype, **copy):
            raise MemoryError

        def __float__(self):
            raise MemoryError

    for options in ({"x": Large()}, {"x": X, "weight": Large()}, {"x": X, "eps": Large()}):
        with pytest.raises(MemoryError):
            bnfast.batch_norm_forward(**options)


def test_foreign_exception_is_the_cause():
    with pytest.raises(TypeError, match="x is an unprintable Raises of type Raises") as caught:
        bnfast.moments(Raises(OSError))
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(TypeError, match="eps is an unprintable Raises") as caught:
        bnfast.batch_norm_forward(X, eps=Raises(KeyError))
    assert isinstance(caught.value.__cause__, KeyError)


class Opinionated(np.ndarray):
    """A subclass that refuses NumPy's functions, and refuses to be written or transposed."""

    def refuse(self, *args, **options):
        raise RuntimeError("not with me")

    __array_function__ = __array_ufunc__ = __setitem__ = __getitem__ = refuse
    astype = copy = transpose = refuse


@pytest.mark.parametrize("strided", [False, True])
def test_subclass_used_as_plain_array(strided):
    def own(a):
        if strided:
            wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
            wide[..., ::2] = a
            a = wide[..., ::2]
        return a.view(Opinionated)

    w, m, v = np.full(4, 2, np.float32), np.zeros(4, np.float32), np.ones(4, np.float32)
    want = bnfast.batch_norm(X, m, v, w, w, True, residual=X, activation="relu")
    out, mean, var = own(np.zeros_like(X)), own(np.zeros(4, "f4")), own(np.ones(4, "f4"))
    given = own(X), mean, var, own(w), own(w), True
    got = bnfast.batch_norm(*given, residual=own(X), activation="relu", out=out)
    assert got is out
    for a, b in ((out, want), (mean, m), (var, v)):
        assert np.array_equal(np.asarray(a), b)
    layer, other = trained(), trained()
    y, y_other = layer(own(X), own(X), out), other(X, X)
    assert y is out
    assert np.array_equal(np.asarray(out), y_other)
    dx, dresidual = layer.backward(own(X))
    dx_other, dresidual_other = other.backward(X)
    assert np.array_equal(dx, dx_other)
    assert np.array_equal(dresidual, dresidual_other)


def test_layers_checked_in_order():
    """The first object that is not a layer ends the search, for any length."""
    endless = as_strided(np.ones(1), (2**50,), (0,))
    with pytest.raises(TypeError, match=r"layers\[0\] is of type float64; expected a BatchNorm"):
        bnfast.recompute_statistics(print, [X], endless)


@pytest.mark.parametrize("groups", [1, 2])
def test_folding_of_layers_without_outputs_or_taps(groups):
    bn = trained()
    weight, bias = bnfast.fold_before(np.ones((0, 4, 3), np.float32), None, bn)
    assert (weight.shape, bias.shape) == ((0, 4, 3), (0,))
    weight, bias = bnfast.fold_before(np.ones((4, 4 // groups, 0)), None, bn, groups=groups)
    assert bias.tolist() == [0] * 4
