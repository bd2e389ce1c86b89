"""With `enable()`: PyTorch's own samples for these operators, its errors, and other callers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import SmallResNet, channels_last
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import bnfast.torch

aten = torch.ops.aten
OPERATORS = [
    op
    for op in op_db
    if op.name
    in (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "nn.functional.batch_norm",
        "nn.functional.instance_norm",
    )
    and torch.float32 in op.dtypes
]
MODULES = [m for m in module_db if m.name.startswith(("nn.BatchNorm", "nn.InstanceNorm"))]
OPERATOR = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
MODULE = pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def plain(function):
    bnfast.torch.disable()
    try:
        return function()
    finally:
        bnfast.torch.enable()


def tensors(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


@OPERATOR
@DTYPE
def test_samples_of_operators(op, dtype, calls):
    for sample in op.sample_inputs("cpu", dtype, requires_grad=False):

        def call(sample=sample):
            args, kwargs = copy.deepcopy((sample.args, sample.kwargs))
            return [*tensors(op(sample.input, *args, **kwargs)), *of_tensors(args, kwargs)]

        def of_tensors(args, kwargs):
            return [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]

        for ours, theirs in zip(call(), plain(call), strict=True):
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
            # In PyTorch the statistics of half data are halves, too.
            loose = {"rtol": 0.05, "atol": 0.05} if dtype.itemsize == 2 else {}
            torch.testing.assert_close(ours, theirs, equal_nan=True, **loose)
    assert calls()[0]


@OPERATOR
@pytest.mark.parametrize("order", [1, 2, "forward"])
def test_derivatives_of_operators(op, order, calls):
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        given = (sample.input, *sample.args)
        places = [i for i, t in enumerate(given) if torch.is_tensor(t) and t.requires_grad]
        leaves = [given[i] for i in places]

        def call(*leaves, given=given, places=places, sample=sample):
            args = [t.clone() if torch.is_tensor(t) else t for t in given]
            for i, leaf in zip(places, leaves, strict=True):
                args[i] = leaf
            return tensors(op(*args, **copy.deepcopy(sample.kwargs)))[0]

        if order == 2:
            assert torch.autograd.gradgradcheck(call, leaves, check_undefined_grad=False)
        else:
            assert torch.autograd.gradcheck(
                call, leaves, check_forward_ad=order == "forward", check_backward_ad=order == 1
            )
    assert calls()[0]


@MODULE
@DTYPE
@pytest.mark.parametrize("training", [True, False])
def test_samples_of_modules(info, dtype, training, calls):
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    for sample in inputs:
        made = sample.constructor_input
        ours = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
        theirs = copy.deepcopy(ours)
        x = sample.forward_input.args[0].detach().requires_grad_()
        y = ours(x)
        dy = torch.randn_like(y)
        found = [y, *torch.autograd.grad(y, [x, *ours.parameters()], dy)]

        def expected(theirs=theirs, x=x, dy=dy):
            y = theirs(x)
            return [y, *torch.autograd.grad(y, [x, *theirs.parameters()], dy)]

        loose = {"rtol": 0.1, "atol": 0.1} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(found, plain(expected), **loose)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **loose)
    ran, _ = calls()
    assert ran["backward"] > 0


@pytest.mark.parametrize("info", MODULES[:3], ids=lambda info: info.name)
def test_errors_of_modules(info, calls):
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    for error in errors:
        made, given = error.module_error_input.constructor_input, error.module_error_input
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            continue
        module = info.module_cls(*made.args, **made.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*given.forward_input.args, **given.forward_input.kwargs)


def refused(args):
    with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
        aten.native_batch_norm(*args)
    return str(caught.value)


X, ONES = torch.randn(4, 3), torch.ones(3)
BAD = {
    "one axis": (torch.randn(4), None, None, None, None, True, 0.1, 1e-5),
    "no axis": (torch.randn(()), None, None, None, None, True, 0.1, 1e-5),
    "no values": (torch.randn(0, 3), None, None, None, None, True, 0.1, 1e-5),
    "integers": (torch.ones(4, 3, dtype=torch.int32), None, None, None, None, True, 0.1, 1e-5),
    "integers, fixed": (torch.ones(4, 3).int(), ONES, ONES, ONES, ONES, False, 0.1, 1e-5),
    "complex": (torch.ones(4, 3) * 1j, None, None, None, None, True, 0.1, 1e-5),
    "wide parameters": (X, ONES.double(), None, None, None, True, 0.1, 1e-5),
    "narrow parameters": (X.double(), ONES, None, ONES, ONES, False, 0.1, 1e-5),
    "mixed parameters": (X, ONES, ONES.double(), ONES, ONES, False, 0.1, 1e-5),
    "halves of another kind": (X.half(), ONES.bfloat16(), None, None, None, True, 0.1, 1e-5),
    "a mean without a variance": (X, None, None, ONES, None, True, 0.1, 1e-5),
    "a variance without a mean": (X, ONES, ONES, None, ONES, True, 0.1, 1e-5),
    "a mean alone, fixed": (X, None, None, ONES, None, False, 0.1, 1e-5),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_have_pytorchs_text(case, calls):
    assert refused(BAD[case]) == plain(lambda: refused(BAD[case]))
    assert calls()[0] == {}


@pytest.mark.parametrize("training", [True, False])
def test_out_of_memory_raises_as_pytorch(training, calls):
    x = torch.zeros(1, 1, dtype=torch.float64).expand(1 << 22, 1 << 22)
    mean, var = torch.zeros(2, 1, dtype=torch.float64).expand(2, 1 << 22).contiguous()
    args = (x, None, None, mean, var, training, 0.1, 1e-5)
    before = mean.clone()
    assert "can't allocate memory" in refused(args)
    assert refused(args) == plain(lambda: refused(args))
    assert torch.equal(mean, before)


BAD_BACKWARD = {
    "wide parameters": (X, X, ONES.double()),
    "a wide gradient": (X.double(), X, ONES),
    "a narrow gradient": (X.half(), X, ONES),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_a_refused_backward_has_pytorchs_text(case, calls):
    dy, x, weight = BAD_BACKWARD[case]

    def refuse():
        with pytest.raises(RuntimeError) as caught:
            aten.native_batch_norm_backward(
                dy, x, weight, None, None, ONES, ONES, True, 1e-5, [True, True, True]
            )
        return str(caught.value)

    assert refuse() == plain(refuse)
    assert calls()[0] == {}


@DTYPE
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, lambda x: x[..., ::2]])
def test_calls_left_to_pytorch_have_its_bits(arrange, affine, training, dtype):
    """The results are those of operators with the same kernels. (Theirs are replaced here.)"""
    x = arrange(torch.randn(4, 3, 5, 6, dtype=torch.float64).to(dtype))
    dy = torch.randn_like(x)
    kind = torch.float32 if dtype.itemsize == 2 else dtype
    weight = torch.rand(3).to(kind) if affine else None
    moved = [torch.zeros(3, dtype=kind), torch.ones(3, dtype=kind)]
    expected = [t.clone() for t in moved]
    bnfast.torch.enable()
    bnfast.torch.disable()
    y, *saved = aten.native_batch_norm(x, weight, None, *moved, training, 0.1, 1e-5)
    got = aten.native_batch_norm_backward(
        dy, x, weight, *moved, *saved, training, 1e-5, [True, True, False]
    )
    if training:
        want = aten._batch_norm_with_update(x, weight, None, *expected, 0.1, 1e-5)[:3]
    else:
        want = aten._batch_norm_no_update(x, weight, None, *expected, 0.1, 1e-5)[:3]
    for a, b in zip([y, *saved, *moved], [*want, *expected], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, check_stride=True)
    ones = torch.ones(3, dtype=kind) if weight is None else weight
    reserve = torch.empty(0)
    want = aten.batch_norm_backward(
        dy, x, ones, *moved, *saved, training, 1e-5, [True, True, False], reserve
    )
    assert got[2] is want[2] is None
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, check_stride=True)


# ---- Other ways to call the operators in PyTorch


@pytest.mark.parametrize("training", [True, False])
def test_transforms(training, calls):
    x = torch.randn(5, 4, 3, 2, 2)
    layer = nn.BatchNorm2d(3, track_running_stats=not training).train(training)
    for call in (
        lambda: torch.func.vmap(layer)(x),
        lambda: torch.func.grad(lambda x: layer(x).square().sum())(x[0]),
        lambda: torch.func.jvp(layer, (x[0],), (x[1],)),
    ):
        got = call()
        assert calls()[0]
        torch.testing.assert_close(got, plain(call))
        calls()


def test_a_trace_and_a_script(calls):
    layer, x = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2)
    traced, scripted = torch.jit.trace(layer, x), torch.jit.script(layer)
    calls()
    y = torch.randn(2, 3, 5, 5)
    for compiled in (traced, scripted):
        torch.testing.assert_close(compiled(y), plain(lambda: layer(y)))
    assert calls()[0]["evaluation"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, calls):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 8, 8)

    def step():
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        y.float().square().mean().backward()
        return y, model[1].weight.grad, model[1].bias.grad

    found = step()
    assert found[0].dtype is dtype
    assert calls()[0] == {"training": 1, "backward": 1}
    torch.testing.assert_close(found, plain(step), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model(training, calls):
    model = SmallResNet().train(training)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    got = compiled(x)
    got.square().sum().backward()
    forward = "training" if training else "evaluation"
    assert calls() == ({forward: 6, "backward": 6}, {})

    def expected():
        want = model(x)
        want.square().sum().backward()
        return want

    torch.testing.assert_close(got, plain(expected))
    for a, b in zip(compiled_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())


def test_an_exported_model(calls):
    model, x = SmallResNet().eval(), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model, (x,))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.batch_norm.default" in names
    calls()
    torch.testing.assert_close(exported.module()(x), plain(lambda: model(x)))
    assert calls()[0]["evaluation"] == 6


def test_modes_and_fake_tensors(calls):
    from torch.utils.flop_counter import FlopCounterMode

    model, x = SmallResNet(), torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 0
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = nn.BatchNorm2d(3)(mode.from_tensor(channels_last(x)))
    assert y.stride() == channels_last(x).stride()
    assert nn.BatchNorm2d(3, device="meta")(x.to("meta")).is_meta


def test_inference_tensors(calls):
    with torch.inference_mode():
        x = torch.randn(4, 3, 5)
        y = F.batch_norm(x, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5)
    F.batch_norm(x, None, None, training=True)  # also outside of it
    assert calls()[0] == {"evaluation": 1, "training": 1}
    plain(lambda: F.batch_norm(x, None, None, training=True))


def test_lazy_copies_stay_lazy(calls):
    x = torch.randn(4, 3, 5)
    copied = torch._lazy_clone(x)
    F.batch_norm(copied, torch.zeros(3), torch.ones(3))
    F.batch_norm(copied, None, None, training=True)
    assert torch._C._is_cow_tensor(copied)


def test_views_of_negatives(calls):
    x = torch.randn(4, 3, 5)
    want = F.batch_norm(-x, None, None, training=True)
    torch.testing.assert_close(F.batch_norm(torch._neg_view(x), None, None, training=True), want)


def test_more_axes_than_are_taken(calls):
    x = torch.randn(2, 3, *[2] * 7, requires_grad=True)
    got = F.batch_norm(x, None, None, training=True)
    got.square().sum().backward()
    want = F.batch_norm(x.detach().reshape(2, 3, -1), None, None, training=True)
    torch.testing.assert_close(got.reshape(want.shape), want)
    assert calls()[1]
