"""Batch norms of a model read as layers, and the operator itself, with ONNX's own tests."""

import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as om  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

import bnfast  # noqa: E402
from bnfast import BatchNorm, conventions  # noqa: E402
from bnfast.onnx import batch_normalization, fold, read  # noqa: E402

RNG = np.random.default_rng(20150303)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "onnx.md"


@pytest.mark.skipif(not PAGE.exists(), reason="not run from a source tree")
def test_the_guide(tmp_path, monkeypatch, capsys):
    """The code of docs/guide/onnx.md, in its order, on a model with its weights as inputs."""
    monkeypatch.chdir(tmp_path)
    body = "(float[N,3] x) => (float[N,3] y) { c = MatMul(x, w) y = BN(c, s, o, m, v) }"
    model = om.listed(om.build(body, 15, w=om.normal(RNG, 3, 3), **om.numbers(RNG, 3)))
    onnx.save(model, "model.onnx")
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", PAGE.read_text(), re.M | re.S)
    variables = {}
    for _, block in blocks[:2]:
        exec(textwrap.dedent(block), variables)
    assert "y: left: its scale, 's', is a graph input" in capsys.readouterr().out
    for _, block in (blocks[0], *blocks[2:]):
        block = block.replace('onnx.load("model.onnx")', "model")
        exec(textwrap.dedent(block), variables)
    assert capsys.readouterr().out == "y: folded into MatMul 'c' before it\n"
    assert set(variables["layers"]) == {"y"}
    x = om.normal(RNG, 2, 3)
    (got,), (want,) = variables["evaluator"].run(None, {"x": x}), om.run_runtime(model, {"x": x})
    (size,) = om.magnitudes(model, {"x": x}, om.run_runtime)
    assert np.all(np.abs(got - want) <= 2 * 2.0**-24 * (3 + 16 * 2) * size)


# ---- read

TWO = """(float[N,3,4,4] x) => (float[N,3,4,4] y) {
    c = BN<epsilon=0.01, momentum=0.75>(x, s, o, m, v) y = BN(c, s1, o1, m1, v1)
}"""


def two(opset=17, dtype=np.float32):
    numbers = om.numbers(RNG, 3, dtype=dtype) | om.numbers(RNG, 3, "s1, o1, m1, v1", dtype)
    body = TWO if dtype == np.float32 else TWO.replace("float", "double")
    return om.build(body, opset, **numbers), numbers


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 22])
def test_layers_are_the_nodes(opset):
    model, numbers = two(opset)
    model.graph.node[0].name = "first"
    before = model.SerializeToString(deterministic=True)
    layers = read(model)
    assert model.SerializeToString(deterministic=True) == before
    assert list(layers) == ["first", "y"]
    for name, suffix in (("first", ""), ("y", "1")):
        layer = layers[name]
        for own, key in zip(("weight", "bias", "running_mean", "running_var"), "somv", strict=True):
            np.testing.assert_array_equal(getattr(layer, own), numbers[key + suffix])
        assert (layer.ddof, layer.axis, layer.training) == (0, 1, False)
        assert layer.dtype == np.float32
    assert layers["first"].eps == float(np.float32(0.01))
    assert layers["first"].momentum == 0.25
    for key, value in conventions.ONNX.items():
        # Attributes are float32, and so are the defaults.
        assert getattr(layers["y"], key) == pytest.approx(value, rel=1e-6, abs=0)

    x = om.normal(RNG, 2, 3, 4, 4)
    got = layers["y"](layers["first"](x))
    # Both round a few times: 16 roundings of two layers, of sizes that are added as positive ones.
    (want,), (size,) = (
        om.run_runtime(model, {"x": x}),
        om.magnitudes(model, {"x": x}, om.run_runtime),
    )
    assert np.all(np.abs(got - want) <= 32 * 2.0**-24 * size)


def test_float64_and_half():
    layers = read(two(dtype=np.float64)[0])
    assert {layer.dtype for layer in layers.values()} == {np.dtype(np.float64)}
    model, numbers = two(dtype=np.float16)
    assert {layer.dtype for layer in read(model).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(read(model)["y"].running_var, numbers["v1"])


def test_training_nodes_are_layers_in_training():
    body = "(float[N,3] x) => (float[N,3] y, float[3] a) {{ y, a, b = BN{}(x, s, o, m, v) }}"
    model = om.build(body.format("<training_mode=1, momentum=0.5>"), 15, **om.numbers(RNG, 3))
    layer = read(model)["y"]
    assert layer.training
    x = om.normal(RNG, 5, 3)
    want = batch_normalization(
        x, layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps, 0.5, 1
    )
    np.testing.assert_array_equal(layer(x), want[0])
    # float32 statistics: one rounding here, at most three in the layer
    np.testing.assert_array_max_ulp(layer.running_mean, want[1], maxulp=4)
    np.testing.assert_array_max_ulp(layer.running_var, want[2], maxulp=4)
    assert read(om.build(body.format(""), 9, **om.numbers(RNG, 3)))["y"].training
    assert not read(om.build(body.format(""), 15, **om.numbers(RNG, 3)))["y"].training


def test_equal_names_are_distinguished():
    model, _ = two()
    for node in model.graph.node:
        node.name = "bn"
    assert list(read(model)) == ["c", "y"]


def named(*nodes):
    """Return a model of batch norms in a row, each given by its name and its output."""
    lines, value = [], "x"
    for _, output in nodes:
        lines.append(f"{output} = BN({value}, s, o, m, v)")
        value = output
    body = f"(float[N,3] x) => (float[N,3] {value}) {{ {' '.join(lines)} }}"
    model = om.build(body, **om.numbers(RNG, 3))
    for node, (name, _) in zip(model.graph.node, nodes, strict=True):
        node.name = name
    return model


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        # the name of one is the output of another, which has no other name
        ([("y", "h"), ("", "y")], ["h", "y"]),
        ([("", "y"), ("y", "h")], ["y", "h"]),
        # and the output it is then called by is the name of a third
        ([("y", "h"), ("", "y"), ("h", "z")], ["h", "y", "z"]),
        ([("a", "b"), ("b", "c"), ("c", "d"), ("", "a")], ["b", "c", "d", "a"]),
        ([("n", "a"), ("n", "b"), ("a", "c"), ("b", "n")], ["a", "b", "c", "n"]),
        # no two have the same name: names stay
        ([("y", "h"), ("b", "y")], ["y", "b"]),
        ([("y", "h"), ("h", "y")], ["y", "h"]),
        ([("bn", "bn"), ("bn", "z")], ["bn", "z"]),
    ],
)
def test_names_are_distinguished_from_outputs(nodes, names):
    model = named(*nodes)
    assert list(read(model)) == names
    seen = []
    fold(model, report=seen.append)
    assert [outcome.name for outcome in seen] == names


def test_names_of_other_nodes_have_no_effect():
    model = named(("y", "h"), ("b", "y"))
    model.graph.node.append(helper.make_node("Relu", ["y"], ["b"]))
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"], "h"))
    assert list(read(model)) == ["y", "b"]


def test_long_rows_of_clashing_names():
    row = [(f"v{i}", f"v{i + 1}") for i in range(2000)]
    assert list(read(named(*row, ("", "v0")))) == [*(f"v{i + 1}" for i in range(2000)), "v0"]


def test_import_error_without_onnx():
    code = "import sys; sys.modules['onnx'] = None; import bnfast; import bnfast.onnx"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError: import of onnx" in done.stderr


# ---- the operator


class BatchNormalization(OpRun):
    """The operator of ONNX's own evaluator, computed by bnfast."""

    op_domain = ""

    def _run(self, *inputs, epsilon, momentum, training_mode):
        got = batch_normalization(*inputs, epsilon, momentum, training_mode)
        return got if training_mode else (got,)


NODE_TESTS = {
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
}


@pytest.fixture(scope="module")
def node_tests():
    """ONNX's backend tests of single nodes."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    return {case.name: case for case in cases if "batchnorm" in case.name}


def test_all_backend_tests_are_listed(node_tests):
    assert set(node_tests) == NODE_TESTS


@pytest.mark.parametrize("name", sorted(NODE_TESTS))
def test_backend_node(node_tests, name):
    case = node_tests[name]
    evaluator = ReferenceEvaluator(case.model, new_ops=[BatchNormalization])
    feeds = [value.name for value in case.model.graph.input]
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        got = evaluator.run(None, dict(zip(feeds, inputs, strict=True)))
        for result, want in zip(got, outputs, strict=True):
            assert result.dtype == want.dtype
            assert result.shape == want.shape
            np.testing.assert_allclose(result, want, rtol=case.rtol, atol=case.atol)


def converted_tests():
    from onnx.backend.test.loader import load_model_tests

    cases = load_model_tests(kind="pytorch-converted")
    return {case.name: case for case in cases if "BatchNorm" in case.name}


@pytest.mark.parametrize("name", sorted(converted_tests()))
def test_backend_pytorch_converted(name):
    """Models that PyTorch wrote, of IR 3 and about opset 6, with inputs and outputs."""
    case = converted_tests()[name]
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    model = onnx.version_converter.convert_version(model, 15)
    evaluator = ReferenceEvaluator(model, new_ops=[BatchNormalization])
    data = {}
    for kind in ("input", "output"):
        (path,) = (folder / "test_data_set_0").glob(f"{kind}_*.pb")
        data[kind] = numpy_helper.to_array(onnx.load_tensor(path))
    got = evaluator.run(None, {model.graph.input[0].name: data["input"]})[0]
    np.testing.assert_allclose(got, data["output"], rtol=case.rtol, atol=case.atol)


def exact(x, s, o, m, v, epsilon, momentum, training):
    """Evaluate the operator's definition in float64."""
    x, s, o, m, v = (np.asarray(a, np.float64) for a in (x, s, o, m, v))
    wide = (-1, *[1] * (x.ndim - 2))
    mean, var = m, v
    if training:
        axes = tuple(i for i in range(x.ndim) if i != 1)
        mean, var = x.mean(axes), x.var(axes)
    y = (x - mean.reshape(wide)) / np.sqrt(var.reshape(wide) + epsilon)
    y = y * s.reshape(wide) + o.reshape(wide)
    return y, m * momentum + mean * (1 - momentum), v * momentum + var * (1 - momentum)


def types():
    names = ["float32", "float64", "float16", "bfloat16"]
    return [pytest.param(name, marks=_unless_supported(name)) for name in names]


def _unless_supported(name):
    """The core decides on half types; those it refuses are skipped."""
    import ml_dtypes  # onnx needs it

    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    try:
        bnfast.moments(np.zeros((2, 1), dtype))
    except TypeError as error:
        return pytest.mark.skip(reason=str(error))
    return ()


@pytest.mark.parametrize("name", types())
@pytest.mark.parametrize("training", [0, 1])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)])
def test_types_and_ranks(name, training, shape):
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    x = RNG.normal(size=shape).astype(dtype)
    s, o, m, v = om.numbers(RNG, 3, dtype=dtype).values()
    kept = m.copy(), v.copy()
    got = batch_normalization(x, s, o, m, v, 0.125, 0.75, training)
    want = exact(x, s, o, m, v, 0.125, 0.75, training)
    np.testing.assert_array_equal(m, kept[0])
    np.testing.assert_array_equal(v, kept[1])
    got = got if training else (got,)
    assert len(got) == (3 if training else 1)
    # (x - mean) * scale + bias: five roundings of terms below 16 in the type of the data, or in
    # float32 with one rounding at the end. The running statistics are rounded once.
    u = float(ml_dtypes.finfo(dtype).eps) / 2
    for result, exactly, size in zip(got, want, (16, 1, 4), strict=False):
        assert result.dtype == dtype
        assert np.all(np.abs(result.astype(np.float64) - exactly) <= 6 * u * size)


def test_parameters_of_other_types():
    """Opset 15: x, the parameters and the statistics may have three different types."""
    x = om.normal(RNG, 4, 3, 5)
    s, o, m, v = om.numbers(RNG, 3, dtype=np.float64).values()
    y, mean, var = batch_normalization(x, s, o, m, v, training_mode=1)
    assert (y.dtype, mean.dtype, var.dtype) == (np.float32, np.float64, np.float64)
    want = exact(x, s, o, m, v, 1e-5, 0.9, True)
    np.testing.assert_allclose(mean, want[1], rtol=0, atol=1e-15 * 8)
    np.testing.assert_allclose(var, want[2], rtol=1e-15 * 32)
    np.testing.assert_allclose(y, want[0], rtol=0, atol=6 * 2.0**-24 * 16)


def test_one_dimension_is_one_channel():
    x, one = om.normal(RNG, 6), np.ones(1, np.float32)
    y, mean, var = batch_normalization(x, 2 * one, one, 0 * one, one, training_mode=1)
    assert y.shape == (6,)
    want = exact(x[:, None], 2 * one, one, 0 * one, one, 1e-5, 0.9, True)
    np.testing.assert_allclose(y, want[0][:, 0], rtol=0, atol=6 * 2.0**-24 * 16)
    assert mean.shape == var.shape == (1,)


def test_one_value_per_channel():
    x = om.normal(RNG, 1, 3)
    s, o, m, v = om.numbers(RNG, 3).values()
    y, mean, var = batch_normalization(x, s, o, m, v, training_mode=1)
    np.testing.assert_array_equal(y, o[None])
    u = 2.0**-24
    np.testing.assert_allclose(mean, m * 0.9 + x[0].astype("f8") * 0.1, rtol=0, atol=8 * u)
    np.testing.assert_allclose(var, v.astype("f8") * 0.9, rtol=2 * u)


def test_running_statistics_are_rounded_once():
    """A mean just above the midpoint of two bfloat16 values, where float32 is at the midpoint."""
    import ml_dtypes

    x = np.array([[1 + 2.0**-8 + 2.0**-40], [1 + 2.0**-8 + 2.0**-40]])
    one = np.ones(1, ml_dtypes.bfloat16)
    _, mean, _ = batch_normalization(x, one, one, one, one, momentum=0.0, training_mode=1)
    assert mean.dtype == one.dtype
    assert float(mean[0]) == 1 + 2.0**-7


def test_independent_of_numpy_errstate():
    x = np.array([[1e30, 1e-30, 0], [-1e30, -1e-30, 0]])
    half = np.array([6e4, 6e-8, 0], np.float16)
    arguments = (x, half, half, half, half, 1e-5, 1e-3)
    for training in (0, 1):
        want = batch_normalization(*arguments, training)
        with np.errstate(all="raise"):
            got = batch_normalization(*arguments, training)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_empty_batch_changes_nothing():
    s, o, m, v = om.numbers(RNG, 3).values()
    x = np.zeros((0, 3, 2), np.float32)
    y, mean, var = batch_normalization(x, s, o, m, v, training_mode=1)
    assert y.shape == x.shape
    np.testing.assert_array_equal(mean, m)
    np.testing.assert_array_equal(var, v)
    assert not np.shares_memory(mean, m)
    assert batch_normalization(x, s, o, m, v).shape == x.shape


def test_bad_arguments():
    x = om.normal(RNG, 4, 3)
    s, o, m, v = om.numbers(RNG, 3).values()
    for arguments, error, message in [
        ((x, s, o, m, v, 1e-5, 0.9, 2), ValueError, "training_mode is 2; expected 0 or 1"),
        ((x, s, o, m[:2], v, 1e-5, 0.9, 1), ValueError, r"mean has shape \(2,\); expected \(3,\)"),
        ((x, s, o, m, v[:2], 1e-5, 0.9, 1), ValueError, r"var has shape \(2,\); expected \(3,\)"),
        ((x, s, o, m, v, 0.0, 0.9, 1), ValueError, "eps is 0.0; expected > 0 in training"),
        ((x, s, o, m, v, 1e-5, np.nan, 1), ValueError, "momentum is nan; expected a finite"),
        ((x, s, o, m.astype(int), v), TypeError, "mean has dtype int64"),
        ((np.ma.array(x), s, o, m, v), TypeError, "x is a masked array"),
        ((x.astype(int), s, o, m, v), TypeError, "x has dtype int64"),
        ((np.float32(3), s, o, m, v), ValueError, r"x has shape \(\)"),
    ]:
        for mode in (0, 1) if len(arguments) == 5 else (arguments[7],):
            with pytest.raises(error, match=message):
                batch_normalization(*arguments[:5], *(arguments[5:7] or (1e-5, 0.9)), mode)


def test_read_layer_freezes():
    model, _ = two()
    x = om.normal(RNG, 2, 3, 4, 4)
    layer = read(model)["y"]
    assert isinstance(layer, BatchNorm)
    np.testing.assert_array_equal(layer.freeze()(x), layer(x))
