"""torch.ops.bnfast: opcheck, torch.compile, torch.export, dispatch modes."""

import copy
import shutil

import pytest
import torch
from cases import by_direction
from layers import SmallResNet, channels_last, dense, ours_like
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import bnfast.torch

OPS = torch.ops.bnfast
ARRANGE = pytest.mark.parametrize("arrange", [dense, channels_last])
VARIANTS = pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler"
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]


def arguments(arrange, residual, dtype=torch.float32):
    x, r = (arrange(t) for t in torch.randn(2, 4, 3, 2, 5, dtype=dtype))
    weight, bias = torch.randn(2, 3, dtype=dtype)
    given = (x, weight, bias, r if residual else None)
    return tuple(None if t is None else t.requires_grad_() for t in given)


@ARRANGE
@VARIANTS
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(arrange, activation, residual, dtype):
    given = arguments(arrange, residual, dtype)
    x, weight, bias, _ = given
    running = torch.randn(3, dtype=dtype), torch.rand(3, dtype=dtype) + 0.5
    options = (1e-5, activation, 0.1)
    opcheck(OPS.batch_norm.default, (*given, *options))
    opcheck(OPS.normalize.default, (*given, *running, *options))
    y, mean, _, inv_std = (t.detach() for t in OPS.batch_norm(*given, *options))
    dy = arrange(torch.randn_like(y)).requires_grad_()
    masked_by = y if residual else None
    for through, needs in ((True, [True, True, True, residual]), (False, [True, False, False, 0])):
        tensors = (dy, x, mean, inv_std, weight, bias, masked_by)
        options = (through, activation, 0.1, [bool(need) for need in needs])
        opcheck(OPS.batch_norm_backward.default, (*tensors, *options))


@TRAINING
@ARRANGE
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # PyTorch 2.6's own
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole(backend, arrange, training, ran):
    """Two programs of one formula, in float64, so that only mistakes are visible."""
    torch._dynamo.reset()
    model = ours_like(SmallResNet()).double().train(training)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend=backend)
    x = arrange(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    for step in range(2):
        want = model(x).square().sum()
        want.backward()
        ran()
        got = compiled(x).square().sum()
        got.backward()
        counts = ran()
        torch.testing.assert_close(got, want)
        forward = "forward" if training else "inference"
        assert by_direction(counts) == {forward: 6, "backward": 6}, step
        assert {(dtype, variant) for _, dtype, _, variant in counts} == {("float64", "plain")}
        if backend == "aot_eager":  # inductor chooses layouts of its own
            layout = "planar" if arrange is dense else "interleaved"
            assert {kind for _, _, kind, _ in counts} == {layout}
    for a, b in zip(compiled_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())


@TRAINING
def test_compiled_for_any_shape(training, ran):
    """One graph for batches of every size: no second compilation."""
    torch._dynamo.reset()
    model = ours_like(SmallResNet()).double().train(training)
    compiled_model = copy.deepcopy(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(compiled_model, fullgraph=True, dynamic=True, backend=backend)
    for size, side in ((4, 8), (7, 6), (2, 10)):
        x = torch.randn(size, 3, side, side, dtype=torch.float64)
        ran()
        want, got = model(x), compiled(x)
        assert by_direction(ran()) == {"forward" if training else "inference": 12}
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())
    assert len(graphs) == 1


@TRAINING
def test_compiled_under_autocast(training, ran):
    """Half data beside float32 parameters. The two round alike, as they run the same operations,
    but for the running statistics, which the operators' vectors move to the last bit or next to."""
    torch._dynamo.reset()
    model = ours_like(SmallResNet().train(training))
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        ran()
        got = compiled(x)
    direction = "forward" if training else "inference"
    assert ran() == {(direction, "bfloat16", "planar", "plain"): 6}
    assert got.dtype is want.dtype
    assert torch.equal(got, want)
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it
def test_a_graph_that_breaks_runs_on_bnfast(ran):
    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = bnfast.torch.BatchNorm2d(3), bnfast.torch.BatchNorm2d(3)
            self.second.register_forward_hook(lambda *args: torch._dynamo.graph_break())

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y).relu()

    torch._dynamo.reset()
    model = Breaks().double()
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        want = model(x)
        ran()
        torch.testing.assert_close(compiled(x), want)
        assert by_direction(ran()) == {"forward": 2}
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())


def test_compiled_cumulative_average(ran):
    torch._dynamo.reset()
    model = bnfast.torch.BatchNorm2d(3, momentum=None).double()
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())
    assert ran() == {("forward", "float64", "planar", "plain"): 6}


@pytest.mark.filterwarnings("ignore:Graph break:UserWarning")  # PyTorch 2.6 says so
def test_one_value_per_channel_is_refused_when_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(bnfast.torch.BatchNorm2d(3), backend="aot_eager")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        compiled(torch.randn(1, 3, 1, 1))


@TRAINING
@pytest.mark.parametrize("strict", [False, True])
def test_exported(training, strict, ran):
    model = ours_like(SmallResNet()).double().train(training)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    exported = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    name = "bnfast.batch_norm" if training else "bnfast.normalize"
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count(f"{name}.default") == 6
    module = exported.module()
    ran()
    got = module(x)
    assert sum(ran().values()) == 6
    torch.testing.assert_close(got, model(x))
    buffers = dict(model.named_buffers())
    for buffer, value in module.named_buffers():  # those that are used
        torch.testing.assert_close(value, buffers[buffer])


def test_exported_for_any_batch(ran):
    model = ours_like(SmallResNet()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(4, 3, 8, 8)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(9, 3, 8, 8)
    ran()
    assert torch.equal(exported.module()(more), model(more))
    assert ran() == {("inference", "float32", "planar", "plain"): 12}


def test_dispatch_modes_see_the_operator(ran):
    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = bnfast.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    want = copy.deepcopy(layer)
    want(x)
    ran()
    with Log() as log:
        layer(x).sum().backward()
    assert by_direction(ran()) == {"forward": 1, "backward": 1}
    assert "bnfast.batch_norm.default" in log.seen
    assert "bnfast.batch_norm_backward.default" in log.seen
    torch.testing.assert_close(layer.state_dict(), want.state_dict())


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_both_ways_move_the_statistics_alike(momentum, ran):
    """The kernels move them in float64, and so do the operators' few vectors: a product and a sum
    that a compiler may contract differ by 2**-53 of either, which a float32 hardly ever shows."""
    layer = bnfast.torch.BatchNorm2d(64, momentum=momentum)
    other = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(4, 64, 5, 5) + 3
        layer(x)
        other._by_operator(x, None, None)
        assert ran() == {("forward", "float32", "planar", "plain"): 2}
    assert layer.num_batches_tracked == other.num_batches_tracked == 3
    for a, b in ((layer.running_mean, other.running_mean), (layer.running_var, other.running_var)):
        assert torch.equal(a, b)
