"""Small ONNX models for the tests, run by ONNX Runtime and by ONNX's own evaluator."""

import re

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bnfast.onnx import fold

NUMBERS = "s, o, m, v"  # scale, B, mean and var of the batch norm that most tests need


def build(body, opset=17, ir=8, **weights):
    """Parse a graph in ONNX's text form, with BN for BatchNormalization, and add initializers."""
    body = re.sub(r"\bBN\b", "BatchNormalization", body)
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> g {body}')
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return model


def numbers(rng, channels, names=NUMBERS, dtype=np.float32):
    """Return scale, B, mean and var of a trained batch norm under the given names."""
    values = (*rng.normal(size=(3, channels)), rng.uniform(0.1, 4, channels))
    return {n: a.astype(dtype) for n, a in zip(names.split(", "), values, strict=True)}


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def batch_norms(model):
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def constants(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def dims(value):
    return value.type.tensor_type.shape.dim


def listed(model):
    """Add a model's initializers to its inputs, as before IR version 4."""
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    return model


def run_runtime(model, feeds):
    """Run a model unchanged, without the runtime's own folding."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def run_reference(model, feeds):
    return ReferenceEvaluator(model).run(None, feeds)


def magnitudes(model, feeds, run):
    """Return the model's outputs when every product and sum has the same sign.

    Weights, biases and inputs are made positive and means negative; variances stay. Every term of
    the true outputs is at most the corresponding term here.
    """
    positive = onnx.ModelProto()
    positive.CopyFrom(model)
    means = {node.input[3] for node in batch_norms(model)}
    variances = {node.input[4] for node in batch_norms(model)}
    for tensor in positive.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "i":  # axes and shapes
            continue
        if tensor.name in means:
            values = -np.abs(values)
        elif tensor.name not in variances:
            values = np.abs(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in positive.graph.node:
        for a in node.attribute:
            if a.name in ("alpha", "beta"):
                a.f = abs(a.f)
            if a.name == "value" and a.t.data_type != onnx.TensorProto.INT64:
                a.t.CopyFrom(numpy_helper.from_array(np.abs(numpy_helper.to_array(a.t))))
            a.floats[:] = [abs(number) for number in a.floats]
    return run(positive, {name: np.abs(x) for name, x in feeds.items()})


def assert_equivalent(folded, model, feeds, terms, run=run_runtime):
    """Compare the outputs of two models that are equal in exact arithmetic.

    `terms` is the sum, over the layers on a path through the model, of the products in one of
    their outputs. A layer of K products and a bias errs by at most gamma(K + 1) times the sum of
    its terms' sizes (Higham, section 4.2). A batch norm rounds six times, and weights folded
    twice are rounded twice. In both models a later layer amplifies an error at most as much as a
    term of that size. So first-order errors are at most u (terms + 16 layers) of `magnitudes`, for
    each model. No model here has more than eleven layers.
    """
    outputs = zip(run(folded, feeds), run(model, feeds), magnitudes(model, feeds, run), strict=True)
    for got, want, magnitude in outputs:
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        u = float(np.finfo(want.dtype).eps) / 2
        bound = 2 * u * (terms + 16 * 11) * magnitude.astype(np.float64)
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
        assert np.all(error <= bound), f"{error.max():.3g} beyond {bound[error > bound].min():.3g}"


def assert_valid(model):
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def outcomes_of(model):
    seen = []
    folded = fold(model, report=seen.append)
    return folded, seen


def assert_folds(model, feeds, terms, *, left=0, references=(run_runtime, run_reference)):
    """Fold, check everything that is promised of the result, and return it."""
    before = model.SerializeToString(deterministic=True)
    folded, outcomes = outcomes_of(model)
    assert model.SerializeToString(deterministic=True) == before
    assert len(batch_norms(folded)) == left == sum(not o.folded for o in outcomes), outcomes
    assert len(outcomes) == len(batch_norms(model))
    assert_valid(folded)
    assert fed(folded) == fed(model)
    assert [v.name for v in folded.graph.output] == [v.name for v in model.graph.output]
    assert fold(folded).SerializeToString(deterministic=True) == folded.SerializeToString(
        deterministic=True
    )
    produced = {name for node in folded.graph.node for name in node.output}
    for value in folded.graph.value_info:
        assert value.name in produced
    for run in references:
        assert_equivalent(folded, model, feeds, terms, run)
    return folded


def fed(model):
    """Return the names and the shapes of the inputs that a caller gives."""
    known = constants(model) if model.ir_version < 4 else {}
    inputs = (value for value in model.graph.input if value.name not in known)
    return [(value.name, [dim.dim_value for dim in dims(value)]) for value in inputs]


def assert_left(model, reason, count=1):
    """Check that nothing is folded or changed, and that the reason is reported."""
    folded, outcomes = outcomes_of(model)
    assert [o.folded for o in outcomes] == [False] * count
    assert reason in outcomes[0].why
    assert folded == model
    return folded
