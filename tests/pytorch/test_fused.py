"""torch.ops.bnfast: opcheck, values, errors; converted layers where graphs are recorded."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import by_direction
from layers import SmallResNet, channels_last, dense, gappy, ours_like, transposed
from torch.library import opcheck

import bnfast.torch
from bnfast import _core
from bnfast.torch import fused

FORWARD, BACKWARD = torch.ops.bnfast.batch_norm_act, torch.ops.bnfast.batch_norm_act_backward
ARRANGE = pytest.mark.parametrize("arrange", [dense, channels_last, gappy, transposed])
ACTIVATIONS = pytest.mark.parametrize("activation", [None, *_core.ACTIVATIONS])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def arguments(arrange, residual, training, activation, dtype=torch.float64):
    x, r = (arrange(t) for t in 4 * torch.randn(2, 4, 3, 2, 5, dtype=dtype))
    weight, bias, mean = torch.randn(3, 3, dtype=dtype)
    rest = (training, 0.1, 1e-3, r if residual else None, activation, 0.2)
    return (x, weight, bias, mean, torch.rand(3, dtype=dtype) + 0.5, *rest)


def composed(x, weight, bias, mean, var, training, momentum, eps, residual, activation, slope):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return fused.rest(
        y, residual, (activation, slope) if activation == "leaky_relu" else activation
    )


def copies(given):
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in given]


@ARRANGE
@ACTIVATIONS
@RESIDUAL
@TRAINING
def test_values_and_gradients(training, residual, activation, arrange, ran):
    given = arguments(arrange, residual, training, activation)
    theirs, ours = copies(given), copies(given)
    differentiable = [theirs[i].requires_grad_() for i in (0, 1, 2, 8) if theirs[i] is not None]
    want = composed(*theirs)
    dy = arrange(torch.randn_like(want))
    wanted = torch.autograd.grad(want, differentiable, dy)
    ran()
    y, save_mean, save_invstd = FORWARD(*ours)
    torch.testing.assert_close(y, want)
    assert y.stride() == F.batch_norm(given[0], *given[3:5], training=True).stride()
    for i in (3, 4):  # running statistics
        torch.testing.assert_close(ours[i], theirs[i])
    x, weight, bias, mean, var, _, _, eps, _, *activation = ours[:11]
    masked = residual and activation[0] is not None
    kept = fused.beside(y, ours[8], activation[0])
    tensors = (dy, x, weight, bias, mean, var, save_mean, save_invstd)
    found = BACKWARD(*tensors, training, eps, kept, *activation, [True, True, True, masked])
    for got, gradient in zip(found, wanted, strict=False):
        torch.testing.assert_close(got if got is not None else dy, gradient)
    assert by_direction(ran()) == {"forward" if training else "inference": 1, "backward": 1}


@pytest.mark.parametrize("arrange", [dense, channels_last])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@RESIDUAL
@TRAINING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, training, residual, activation, arrange):
    given = arguments(arrange, residual, training, activation, dtype)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(FORWARD.default, given, test_utils=checks)
    y, *saved = FORWARD(*copies(given))
    x, weight, bias, mean, var, _, _, eps, _, *activation = given
    masked = y if residual else None
    needs = [True, True, training, bool(residual and activation[0])]
    tensors = (torch.randn_like(y), x, weight, bias, mean, var, *saved)
    arguments_ = (*tensors, training, eps, masked, *activation, needs)
    opcheck(BACKWARD.default, arguments_, test_utils=checks)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_unneeded_gradients_are_none(needs):
    x, weight, bias, mean, var, *_ = arguments(dense, False, True, "relu")
    y, *saved = FORWARD(x, weight, bias, mean, var, True, 0.1, 1e-3, x, "relu", 0.0)
    found = BACKWARD(y, x, weight, bias, None, None, *saved, True, 1e-3, y, "relu", 0.0, needs)
    assert tuple(t is not None for t in found) == needs


REFUSED = {
    "activation": ({9: "swish"}, "an activation that bnfast does not have"),
    "slope": ({9: "leaky_relu", 10: 1.5}, "an activation that bnfast does not have"),
    "type": ({0: torch.zeros(4, 3, 2, 5).int()}, "a type of tensor that bnfast does not take"),
    "residual's shape": ({8: torch.zeros(4, 3, 2, 1)}, "not the shape of a batch"),
    "residual's type": ({8: torch.zeros(4, 3, 2, 5).double()}, "a type of tensor"),
    "no values": ({0: torch.zeros(0, 3, 2, 5)}, "no values"),
    "parameters": ({1: torch.zeros(4)}, "parameters or statistics of another type, shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_give_reason_and_write_nothing(name):
    changes, why = REFUSED[name]
    given = list(arguments(dense, True, True, "relu", torch.float32))
    for place, value in changes.items():
        given[place] = value
    before = copies(given)
    with pytest.raises(RuntimeError, match=f"bnfast does not take this call: .*{why}"):
        FORWARD(*given)
    torch.testing.assert_close(given[3:5], before[3:5], rtol=0, atol=0)


# ---- Converted layers in recorded graphs: PyTorch's operators, nothing of bnfast


@TRAINING
def test_compiled_whole(training):
    torch._dynamo.reset()
    model = ours_like(SmallResNet()).double().train(training)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
    for a, b in zip(compiled_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(compiled_model.state_dict(), model.state_dict())


@TRAINING
@pytest.mark.parametrize("strict", [False, True])
def test_exported_without_a_trace(training, strict):
    model = ours_like(SmallResNet()).double().train(training)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    exported = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "aten.batch_norm.default" in targets
    assert not any("bnfast" in target for target in targets)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_one_node_in_a_graph_of_fx():
    model = ours_like(SmallResNet()).eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(graph(x), model(x))
    norms = [m for m in graph.modules() if isinstance(m, bnfast.torch.BatchNorm2d)]
    assert len(norms) == 6


# ---- Models that were pickled when bnfast's layers were written in Python


def test_an_old_pickle_loads(ran):
    file = Path(__file__).parent / "data" / "converted_by_python_layers.pt"
    old = torch.load(file, weights_only=False)
    model = old["model"]
    assert [type(m).__name__ for m in model if "Norm" in type(m).__name__] == [
        "BatchNorm2d", "BatchNorm2d", "BatchNorm1d", "SyncBatchNorm",
    ]  # fmt: skip
    torch.testing.assert_close(model(old["x"]), old["y"])
    model.train()(old["x"]).square().sum().backward()
    assert by_direction(ran()) == {"inference": 4, "forward": 4, "backward": 4}
    assert model[1].num_batches_tracked == 2
    bnfast.torch.revert(model)
    assert type(model[1]) is torch.nn.BatchNorm2d
