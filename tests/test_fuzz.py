"""Random calls (hypothesis): good ones are compared with the reference, bad ones are refused.

The default searches for seconds, HYPOTHESIS_PROFILE=long for hours.
"""

import copy
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from cases import (
    ACTIVATIONS,
    DTYPES,
    HALVES,
    at_offset,
    backwards,
    bfloat16,
    bits,
    make_problem,
    poisoned_like,
    with_gaps,
)
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.lib.stride_tricks import as_strided
from tolerance import (
    SECOND_ORDER,
    U,
    assert_within,
    backward_bounds,
    batch_statistics,
    constants,
    forward_bound,
    off_the_kinks,
    running_bound,
    tiny,
    unit,
)
from wide import wide

import bnfast

# The profile's own number of examples, and more for calls that take microseconds.
MANY = settings(max_examples=10 * settings.default.max_examples)

seeds = st.integers(0, 2**32 - 1)
kept_dtypes = st.sampled_from(DTYPES)  # of parameters and running statistics
dtypes = st.sampled_from([*DTYPES, np.float16, *([] if bfloat16 is None else [bfloat16])])
# Usual values, and the limits for a scale that float32 can hold.
epsilons = st.one_of(st.floats(1e-12, 10), st.sampled_from([1e-30, 1e30]))
activations = st.one_of(
    st.sampled_from(ACTIVATIONS),
    st.floats(2**-20, 1).map(lambda slope: ("leaky_relu", slope)),
)


@st.composite
def arrangements(draw, rank):
    """Any order of the axes in memory, contiguous or not, native or not."""
    order = draw(st.permutations(range(rank)))
    then = draw(
        st.sampled_from(
            [
                lambda a: a,
                lambda a: a,
                with_gaps,
                backwards,
                at_offset(draw(st.integers(0, 63))),
                lambda a: a.astype(a.dtype.newbyteorder()),
                lambda a: a.view(np.recarray),
            ]
        )
    )

    def arrange(a):
        return then(np.ascontiguousarray(a.transpose(order))).transpose(np.argsort(order))

    return arrange


@st.composite
def problems(draw):
    rank = draw(st.integers(2, 6))
    longest = {2: 70, 3: 24, 4: 9, 5: 5, 6: 4}[rank]
    shape = [draw(st.integers(1, longest)) for _ in range(rank)]
    axis = draw(st.integers(-rank, rank - 1))
    if np.prod(shape) == shape[axis]:  # one value per channel
        shape[(axis - 1) % rank] += 1
    p = make_problem(
        tuple(shape),
        draw(dtypes),
        axis=axis,
        activation=draw(activations),
        residual=draw(st.booleans()),
        seed=draw(seeds),
    ).replace(eps=draw(epsilons))
    arranged = {
        name: draw(arrangements(rank))(getattr(p, name))
        for name in ("x", "dy", "residual")
        if getattr(p, name) is not None
    }
    return p, p.replace(**arranged)


@st.composite
def outs(draw, q, *may_be):
    """None, a poisoned array in some order, or one of the tensors (a copy, since it is lost)."""
    kind = draw(st.sampled_from(["none", "poison", *may_be]))
    if kind == "none" or (kind != "poison" and getattr(q, kind) is None):
        return None, q
    if kind == "poison":
        return draw(arrangements(q.x.ndim))(poisoned_like(q.x)), q
    # A copy keeps the memory order, but not gaps or byte order.
    own = np.array(getattr(q, kind), order="K")
    return own, q.replace(**{kind: own})


def rounded(error, want, dtype):
    """The error of a float64 number after it is rounded to another type."""
    magnitude = SECOND_ORDER * np.abs(want) + error
    return error + np.maximum(unit(dtype) * magnitude, tiny(dtype) / 2)


def check_result(got, out, q):
    if out is not None:
        assert got is out
    else:
        assert type(got) is np.ndarray
        assert got.dtype == q.x.dtype.newbyteorder("=")
        assert got.dtype.isnative


class TestGoodCalls:
    """`p` holds the values, `q` the same values in the arrays that are given to the call."""

    @given(problems(), st.data())
    def test_training(self, problem, data):
        p, q = problem
        out, q = data.draw(outs(q, "x", "residual"))
        y, stats = bnfast.batch_norm_forward(q.x, q.weight, q.bias, eps=q.eps, out=out, **q.options)
        check_result(y, out, q)
        assert stats.count == p.m
        s = batch_statistics(p.x, p.axis)
        assert_within(stats.mean, s.mean, s.mean_error)
        assert_within(stats.var, s.var, s.var_error)
        assert_within(y, reference.forward(*p.exact()), forward_bound(p, s))

    @given(problems(), st.data())
    def test_inference(self, problem, data):
        p, q = problem
        rng = np.random.default_rng(p.channels)
        mean, var = rng.standard_normal(p.channels), rng.uniform(0.1, 4, p.channels)
        dtype = np.float64 if p.x.dtype == np.float64 and data.draw(st.booleans()) else np.float32
        mean, var = mean.astype(dtype), var.astype(dtype)
        s = constants(mean, var)
        x, *others = p.exact()
        want, bound = reference.inference(x, s.mean, s.var, *others), forward_bound(p, s)
        frozen = bnfast.BatchNorm(
            p.channels, p.eps, axis=q.axis, activation=q.activation, dtype=np.float64
        )
        frozen.weight[:], frozen.bias[:] = p.weight, p.bias
        frozen.running_mean[:], frozen.running_var[:] = mean, var
        out, q = data.draw(outs(q, "x", "residual"))
        call = data.draw(st.sampled_from(["batch_norm", "normalize", "frozen"]))
        y = {
            "batch_norm": lambda: bnfast.batch_norm(
                q.x, mean, var, q.weight, q.bias, eps=q.eps, out=out, **q.options
            ),
            "normalize": lambda: bnfast.normalize(
                q.x, mean, var, q.weight, q.bias, eps=q.eps, out=out, **q.options
            ),
            "frozen": lambda: frozen.freeze()(q.x, q.residual, out=out),
        }[call]()
        check_result(y, out, q)
        assert_within(y, want, bound, call)

    @given(problems(), st.data())
    def test_scale_shift(self, problem, data):
        p, q = problem
        p = p.replace(eps=0.0)
        s = constants(np.zeros(p.channels), np.ones(p.channels))
        x, *others = p.exact()
        want, bound = reference.inference(x, s.mean, s.var, *others), forward_bound(p, s)
        out, q = data.draw(outs(q, "x", "residual"))
        y = bnfast.scale_shift(q.x, q.weight, q.bias, out=out, **q.options)
        check_result(y, out, q)
        assert_within(y, want, bound)

    @given(
        problems(),
        st.floats(0, 1),
        st.sampled_from([0, 1]),
        kept_dtypes,
        st.sampled_from([lambda a: a, with_gaps, at_offset(3)]),
    )
    def test_running_statistics(self, problem, momentum, ddof, dtype, arrange):
        p, q = problem
        dtype = dtype if p.x.dtype == np.float64 else np.float32
        rng = np.random.default_rng(p.channels)
        start = rng.standard_normal(p.channels), rng.uniform(0.1, 4, p.channels)
        mean, var = (arrange(a.astype(dtype)) for a in start)
        old = wide(mean), wide(var)
        bnfast.batch_norm(
            q.x, mean, var, training=True, momentum=momentum, ddof=ddof, axis=q.axis, eps=q.eps
        )
        s = batch_statistics(p.x, p.axis)
        k = wide(p.m) / (p.m - ddof)
        for got, before, new, error in (
            (mean, old[0], s.mean, s.mean_error),
            (var, old[1], k * s.var, k * s.var_error),
        ):
            want = reference.running_average(before, new, wide(momentum))
            assert_within(got, want, running_bound(before, new, error, momentum, dtype))

    @given(problems(), st.data())
    def test_gradients(self, problem, data):
        p, q = problem
        through = data.draw(st.booleans())
        mean, var = p.bias.astype(np.float64), p.weight.astype(np.float64) ** 2
        s = batch_statistics(p.x, p.axis) if through else constants(mean, var)
        off_the_kinks(p, s)
        q = q.replace(dy=data.draw(arrangements(p.x.ndim))(p.dy))
        dy, (x, *others) = wide(p.dy), p.exact()
        if through:
            exact = reference.backward(dy, x, *others)
            stats = bnfast.batch_norm_forward(p.x, axis=p.axis, eps=p.eps)[1]
        else:
            exact = reference.inference_backward(dy, x, s.mean, s.var, *others)
            stats = bnfast.BatchStats.from_population(mean, var, p.eps)
        bounds = backward_bounds(p, s, exact, through_statistics=through)
        names = [n for n in bnfast.Gradients._fields if n != "residual" or q.residual is not None]
        needs = data.draw(st.sets(st.sampled_from(names)))
        out, q = data.draw(outs(q, "x", "dy")) if "x" in needs else (None, q)
        got = bnfast.batch_norm_backward(
            q.dy, q.x, stats, q.weight, q.bias, out=out, needs=needs, **q.options
        )
        if "x" in needs:
            check_result(got.x, out, q)
        for name, g, want, bound in zip(bnfast.Gradients._fields, got, exact, bounds, strict=True):
            if name in needs:
                assert_within(g, want, bound, name)
            else:
                assert g is None

    @given(problems())
    def test_moments(self, problem):
        p, q = problem
        got = bnfast.moments(q.x, axis=q.axis)
        s = batch_statistics(p.x, p.axis)
        assert got.count == p.m
        assert_within(got.mean, s.mean, s.mean_error)
        assert_within(got.m2, p.m * s.var, p.m * s.var_error)

    @given(problems(), st.lists(st.integers(0, 70), max_size=4))
    def test_moments_of_parts(self, problem, cuts):
        """Added one after the other, or merged; a part may be empty, and of any type."""
        p, q = problem
        along = (p.axis + 1) % p.x.ndim
        parts = np.split(q.x, sorted(cut % (p.x.shape[along] + 1) for cut in cuts), axis=along)
        running = bnfast.Moments.empty(p.channels)
        for part in parts:
            assert running.update(part, axis=q.axis) is running
        merged = bnfast.Moments.merge_all([bnfast.moments(part, axis=q.axis) for part in parts])
        s = batch_statistics(p.x, p.axis)
        for got in (running, merged, sum(bnfast.moments(part, axis=q.axis) for part in parts)):
            assert got.count == p.m
            assert_within(got.mean, s.mean, s.mean_error)
            assert_within(got.var(), s.var, s.var_error)

    @given(problems(), st.data())
    def test_gradients_of_parts(self, problem, data):
        """Each part with the sums of all of them."""
        p, q = problem
        s = batch_statistics(p.x, p.axis)
        off_the_kinks(p, s)
        q = q.replace(dy=data.draw(arrangements(p.x.ndim))(p.dy))
        exact = reference.backward(wide(p.dy), *p.exact())
        bounds = backward_bounds(p, s, exact)
        stats = bnfast.batch_norm_forward(p.x, axis=p.axis, eps=p.eps)[1]
        along = (p.axis + 1) % p.x.ndim
        cut = data.draw(st.integers(0, p.x.shape[along]))
        halves = [slice(0, cut), slice(cut, None)]
        parts = []
        for half in halves:
            at = tuple(half if i == along else slice(None) for i in range(p.x.ndim))
            residual = None if q.residual is None else q.residual[at]
            parts.append(q.replace(x=q.x[at], dy=q.dy[at], residual=residual))
        each = [
            bnfast.batch_norm_backward(
                part.dy,
                part.x,
                stats._replace(count=0),
                q.weight,
                q.bias,
                needs=("weight", "bias"),
                **part.options,
            )
            for part in parts
        ]
        sums = sum(g.weight for g in each), sum(g.bias for g in each)
        assert_within(sums[0], exact.gamma, bounds.gamma)
        assert_within(sums[1], exact.beta, bounds.beta)
        for part, half in zip(parts, halves, strict=True):
            at = tuple(half if i == along else slice(None) for i in range(p.x.ndim))
            out = poisoned_like(part.x)
            got = bnfast.batch_norm_backward(
                part.dy, part.x, stats, q.weight, q.bias, sums=sums, out=out, **part.options
            )
            assert got.x is out
            assert_within(got.x, exact.x[at], bounds.x[at])

    @given(
        st.lists(st.integers(1, 6), min_size=2, max_size=5),
        dtypes,
        dtypes,
        kept_dtypes,
        st.booleans(),
        epsilons,
        seeds,
        st.data(),
    )
    def test_folding(self, shape, dtype, bias_dtype, kept, is_frozen, eps, seed, data):
        """The weight times the scale; the bias goes through the map. Rounded once."""
        rng = np.random.default_rng(seed)
        axis = data.draw(st.integers(-len(shape), len(shape) - 1))
        channels = shape[axis]
        weight = data.draw(arrangements(len(shape)))(rng.standard_normal(shape).astype(dtype))
        bias = rng.standard_normal(channels).astype(bias_dtype)
        bn = bnfast.BatchNorm(channels, eps, dtype=kept)
        bn.running_mean[:], bn.running_var[:] = rng.standard_normal((2, channels)) ** 2
        bn.weight[:], bn.bias[:] = rng.standard_normal((2, channels))
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (wide(getattr(bn, name)) for name in names)
        given = bn.freeze() if is_frozen else bn
        got = bnfast.fold(weight, bias, given, out_axis=axis)
        assert [a.dtype for a in got] == [np.dtype(dtype)] * 2
        scale = gamma / np.sqrt(var + wide(eps))
        want = wide(weight) * reference.to_shape(scale, weight, axis)
        # The scale: the sum, its root, the quotient and the product; then one more product.
        assert_within(got[0], want, rounded(6 * U * np.abs(want), want, dtype))
        moved = wide(bias) - mean
        want = moved * scale + beta
        terms = (np.abs(wide(bias)) + np.abs(mean)) * np.abs(scale) + np.abs(beta)
        assert_within(got[1], want, rounded(8 * U * terms, want, dtype))

    @given(problems(), st.data())
    def test_empty_inputs(self, problem, data):
        """Sizes of zero anywhere: the result is empty, and nothing changes."""
        p, _ = problem
        shape = list(p.x.shape)
        for i in data.draw(st.sets(st.integers(0, p.x.ndim - 1), min_size=1)):
            shape[i] = 0
        x = np.empty(shape, p.x.dtype)
        c = shape[p.axis]
        mean, var, ones = np.zeros(c, np.float32), np.ones(c, np.float32), np.ones(c, np.float32)
        y, stats = bnfast.batch_norm_forward(x, ones, ones, axis=p.axis, activation=p.activation)
        assert (y.shape, y.dtype, stats.count) == (x.shape, x.dtype, 0)
        bnfast.batch_norm(x, mean, var, training=True, axis=p.axis)
        assert not mean.any()
        assert (var == 1).all()
        assert bnfast.batch_norm(x, mean, var, axis=p.axis).shape == x.shape
        g = bnfast.batch_norm_backward(x, x, stats, ones, ones, axis=p.axis)
        assert (g.x.shape, g.weight.tolist(), g.bias.tolist()) == (x.shape, [0] * c, [0] * c)
        assert bnfast.moments(x, axis=p.axis) == bnfast.Moments.empty(c)


# --- Bad calls

P = make_problem((6, 4, 5), residual=True, activation="relu")
STATS = bnfast.batch_norm_forward(P.x, P.weight, P.bias)[1]
TENSORS = {"x": P.x, "dy": P.dy, "y": P.x, "residual": P.residual, "out": -P.x}
VECTORS = {
    "weight": P.weight,
    "bias": P.bias,
    "scale": P.weight,
    "shift": P.bias,
    "mean": P.bias,
    "var": P.weight**2,
    "running_mean": P.bias,
    "running_var": P.weight**2,
}
CALLS = {
    "forward": (bnfast.batch_norm_forward, "x weight bias residual out", {}),
    "training": (
        bnfast.batch_norm,
        "x running_mean running_var weight bias residual out",
        {"training": True},
    ),
    "inference": (bnfast.batch_norm, "x running_mean running_var weight bias residual out", {}),
    "normalize": (bnfast.normalize, "x mean var weight bias residual out", {}),
    "scale_shift": (bnfast.scale_shift, "x scale shift residual out", {}),
    "backward": (bnfast.batch_norm_backward, "dy x stats weight bias residual y out", {}),
    "moments": (bnfast.moments, "x", {}),
}
REQUIRED = {"x", "dy", "stats", "mean", "var"}
OPTIONS = {
    "forward": "eps axis activation",
    "training": "eps axis activation momentum ddof training",
    "inference": "eps axis activation momentum training",
    "normalize": "eps axis activation",
    "scale_shift": "axis activation",
    "backward": "axis activation needs stats",
    "moments": "axis",
}


class Unreadable:
    def __array__(self, *dtype, **copy):
        raise RuntimeError("no data")


def read_only_view(a):
    view = a.view()
    view.flags.writeable = False
    return view


# Errors that any array can have, for any purpose.
BAD_ARRAYS = {
    "text": lambda a: "text",
    "bytes": lambda a: b"\0" * a.nbytes,
    "number": lambda a: 1.0,
    "set": lambda a: {1.0, 2.0},
    "dict": lambda a: {"x": a},
    "class": lambda a: np.ndarray,
    "generator": lambda a: (row for row in a),
    "ragged": lambda a: [[1.0], [1.0, 2.0]],
    "strings": lambda a: np.full(a.shape, "1.5"),
    "objects": lambda a: a.astype(object),
    "integers": lambda a: a.astype(int),
    "unsigned": lambda a: np.abs(a).astype(np.uint16),  # of a negative one it is not defined
    "booleans": lambda a: a > 0,
    "complex": lambda a: a.astype(complex),
    "wider": lambda a: a.astype(np.longdouble),
    "dates": lambda a: np.zeros(a.shape, "m8[s]"),
    "records": lambda a: np.zeros(a.shape, [("a", a.dtype)]),
    "masked": lambda a: np.ma.masked_array(a, a > 0),
    "unreadable": lambda a: Unreadable(),
    "no axes": lambda a: a.reshape(-1)[0],
    "one axis more": lambda a: a[None],
    "shorter": lambda a: a[:-1],
    "longer": lambda a: np.concatenate([a, a[:1]]),
    "nothing": lambda a: a[:0],
    "giant": lambda a: as_strided(a, (2**40, *a.shape), (0, *a.strides)),
    "giant strides": lambda a: as_strided(a[:1], (1, *a.shape[1:], 7), (2**60, *a.strides[1:], 0)),
}
BAD_TARGETS = {
    "list": lambda a: a.tolist(),
    "memoryview": lambda a: memoryview(a.tobytes()),
    "read-only": read_only_view,
    "broadcast": lambda a: np.broadcast_to(a[:1] * 0, a.shape),
    "no strides": lambda a: as_strided(a, a.shape, (0,) * a.ndim),
    "two rows in one": lambda a: as_strided(a, a.shape, (0, *a.strides[1:])),
}


def bad_values(call, name, dtype=np.float32):
    """{what is wrong: a function that makes it} for one argument."""
    if name not in TENSORS | VECTORS:
        return BAD_OPTIONS[name]
    good, bad = (TENSORS | VECTORS)[name], dict(BAD_ARRAYS)
    if name == "out" or (call == "training" and name.startswith("running")):
        bad |= BAD_TARGETS
    if name in VECTORS:
        bad["a column"] = lambda a: a[:, None]
    if name in REQUIRED:
        bad["None"] = lambda a: None
    return {kind: (lambda make=make: make(good.astype(dtype))) for kind, make in bad.items()}


def constantly(*values):
    return {repr(value)[:30]: (lambda value=value: value) for value in values}


ARRAY = np.array([1.0, 2.0])
BAD_OPTIONS = {
    "eps": constantly(
        np.nan, np.inf, -np.inf, -1e-30, -1, "1", b"1", None, True, 1j, [1e-5], ARRAY, ARRAY[:1], ()
    ),
    "momentum": constantly(np.nan, np.inf, -np.inf, "0.1", None, True, 1j, [0.1], ARRAY, 10**400),
    "axis": constantly(3, -4, 2**31, 2**70, -(2**70), 1.0, "1", None, True, [1], ARRAY, ()),
    "ddof": constantly(2, -1, 2**70, 1.0, "1", None, True, [1], ARRAY),
    "training": constantly(ARRAY),
    "activation": constantly(
        "mish", "RELU", "", b"relu", 1, True, ("relu", 1), ("leaky_relu",), ("leaky_relu", 0),
        ("leaky_relu", -1), ("leaky_relu", 1.5), ("leaky_relu", np.nan), ("leaky_relu", "1"),
        ("leaky_relu", 1, 1), ["leaky_relu", 0.1], (ARRAY, 0.1), ("leaky_relu", ARRAY), ARRAY, {},
    ),
    "needs": constantly("y", "weights", ["x", "gamma"], [1], [None], 1, ARRAY, [["x"]], b"x"),
    "stats": constantly(
        None, (), tuple(STATS), list(STATS), P.x, "stats", 1,
        *(
            STATS._replace(**{name: value})
            for name in ("mean", "inv_std")
            for value in (None, "1", STATS.mean[1:], STATS.mean[None], np.ones(4, int),
                          np.ma.masked_array(STATS.mean, [0, 0, 0, 1]), 1.0, [[1], [1, 2]])
        ),
        *(STATS._replace(count=count) for count in (29, -1, 1, 2**70, 3.0, None, "30", ARRAY)),
    ),
}  # fmt: skip


def arguments_of(call):
    function, names, options = CALLS[call]
    given = {
        name: copy.copy((TENSORS | VECTORS | {"stats": STATS})[name]) for name in names.split()
    }
    given |= options
    if "residual" in given:
        given["activation"] = "relu"
    return function, given


def memory(value):
    """The bytes behind an argument, up to their owner; None if there are none."""
    values = value if isinstance(value, tuple | list) else (value,)
    owners = []
    for a in values:
        while isinstance(getattr(a, "base", None), np.ndarray):
            a = a.base
        if isinstance(a, np.ndarray) and a.size and not a.dtype.hasobject and a.nbytes < 2**20:
            owners.append(bits(a))
    return owners


def assert_refused(function, given, names):
    """An exception of a promised type that names the argument; and no byte has changed."""
    before = {name: memory(value) for name, value in given.items()}
    counted = bnfast._core.dispatches()
    with pytest.raises((TypeError, ValueError, MemoryError)) as caught:
        function(**given)
    message = str(caught.value)
    if not issubclass(caught.type, MemoryError):
        words = message.replace(".", " ").replace(";", " ").replace(",", " ").split()
        assert any(name in words for name in names), (names, message)
    assert {name: memory(value) for name, value in given.items()} == before
    assert bnfast._core.dispatches() == counted


def combinations():
    for call, (_, names, _) in CALLS.items():
        for name in dict.fromkeys([*names.split(), *OPTIONS[call].split()]):
            for kind in bad_values(call, name):
                yield call, name, kind


# moments has one tensor, and accepts any shape.
SHAPES_OF_ONE = ("one axis more", "shorter", "longer", "nothing", "giant strides")
GOOD_AFTER_ALL = [("moments", "x", kind) for kind in SHAPES_OF_ONE]


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize(
    ("call", "name", "kind"), [c for c in combinations() if c not in GOOD_AFTER_ALL]
)
def test_each_bad_argument(call, name, kind, strided, dtype):
    """Hundreds of them, one at a time, on the common path and with a conversion."""
    function, given = arguments_of(call)
    given = {n: a.astype(dtype) if n in TENSORS else a for n, a in given.items()}
    if strided and name != "x":
        given["x"] = given["x"][::-1]
    elif strided:
        given = {n: a[::-1] if n in TENSORS else a for n, a in given.items()}
    given[name] = bad_values(call, name, dtype if name in TENSORS else np.float32)[kind]()
    names = {name, "x"} if name in ("x", "axis", "residual", "dy", "y", "out") else {name}
    if name == "x":  # the others are compared with x
        names = {*given}
    if name == "stats":
        names = {"stats", "mean", "inv_std", "count"}
    assert_refused(function, given, names)


# --- Bad aliasing

SPARE = 32


@st.composite
def two_places(draw, size, other_size):
    """Two ranges of one buffer that share some elements, but not all of them in order."""
    a = draw(st.integers(0, SPARE))
    b = draw(st.integers(max(0, a - other_size + 1), min(SPARE + size, a + size - 1)))
    return a, b


@pytest.mark.parametrize("call", [call for call in CALLS if call != "moments"])
@MANY
@given(st.data())
def test_overlaps(call, data):
    """Outputs that overlap other arguments, in every way except the whole of one with the other."""
    function, given = arguments_of(call)
    written = ["out", *(["running_mean", "running_var"] if call == "training" else [])]
    name = data.draw(st.sampled_from(written))
    vectors = [n for n in given if n in VECTORS]
    other = data.draw(
        st.sampled_from([n for n in (*TENSORS, *vectors) if n in given and n != name])
    )
    size, other_size = given[name].size, given[other].size
    a, b = data.draw(two_places(size, other_size))
    store = np.zeros(2 * (SPARE + size + other_size), np.float32)
    step = data.draw(st.sampled_from([1, 2]))
    for n, start, count in ((name, a, size), (other, b, other_size)):
        place = store[step * start :: step][:count].reshape(given[n].shape)
        turned = data.draw(st.booleans())
        given[n] = place[::-1] if turned else place
    places = [
        (v.__array_interface__["data"], v.shape, v.strides) for v in (given[name], given[other])
    ]
    may_be = ("x", "dy") if call == "backward" else ("x", "residual")
    if name == "out" and other in may_be and places[0] == places[1]:
        return  # in place
    assert_refused(function, given, {name, other})


# --- The life of a layer


class LayerLife(RuleBasedStateMachine):
    """A layer and a model of it: a dict of arrays, and the functions applied to them by hand."""

    @initialize(
        options=st.fixed_dictionaries(
            {
                "momentum": st.sampled_from([0.1, 1.0, 0.0, None]),
                "affine": st.booleans(),
                "track_running_stats": st.booleans(),
                "ddof": st.sampled_from([0, 1]),
                "activation": activations,
                "dtype": kept_dtypes,
            }
        ),
        data=dtypes,
    )
    def create(self, options, data):
        self.options = options
        self.data = (
            data if options["dtype"] == np.float32 != data != np.float64 else options["dtype"]
        )
        self.layer = bnfast.BatchNorm(3, 0.01, axis=-1, **options)
        dtype, affine, tracked = (options[n] for n in ("dtype", "affine", "track_running_stats"))
        ones, zeros = np.ones(3, dtype), np.zeros(3, dtype)
        self.state = {"weight": ones.copy(), "bias": zeros.copy()} if affine else {}
        self.grads = [zeros.copy(), zeros.copy()] if affine else [None, None]
        if tracked:
            self.state |= {"running_mean": zeros.copy(), "running_var": ones.copy()}
            self.state["num_batches_tracked"] = np.zeros((), np.int64)
        self.training, self.kept = True, None

    def tensors(self, seed, *kinds):
        rng = np.random.default_rng(seed)
        return [rng.standard_normal((4, 2, 3)).astype(self.data) for _ in kinds]

    @property
    def parameters(self):
        return self.state.get("weight"), self.state.get("bias")

    @property
    def map_options(self):
        return {"axis": -1, "activation": self.options["activation"]}

    @rule(mode=st.booleans())
    def switch(self, mode):
        assert self.layer.train(mode) is self.layer
        self.training = mode
        self.kept = self.kept if mode else None

    @rule(
        seed=seeds,
        with_residual=st.booleans(),
        update=st.booleans(),
        place=st.sampled_from([None, "x", "residual", "new"]),
    )
    def forward(self, seed, with_residual, update, place):
        x, residual = self.tensors(seed, "x", "residual")
        residual = residual if with_residual else None
        out = {"x": x, "residual": residual, "new": poisoned_like(x), None: None}[place]
        kept_x, kept_r = x.copy(), None if residual is None else residual.copy()
        y = self.layer(x, residual, out, update_stats=update)
        if out is not None:
            assert y is out
        want = self.normalized(kept_x, kept_r, update)
        assert bits(y) == bits(want)
        if place != "residual":
            y[...] = np.nan  # the caller may overwrite it
        if self.training:
            # The output replaces the residual: where the output is flat, the forward was flat.
            covered = y if place == "residual" and residual is not None else None
            self.kept = None if place == "x" else (kept_x, kept_r, covered)

    def normalized(self, x, residual, update):
        weight, bias = self.parameters
        options = {"eps": 0.01, "residual": residual, **self.map_options}
        tracked = self.options["track_running_stats"]
        if not self.training and tracked:
            mean, var = self.state["running_mean"], self.state["running_var"]
            return bnfast.batch_norm(x, mean, var, weight, bias, **options)
        if self.training and tracked and update:
            counter = self.state["num_batches_tracked"]
            momentum = self.options["momentum"]
            momentum = 1 / (int(counter) + 1) if momentum is None else momentum
            counter += 1
            return bnfast.batch_norm(
                x,
                self.state["running_mean"],
                self.state["running_var"],
                weight,
                bias,
                training=True,
                momentum=momentum,
                ddof=self.options["ddof"],
                **options,
            )
        return bnfast.batch_norm_forward(x, weight, bias, **options)[0]

    @rule(seed=seeds)
    def backward(self, seed):
        (dy,) = self.tensors(seed, "dy")
        if not self.training or self.kept is None:
            with pytest.raises(RuntimeError, match="backward"):
                self.layer.backward(dy)
            return
        x, residual, y = self.kept
        weight, bias = self.parameters
        stats = bnfast.batch_norm_forward(x, eps=0.01, axis=-1)[1]
        want = bnfast.batch_norm_backward(
            dy, x, stats, weight, bias, residual=residual, y=y, **self.map_options
        )
        got = self.layer.backward(dy)
        dx, dresidual = (got, None) if residual is None else got
        assert bits(dx) == bits(want.x)
        assert dresidual is want.residual is None or bits(dresidual) == bits(want.residual)
        for total, new in zip(self.grads, (want.weight, want.bias), strict=True):
            if total is not None:
                total += new

    @rule(seed=seeds)
    def freeze(self, seed):
        x, residual = self.tensors(seed, "x", "residual")
        if not self.options["track_running_stats"]:
            with pytest.raises(RuntimeError, match="running statistics"):
                self.layer.freeze()
            return
        frozen = pickle.loads(pickle.dumps(self.layer.freeze()))
        weight, bias = self.parameters
        mean, var = self.state["running_mean"], self.state["running_var"]
        want = bnfast.batch_norm(
            x, mean, var, weight, bias, eps=0.01, residual=residual, **self.map_options
        )
        assert bits(frozen(x, residual)) == bits(want)

    @rule(duplicate=st.sampled_from([copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]))
    def replace_by_a_copy(self, duplicate):
        self.layer, old = duplicate(self.layer), self.layer
        self.kept = None  # it is not copied
        for name in self.state:
            getattr(old, name)[...] = 0

    @rule(seed=seeds, strict=st.booleans(), prefix=st.sampled_from(["", "a.b."]))
    def load(self, seed, strict, prefix):
        rng = np.random.default_rng(seed)
        new = {
            name: rng.integers(0, 9, a.shape) if a.dtype == np.int64 else rng.uniform(0.1, 2, 3)
            for name, a in self.state.items()
        }
        if not strict:
            new = {name: a for name, a in new.items() if rng.random() < 0.5}
        self.layer.load_state_dict({prefix + name: a for name, a in new.items()}, strict, prefix)
        if {"running_mean", "running_var"} & set(new):
            new.setdefault("num_batches_tracked", 0)
        for name, a in new.items():
            self.state[name][...] = a

    @rule(what=st.sampled_from(["reset_parameters", "reset_running_stats", "zero_grad"]))
    def reset(self, what):
        getattr(self.layer, what)()
        starts = {"running_var": 1, "weight": 1}
        names = {"zero_grad": (), "reset_parameters": tuple(self.state)}.get(
            what, ("running_mean", "running_var", "num_batches_tracked")
        )
        for name in names:
            if name in self.state:
                self.state[name][...] = starts.get(name, 0)
        for grad in self.grads if what == "zero_grad" else ():
            if grad is not None:
                grad[...] = 0

    @rule(data=st.data())
    def call_badly(self, data):
        x, residual, dy = self.tensors(1, "x", "residual", "dy")
        call = data.draw(
            st.sampled_from(
                [
                    lambda: self.layer(x[..., :2]),
                    lambda: self.layer(x.astype(int)),
                    lambda: self.layer(x, residual[1:]),
                    lambda: self.layer(x, out=x[::-1]),
                    lambda: self.layer(x, out=read_only_view(x)),
                    lambda: self.layer([[1.0], [1.0, 2.0]]),
                    lambda: self.layer.load_state_dict({"weight": np.ones(4), "no": 1}),
                    lambda: self.layer.load_state_dict({"running_var": np.ones(2), "no": 1}),
                    lambda: self.layer.train(np.ones(2)),
                    lambda: self.layer.backward(dy[1:]),
                    lambda: self.layer.backward(None),
                ]
            )
        )
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call()

    @invariant()
    def same(self):
        got = self.layer.state_dict()
        assert set(got) == set(self.state)
        for name, want in self.state.items():
            assert bits(got[name]) == bits(want), name
        for grad, want in zip(
            (self.layer.weight_grad, self.layer.bias_grad), self.grads, strict=True
        ):
            assert grad is want is None or bits(grad) == bits(want)
        assert self.layer.training is self.training


TestLayerLife = LayerLife.TestCase
