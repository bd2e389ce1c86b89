"""Batch norms that fold into their neighbours in an ONNX graph, and those that must not."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as om  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import assert_folds, assert_left, outcomes_of  # noqa: E402

from bnfast.onnx import Outcome, fold, read  # noqa: E402

RNG = np.random.default_rng(20150302)


# ---- the layer before

CONV = """(float[N,6,7,5] x) => (float[N,4,H,W] y) {{
    c = Conv{options}(x, w{bias}) y = BN(c, s, o, m, v)
}}"""
PADDED = "<group=2, pads=[1,0,1,2], strides=[2,1]>"


# The reference evaluator runs BatchNormalization-9 as if it were training (onnx 1.23).
def evaluators(opset):
    return (om.run_runtime, om.run_reference) if opset >= 14 else (om.run_runtime,)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 17, 22])
@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("options", ["", PADDED])
def test_convolution(opset, bias, options):
    groups = 2 if options else 1
    weights = {"w": om.normal(RNG, 4, 6 // groups, 3, 2)}
    if bias:
        weights["b"] = om.normal(RNG, 4)
    body = CONV.format(options=options, bias=bias)
    model = om.build(body, opset, **weights, **om.numbers(RNG, 4))
    x = om.normal(RNG, 2, 6, 7, 5)
    folded = assert_folds(model, {"x": x}, 36, references=evaluators(opset))
    (conv,) = folded.graph.node
    assert list(conv.output) == ["y"]
    assert conv.input[1] == "w"
    assert set(om.constants(folded)) == set(conv.input) - {"x"}


@pytest.mark.parametrize("rank", [3, 5])
def test_convolution_of_other_ranks(rank):
    space = ",".join("5" * (rank - 2))
    out = ",".join("4" * (rank - 2))
    body = (
        f"(float[N,3,{space}] x) => (float[N,4,{out}] y) {{ c = Conv(x, w) y = BN(c, s, o, m, v) }}"
    )
    model = om.build(body, w=om.normal(RNG, 4, 3, *[2] * (rank - 2)), **om.numbers(RNG, 4))
    assert_folds(model, {"x": om.normal(RNG, 2, 3, *[5] * (rank - 2))}, 24)


STRIDED = "strides=[2,1], pads=[1,0,0,1], output_padding=[1,0]"


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups):
    body = f"""(float[N,6,4,5] x) => (float[N,4,H,W] y) {{
        c = ConvTranspose<group={groups}, {STRIDED}>(x, w, b) y = BN(c, s, o, m, v)
    }}"""
    weights = {"w": om.normal(RNG, 6, 4 // groups, 3, 2), "b": om.normal(RNG, 4)}
    model = om.build(body, **weights, **om.numbers(RNG, 4))
    # The reference evaluator (onnx 1.23) splits the weights of several groups wrongly.
    runs = (om.run_runtime, om.run_reference)[: 1 if groups > 1 else 2]
    assert_folds(model, {"x": om.normal(RNG, 2, 6, 4, 5)}, 36, references=runs)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("shape", [None, (), (1,), (5,), (1, 5), (1, 1)])
def test_gemm(trans_b, shape):
    weights = {"w": om.normal(RNG, *((5, 7) if trans_b else (7, 5)))}
    if shape is not None:
        weights["b"] = om.normal(RNG, *shape)
    c = "" if shape is None else ", b"
    body = f"""(float[N,7] x) => (float[N,5] y) {{
        g = Gemm<alpha=0.5, beta=-3.0, transB={trans_b}>(x, w{c}) y = BN(g, s, o, m, v)
    }}"""
    model = om.build(body, **weights, **om.numbers(RNG, 5))
    assert_folds(model, {"x": om.normal(RNG, 3, 7)}, 7)


def test_gemm_of_a_transposed_input():
    body = "(float[7,N] x) => (float[N,5] y) { g = Gemm<transA=1>(x, w) y = BN(g, s, o, m, v) }"
    model = om.build(body, w=om.normal(RNG, 7, 5), **om.numbers(RNG, 5))
    assert_folds(model, {"x": om.normal(RNG, 7, 3)}, 7)


@pytest.mark.parametrize("add", ["", "a = Add(g, b)", "a = Add(b, g)"])
@pytest.mark.parametrize("shape", [(), (5,), (1, 5)])
def test_matmul_becomes_a_gemm(add, shape):
    last = "a" if add else "g"
    body = (
        f"(float[N,7] x) => (float[N,5] y) {{ g = MatMul(x, w) {add} y = BN({last}, s, o, m, v) }}"
    )
    weights = {"w": om.normal(RNG, 7, 5), **({"b": om.normal(RNG, *shape)} if add else {})}
    model = om.build(body, **weights, **om.numbers(RNG, 5))
    folded = assert_folds(model, {"x": om.normal(RNG, 3, 7)}, 7)
    assert [node.op_type for node in folded.graph.node] == ["Gemm"]


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 4, 1, 1)])
def test_convolution_and_an_addition(bias, shape):
    body = f"""(float[N,3,5,5] x) => (float[N,4,4,4] y) {{
        c = Conv(x, w{bias}) a = Add(c, k) y = BN(a, s, o, m, v)
    }}"""
    weights = {"w": om.normal(RNG, 4, 3, 2, 2), "k": om.normal(RNG, *shape)}
    if bias:
        weights["b"] = om.normal(RNG, 4)
    model = om.build(body, **weights, **om.numbers(RNG, 4))
    folded = assert_folds(model, {"x": om.normal(RNG, 2, 3, 5, 5)}, 12)
    assert [node.op_type for node in folded.graph.node] == ["Conv"]


# ---- the layer after


@pytest.mark.parametrize("options", ["", "<group=2>", '<auto_pad="VALID">'])
def test_before_a_convolution(options):
    groups = 2 if "group" in options else 1
    body = f"""(float[N,6,7,5] x) => (float[N,4,5,4] y) {{
        c = BN(x, s, o, m, v) y = Conv{options}(c, w)
    }}"""
    model = om.build(body, w=om.normal(RNG, 4, 6 // groups, 3, 2), **om.numbers(RNG, 6))
    assert_folds(model, {"x": om.normal(RNG, 2, 6, 7, 5)}, 36)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("Gemm<alpha=0.5, beta=2.0>(c, w, b)", (6, 5)),
        ("Gemm<transB=1>(c, w)", (5, 6)),
        ("MatMul(c, w)", (6, 5)),
    ],
)
def test_before_a_linear_layer(layer, shape):
    body = f"(float[N,6] x) => (float[N,5] y) {{ c = BN(x, s, o, m, v) y = {layer} }}"
    weights = {"w": om.normal(RNG, *shape)} | ({"b": om.normal(RNG, 5)} if "b)" in layer else {})
    model = om.build(body, **weights, **om.numbers(RNG, 6))
    assert_folds(model, {"x": om.normal(RNG, 3, 6)}, 6)


PADDINGS = ["Conv<pads=[1,1,1,1]>", 'Conv<auto_pad="SAME_UPPER">', "ConvTranspose"]


@pytest.mark.parametrize("layer", PADDINGS)
def test_before_padding(layer):
    """Exact only if zero stays zero."""
    body = f"(float[N,4,7,5] x) => (float[N,4,H,W] y) {{ c = BN(x, s, o, m, v) y = {layer}(c, w) }}"
    weights = {"w": om.normal(RNG, 4, 4, 3, 3), **om.numbers(RNG, 4)}
    assert_left(om.build(body, **weights), "maps 0 to 0")
    weights |= {"o": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)}
    assert_folds(om.build(body, **weights), {"x": om.normal(RNG, 2, 4, 7, 5)}, 36)


def test_several_in_a_row():
    body = """(float[N,3,9,9] x) => (float[N,4] y) {
        x0 = BN(x, s0, o0, m0, v0)
        x1 = BN(x0, s1, o1, m1, v1)
        c = Conv(x1, w)
        c0 = BN(c, s2, o2, m2, v2)
        c1 = BN(c0, s3, o3, m3, v3)
        r = Relu(c1)
        p = GlobalAveragePool(r)
        f = Flatten(p)
        f0 = BN(f, s4, o4, m4, v4)
        y = Gemm(f0, k)
    }"""
    weights = {"w": om.normal(RNG, 5, 3, 3, 3), "k": om.normal(RNG, 5, 4)}
    for i, channels in enumerate((3, 3, 5, 5, 5)):
        weights |= om.numbers(RNG, channels, f"s{i}, o{i}, m{i}, v{i}")
    folded = assert_folds(om.build(body, **weights), {"x": om.normal(RNG, 2, 3, 9, 9)}, 27 + 49 + 5)
    assert [n.op_type for n in folded.graph.node] == [
        *("Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm")
    ]


# ---- sources of constants, and their other users


def test_shared_weights_are_not_changed_for_others():
    body = """(float[N,3,5,5] x) => (float[N,4,4,4] y, float[N,4,4,4] z, float[4] t) {
        c = Conv(x, w, b) y = BN(c, s, o, m, v)
        d = Conv(x, w, b) e = BN(d, s, o, m, b2) z = Conv(e, k)
        t = Relu(v)
    }"""
    weights = {"w": om.normal(RNG, 4, 3, 2, 2), "b": om.normal(RNG, 4), "unused": om.normal(RNG, 3)}
    weights |= {"k": om.normal(RNG, 4, 4, 1, 1), "b2": np.abs(weights["b"]), **om.numbers(RNG, 4)}
    folded = assert_folds(om.build(body, **weights), {"x": om.normal(RNG, 2, 3, 5, 5)}, 16)
    names = set(om.constants(folded))
    assert {"unused", "v", "k"} <= names  # v is used elsewhere
    assert not {"s", "o", "m", "b2"} & names
    assert len(folded.graph.node) == 4


def test_weights_used_elsewhere_stay():
    body = """(float[N,3] x) => (float[N,3] y, float[3,3] z) {
        c = MatMul(x, w) y = BN(c, s, o, m, v) z = Relu(w)
    }"""
    weights = {"w": om.normal(RNG, 3, 3), "w_folded": om.normal(RNG, 1)}
    model = om.build(body, **weights, **om.numbers(RNG, 3))
    folded = assert_folds(model, {"x": om.normal(RNG, 2, 3)}, 3)
    np.testing.assert_array_equal(om.constants(folded)["w"], weights["w"])
    assert folded.graph.node[0].input[1] == "w_folded1"


def test_constant_nodes_identities_and_transposes():
    body = """(float[N,3] x) => (float[N,2] y) {
        k = Constant<value_floats=[1.0, -2.0]>()
        w0 = Constant<value=float[2,3] {1.0, 2.0, 3.0, -4.0, 5.0, 6.0}>()
        w = Transpose<perm=[1,0]>(w0)
        sv = Identity(s)
        g = Gemm(x, w, k)
        y = BN(g, sv, o, m, v)
    }"""
    model = om.build(body, **om.numbers(RNG, 2))
    folded = assert_folds(model, {"x": om.normal(RNG, 2, 3)}, 3)
    assert [node.op_type for node in folded.graph.node] == ["Gemm"]


def test_transposed_weights():
    body = """(float[N,3,5] x) => (float[N,2,4] y) {
        w = Transpose<perm=[1,2,0]>(w0) c = Conv(x, w) y = BN(c, s, o, m, v)
    }"""
    model = om.build(body, w0=om.normal(RNG, 2, 2, 3), **om.numbers(RNG, 2))
    folded = assert_folds(model, {"x": om.normal(RNG, 2, 3, 5)}, 6)
    assert [node.op_type for node in folded.graph.node] == ["Conv"]


def test_constants_used_in_subgraphs_stay():
    body = """(float[N,3] x, bool k) => (float[N,3] y, float[3] z) {
        c = MatMul(x, w) y = BN(c, s, o, m, v)
        z = If(k)<then_branch = then () => (float[3] zt) { zt = Relu(s) },
                  else_branch = else () => (float[3] ze) { ze = Neg(o) }>
    }"""
    model = om.build(body, w=om.normal(RNG, 3, 3), **om.numbers(RNG, 3))
    x = om.normal(RNG, 2, 3)
    for k in (True, False):
        folded = fold(model)
        om.assert_valid(folded)
        got, want = (om.run_runtime(m, {"x": x, "k": np.array(k)}) for m in (folded, model))
        np.testing.assert_array_equal(got[1], want[1])
    assert not om.batch_norms(folded)
    assert {"s", "o"} <= set(om.constants(folded))


# ---- not folded

MATMUL = "(float[N,3] x) => (float[N,3] y) { c = MatMul(x, w) y = BN(c, s, o, m, v) }"


def linear(body=MATMUL, shape=(3, 3), **options):
    return om.build(body, w=om.normal(RNG, *shape), **om.numbers(RNG, 3), **options)


def test_values_with_other_users_not_folded():
    assert_left(
        linear(
            """(float[N,3] x) => (float[N,3] y, float[N,3] c) {
                c = MatMul(x, w) y = BN(c, s, o, m, v)
            }"""
        ),
        "'c' is a graph output",
    )
    assert_left(
        linear(
            """(float[N,3] x) => (float[N,3] y, float[N,3] z) {
                c = MatMul(x, w) y = BN(c, s, o, m, v) z = Relu(c)
            }"""
        ),
        "'c' is used 2 times",
    )
    assert_left(
        linear(
            """(float[N,3] x) => (float[N,3] y) {
                c = MatMul(x, w) e = BN(c, s, o, m, v) y = Add(c, e)
            }"""
        ),
        "'c' is used 2 times",
    )
    assert_left(
        linear(
            """(float[N,3] x, bool k) => (float[N,3] y, float[N,3] z) {
                c = MatMul(x, w) y = BN(c, s, o, m, v)
                z = If(k)<then_branch = then () => (float[N,3] zt) { zt = Relu(c) },
                          else_branch = else () => (float[N,3] ze) { ze = Neg(c) }>
            }"""
        ),
        "'c' is used 3 times",
    )
    assert_left(
        linear(
            """(float[N,3] x, bool k) => (float[N,3] y) {
                r = Relu(x) c = BN(r, s, o, m, v)
                y = If(k)<then_branch = then () => (float[N,3] zt) { zt = MatMul(c, w) },
                          else_branch = else () => (float[N,3] ze) { ze = Neg(x) }>
            }"""
        ),
        "'c' is used in a subgraph of If 'y'",
    )


@pytest.mark.parametrize("ir", [4, 8])
@pytest.mark.parametrize("name", ["w", "s"])
def test_settable_inputs_not_folded(ir, name):
    model = linear(ir=ir)
    shape = om.constants(model)[name].shape
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    om.assert_valid(model)
    reason = "a graph input, which a caller may set"
    assert_left(model, reason)
    if name == "s":
        with pytest.warns(UserWarning, match=reason):
            assert read(model) == {}


def test_all_initializers_are_inputs_in_ir_version_3():
    """They had to be inputs: a caller cannot set any of them."""
    model = om.listed(linear(ir=3))
    om.assert_valid(model)
    assert len(read(model)) == 1
    folded = assert_folds(model, {"x": om.normal(RNG, 2, 3)}, 3)
    assert folded.ir_version == 3
    inputs = {v.name: [d.dim_value for d in om.dims(v)] for v in folded.graph.input}
    assert inputs.pop("x") == [0, 3]
    assert inputs == {name: list(a.shape) for name, a in om.constants(folded).items()}
    model.ir_version = 0  # of no known version
    assert_left(model, "its scale, 's', is a graph input, which a caller may set")


def test_computed_values_not_folded():
    body = """(float[N,3] x, float[3,3] w0) => (float[N,3] y) {{
        {} c = Gemm(x, {}) y = BN(c, {}, o, m, v)
    }}"""
    for computed, arguments, scale, reason in [
        ("", "w0", "s", "the weight of Gemm 'c', 'w0', is a graph input"),
        ("w1 = Relu(w0)", "w1", "s", "the weight of Gemm 'c', 'w1', is not a constant"),
        ("b = ReduceSum<keepdims=0>(w0)", "w, b", "s", "the bias of Gemm 'c', 'b', is not a"),
        ("r = Relu(s)", "w", "r", "its scale, 'r', is not a constant"),
    ]:
        assert_left(linear(body.format(computed, arguments, scale)), reason)


def test_other_neighbours_not_folded():
    for body, reason in [
        ("{ c = Relu(x) y = BN(c, s, o, m, v) }", "Relu 'c' is no convolution"),
        ("{ c = BN(x, s, o, m, v) y = Relu(c) }", "Relu 'y' is no convolution"),
        ("{ c = BN(x, s, o, m, v) y = Gemm<transA=1>(c, w) }", "transposes it"),
        ("{ c = BN(x, s, o, m, v) y = MatMul(w, c) }", "'c', is not a constant"),
        ("{ c = BN(x, s, o, m, v) y = Add(c, x) }", "Add 'y' is no convolution"),
        ("{ c = Add(x, x) y = BN(c, s, o, m, v) }", "'c' adds no constant"),
    ]:
        assert_left(linear(f"(float[3,3] x) => (float[3,3] y) {body}"), reason)


def test_matmul_over_more_axes_not_folded():
    """Its channels are on the last axis, the batch norm's on axis 1; both have length three."""
    body = MATMUL.replace("[N,3]", "[N,3,3]")
    assert_left(linear(body), "MatMul 'c' gives 3 axes")
    unknown = MATMUL.replace("float[N,3] x", "float[] x").replace("float[N,3] y", "float[] y")
    model = linear(unknown)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    assert_left(model, "MatMul 'c' gives an unknown number of axes")


@pytest.mark.parametrize("shape", [(3, 1), (3, 3)])
def test_addition_per_pixel_not_folded(shape):
    body = (
        "(float[3,3] x) => (float[3,3] y) { c = MatMul(x, w) a = Add(c, b) y = BN(a, s, o, m, v) }"
    )
    model = om.build(body, w=om.normal(RNG, 3, 3), b=om.normal(RNG, *shape), **om.numbers(RNG, 3))
    assert_left(model, f"the constant of Add 'a' has shape {shape}, not one value a channel")


def test_addition_that_makes_channels_not_folded():
    body = """(float[2,1,4,4] x) => (float[2,3,4,4] y) {
        c = Conv(x, w) a = Add(c, b) y = BN(a, s, o, m, v)
    }"""
    weights = {"w": om.normal(RNG, 1, 1, 1, 1), "b": om.normal(RNG, 3, 1, 1)}
    assert_left(
        om.build(body, **weights, **om.numbers(RNG, 3)), "has shape (3, 1, 1), not one value"
    )


def test_training_mode_not_folded():
    body = """(float[N,3] x) => (float[N,3] y) {
        c = MatMul(x, w) y, a, b = BN<training_mode=1>(c, s, o, m, v)
    }"""
    assert_left(linear(body), "it is in training mode")
    outputs = body.replace("<training_mode=1>", "")
    assert_left(linear(outputs), "it has the outputs of training mode")
    assert_left(linear(outputs, opset=9), "it is in training mode")


def test_statistics_per_pixel_not_folded():
    body = MATMUL.replace("BN(", "BN<spatial=0>(")
    model = linear(body, opset=7)
    assert_left(model, "spatial is 0")
    with pytest.warns(UserWarning, match="y is not read: .*spatial is 0"):
        assert read(model) == {}


def test_numbers_that_would_overflow_not_folded():
    body = MATMUL.replace("float", "float16")
    weights = om.numbers(RNG, 3, dtype=np.float16) | {"s": np.full(3, 6e4, np.float16)}
    weights["v"] = np.full(3, 1e-3, np.float16)
    model = om.build(body, w=om.normal(RNG, 3, 3, dtype=np.float16), **weights)
    assert_left(model, "are not finite in float16")
    weights["v"] = np.full(3, -1, np.float16)
    model = om.build(body, w=om.normal(RNG, 3, 3, dtype=np.float16), **weights)
    assert_left(model, "are not finite in float16")


def test_numbers_of_wrong_shape_not_folded():
    model = om.build(MATMUL, w=om.normal(RNG, 3, 4), **om.numbers(RNG, 3))
    assert_left(model, "weight of shape (3, 4) has 4 output channels")
    model = om.build(MATMUL, w=om.normal(RNG, 3, 3), **om.numbers(RNG, 3) | {"s": np.ones(2, "f4")})
    assert_left(model, "its B has shape (3,); expected (2,)")
    model = om.build(MATMUL, w=om.normal(RNG, 3, 3), **om.numbers(RNG, 3) | {"s": np.ones(3, "i4")})
    assert_left(model, "its scale, 's', is of type INT32")
    model = om.build(MATMUL, w=np.ones((3, 3), "i4"), **om.numbers(RNG, 3))
    assert_left(model, "the weight of MatMul 'c', 'w', is of type INT32")


def test_unloaded_data_not_folded(tmp_path):
    model = linear()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0)
    assert_left(onnx.load(path, load_external_data=False), "external data that is not loaded")
    assert om.batch_norms(fold(onnx.load(path))) == []


def test_subgraphs_and_functions_not_folded():
    body = """(float[N,3] x, bool k) => (float[N,3] y) {
        y = If(k)<then_branch = then () => (float[N,3] zt) {
                      c = MatMul(x, w) zt = BN(c, s, o, m, v) },
                  else_branch = else () => (float[N,3] ze) { ze = Neg(x) }>
    }"""
    model = linear(body)
    assert_left(model, "it is in a subgraph of If 'y'")
    with pytest.warns(UserWarning, match="zt is not read: it is in a subgraph"):
        assert read(model) == {}
    model = linear("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    inner = helper.make_node("BatchNormalization", list("abcde"), ["f"], "inner")
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "F", list("abcde"), ["f"], [inner], opsets))
    assert_left(model, "it is in the function 'F'")


# ---- types


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_types(dtype):
    """In the type of the weights, rounded once from float64."""
    kind = np.dtype(dtype if dtype != "bfloat16" else pytest.importorskip("ml_dtypes").bfloat16)
    name = "double" if dtype == "float64" else dtype
    body = (
        f"({name}[N,6] x) => ({name}[N,4] y) {{ c = Gemm<transB=1>(x, w) y = BN(c, s, o, m, v) }}"
    )
    weights = {"w": om.normal(RNG, 4, 6, dtype=kind), **om.numbers(RNG, 4, dtype=kind)}
    model = om.build(body, **weights)
    folded = fold(model)
    om.assert_valid(folded)
    got = om.constants(folded)
    assert {a.dtype for a in got.values()} == {kind}
    w, s, o, m, v = (weights[k].astype(np.float64) for k in "wsomv")
    scale = s / np.sqrt(v + float(np.float32(1e-5)))
    bias = folded.graph.node[0].input[2]
    # float64 is computed in another order here: products and sums of a few terms of order ten.
    slack = 1e-14 if dtype == "float64" else 0
    np.testing.assert_allclose(
        got["w"].astype("f8"), (w * scale[:, None]).astype(kind).astype("f8"), rtol=slack
    )
    np.testing.assert_allclose(
        got[bias].astype("f8"), (o - m * scale).astype(kind).astype("f8"), rtol=0, atol=slack
    )
    if dtype == "float64":
        om.assert_equivalent(
            folded, model, {"x": om.normal(RNG, 3, 6, dtype=kind)}, 6, om.run_reference
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_once(dtype):
    """Just above the midpoint of two numbers, where float32 is at the midpoint."""
    kind = np.dtype(dtype if dtype != "bfloat16" else pytest.importorskip("ml_dtypes").bfloat16)
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    body = f"""({dtype}[N,1] x) => ({dtype}[N,1] y) {{
        c = Gemm(x, w, b) y = BN<epsilon=0.0>(c, s, o, m, v)
    }}"""
    one, zero = np.ones(1), np.zeros(1)
    for scale, expected in [
        (1 + step / 2 + 2.0**-40, 1 + step),
        (1 + step / 2, 1),
        (1 + 3 * step / 2 - 2.0**-40, 1 + step),
        (1 + 3 * step / 2, 1 + 2 * step),
    ]:
        weights = {"w": np.ones((1, 1), kind), "b": np.ones(1, kind), "s": scale * one}
        model = om.build(body, **weights, o=zero, m=zero, v=one)
        got = om.constants(fold(model))
        assert {a.dtype for a in got.values()} == {kind}
        assert [float(a.reshape(())) for a in got.values()] == [expected, expected]


def test_several_batch_norms_rounded_once():
    """A batch norm before and two after: 1.5 units of float32's last place, not one and two."""
    body = """(float[N,1] x) => (float[N,1] y) {
        a = BN<epsilon=0.0>(x, s, o, m, v) b = MatMul(a, w)
        c = BN<epsilon=0.0>(b, s, o, m, v) y = BN<epsilon=0.0>(c, s, o, m, v)
    }"""
    one, zero = np.ones(1), np.zeros(1)
    scale = 1 + 2.0**-25 + 2.0**-26
    model = om.build(body, w=np.ones((1, 1), "f4"), s=scale * one, o=zero, m=zero, v=one)
    folded = fold(model)
    assert not om.batch_norms(folded)
    assert om.constants(folded)["w"] == np.float32(scale**3) == 1 + 2.0**-23


def test_independent_of_numpy_errstate():
    body = MATMUL.replace("float", "float16")
    weights = om.numbers(RNG, 3) | {"w": om.normal(RNG, 3, 3, dtype=np.float16)}
    weights["s"] = np.array([1e30, 1e-30, 1e-9], np.float32)
    small = weights | {"s": np.array([1, 1e-30, 1e-7], np.float32)}
    for numbers, left in ((weights, 1), (small, 0)):
        model = om.build(body, **numbers)
        want = fold(model)
        assert len(om.batch_norms(want)) == left
        with np.errstate(all="raise"):
            assert fold(model) == want
            assert len(read(model)) == 1


def test_statistics_keep_their_own_type():
    """float32 parameters with float64 statistics: the mean is not rounded."""
    body = "(double[N,3] x) => (double[N,3] y) { c = MatMul(x, w) y = BN(c, s, o, m, v) }"
    weights = om.numbers(RNG, 3) | om.numbers(RNG, 3, "s0, o0, m, v", np.float64)
    weights = {k: weights[k] for k in "somv"} | {"w": np.eye(3)}
    model = om.build(body, **weights)
    got = om.constants(fold(model))
    scale = weights["s"] / np.sqrt(weights["v"] + float(np.float32(1e-5)))
    # A few roundings of float64; a mean rounded to float32 would be off by 1e-8.
    np.testing.assert_allclose(got["w"], np.diag(scale), rtol=1e-15)
    (bias,) = set(got) - {"w"}
    np.testing.assert_allclose(got[bias], weights["o"] - weights["m"] * scale, rtol=0, atol=1e-14)


# ---- random graphs


def random_network(rng):
    """Return a model of eight random nodes over images of four channels, with branches."""
    lines, weights, values = [], {}, ["x"]
    for i in range(8):
        source = values[-1] if rng.random() < 0.8 else str(rng.choice(values))
        kind = rng.choice(["conv", "bn", "bn", "bn", "add", "relu", "join", "transposed"])
        if kind in ("conv", "transposed"):
            op, groups = ("Conv", 2) if kind == "conv" else ("ConvTranspose", 1)
            size, bias = rng.choice([1, 3]), ""
            weights[f"w{i}"] = om.normal(rng, 4, 4 // groups, size, size) / 2
            if rng.random() < 0.5:
                weights[f"b{i}"], bias = om.normal(rng, 4), f", b{i}"
            pads = ",".join([str(size // 2)] * 4)
            lines.append(f"t{i} = {op}<group={groups}, pads=[{pads}]>({source}, w{i}{bias})")
        elif kind == "bn":
            names = f"s{i}, o{i}, m{i}, v{i}"
            weights |= om.numbers(rng, 4, names)
            lines.append(f"t{i} = BN({source}, {names})")
        elif kind == "add":
            weights[f"k{i}"] = om.normal(rng, 4, 1, 1)
            lines.append(f"t{i} = Add({source}, k{i})")
        elif kind == "join":
            lines.append(f"t{i} = Add({source}, {rng.choice(values)})")
        else:
            lines.append(f"t{i} = Relu({source})")
        values.append(f"t{i}")
    body = f"(float[N,4,6,6] x) => (float[N,4,6,6] t7) {{ {chr(10).join(lines)} }}"
    return om.build(body, **weights)


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed):
    rng = np.random.default_rng(seed)
    model = onnx.shape_inference.infer_shapes(random_network(rng))
    left = len(om.batch_norms(fold(model)))
    assert_folds(model, {"x": om.normal(rng, 2, 4, 6, 6)}, 8 * 36, left=left)


def test_random_graphs_have_something_to_fold():
    models = [random_network(np.random.default_rng(seed)) for seed in range(60)]
    folded = [o.folded for model in models for o in outcomes_of(model)[1]]
    assert 20 < sum(folded) < len(folded) - 20


# ---- arguments and report


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model is of type str; expected an onnx.ModelProto"):
        fold("model.onnx")
    with pytest.raises(TypeError, match="report is 3; expected a callable"):
        fold(linear(), report=3)
    for call in (fold, read):
        with pytest.raises(ValueError, match="model uses opset 6; expected 7 or later"):
            call(linear(opset=6))
    model = linear()
    model.training_info.add()
    with pytest.raises(ValueError, match="model has training_info"):
        fold(model)


def test_report_names_each_batch_norm_once(capsys):
    body = """(float[N,3] x) => (float[N,3] z) {
        c = MatMul(x, w) d = BN(c, s, o, m, v)
        r = Relu(d) z = BN(r, s, o, m, v)
    }"""
    model = linear(body)
    assert not om.batch_norms(fold(linear()))
    model.graph.node[1].name = "bn"
    seen = outcomes_of(model)[1]
    assert seen[0] == Outcome("bn", True, "MatMul 'c' before it")
    assert seen[1][:2] == ("z", False)
    fold(model, report=print)
    assert capsys.readouterr().out == (
        "bn: folded into MatMul 'c' before it\n"
        "z: left: Relu 'r' is no convolution or linear layer; 'z' is a graph output\n"
    )


def test_numbers_in_lists():
    """An initializer is read whether its numbers are raw bytes or a list."""
    model = linear()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values.reshape(-1))
        )
    assert_folds(model, {"x": om.normal(RNG, 2, 3)}, 3)


# ---- what an exporter writes

EXPORT = """
import sys, warnings
import numpy as np, torch
from torch import nn

class Block(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, groups=2), nn.BatchNorm2d(out)
        self.short = nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))

torch.manual_seed(0)
net = nn.Sequential(
    Block(3, 8, 1), Block(8, 8, 2), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5),
    nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4),
)
x = torch.randn(4, 3, 8, 8)
for _ in range(3):
    net(x)
net.eval()
warnings.simplefilter("ignore")
keep = torch.onnx.TrainingMode.PRESERVE  # or the exporter folds
options = {"dynamo": False, "training": keep, "do_constant_folding": False}
torch.onnx.export(net, (x,), sys.argv[1], **options)
np.savez(sys.argv[2], x=x.numpy(), y=net(x).detach().numpy())
"""


def test_a_network_from_pytorch(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    files = [tmp_path / "model.onnx", tmp_path / "expected.npz"]
    subprocess.run([sys.executable, "-c", EXPORT, *files], check=True, timeout=300)
    model = onnx.load(files[0])
    assert len(om.batch_norms(model)) == 10
    folded = fold(model)
    om.assert_valid(folded)
    kinds = {node.op_type for node in folded.graph.node}
    assert not kinds & {"BatchNormalization", "Identity", "Transpose", "MatMul"}
    with np.load(files[1]) as expected:
        (name,) = (value.name for value in model.graph.input)
        # Longest path: 27 + 36 + 72 + 36 products in the blocks, 8, 16 in the mean, 6 and 5.
        om.assert_equivalent(folded, model, {name: expected["x"]}, 206)
        got = om.run_runtime(folded, {name: expected["x"]})[0]
        size = om.magnitudes(model, {name: expected["x"]}, om.run_runtime)[0]
        assert np.all(np.abs(got - expected["y"]) <= 2 * 2.0**-24 * (206 + 16 * 11) * size)
