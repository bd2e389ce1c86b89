"""Models with errors: the correct parts are folded and read, and nothing else breaks.

If only one batch norm is affected, it is left and the reason is given. If the meaning of the graph
is unclear, the model is refused.
"""

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_fuzz  # noqa: E402
import onnx_models as om  # noqa: E402
from onnx import AttributeProto, TensorProto, helper, numpy_helper  # noqa: E402

from bnfast.onnx import fold, read  # noqa: E402
from bnfast.onnx.constants import Constants  # noqa: E402
from bnfast.onnx.folding import _Folding  # noqa: E402
from bnfast.onnx.graph import Graph  # noqa: E402

RNG = np.random.default_rng(20150305)

TWO = """(float[N,3,5,5] x) => (float[N,3,5,5] y) {
    c = Conv(x, w) d = BN(c, s, o, m, v) r = Relu(d)
    e = Conv<auto_pad="NOTSET">(r, w2, b) a = Add(e, k) y = BN(a, s, o, m, v2)
}"""


def two():
    """Return a model of two convolutions, each with its batch norm."""
    weights = {"w": om.normal(RNG, 3, 3, 1, 1), "w2": om.normal(RNG, 3, 3, 1, 1)}
    weights |= {"b": om.normal(RNG, 3), "k": om.normal(RNG, 3, 1, 1), "v2": np.ones(3, np.float32)}
    return om.build(TWO, **weights, **om.numbers(RNG, 3))


def initializer(model, name):
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def replace(model, name, values):
    initializer(model, name).CopyFrom(numpy_helper.from_array(values, name))


def reasons(model):
    """Fold, and return why each batch norm was left, by its name; None if it was folded."""
    outcomes = []
    fold(model, report=outcomes.append)
    return {o.name: None if o.folded else o.why for o in outcomes}


# ---- one batch norm is left, the other folded


def without_inputs(i):
    def spoil(model):
        del model.graph.node[i].input[:]

    return spoil


def set_attribute(i, name, value, kind=None):
    def spoil(model):
        node = model.graph.node[i]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value, attr_type=kind)])

    return spoil


def set_tensor(name, **fields):
    def spoil(model):
        tensor = initializer(model, name)
        for field, value in fields.items():
            if field == "dims":
                del tensor.dims[:]
                tensor.dims.extend(value)
            else:
                setattr(tensor, field, value)

    return spoil


def set_numbers(name, values):
    return lambda model: replace(model, name, values)


def set_input(i, position, name):
    def spoil(model):
        model.graph.node[i].input[position] = name

    return spoil


def make(*nodes):
    """Add nodes at the front, and take the second batch norm's variance from them."""

    def spoil(model):
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        model.graph.node[-1].input[4] = "made"

    return spoil


def make_constant(**attributes):
    return make(helper.make_node("Constant", [], ["made"], **attributes))


def other_node(i, kind, *inputs, **attributes):
    """Replace a node by another."""

    def spoil(model):
        output = model.graph.node[i].output[0]
        model.graph.node[i].CopyFrom(helper.make_node(kind, inputs, [output], **attributes))

    return spoil


def no_references(model):
    set_attribute(5, "epsilon", 0.5)(model)
    model.graph.node[5].attribute[0].ref_attr_name = "outside"


CONV, ADD, NORM = 3, 4, 5
COMPLEX = np.ones(3, np.complex64)
LEFT = [
    (without_inputs(NORM), "it has 0 inputs and 1 outputs; expected 5 and 1"),
    (without_inputs(CONV), "Conv 'e' has 0 inputs and 1 outputs; expected 2 to 3 and 1"),
    (without_inputs(ADD), "Add 'a' adds no constant"),
    (set_input(NORM, 2, ""), "its B is missing"),
    (set_input(CONV, 1, ""), "the weight of Conv 'e' is missing"),
    (set_input(NORM, 0, ""), "nothing is before ''"),
    (set_attribute(NORM, "epsilon", 1), "the epsilon of BatchNormalization is of type INT"),
    (set_attribute(NORM, "epsilon", -1.0), "as a layer, its eps is -1.0; expected >= 0"),
    (set_attribute(NORM, "training_mode", "no"), "the training_mode of BatchNormalization is of"),
    (no_references, "the epsilon of BatchNormalization is not one value"),
    (set_attribute(CONV, "auto_pad", 1), "the auto_pad of Conv is of type INT, not STRING"),
    (set_attribute(CONV, "auto_pad", "SOME"), "the auto_pad of Conv is b'SOME'"),
    (set_attribute(CONV, "pads", [0.5] * 4), "the pads of Conv is of type FLOATS, not INTS"),
    (set_attribute(CONV, "group", "one"), "the group of Conv is of type STRING, not INT"),
    (set_attribute(CONV, "group", 0), "Conv 'e' has 0 groups; expected 1 or more"),
    (set_attribute(CONV, "group", 2), "groups is 2; expected a divisor of the weight's first axis"),
    (set_tensor("v2", data_type=999), "its var, 'v2', is of type 999"),
    (set_tensor("v2", data_type=0), "its var, 'v2', is of type UNDEFINED"),
    (set_tensor("v2", data_type=TensorProto.STRING), "its var, 'v2', is of type STRING"),
    (set_tensor("v2", raw_data=b"\0" * 7), "its var, 'v2', of shape (3,) cannot be read: buffer"),
    (set_tensor("v2", raw_data=b"\0" * 8), "its var, 'v2', of shape (3,) cannot be read: cannot"),
    (set_tensor("v2", dims=[-1]), "its var, 'v2', has the shape (-1,)"),
    (set_tensor("v2", dims=[2**40]), f"its var, 'v2', of shape ({2**40},) cannot be read"),
    (set_tensor("v2", dims=[1] * 70 + [3]), "cannot be read: maximum supported dimension"),
    (set_tensor("v2", dims=[3, 1]), "its var has shape (3, 1); expected (3,)"),
    (set_tensor("w2", dims=[3, 3]), "the weight of Conv 'e' has shape (3, 3); expected 3 or more"),
    (set_tensor("w2", dims=[9]), "the weight of Conv 'e' has shape (9,); expected 3 or more axes"),
    (set_numbers("b", np.ones(1, "f4")), "the bias of Conv 'e' has shape (1,); expected (3,)"),
    (set_numbers("b", np.ones(4, "f4")), "the bias of Conv 'e' has shape (4,); expected (3,)"),
    (set_numbers("b", np.ones(3, "i4")), "the bias of Conv 'e', 'b', is of type INT32"),
    (set_numbers("b", COMPLEX), "the bias of Conv 'e', 'b', is of type COMPLEX64"),
    (set_numbers("w2", COMPLEX), "the weight of Conv 'e', 'w2', is of type COMPLEX64"),
    (set_numbers("k", COMPLEX), "the constant of Add 'a', 'k', is of type COMPLEX64"),
    (set_numbers("k", np.ones(3, "i8")), "the constant of Add 'a', 'k', is of type INT64"),
    (set_numbers("v2", COMPLEX), "its var, 'v2', is of type COMPLEX64"),
    (make_constant(), "its var, 'made', is a Constant without numbers"),
    (make_constant(value_string="3"), "its var, 'made', is a Constant without numbers"),
    (make_constant(value_int=3), "its var, 'made', is of type INT64"),
    (make_constant(value_ints=[3]), "its var, 'made', is of type INT64"),
    (make_constant(value=3), "the value of Constant is of type INT, not TENSOR"),
    (make_constant(value_floats=3.0), "the value_floats of Constant is of type FLOAT, not FLOATS"),
    (make(helper.make_node("Identity", [], ["made"])), "its var, 'made', is not a constant"),
    (make(helper.make_node("Identity", ["v", "s"], ["made"])), "its var, 'made', is not a const"),
    (make(helper.make_node("Transpose", [], ["made"])), "its var, 'made', is not a constant"),
    (make(helper.make_node("Expand", ["v"], ["made"])), "its var, 'made', is not a constant"),
    (make(helper.make_node("Shape", [], ["made"])), "its var, 'made', is not a constant"),
    (make(helper.make_node("Cast", ["v"], ["made"], to="1")), "the to of Cast is of type STRING"),
    (make(helper.make_node("CastLike", ["v", ""], ["made"])), "is cast to the type UNDEFINED"),
    (other_node(ADD, "Mul"), "Mul 'a' multiplies by no constant"),
    (other_node(ADD, "Mul", "k"), "Mul 'a' multiplies by no constant"),
    (other_node(ADD, "Add", "e", "k", "k"), "Add 'a' adds no constant"),
    (other_node(ADD, "Slice"), "Slice 'a' has no input, or not one output"),
    (other_node(ADD, "Reshape"), "Reshape 'a' has no input, or not one output"),
    (other_node(ADD, "Concat"), "Concat 'a' has no input, or not one output"),
    (other_node(ADD, "Slice", "e", axes="0"), "the axes of Slice is of type STRING, not INTS"),
    (other_node(ADD, "Slice", "e", starts=[2**40], axes=[4]), "are [4] of a value with 4 axes"),
    (other_node(ADD, "Slice", "e", "k"), "the starts of Slice 'a', 'k', is not axes: float32"),
    (other_node(ADD, "Reshape", "e"), "Reshape 'a' does not surely keep axes 0 and 1"),
    (other_node(ADD, "Concat", "e", axis=1.0), "the axis of Concat is of type FLOAT, not INT"),
    (other_node(ADD, "Concat", "e", ""), "nothing is before ''"),
    (
        make(helper.make_node("Transpose", ["v"], ["made"], perm=[1])),
        "its var, 'v', of shape (3,) is transposed by [1]",
    ),
]


@pytest.mark.parametrize(("spoil", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_malformed_one_not_folded_other_is(spoil, reason):
    model = two()
    spoil(model)
    before = model.SerializeToString(deterministic=True)
    left = reasons(model)
    assert model.SerializeToString(deterministic=True) == before
    assert left["d"] is None
    assert reason in left["y"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert "d" in read(model)


@pytest.mark.parametrize(("i", "other"), [(1, "y"), (5, "d")])
def test_batch_norm_without_output(i, other):
    """It has no output to be named after."""
    model = two()
    del model.graph.node[i].output[:]
    why = "it has 5 inputs and 0 outputs; expected 5 and 1"
    assert reasons(model) == {"BatchNormalization": why, other: None}
    with pytest.warns(UserWarning, match=f"BatchNormalization is not read: {why}"):
        assert set(read(model)) == {other}


def test_other_nodes_without_output():
    model = two()
    model.graph.node.append(helper.make_node("Relu", ["x"], []))
    model.graph.node.append(helper.make_node("Conv", [], []))
    assert reasons(model) == {"d": None, "y": None}


def test_unsorted_nodes():
    """Checkers refuse this, though the meaning of the graph is clear."""
    row = "c = Conv(x, w) d = BN(c, s, o, m, v) e = Mul(d, k) f = BN(e, s, o, m, v) r = Relu(f)"
    row += " g = BN(r, s, o, m, v) h = Add(g, k) i = BN(h, s, o, m, v) y = Conv(i, w)"
    numbers = {"w": om.normal(RNG, 3, 3, 1, 1), "k": om.normal(RNG, 3, 1, 1)} | om.numbers(RNG, 3)
    model = om.build(f"(float[N,3,5,5] x) => (float[N,3,5,5] y) {{ {row} }}", **numbers)
    nodes = list(model.graph.node)
    for order in (nodes[::-1], nodes[::2] + nodes[1::2], nodes):
        del model.graph.node[:]
        model.graph.node.extend(order)
        assert set(reasons(model).values()) == {None}
        assert len(fold(model).graph.node) == 3


def test_shapes_that_cannot_be_inferred():
    """The shapes stated in the model are used: here none for a MatMul's output."""
    body = "(float[N,3] x) => (float[N,3] z) { c = MatMul(x, w) y = BN(c, s, o, m, v) z = Relu(y) }"
    model = om.build(body, w=om.normal(RNG, 3, 3), **om.numbers(RNG, 3))
    assert reasons(model) == {"y": None}
    for _ in range(2):
        model.functions.add(name="F", domain="own")
    assert "MatMul 'c' gives an unknown number of axes" in reasons(model)["y"]


# ---- models that are refused


def spoil_twice(model):
    model.graph.node[2].output[0] = "c"


def spoil_initializer(model):
    model.graph.initializer.append(initializer(model, "v"))


def spoil_input(model):
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))


def cycle_of_identities(model):
    model.graph.node.append(helper.make_node("Identity", ["p"], ["q"]))
    model.graph.node.append(helper.make_node("Identity", ["q"], ["p"]))
    model.graph.node[1].input[1] = "p"


def cycle_of_one(model):
    model.graph.node.append(helper.make_node("Transpose", ["p"], ["p"]))


def cycle_of_layers(model):
    model.graph.node[0].input[0] = "d"


def deep(model):
    graph = model.graph
    for _ in range(20_000):
        inner = graph.node.add().attribute.add()
        inner.name, inner.type = "body", AttributeProto.GRAPH
        graph = inner.g


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_twice, "model makes the value 'c' 2 times; expected once"),
        (spoil_initializer, "model makes the value 'v' 2 times; expected once"),
        (spoil_input, "model makes the value 'c' 2 times; expected once"),
        (cycle_of_identities, "model computes a value from itself: Identity '[pq]' -> Identity"),
        (cycle_of_one, "model computes a value from itself: Transpose 'p' -> Transpose 'p';"),
        (cycle_of_layers, "model computes a value from itself: .*; expected a graph without cyc"),
        (deep, "model has 100 subgraphs one in the other; expected fewer"),
    ],
)
def test_refused(spoil, message):
    model = two()
    spoil(model)
    for call in (fold, read):
        with pytest.raises(ValueError, match=message):
            call(model)


# ---- long models


@pytest.mark.parametrize("kind", ["Identity", "Transpose"])
def test_chain_of_five_thousand_identities(kind):
    model, shape = two(), (3, 3, 1, 1)
    replace(model, "w", om.normal(RNG, *shape))
    names = ["w", *(f"w_{i}" for i in range(5000))]
    options = {"perm": [1, 0, 2, 3]} if kind == "Transpose" else {}
    for name, made in itertools.pairwise(names):
        model.graph.node.append(helper.make_node(kind, [name], [made], **options))
    model.graph.node[0].input[1] = names[-1]
    assert reasons(model) == {"d": None, "y": None}
    assert [node.op_type for node in fold(model).graph.node] == ["Conv", "Relu", "Conv"]


@pytest.fixture
def work(monkeypatch):
    """Count the attempts to fold, and the constants that are read."""
    counts = Counter()

    def count(owner, name):
        own = getattr(owner, name)

        def counted(self, *arguments):
            counts[name] += 1
            return own(self, *arguments)

        monkeypatch.setattr(owner, name, counted)

    count(_Folding, "_fold_one")
    count(Constants, "array")
    count(Constants, "_made")
    count(Graph, "producer")
    return counts


@pytest.mark.parametrize("layer", ["before", "after", "between"])
def test_row_of_batch_norms_takes_linear_work(layer, work):
    """One attempt for each, and one more after its neighbour was folded."""
    row = 300
    body = [] if layer == "after" else ["c = Conv(x, w)"]
    value = "x" if layer == "after" else "c"
    for i in range(row):
        body.append(f"y{i} = BN({value}, s, o, m, v)")
        value = f"y{i}"
    if layer != "before":
        body.append(f"z = Conv({value}, w)")
        value = "z"
    numbers = {"w": om.normal(RNG, 3, 3, 1, 1)} | om.numbers(RNG, 3)
    numbers |= {"s": np.ones(3, np.float32), "v": np.ones(3, np.float32)}
    text = f"(float[N,3,4,4] x) => (float[N,3,4,4] {value}) {{ {' '.join(body)} }}"
    model = om.build(text, **numbers)
    assert set(reasons(model).values()) == {None}
    assert work["_fold_one"] <= 2 * row
    assert work["array"] <= 6 * row


ROWS = {
    "scaled": "y{i} = BN({x}, s, o, m, v) a{i} = Mul(y{i}, k) x{i} = Add(k, a{i})",
    "sliced": "a{i} = Slice({x}, f, t, l) x{i} = BN(a{i}, s, o, m, v)",
    "joined": "c{i} = Conv(x, w1) a{i} = Concat<axis=2>({x}, c{i}) x{i} = BN(a{i}, s, o, m, v)",
    "seen": "a{i} = BN({x}, s, o, m, v) z{i} = Shape(a{i}) x{i} = Mul(a{i}, k)",
    "biased": "c{i} = Conv({x}, w, b999) x{i} = BN(c{i}, s, o, m, v)",
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("layer", ["Conv(x, w)", "Relu(x)"])
def test_rows_of_other_nodes_take_linear_work(kind, layer, work):
    row = 600
    body, value = [f"c = {layer}"], "c"
    for i in range(row):
        body.append(ROWS[kind].format(i=i, x=value))
        value = f"x{i}"
    body += ["b0 = Identity(b)", *(f"b{i} = Transpose(b{i - 1})" for i in range(1, 1000))]
    numbers = {"w": np.eye(3, dtype="f4")[..., None, None], "b": np.zeros(3, np.float32)}
    numbers |= {"k": np.ones((3, 1, 1), np.float32), "w1": om.normal(RNG, 3, 3, 1, 1)}
    numbers |= {name: np.array([number]) for name, number in (("f", 0), ("t", 2**40), ("l", -1))}
    numbers |= om.numbers(RNG, 3) | {"s": np.ones(3, np.float32), "v": np.ones(3, np.float32)}
    text = f"(float[N,3,4,4] x) => (float[N,3,H,W] {value}) {{ {' '.join(body)} }}"
    outcomes = outcomes_of(om.build(text, **numbers))
    assert len(outcomes) == row
    if layer != "Relu(x)" and kind != "joined":
        assert sum(o.folded for o in outcomes) >= 255
    assert work["_fold_one"] <= 2 * row
    assert work["array"] <= 16 * row
    assert work["producer"] <= 260 * row
    assert work["_made"] <= 1000


# ---- everything else


def outcomes_of(model):
    outcomes = []
    try:
        fold(model, report=outcomes.append)
    except (ValueError, TypeError):
        return None
    return outcomes


@pytest.mark.parametrize("seed", range(10))
def test_random_invalid_models(seed):
    """Only ValueError and TypeError are raised; models are not changed."""
    folded = 0
    for part in range(60):
        model, done = onnx_fuzz.spoiled(np.random.default_rng([seed, part]))
        before = model.SerializeToString(deterministic=True)
        outcomes = outcomes_of(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                layers = read(model)
            except (ValueError, TypeError):
                layers = None
        assert (layers is None) <= (outcomes is None), done
        assert model.SerializeToString(deterministic=True) == before, done
        assert {w.category for w in caught} <= {UserWarning}, done
        if outcomes is not None:
            assert len(outcomes) == len(layers) + len(caught), done
            folded += sum(o.folded for o in outcomes)
    assert folded > 10
