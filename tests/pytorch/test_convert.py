"""convert, revert and report: what is swapped, what is left, what stays as it was."""

import copy

import pytest
import torch
from cases import by_direction
from layers import SmallResNet
from torch import nn

import bnfast.torch


def kinds(model):
    return {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def test_convert_and_revert_keep_every_object():
    model = SmallResNet().eval()
    model.stem.train()
    before = {name: (m, m.training) for name, m in model.named_modules()}
    tensors = {name: t.data_ptr() for name, t in model.state_dict().items()}
    assert bnfast.torch.convert(model) is model
    assert kinds(model) == {bnfast.torch.BatchNorm2d}
    assert bnfast.torch.convert(model) is model  # again changes nothing
    assert len(bnfast.torch.report(model).converted) == 6
    assert bnfast.torch.revert(model) is model
    assert kinds(model) == {nn.BatchNorm2d}
    assert {name: (m, m.training) for name, m in model.named_modules()} == before
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == tensors


def test_a_batch_norm_alone_and_a_shared_one():
    layer = nn.BatchNorm1d(3)
    assert bnfast.torch.convert(layer) is layer
    assert type(layer) is bnfast.torch.BatchNorm1d
    shared = nn.BatchNorm2d(3)
    model = bnfast.torch.convert(nn.Sequential(shared, nn.Sequential(shared)))
    assert model[0] is model[1][0] is shared


def test_what_is_left_is_reported(ran):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    patched = nn.BatchNorm2d(3)
    patched.forward = patched.forward
    model = nn.ModuleDict(
        {"own": Own(3), "patched": patched, "lazy": nn.LazyBatchNorm2d(), "fine": nn.BatchNorm2d(3)}
    )
    assert set(bnfast.torch.report(model).left) == set(model)
    report = bnfast.torch.report(bnfast.torch.convert(model))
    assert report.converted == ("fine",)
    assert set(report.left) == {"own", "patched", "lazy"}
    assert "own: left to PyTorch, Own is a class of its own" in str(report)
    assert type(model["own"]) is Own
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model["own"](x), nn.BatchNorm2d(3)(x) + 1)
    assert not ran()


@pytest.mark.parametrize("fused", [False, True])
def test_convolutions_take_our_layers_in(fused, ran):
    model = bnfast.torch.convert(SmallResNet(), fuse=fused)
    model(torch.randn(8, 3, 8, 8))
    model.eval()
    conv, norm = model.stem[0], model.stem[1]
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    x = torch.randn(2, 3, 8, 8)
    ran()
    torch.testing.assert_close(folded(x), norm(conv(x)))
    assert by_direction(ran()) == {"inference": 1}


def test_fx_keeps_our_layers_whole(ran):
    model = bnfast.torch.convert(SmallResNet()).eval()
    graph = torch.fx.symbolic_trace(model)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    norms = [name for name in called if type(graph.get_submodule(name)) in kinds(model)]
    assert len(norms) == 6
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(graph(x), model(x))
    assert by_direction(ran()) == {"inference": 12}
    # It knows classes by identity, so that layers have to be PyTorch's own again for it.
    from torch.fx.experimental.optimization import fuse

    torch.testing.assert_close(fuse(copy.deepcopy(model))(x), model(x))
    assert by_direction(ran()) == {"inference": 12}
    folded = fuse(bnfast.torch.revert(copy.deepcopy(model)))
    assert not kinds(folded)
    torch.testing.assert_close(folded(x), model(x))
    assert by_direction(ran()) == {"inference": 6}
