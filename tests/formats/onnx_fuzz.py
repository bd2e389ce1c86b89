"""Small valid ONNX models, and ways to make them invalid."""

import numpy as np
import onnx
import onnx_models as om
from onnx import AttributeProto, TensorProto, helper

BODIES = [
    """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a = BN<epsilon=0.01>(x, s, o, m, v) b = Conv<pads=[1,1,1,1], group=2>(a, w3, k)
        c = BN(b, s, o, m, v) d = Relu(c) e = Add(d, p) y = BN(e, s, o, m, v)
    }""",
    """(float[N,4] x, bool t) => (float[N,4] y, float[N,4] z) {
        a = MatMul(x, w) b = Add(a, k) c = BN<momentum=0.5>(b, s, o, m, v)
        d = Gemm<alpha=0.5, beta=2.0, transB=1>(c, w, k) y = BN(d, s, o, m, v)
        z = If(t)<then_branch = then () => (float[N,4] zt) { zt = BN(c, s, o, m, v) },
                  else_branch = else () => (float[N,4] ze) { ze = Neg(y) }>
    }""",
    """(float[N,4,6,6] x) => (float[N,4,H,W] y) {
        i = Identity(w1) j = Transpose<perm=[1,0,2,3]>(i)
        k2 = Constant<value_floats=[1.0, 2.0, 3.0, 4.0]>()
        s2 = Constant<value=float[4] {1.0, 2.0, 3.0, 4.0}>() s3 = Identity(s2)
        a = BN(x, s3, o, m, v) b = ConvTranspose<strides=[2,2]>(a, j, k2) c = BN(b, s, o, m, v)
        e = Conv<auto_pad="SAME_UPPER">(c, j) f = Add(p, e) y = BN(f, s, k2, m, v)
    }""",
    """(float[N,4,6,6] x) => (float[N,A,B] y) {
        n = Shape<start=0, end=1>(w3) i = Constant<value_ints=[1]>() n1 = Expand(n, i)
        z = Constant<value=float {0.0}>() z1 = CastLike(z, x) z2 = Expand(z1, n1)
        a = Conv<group=2>(x, w3, z2) b = BN(a, s, o, m, v) c = Mul(b, p) d = Add(c, p)
        at = Constant<value_ints=[1]>() to = Constant<value_ints=[3]>()
        ax = Constant<value_ints=[3]>() e = Slice(d, at, to, ax) f = BN(e, s, o, m, v)
        ks = ConstantOfShape<value=float[1] {0.5}>(n) kr = Reshape(ks, sh) ku = Unsqueeze(k, un)
        sh = Constant<value_ints=[4, 1, 1]>() un = Constant<value_ints=[1, 2]>()
        g = Mul(f, kr) h = Add(g, ku) r = Constant<value_ints=[0, 4, -1]>() q = Reshape(h, r)
        y = BN(q, s, o, m, v)
    }""",
    """(float[N,4,6,6] x) => (float[N,8,6,6] y) {
        a = Conv(x, w1) b = Conv<pads=[1,1,1,1], group=2>(x, w3, k) c = Mul(b, p)
        d = BN(c, s, o, m, v) e = Concat<axis=1>(a, d) k2 = Concat<axis=0>(k, k)
        s2 = Cast<to=1>(k2) s3 = Squeeze(s2) t0 = Constant<value_int=0>() w2 = Unsqueeze(s3, t0)
        s4 = Squeeze(w2) y = BN(e, k2, s4, s2, s3)
    }""",
]


def base(rng):
    """Return one of the models. Those without numbers in their text have one of three types."""
    body = BODIES[rng.integers(len(BODIES))]
    types = {"float": np.float32, "double": np.float64, "float16": np.float16}
    name = "float" if "Constant" in body else str(rng.choice([*types]))
    body, dtype = body.replace("float[", f"{name}["), types[name]
    shapes = {"w": (4, 4), "w1": (4, 4, 1, 1), "w3": (4, 2, 3, 3), "k": (4,), "p": (4, 1, 1)}
    weights = {key: om.normal(rng, *shape, dtype=dtype) for key, shape in shapes.items()}
    weights |= om.numbers(rng, 4, dtype=dtype)
    model = om.build(body, int(rng.choice([9, 13, 14, 17])), int(rng.choice([3, 8])), **weights)
    if model.ir_version == 3 and rng.random() < 0.9:
        om.listed(model)
    for node in model.graph.node:
        if rng.random() < 0.5:
            node.name = f"n_{node.output[0]}"
    return model


def spoiled(rng):
    """Return a model with up to three errors, and a list of them."""
    model, done = base(rng), []
    for _ in range(rng.integers(1, 4)):
        change = CHANGES[rng.integers(len(CHANGES))]
        done.append(change.__name__)
        change(rng, model)
    return model, done


def a_node(rng, model):
    return model.graph.node[rng.integers(len(model.graph.node))]


def a_copy(rng, model):
    node = onnx.NodeProto()
    node.CopyFrom(a_node(rng, model))
    return node


def a_name(rng, model):
    """Any name in the graph, an empty one, or a new one."""
    names = {"", "new", *(value.name for value in (*model.graph.input, *model.graph.output))}
    names |= {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        names |= {node.name, *node.input, *node.output}
    return str(rng.choice(sorted(names)))


def a_tensor(rng, model):
    tensors = [*model.graph.initializer]
    tensors += [a.t for node in model.graph.node for a in node.attribute if a.name == "value"]
    return tensors[rng.integers(len(tensors))] if tensors else model.graph.initializer.add()


def an_attribute(rng, model):
    every = [a for node in model.graph.node for a in node.attribute]
    return every[rng.integers(len(every))] if every else a_node(rng, model).attribute.add()


def drop_names(rng, model):
    node = a_node(rng, model)
    names = node.input if rng.random() < 0.6 else node.output
    kept = list(names)[: rng.integers(len(names) + 1)]
    del names[:]
    names.extend(kept)


def drop_a_name(rng, model):
    node = a_node(rng, model)
    names = node.input if rng.random() < 0.6 else node.output
    if names:
        del names[rng.integers(len(names))]


def add_names(rng, model):
    node = a_node(rng, model)
    for _ in range(rng.integers(1, 4)):
        (node.input if rng.random() < 0.5 else node.output).append(a_name(rng, model))


def rewire(rng, model):
    """Make collisions, cycles, missing values."""
    node = a_node(rng, model)
    names = node.input if rng.random() < 0.6 else node.output
    if names:
        names[rng.integers(len(names))] = a_name(rng, model)


def rename(rng, model):
    a_node(rng, model).name = a_name(rng, model)


def rename_a_value(rng, model):
    values = [*model.graph.input, *model.graph.output, *model.graph.initializer]
    values[rng.integers(len(values))].name = a_name(rng, model)


def retype_an_attribute(rng, model):
    a = an_attribute(rng, model)
    kinds = list(AttributeProto.AttributeType.values())
    a.type = kinds[rng.integers(len(kinds))]
    if rng.random() < 0.2:
        a.ref_attr_name = "elsewhere"


def change_an_attribute(rng, model):
    a = an_attribute(rng, model)
    values = [0, -1, 3, 2**40, -(2**63), 1.5, np.inf, np.nan, -1e30, "", "FOO", "NOTSET"]
    values += [[], [1], [1, 1, 1, 1], [-1, 0], [0, 0, 1, 1], [1.0, 0.0], ["a"], [2**62, 4]]
    value = values[rng.integers(len(values))]
    kind = AttributeProto.INTS if value == [] else None
    a.CopyFrom(helper.make_attribute(a.name, value, attr_type=kind))


def add_an_attribute(rng, model):
    names = ["auto_pad", "pads", "group", "perm", "transA", "transB", "alpha", "epsilon", "spatial"]
    names += ["momentum", "training_mode", "value", "value_float", "value_int", "value_ints"]
    names += ["axis", "axes", "starts", "to", "start", "end", "allowzero"]
    node = a_node(rng, model)
    node.attribute.append(helper.make_attribute(str(rng.choice(names)), int(rng.integers(-1, 3))))
    node.attribute[-1].name = node.attribute[rng.integers(len(node.attribute))].name


def drop_an_attribute(rng, model):
    node = a_node(rng, model)
    del node.attribute[: rng.integers(1, 3)]


def reshape_a_tensor(rng, model):
    dims = a_tensor(rng, model).dims
    if rng.random() < 0.5 and dims:
        dims[rng.integers(len(dims))] = int(rng.choice([0, 1, 2, 8, -1, 2**40, -(2**63), 2**62]))
    elif rng.random() < 0.5:
        dims.extend([1] * int(rng.integers(1, 70)))
    else:
        del dims[rng.integers(len(dims) + 1) :]


def retype_a_tensor(rng, model):
    a_tensor(rng, model).data_type = int(rng.choice([*range(30), 999, -1, 2**31 - 1]))


def truncate_a_tensor(rng, model):
    tensor = a_tensor(rng, model)
    tensor.raw_data = tensor.raw_data[: rng.integers(len(tensor.raw_data) + 1)]


def move_data(rng, model):
    """Move data into another field or elsewhere, or drop a part."""
    tensor = a_tensor(rng, model)
    kind = rng.integers(4)
    if kind == 0:
        tensor.ClearField("raw_data")
        tensor.float_data.extend(rng.normal(size=rng.integers(20)))
        tensor.int32_data.extend(rng.integers(-(2**31), 2**31, rng.integers(20)).tolist())
    elif kind == 1:
        tensor.data_location = TensorProto.EXTERNAL
    elif kind == 2:
        tensor.segment.begin = 1
    else:
        tensor.raw_data = rng.bytes(len(tensor.raw_data))


def repeat_a_tensor(rng, model):
    tensor = TensorProto()
    tensor.CopyFrom(a_tensor(rng, model))
    tensor.name = tensor.name if rng.random() < 0.5 else a_name(rng, model)
    model.graph.initializer.append(tensor)


def sparsify_a_tensor(rng, model):
    model.graph.sparse_initializer.add().values.CopyFrom(a_tensor(rng, model))


def repeat_a_node(rng, model):
    node = a_copy(rng, model)
    if rng.random() < 0.7:
        for i in range(len(node.output)):
            node.output[i] += "_again"
    model.graph.node.append(node)


def drop_a_node(rng, model):
    if len(model.graph.node) > 1:
        del model.graph.node[rng.integers(len(model.graph.node))]


def shuffle(rng, model):
    model.graph.node.sort(key=lambda _: rng.random())


def other_operator(rng, model):
    kinds = ["BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Identity"]
    kinds += ["Transpose", "Constant", "Relu", "If", "Loop", "NoSuchOperator", ""]
    kinds += ["Mul", "Slice", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Shape"]
    kinds += ["Size", "Expand", "Cast", "CastLike", "ConstantOfShape"]
    node = a_node(rng, model)
    node.op_type = str(rng.choice(kinds))
    if rng.random() < 0.1:
        node.domain = "elsewhere"


def swap_inputs(rng, model):
    node = a_node(rng, model)
    order = [node.input[i] for i in rng.permutation(len(node.input))]
    del node.input[:]
    node.input.extend(order)


def make_an_input(rng, model):
    value = model.graph.input.add()
    value.name = a_name(rng, model)
    if rng.random() < 0.5:
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def make_an_output(rng, model):
    model.graph.output.add().name = a_name(rng, model)


def forget_types(rng, model):
    for value in (*model.graph.input, *model.graph.output):
        if rng.random() < 0.5:
            value.ClearField("type")


def claim_a_type(rng, model):
    value = model.graph.value_info.add()
    value.name = a_name(rng, model)
    value.type.tensor_type.elem_type = int(rng.choice([0, 1, 7, 11]))
    for _ in range(rng.integers(5)):
        value.type.tensor_type.shape.dim.add().dim_value = int(rng.integers(-1, 5))


def change_the_opset(rng, model):
    del model.opset_import[: rng.integers(2)]
    for _ in range(rng.integers(3)):
        domain, version = str(rng.choice(["", "ai.onnx", "elsewhere"])), int(rng.integers(-1, 30))
        model.opset_import.append(helper.make_opsetid(domain, version))


def nest(rng, model):
    """Add a subgraph with another one in it, which has a batch norm or uses a value."""
    copied = a_copy(rng, model)
    outer = a_node(rng, model).attribute.add()
    outer.name, outer.type = "body", AttributeProto.GRAPH
    inner = outer.g.node.add().attribute.add()
    inner.name, inner.type = "bodies", AttributeProto.GRAPHS
    inner.graphs.add().node.append(copied)


def add_a_function(rng, model):
    function = model.functions.add()
    function.name = a_name(rng, model)
    function.node.append(a_copy(rng, model))


CHANGES = [
    *(drop_names, drop_a_name, add_names, rewire, rewire, rename, rename_a_value),
    *(retype_an_attribute, change_an_attribute, add_an_attribute, drop_an_attribute),
    *(reshape_a_tensor, retype_a_tensor, truncate_a_tensor, move_data, repeat_a_tensor),
    *(sparsify_a_tensor, repeat_a_node, drop_a_node, shuffle, other_operator, swap_inputs),
    *(make_an_input, make_an_output, forget_types, claim_a_type, change_the_opset, nest),
    add_a_function,
]
