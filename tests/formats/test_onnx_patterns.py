"""Batch norms after Slice, Reshape, Concat, Mul and Add, and constants that the graph computes."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as om  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import assert_folds, assert_left, outcomes_of  # noqa: E402

from bnfast.onnx import Outcome, fold, read  # noqa: E402
from bnfast.onnx import constants as constants_module  # noqa: E402
from bnfast.onnx.paths import _keeps_channels  # noqa: E402

RNG = np.random.default_rng(20150306)


def ints(*numbers):
    return np.array(numbers, np.int64)


def weights(**shapes):
    return {name: om.normal(RNG, *shape) for name, shape in shapes.items()}


def kinds(model):
    return [node.op_type for node in model.graph.node]


# ---- nodes between a layer and the batch norm after it

FOUR = weights(w=(4, 3, 2, 2), b=(4,), k=(4, 1, 1), q=(1, 4, 1, 1), one=()) | om.numbers(RNG, 4)
CONV = "(float[{n},3,5,5] x) => (float[] y) {{ c = Conv(x, w, b) {between} y = BN(d, s, o, m, v) }}"


def conv(between, n="N", opset=17, **more):
    """Return a model of a Conv with four channels, its batch norm, and the nodes between."""
    model = shaped(om.build(CONV.format(between=between, n=n), opset, **FOUR, **more))
    del model.graph.value_info[:]
    return model


def shaped(model):
    """State the shapes of a model's output and of the values between."""
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


IMAGES = {"x": om.normal(RNG, 2, 3, 5, 5)}
AXES = {"first": ints(1, 0), "last": ints(4, 3), "axes": ints(3, -2), "by": ints(1, 2)}
BETWEEN = [
    ("d = Slice(c, first, last, axes, by)", AXES),
    ("d = Slice(c, first, last, axes)", AXES),
    ("e = Cast<to=7>(axes) d = Slice(c, first, last, e)", AXES),
    ("d = Slice(c, first, last)", {"first": ints(0), "last": ints(1)}),
    ("d = Reshape(c, to)", {"to": ints(0, 0, -1)}),
    ("d = Reshape(c, to)", {"to": ints(-1, 4, 2, 8)}),
    ("d = Reshape(c, to)", {"to": ints(0, 4, 16, 1)}),
    ("e = Reshape(c, to) d = Slice(e, first, last, axes)", AXES | {"to": ints(0, 0, 2, -1)}),
    ("e = Unsqueeze(c, axes) d = Squeeze(e, axes)", {"axes": ints(3)}),
    (
        "f = Shape(c) g = Slice(f, zero, two) h = Concat<axis=0>(g, rest) d = Reshape(c, h)",
        {"zero": ints(0), "two": ints(2), "rest": ints(-1)},
    ),
    ("d = Mul(c, k)", {}),
    ("d = Mul(q, c)", {}),
    ("d = Mul(one, c)", {}),
    ("e = Mul(c, k) f = Add(q, e) g = Mul(f, one) d = Add(g, one)", {}),
    ("e = Mul(c, k) f = Slice(e, first, last, axes) g = Reshape(f, to) d = Add(g, b1)", {
        **AXES, "to": ints(0, 0, -1), "b1": om.normal(RNG, 4, 1)
    }),
]  # fmt: skip


@pytest.mark.parametrize(("between", "more"), BETWEEN, ids=[text for text, _ in BETWEEN])
def test_nodes_between(between, more):
    model = conv(between, **more)
    folded = assert_folds(model, IMAGES, 12 + 16)
    assert not {"BatchNormalization", "Mul", "Add"} & {*kinds(folded)}
    assert outcomes_of(model)[1] == [Outcome("y", True, "Conv 'c' before it")]


@pytest.mark.parametrize(
    ("between", "more"),
    [
        ("d = Reshape(c, to)", {"to": ints(2, 4, 16)}),
        ("e = Unsqueeze(c, a0) d = Squeeze(e, a0)", {"a0": ints(3)}),
    ],
)
def test_nodes_between_with_known_axes(between, more):
    assert_folds(conv(between, 2, **more), IMAGES, 12)


def test_slices_of_old_opsets():
    between = "d = Slice<starts=[1, 0], ends=[3, 9], axes=[2, 3]>(c)"
    assert_folds(conv(between, opset=9), IMAGES, 12, references=(om.run_runtime,))
    between = "d = Slice<starts=[0], ends=[1]>(c)"
    assert_folds(conv(between, opset=9), IMAGES, 12, references=(om.run_runtime,))


def test_flattened_after_a_linear_layer():
    body = """(float[N,6] x) => (float[N,4] y) {
        c = MatMul(x, w) a = Unsqueeze(c, two) p = Mul(a, k) d = Flatten(p)
        e = Add(d, b) y = BN(e, s, o, m, v)
    }"""
    numbers = weights(w=(6, 4), k=(4, 1), b=(4,)) | om.numbers(RNG, 4)
    folded = assert_folds(om.build(body, two=ints(2), **numbers), {"x": om.normal(RNG, 3, 6)}, 6)
    assert kinds(folded) == ["Gemm", "Unsqueeze", "Flatten"]


@pytest.mark.parametrize(
    ("between", "more", "reason"),
    [
        ("d = Slice(c, a, b9, a)", {"a": ints(1), "b9": ints(4)}, "Slice 'd' slices the channels"),
        ("d = Slice(c, a, b9, t)", {"a": ints(1), "b9": ints(4), "t": ints(-3)}, "slices the cha"),
        ("d = Slice(c, z, b9)", {"z": ints(0, 0), "b9": ints(1, 4)}, "slices the channels"),
        ("d = Slice(c, z, z, t)", {"z": ints(0), "t": ints(4)}, "are [4] of a value with 4 axes"),
        ("d = Slice(c, z, z, b)", {"z": ints(0)}, "the axes of Slice 'd', 'b', is not axes: floa"),
        ("f = Size(x) d = Slice(c, f, f, f)", {}, "the axes of Slice 'd', 'f', is not a constant"),
        ("d = Reshape(c, to)", {"to": ints(0, 2, 2, 4, 4)}, "does not surely keep axes 0 and 1"),
        ("d = Reshape(c, to)", {"to": ints(-1, 4, 8)}, "Reshape 'd' does not surely keep axes 0"),
        ("d = Reshape(c, to)", {"to": ints(-1, 4)}, "does not surely keep axes 0 and 1"),
        ("d = Reshape(c, to)", {"to": ints(16, 4, -1)}, "does not surely keep axes 0 and 1"),
        ("d = Transpose<perm=[0, 1, 3, 2]>(c)", {}, "Transpose 'd' is no convolution or linear"),
        ("d = Mul(c, p)", {"p": om.normal(RNG, 4, 4, 4)}, "the constant of Mul 'd' has shape"),
        ("d = Mul(c, p)", {"p": om.normal(RNG, 1, 1, 4, 1, 1)}, "not one value a channel"),
        ("d = Add(c, p)", {"p": om.normal(RNG, 2, 1, 1, 1)}, "not one value a channel"),
        ("d = Mul(c, p)", {"p": om.normal(RNG, 4)}, "has shape (4,), not one value a channel"),
        ("r = Relu(x) e = GlobalMaxPool(r) d = Mul(c, e)", {}, "Mul 'd' multiplies by no constant"),
        ("d = Mul(c, c)", {}, "Mul 'd' multiplies by no constant"),
        ("e = Mul(c, k) f = Relu(e) d = Mul(f, k)", {}, "Relu 'f' is no convolution"),
        ("d = Div(c, k)", {}, "Div 'd' is no convolution or linear layer"),
    ],
)
def test_nodes_between_not_folded(between, more, reason):
    assert_left(conv(between, **more), reason)


@pytest.mark.parametrize("used", ["c", "e", "d"])
def test_values_used_elsewhere_stay(used):
    model = conv("e = Mul(c, k) d = Slice(e, first, last, axes)", **AXES)
    model.graph.node.append(helper.make_node("Relu", [used], ["z"]))
    model.graph.output.add().name = "z"
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.FLOAT
    assert_left(model, f"{used!r} is used 2 times")
    del model.graph.node[-1]
    model.graph.output[1].name = used
    assert_left(model, f"{used!r} is ")


@pytest.mark.parametrize(
    ("dims", "made", "kept"),
    [
        (("N", 4, 4, 4), ("N", 4, 16), True),
        (("N", 4, 4, None), ("N", 4, None), True),
        (("N", 4, 4, 4), ("M", 4, 2, 8), True),
        ((None, 4, 4, 4), (None, 4, 16), True),
        ((None, 4, 4, 4), (None, 4, 8), False),
        (("N", 4, 4, "H"), ("M", 4, 4, "H"), False),
        (("N", 4, 4), ("N", 2, 8), False),
        (("N", 4, 4), ("N", None, 4), False),
        (("N", 4), ("N",), False),
    ],
)
def test_kept_axes(dims, made, kept):
    assert _keeps_channels(dims, made, 4) == kept


def test_number_of_nodes_searched_is_limited():
    row = " ".join(f"e{i} = Add(e{i - 1}, one)" for i in range(1, 300))
    model = conv(f"e0 = Mul(c, k) {row} d = Add(e299, one)")
    assert_left(model, "there are more than 256 nodes between it and its layers")


# ---- several layers, joined

JOIN = """(float[N,3,5,5] x) => (float[N,H,W,K] y) {
    a = Conv(x, w, b) p = ConvTranspose<group=3, pads=[1,1,1,1]>(x, w2)
    u = Conv<group=3, pads=[1,1,1,1], dilations=[2,2]>(x, w3) u1 = Mul(u, k3) u2 = Add(u1, b3)
    d = Concat<axis=AXIS>(a, p, u2) d1 = Mul(d, k) y0 = BN(d1, s, o, m, v) y = Mul(y0, k)
}"""


def joined(body=JOIN, axis=1, channels=13, **more):
    parts = weights(w=(4, 3, 2, 2), b=(4,), w2=(3, 2, 2, 2), w3=(3, 1, 2, 2), k3=(3, 1, 1))
    parts |= weights(b3=(1, 3, 1, 1), k=(channels, 1, 1)) | om.numbers(RNG, channels)
    body = body.replace("AXIS", str(axis)).replace("[2,2]>(x, w3)", "[3,3]>(x, w3)")
    return om.build(body.replace("H,W,K", "C,H,W"), **parts | more)


@pytest.mark.parametrize("axis", [1, -3])
def test_concat_of_layers(axis):
    model = joined(axis=axis)
    # The reference evaluator (onnx 1.23) splits the weights of several groups wrongly.
    folded = assert_folds(model, IMAGES, 24, references=(om.run_runtime,))
    assert kinds(folded) == ["Conv", "ConvTranspose", "Conv", "Concat"]
    (outcome,) = outcomes_of(model)[1]
    assert outcome.why == "Conv 'a', ConvTranspose 'p', Conv 'u' before it"


def test_nested_concat_with_batch_norm_inside():
    body = """(float[N,5] x) => (float[N,12] y) {
        a = MatMul(x, w1) b = Gemm<transB=1, alpha=0.5>(x, w2, k) c = MatMul(x, w3)
        b1 = BN(b, s1, o1, m1, v1) d = Concat<axis=1>(a, b1) e = BN(d, s2, o2, m2, v2)
        f = Concat<axis=-1>(c, e) y = BN(f, s3, o3, m3, v3)
    }"""
    numbers = weights(w1=(5, 3), w2=(4, 5), w3=(5, 5), k=(1, 4))
    for i, channels in enumerate((4, 7, 12), 1):
        numbers |= om.numbers(RNG, channels, f"s{i}, o{i}, m{i}, v{i}")
    folded = assert_folds(om.build(body, **numbers), {"x": om.normal(RNG, 3, 5)}, 5)
    assert kinds(folded) == ["Gemm", "Gemm", "Gemm", "Concat", "Concat"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("axis=AXIS", "axis=2", "Concat 'd' does not join channels"),
        ("<axis=AXIS>", "", "Concat 'd' does not join channels"),
        ("Concat<axis=AXIS>(a, p, u2)", "Concat<axis=1>(a, p, x)", "nothing is before 'x'"),
        ("Concat<axis=AXIS>(a, p, u2)", "Concat<axis=1>(a, a, u2)", "'a' is used 2 times"),
        ("u2 = Add(u1, b3)", "u2 = Relu(u1)", "Relu 'u2' is no convolution or linear layer"),
        ("d1 = Mul(d, k)", "d1 = Mul(d, a)", "Mul 'd1' multiplies by no constant"),
    ],
)
def test_concat_of_layers_not_folded(old, new, reason):
    assert_left(joined(JOIN.replace(old, new)), reason)


def test_concat_with_wrong_number_of_channels():
    model = joined(channels=12, k=om.normal(RNG, 13, 1, 1))
    assert_left(model, "the layers before it have 13 channels; expected 12")


def test_joined_layers_fold_all_or_none():
    """The last layer's numbers would overflow: the first layers stay unchanged, too."""
    body = """(float16[N,5] x) => (float16[N,6] y) {
        a = MatMul(x, w1) b = MatMul(x, w2) d = Concat<axis=1>(a, b) y = BN(d, s, o, m, v)
    }"""
    numbers = {key: om.normal(RNG, 5, 3, dtype=np.float16) for key in ("w1", "w2")}
    numbers |= om.numbers(RNG, 6, dtype=np.float16)
    numbers["s"] = np.array([1, 1, 1, 1, 1, 6e4], np.float16)
    numbers["v"] = np.full(6, 1e-3, np.float16)
    assert_left(om.build(body, **numbers), "are not finite in float16")


# ---- Adds and Muls after a batch norm, and before a layer


def test_constants_after_folded_batch_norm():
    """As in Caffe's models."""
    body = """(float[N,3,5,5] x) => (float[N,4,4,4] y) {
        c = Conv(x, w, b) d = BN(c, s, o, m, v) e = Mul(d, k) f = Add(e, q) y = Relu(f)
    }"""
    folded = assert_folds(om.build(body, **FOUR), IMAGES, 12)
    assert kinds(folded) == ["Conv", "Relu"]


def test_constants_not_per_channel_after_folded_batch_norm():
    body = """(float[N,3,5,5] x) => (float[N,4,4,4] y, float[N,4,4,4] z) {
        c = Conv(x, w, b) d = BN(c, s, o, m, v) e = Mul(d, k) f = Add(e, p) y = Mul(f, k)
        z = Add(y, q)
    }"""
    model = om.build(body, p=om.normal(RNG, 4, 4, 4), **FOUR)
    folded = assert_folds(model, IMAGES, 12)
    assert kinds(folded) == ["Conv", "Add", "Mul", "Add"]


@pytest.mark.parametrize("layer", ["Conv(f, w3)", "ConvTranspose(f, w3)", "Conv<group=2>(f, w2)"])
def test_before_a_layer(layer):
    body = f"""(float[N,4,5,5] x) => (float[N,C,H,W] y) {{
        d = BN(x, s, o, m, v) e = Mul(d, k) f = Add(e, q) y = {layer}
    }}"""
    numbers = FOUR | weights(w3=(4, 4, 2, 2), w2=(6, 2, 2, 2))
    images = {"x": om.normal(RNG, 2, 4, 5, 5)}
    if "Transpose" in layer:
        assert_left(om.build(body, **numbers), "maps 0 to 0")
        zero = np.zeros(4, np.float32)
        numbers |= {"o": zero, "m": zero, "q": zero.reshape(1, 4, 1, 1)}
    folded = assert_folds(om.build(body, **numbers), images, 16)
    assert len(kinds(folded)) == 1


def test_before_a_linear_layer():
    body = """(float[N,4] x) => (float[N,3] y) {
        d = BN(x, s, o, m, v) e = Add(b, d) f = Mul(e, b) y = MatMul(f, w)
    }"""
    numbers = weights(w=(4, 3), b=(4,)) | om.numbers(RNG, 4)
    folded = assert_folds(om.build(body, **numbers), {"x": om.normal(RNG, 3, 4)}, 4)
    assert kinds(folded) == ["Gemm"]
    assert_left(om.build(body.replace("Mul(e, b)", "Mul(e, x)"), **numbers), "Mul 'f' is no conv")


# ---- constants that the graph computes

EXPORTED = """
    n{i} = Shape<start=0, end=1>(w{i}) one{i} = Constant<value_ints=[1]>()
    r{i} = Expand(n{i}, one{i}) t{i} = CastLike(zero, {x}) z{i} = Expand(t{i}, r{i})
    c{i} = Conv<pads=[{pad},{pad},{pad},{pad}]>({x}, w{i}, z{i})
"""


@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
def test_zero_bias_of_current_exporter(dtype):
    """Shape, Expand, CastLike, Expand: for `dynamo=True, optimize=False` without a bias."""
    body = f"""({dtype}[N,4,5,5] x) => ({dtype}[N,4,5,5] y) {{
        zero = Constant<value=float {{0.0}}>()
        {EXPORTED.format(i=1, x="x", pad=1)} a = BN(c1, s, o, m, v) u = Relu(a)
        {EXPORTED.format(i=2, x="u", pad=1)} y = BN(c2, s, o, m, v)
    }}"""
    kind = {"float": np.float32, "double": np.float64, "float16": np.float16}[dtype]
    numbers = {f"w{i}": om.normal(RNG, 4, 4, 3, 3, dtype=kind) for i in (1, 2)}
    model = om.build(body, 20, 10, **numbers, **om.numbers(RNG, 4, dtype=kind))
    if dtype == "float":
        folded = assert_folds(model, {"x": om.normal(RNG, 2, 4, 5, 5)}, 72)
    folded = fold(model)
    om.assert_valid(folded)
    assert kinds(folded) == ["Conv", "Relu", "Conv"]
    assert {a.dtype for a in om.constants(folded).values()} == {np.dtype(kind)}
    assert {"w1", "w2"} < set(om.constants(folded))


def test_users_of_type_or_shape_get_another_value():
    """The batch norm is removed, and with it the value whose type the second bias has."""
    body = f"""(float[N,4,5,5] x) => (float[N,4,5,5] y, int64[4] z, int64 k, float[4] t2) {{
        zero = Constant<value=float {{0.0}}>() a = BN(x, s, o, m, v)
        {EXPORTED.format(i=1, x="a", pad=0)} z = Shape(a) k = Size(c1)
        b = BN(c1, s, o, m, v) g = Mul(b, q) y = Relu(g) t2 = CastLike(s, a)
    }}"""
    numbers = weights(w1=(4, 4, 1, 1), q=(4, 1, 1)) | om.numbers(RNG, 4)
    model = om.build(body, 20, 10, **numbers)
    images = {"x": om.normal(RNG, 2, 4, 5, 5)}
    folded = assert_folds(model, images, 4, references=())
    for got, want in zip(
        om.run_runtime(folded, images), om.run_runtime(model, images), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4 if got.ndim == 4 else 0)
    assert sorted(kinds(folded)) == ["CastLike", "Conv", "Relu", "Shape", "Size"]


COMPUTED = [
    ("b1 = ConstantOfShape<value=float[1] {0.5}>(n)", {"n": ints(4)}),
    ("b1 = ConstantOfShape(n)", {"n": ints(4)}),
    ("b1 = Cast<to=1>(d)", {"d": np.array([1.5, 2, 0.1, -3])}),
    ("b1 = Cast<to=1>(d)", {"d": ints(1, 2, 3, -4)}),
    ("b1 = Reshape(d, to)", {"d": om.normal(RNG, 2, 2), "to": ints(-1)}),
    ("e = Reshape(d, to) b1 = Squeeze(e, z)", {"d": om.normal(RNG, 4, 1), "to": ints(1, 0, 4),
                                                 "z": ints(0, 1)}),
    ("e = Unsqueeze(d, z) b1 = Squeeze(e)", {"d": om.normal(RNG, 4), "z": ints(0, -1)}),
    ("b1 = Concat<axis=0>(d, d)", {"d": om.normal(RNG, 2)}),
    ("t = Concat<axis=0>(n, n) e = Reshape(d, t) b1 = Reshape(e, l)",
     {"n": ints(2), "l": ints(-1), "d": om.normal(RNG, 4)}),
    ("u = Transpose(w) e = Shape<start=-1>(u) b1 = Expand(g, e)", {"g": om.normal(RNG, 1)}),
    ("e = Identity(d) b1 = CastLike(e, x)", {"d": np.array([1.5, 2, 0.1, -3])}),
]  # fmt: skip


@pytest.mark.parametrize(("computed", "more"), COMPUTED, ids=[text for text, _ in COMPUTED])
def test_computed_constants(computed, more):
    body = CONV.format(between=computed, n="N").replace("c = Conv(x, w, b) ", "")
    body = body.replace("y =", "c = Conv(x, w, b1) y =").replace("BN(d,", "BN(c,")
    model = shaped(om.build(body, **FOUR, **more))
    folded = assert_folds(model, IMAGES, 12)
    assert [kind for kind in kinds(folded) if kind != "ConstantOfShape"] == ["Conv"]
    assert len(read(model)) == 1


@pytest.mark.parametrize(
    ("computed", "more", "reason"),
    [
        ("k9 = Shape<start=0, end=1>(x) b1 = Expand(d, k9)", {}, "is the shape of 'x', not known"),
        ("k9 = Shape<start=1>(x) b1 = Expand(one, k9)", {}, "has shape (3, 5, 5)"),
        ("b1 = Cast<to=7>(d)", {}, "'b1', cannot be computed: it is cast to the type INT64"),
        ("b1 = Cast<to=99>(d)", {}, "'b1', cannot be computed: it is cast to the type 99"),
        ("b1 = Expand(d, n)", {"n": ints(2**40)}, "is negative or too large"),
        ("b1 = Expand(d, n)", {"n": ints(-4)}, "is negative or too large"),
        ("b1 = Expand(d, n)", {"n": ints(3)}, "shape mismatch"),
        ("b1 = Expand(d, n)", {"n": ints(*[1] * 65)}, "no short row of integers"),
        (
            "b1 = Expand(e, n)",
            {"e": np.ones([1] * 40, "f4"), "n": ints(4)},
            "there are 40 axes; exp",
        ),
        ("b1 = Expand(d, b)", {}, "float32 of shape (4,) is no short row of integers"),
        ("b1 = ConstantOfShape(n)", {"n": ints(0, 2**62)}, "'b1', cannot be computed"),
        ("b1 = ConstantOfShape<value=float[2] {1.0, 2.0}>(n)", {"n": ints(4)}, "shape (2,); exp"),
        ("b1 = ConstantOfShape<value=int64[1] {1}>(n)", {"n": ints(4)}, "'b1', is of type INT64"),
        ("b1 = Reshape(d, n)", {"n": ints(5)}, "cannot reshape"),
        ("b1 = Reshape<allowzero=1>(d, n)", {"n": ints(0)}, "cannot reshape"),
        ("b1 = Unsqueeze(d, n)", {"n": ints(2**62)}, "'b1', cannot be computed"),
        ("b1 = Squeeze(d, n)", {"n": ints(0)}, "'b1', cannot be computed"),
        ("b1 = Concat<axis=5>(d, d)", {}, "'b1', cannot be computed"),
        ("b1 = Concat<axis=4611686018427387904>(d, d)", {}, "'b1', cannot be computed"),
        ("b1 = Concat<axis=0>(d, n)", {"n": ints(0)}, "its parts are of different types"),
        ("e = Relu(d) b1 = Identity(e)", {}, "the bias of Conv 'c', 'e', is not a constant"),
    ],
)
def test_computed_constants_not_folded(computed, more, reason):
    body = CONV.format(between=computed, n="N").replace("c = Conv(x, w, b) ", "")
    body = body.replace("y =", "c = Conv(x, w, b1) y =").replace("BN(d,", "BN(c,")
    assert_left(om.build(body, d=om.normal(RNG, 4), **FOUR, **more), reason)


def test_size_of_expanded_constants_is_limited(monkeypatch):
    """There is a limit on each, and on all together, however many layers share one."""
    body = """(float[N,3,5,5] x) => (float[N,4,4,4] y, float[N,4,4,4] z) {
        k2 = ConstantOfShape<value=float[1] {0.5}>(n) c = Conv(x, k2) y = BN(c, s, o, m, v)
        e = Conv(x, k2) z = BN(e, s, o, m, v)
    }"""
    model = om.build(body, n=ints(4, 3, 2, 2), **FOUR)
    assert [o.folded for o in outcomes_of(model)[1]] == [True, True]
    monkeypatch.setattr(constants_module, "MOST_NUMBERS", 60)
    assert [o.folded for o in outcomes_of(model)[1]] == [True, False]
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(ints(9), "n"))
    huge = om.build(body, n=ints(2**14, 2**14, 1, 1), **FOUR)
    assert_left(huge, "the shape [16384, 16384, 1, 1] is negative or too large", 2)


def test_size_of_copied_constants_is_limited(monkeypatch):
    row = "".join(f"e{i} = Cast<to=1>(e{i - 1})" for i in range(1, 20))
    text = f"{{ c = Conv(x, w) {row} y = BN(c, e19, o, m, v) }}"
    model = om.build(
        f"(float[N,3,5,5] x) => (float[N,4,4,4] y) {text}", e0=om.normal(RNG, 4), **FOUR
    )
    assert [o.folded for o in outcomes_of(model)[1]] == [True]
    monkeypatch.setattr(constants_module, "MOST_NUMBERS", 40)
    assert_left(model, "its scale, 'e12', is not computed: constants would have more than")


def test_independent_of_numpy_errstate():
    model = conv("d1 = BN(c, s, o, m, v) d = Relu(d1)", big=np.array([1e300, 1, 1, 1]))
    model.graph.node.insert(0, helper.make_node("Cast", ["big"], ["cast"], to=TensorProto.FLOAT))
    model.graph.node[2].input[1] = "cast"
    with np.errstate(all="raise"):
        assert read(model)["d1"].weight[0] == np.inf


@pytest.mark.parametrize("shape", [(), (1, 3), (3,)])
def test_constants_whose_shape_is_used_stay(shape):
    body = """(float[N,3] x) => (float[N,3] y, int64[R] n) {
        c = Gemm(x, w, b) y = BN(c, s, o, m, v) n = Shape(b)
    }"""
    numbers = weights(w=(3, 3), b=shape) | om.numbers(RNG, 3)
    model = om.build(body.replace("[R]", f"[{len(shape)}]"), **numbers)
    folded = fold(model)
    om.assert_valid(folded)
    x = {"x": om.normal(RNG, 2, 3)}
    for got, want in zip(om.run_runtime(folded, x), om.run_runtime(model, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 if got.ndim == 2 else 0)


def test_value_used_for_type_stays_if_other_outputs_are_used():
    body = f"""(float[N,8,5,5] x) => (float[N,4,5,5] y) {{
        zero = Constant<value=float {{0.0}}>() r, t = Split<axis=1>(x, sizes)
        {EXPORTED.format(i=1, x="t", pad=0).replace("CastLike(zero, t)", "CastLike(zero, r)")}
        y = BN(c1, s, o, m, v)
    }}"""
    numbers = weights(w1=(4, 4, 1, 1)) | om.numbers(RNG, 4)
    model = om.build(body, sizes=ints(4, 4), **numbers)
    folded = assert_folds(model, {"x": om.normal(RNG, 2, 8, 5, 5)}, 4)
    assert kinds(folded) == ["Split", "Conv"]


@pytest.mark.parametrize("shape", [(), (1, 3), (3,)])
def test_constants_with_new_shape_get_new_name(shape):
    """Before IR version 4 an initializer is also an input, with its former shape."""
    body = "(float[N,3] x) => (float[N,3] y) { c = Gemm(x, w, b) y = BN(c, s, o, m, v) }"
    numbers = weights(w=(3, 3), b=shape) | om.numbers(RNG, 3)
    folded = assert_folds(
        om.listed(om.build(body, 15, 3, **numbers)), {"x": om.normal(RNG, 2, 3)}, 3
    )
    assert ("b" in om.constants(folded)) == (shape == (3,))


def test_weights_of_ir_version_3():
    """Like the light models of the onnx package: every constant an input, weights computed."""
    body = """(float[N,3,5,5] x) => (float[N,4,4,4] y) {
        w1 = ConstantOfShape<value=float[1] {0.25}>(n) k1 = ConstantOfShape<value=float[1] {3.0}>(l)
        s1 = ConstantOfShape<value=float[1] {2.0}>(l) k2 = Unsqueeze<axes=[1, 2]>(k1)
        c = Conv(x, w1) d = BN(c, s1, o, m, v) e = Mul(d, k2) y = Add(e, k)
    }"""
    model = om.listed(om.build(body, 9, 3, n=ints(4, 3, 2, 2), l=ints(4), **FOUR))
    folded = assert_folds(model, IMAGES, 12, references=(om.run_runtime,))
    assert kinds(folded) == ["Conv"]
    assert [v.name for v in folded.graph.input if v.name not in om.constants(folded)] == ["x"]
    assert {"n", "l", "s", "o", "m", "v"} & set(om.constants(folded)) <= {"s"}


# ---- random graphs of all this


KINDS = ["conv"] * 4 + ["join", "bn"] * 3 + ["bn", "bn", "scale", "scale"]
KINDS += ["slice", "reshape", "relu"]


class RandomNetwork:
    """A row of random nodes, most of them on the previous value; values are kept by name."""

    def __init__(self, rng):
        self.rng, self.lines, self.numbers = rng, ["zero = Constant<value=float {0.0}>()"], {}
        self.terms = 0
        value, dims = "x", (4, 6, 6)
        for i in range(9):
            kind = rng.choice(KINDS)
            value, dims = getattr(self, f"add_{kind}")(value, dims, i)
        self.lines.append(f"y = Identity({value})")

    def add(self, i, text, **numbers):
        self.numbers |= numbers
        self.lines.append(f"t{i} = {text}")
        return f"t{i}"

    def add_conv(self, value, dims, i, out=4):
        size, groups = self.rng.choice([1, 3]), self.rng.choice([1, 2])
        w = om.normal(self.rng, out, dims[0] // groups, *[size] * (len(dims) - 1)) / 2
        pads = ",".join([str(size // 2)] * 2 * (len(dims) - 1))
        self.terms += w[0].size
        bias = ""
        if self.rng.random() < 0.4:
            self.lines += [f"n{i} = Shape<start=0, end=1>(w{i}) l{i} = CastLike(zero, {value})"]
            self.lines += [f"z{i} = Expand(l{i}, n{i})"]
            bias = f", z{i}"
        text = f"Conv<group={groups}, pads=[{pads}]>({value}, w{i}{bias})"
        return self.add(i, text, **{f"w{i}": w}), (out, *dims[1:])

    def add_join(self, value, dims, i):
        one, first = self.add_conv(value, dims, f"{i}a", 2)
        if self.rng.random() < 0.5:
            one, first = self.add_scale(one, first, f"{i}m")
        if self.rng.random() < 0.3:
            one, first = self.add_bn(one, first, f"{i}n")
        other, second = self.add_conv(value, dims, f"{i}b", 4)
        axis = 1 if self.rng.random() < 0.7 else -len(dims)
        return self.add(i, f"Concat<axis={axis}>({one}, {other})"), (
            first[0] + second[0],
            *dims[1:],
        )

    def add_bn(self, value, dims, i):
        names = f"s{i}, o{i}, m{i}, v{i}"
        return self.add(i, f"BN({value}, {names})", **om.numbers(self.rng, dims[0], names)), dims

    def add_scale(self, value, dims, i):
        shape = (dims[0], *[1] * (len(dims) - 1)) if self.rng.random() < 0.8 else dims
        op = self.rng.choice(["Mul", "Add"])
        return self.add(i, f"{op}({value}, k{i})", **{f"k{i}": om.normal(self.rng, *shape)}), dims

    def add_slice(self, value, dims, i):
        if dims[-1] < 3:
            return self.add_relu(value, dims, i)
        numbers = {f"f{i}": ints(1), f"l{i}": ints(dims[-1] - 1), f"a{i}": ints(-1)}
        text = f"Slice({value}, {', '.join(numbers)})"
        return self.add(i, text, **numbers), (*dims[:-1], dims[-1] - 2)

    def add_reshape(self, value, dims, i):
        if self.rng.random() < 0.7:
            made, target = (dims[0], int(np.prod(dims[1:]))), ints(0, 0, -1)
        else:
            made, target = (
                (dims[0] * dims[1], *dims[2:], 1),
                ints(0, dims[0] * dims[1], *dims[2:], 1),
            )
        return self.add(i, f"Reshape({value}, r{i})", **{f"r{i}": target}), made

    def add_relu(self, value, dims, i):
        return self.add(i, f"Relu({value})"), dims

    def model(self):
        text = "\n".join(self.lines)
        model = om.build(f"(float[N,4,6,6] x) => (float[] y) {{ {text} }}", 18, **self.numbers)
        return shaped(model)


@pytest.mark.parametrize("seed", range(80))
def test_random_graphs(seed):
    network = RandomNetwork(np.random.default_rng(seed))
    model = network.model()
    left = len(om.batch_norms(fold(model)))
    x = om.normal(network.rng, 2, 4, 6, 6)
    # Five layers and 16 roundings more than `assert_equivalent` counts, in a row of nine.
    assert_folds(model, {"x": x}, network.terms + 16 * 10, left=left, references=(om.run_runtime,))


def test_random_graphs_have_something_to_fold():
    outcomes = []
    for seed in range(80):
        outcomes += outcomes_of(RandomNetwork(np.random.default_rng(seed)).model())[1]
    folded = [o for o in outcomes if o.folded]
    assert len(folded) > 80
    assert len(outcomes) - len(folded) > 40
    assert sum("," in o.why for o in folded) > 10
