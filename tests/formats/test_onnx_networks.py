"""Whole networks: from PyTorch's exporters, and the models in the onnx package."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as om  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from bnfast.onnx import fold, read  # noqa: E402

# Numbers of folded and of remaining batch norms. Those that remain come before the first
# convolution of a block that adds or joins its input to its result.
NETWORKS = {
    "residual": (10, 0),
    "preactivation": (3, 2),
    "inception": (7, 0),
    "mobile": (8, 0),
    "dense": (4, 3),
    "shuffle": (6, 0),
    "up": (5, 0),
    "caffe": (3, 0),
    "points": (3, 0),
}
EXPORTERS = ["torchscript", "static", "dynamic"]


def assert_near(got, want):
    """Networks of tens of layers: float32 errs by some 1e-6 of the largest, a wrong fold by all."""
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def assert_same_network(folded, model, feeds):
    om.assert_valid(folded)
    (got,), (want,) = om.run_runtime(folded, feeds), om.run_runtime(model, feeds)
    assert_near(got, want)
    return got


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of networks that PyTorch has exported."""
    for needed in ("torch", "onnxscript"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    folder = tmp_path_factory.mktemp("networks")
    script = Path(__file__).with_name("onnx_networks.py")
    subprocess.run([sys.executable, script, folder], check=True, timeout=500, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_from_pytorch(exported, name, exporter):
    model = onnx.load(exported / f"{name}.{exporter}.onnx")
    folded, outcomes = om.outcomes_of(model)
    totals = Counter(o.folded for o in outcomes)
    assert (totals[True], totals[False]) == NETWORKS[name], list(map(str, outcomes))
    with np.load(exported / f"{name}.npz") as data:
        feeds = {model.graph.input[0].name: data["x"]}
        assert_near(assert_same_network(folded, model, feeds), data["y"])
    used = {name for node in folded.graph.node for name in node.input}
    assert {t.name for t in folded.graph.initializer} <= used


@pytest.mark.slow
def test_all_networks_are_listed(exported):
    assert {path.name.split(".")[0] for path in exported.iterdir()} == set(NETWORKS)


# ---- the light models of the onnx package: IR version 3, weights by ConstantOfShape

# Those that remain come before a ReLU, after a value that other layers use, too.
LIGHT = {
    "bvlc_alexnet": (0, 0),
    "densenet121": (59, 62),
    "inception_v1": (0, 0),
    "inception_v2": (69, 0),
    "resnet50": (53, 0),
    "shufflenet": (49, 0),
    "squeezenet": (0, 0),
    "vgg19": (0, 0),
    "zfnet512": (0, 0),
}
FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def test_all_light_models_are_listed():
    assert {path.stem.removeprefix("light_") for path in FOLDER.glob("*.onnx")} == set(LIGHT)


@pytest.mark.parametrize("name", LIGHT)
def test_light_models(name):
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    folded, outcomes = om.outcomes_of(model)
    totals = Counter(o.folded for o in outcomes)
    assert (totals[True], totals[False]) == LIGHT[name]
    for outcome in outcomes:
        assert outcome.folded or "is used 2 times; Relu" in outcome.why
    assert len(read(model)) == len(outcomes)  # without a warning, which would be an error
    if outcomes:
        ((x, shape),) = om.fed(model)
        got = assert_same_network(folded, model, {x: np.ones(shape, "f4")})
        assert got.size > 1


def with_numbers(model, rng):
    """Replace the values that the model computes by ConstantOfShape with random initializers."""
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    positive = {node.input[4] for node in om.batch_norms(model)}
    kept = [value for value in model.graph.input if value.name not in shapes]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        (name,), shape = node.output, shapes[node.input[0]]
        values = rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
        values = rng.uniform(0.5, 1.5, shape) if name in positive else values
        model.graph.initializer.append(numpy_helper.from_array(values.astype("f4"), name))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return om.listed(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "inception_v2", "shufflenet"])
def test_light_models_with_numbers(name):
    rng = np.random.default_rng(20150307)
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    ((x, shape),) = om.fed(model)
    model = with_numbers(model, rng)
    # The output before the softmax, which would hide errors.
    if model.graph.node[-1].op_type == "Softmax":
        model.graph.node[-1].op_type = "Identity"
        del model.graph.node[-1].attribute[:]
    folded, outcomes = om.outcomes_of(model)
    assert sum(o.folded for o in outcomes) == LIGHT[name][0]
    got = assert_same_network(folded, model, {x: rng.normal(size=shape).astype("f4")})
    assert got.std() > 0
    assert fold(folded) == folded
