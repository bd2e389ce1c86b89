"""convert, revert and report: what is converted, what is left, and what does not change."""

import copy
import pickle
import threading

import pytest
import torch
from cases import by_direction
from layers import SmallResNet
from torch import nn
from torch.nn.utils import parametrize

import bnfast
import bnfast.torch
from bnfast.torch import convert, report, revert
from bnfast.torch.modules import BatchNormOnCPU


def kinds(model):
    return {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def test_convert_and_revert_keep_every_object():
    model = SmallResNet().eval()
    model.stem.train()
    before = {name: (m, m.training) for name, m in model.named_modules()}
    tensors = {name: t.data_ptr() for name, t in model.state_dict().items()}
    assert convert(model) is model
    assert kinds(model) == {bnfast.torch.BatchNorm2d}
    assert convert(model) is model  # a second time changes nothing
    assert len(report(model).converted) == 6
    assert revert(model) is model
    assert kinds(model) == {nn.BatchNorm2d}
    assert {name: (m, m.training) for name, m in model.named_modules()} == before
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == tensors


def test_a_batch_norm_alone_and_a_shared_one():
    layer = nn.BatchNorm1d(3)
    assert convert(layer) is layer
    assert type(layer) is bnfast.torch.BatchNorm1d
    shared = nn.BatchNorm2d(3)
    model = convert(nn.Sequential(shared, nn.Sequential(shared)))
    assert model[0] is model[1][0] is shared


def snapshot(model):
    """Everything in a model except the values of its tensors."""
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()}
        | {"module": m, "class": type(m)}
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("converted", [False, True])
def test_fuse_is_refused_and_nothing_changes(converted):
    model = SmallResNet().eval()
    model.stem.train()
    model.stem.register_forward_hook(lambda *args: None)
    if converted:
        convert(model)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"^fuse is True; expected False: a recorded graph of a forward is not the forward",
    ):
        convert(model, fuse=True)
    assert snapshot(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


class Remembers(nn.Module):
    """A forward with branches and side effects, which no recorded graph can replace."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.seen, self.factor = [], 2.0

    def forward(self, x):
        y = torch.relu(self.bn(x))
        self.seen.append(y)
        return y * self.factor if isinstance(y, torch.Tensor) else y


def test_model_forward_not_replaced(ran):
    theirs = Remembers()
    ours = convert(copy.deepcopy(theirs), fuse=False)
    assert type(ours) is Remembers
    assert ours.seen == []  # nothing was run
    for factor in (2.0, 5.0):
        x = torch.randn(4, 3, 2, 2)
        theirs.factor = ours.factor = factor
        want = theirs(x)
        assert not ran()
        torch.testing.assert_close(ours(x), want)
        assert by_direction(ran()) == {"forward": 1}
    assert [type(y) for y in ours.seen] == [torch.Tensor] * 2
    assert report(ours).converted == ("bn",)
    assert type(revert(ours)) is Remembers


def test_modules_added_after_converting_run(ran):
    model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    model.append(nn.Flatten())
    assert model(torch.randn(4, 3, 2, 2)).shape == (4, 12)
    assert by_direction(ran()) == {"forward": 1}


@pytest.mark.parametrize("function", [convert, revert, report])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "model is of type builtins.NoneType"),
        ([nn.BatchNorm2d(3)], "model is of type builtins.list"),
        (nn.BatchNorm2d, "model is the class torch.nn.modules.batchnorm.BatchNorm2d"),
        (
            bnfast.BatchNorm2d(3),
            "model is of type bnfast.layers.BatchNorm2d, a layer for NumPy arrays",
        ),
        (torch.ones(3), "model is of type torch.Tensor"),
    ],
    ids=["None", "list", "class", "NumPy layer", "tensor"],
)
def test_not_a_module_refused(function, model, said):
    with pytest.raises(TypeError, match=f"^{said}; expected a torch.nn.Module$"):
        function(model)


def test_unconverted_layers_are_reported(ran):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    scripted = torch.jit.script(nn.BatchNorm2d(3))
    patched = nn.BatchNorm2d(3)
    patched.forward = patched.forward
    parametrized = nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.ModuleDict(
        {
            "own": Own(3),
            "parametrized": parametrized,
            "patched": patched,
            "lazy": nn.LazyBatchNorm2d(),
            "scripted": scripted,
            "fine": nn.BatchNorm2d(3),
        }
    )
    assert set(report(model).left) == set(model)
    model["other"] = nn.LazyInstanceNorm2d()  # it is not a batch norm
    found = report(convert(model))
    assert found.converted == ("fine",)
    assert found.left == {
        "own": "Own has a forward of its own, which enable() serves",
        "parametrized": "its parameters are parametrized; convert before that",
        "patched": "its forward was replaced on the instance",
        "lazy": "LazyBatchNorm2d becomes a batch norm at its first forward; convert after that",
        "scripted": "a scripted BatchNorm2d",
    }
    assert str(found).splitlines()[:2] == [
        "1 batch norms run on bnfast",
        "own: left to PyTorch, Own has a forward of its own, which enable() serves",
    ]
    assert type(model["own"]) is Own
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model["own"](x), nn.BatchNorm2d(3)(x) + 1)
    assert not ran()


class Derived(nn.BatchNorm2d):
    """Has no forward of its own."""

    def __init__(self, num_features, tag):
        super().__init__(num_features)
        self.tag = tag

    def _check_input_dim(self, x):
        if x.shape[0] == 1:
            raise ValueError("my rule")


class Reduced(nn.BatchNorm2d):
    """Has its own way of pickling."""

    def __reduce__(self):
        return Reduced, (self.num_features,)


def test_derived_classes_are_converted(ran):
    layer = Derived(3, "mine")
    assert report(layer).left == {"(model)": "convert has not been called"}
    assert convert(layer) is layer
    assert type(convert(Derived(3, "another's"))) is type(convert(layer))
    assert report(layer).converted == ("(model)",)
    assert isinstance(layer, Derived)
    assert isinstance(layer, BatchNormOnCPU)
    assert repr(layer) == repr(Derived(3, ""))
    layer(torch.randn(4, 3, 2, 2))
    assert by_direction(ran()) == {"forward": 1}
    with pytest.raises(ValueError, match="my rule"):
        layer(torch.randn(1, 3, 2, 2))
    for copied in (
        copy.deepcopy(layer),
        *(pickle.loads(pickle.dumps(layer, p)) for p in (0, 2, 5)),
    ):
        assert type(copied) is type(layer)
        assert copied.tag == "mine"
        assert copied.num_batches_tracked == 1
    assert type(revert(layer)) is Derived


def test_derived_class_with_own_pickling():
    assert type(pickle.loads(pickle.dumps(convert(Reduced(3))))) is Reduced


def test_fuse_conv_bn_eval_takes_converted_layers(ran):
    model = convert(SmallResNet(), fuse=False)
    model(torch.randn(8, 3, 8, 8))
    model.eval()
    conv, norm = model.stem[0], model.stem[1]
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    x = torch.randn(2, 3, 8, 8)
    ran()
    torch.testing.assert_close(folded(x), norm(conv(x)))
    assert by_direction(ran()) == {"inference": 1}


def test_fx_keeps_layers_as_leaves(ran):
    model = convert(SmallResNet()).eval()
    graph = torch.fx.symbolic_trace(model)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    norms = [name for name in called if type(graph.get_submodule(name)) in kinds(model)]
    assert len(norms) == 6
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(graph(x), model(x))
    assert by_direction(ran()) == {"inference": 12}
    # It compares classes by identity, so layers have to be PyTorch's own again.
    from torch.fx.experimental.optimization import fuse

    torch.testing.assert_close(fuse(copy.deepcopy(model))(x), model(x))
    assert by_direction(ran()) == {"inference": 12}
    folded = fuse(revert(copy.deepcopy(model)))
    assert not kinds(folded)
    torch.testing.assert_close(folded(x), model(x))
    assert by_direction(ran()) == {"inference": 6}


# ---- A backward runs where its forward did


def step(layer, x):
    y = layer(x)
    (y * x.detach().roll(1, 0)).sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_backward_in_another_thread(training, ran):
    layer = convert(nn.BatchNorm2d(3)).train(training)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = layer(x)
    ran()
    thread = threading.Thread(target=lambda: y.square().sum().backward())
    thread.start()
    thread.join()
    assert by_direction(ran()) == {"backward": 1}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_runs_where_forward_ran(training, ran):
    plain = nn.BatchNorm2d(3).train(training)
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    step(nn.Sequential(plain, ours, copy.deepcopy(plain)), x)
    assert by_direction(ran()) == {"forward" if training else "inference": 1, "backward": 1}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["copied", "kept"])
def test_moved_saved_tensors(way, training, ran):
    """Copies have no mark: PyTorch's own backward reads them."""
    hooks = {"copied": torch.Tensor.clone, "kept": lambda t: t}
    plain = nn.BatchNorm2d(3).train(training)
    found = []
    for layer in (plain, convert(copy.deepcopy(plain))):
        x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(hooks[way], lambda t: t):
            y = layer(x)
        y.pow(3).sum().backward()
        found.append((x.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(found[1], found[0])
    forward = "forward" if training else "inference"
    assert by_direction(ran()) == {forward: 1} | ({} if way == "copied" else {"backward": 1})


def test_resized_saved_statistics(ran):
    """Our saved statistics, shortened or extended, are read by PyTorch's backward."""
    x = torch.randn(8, 4, requires_grad=True)
    with bnfast.torch.enabled():
        _, mean, inv_std = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    ran()
    backward = torch.ops.aten.native_batch_norm_backward
    mean, inv_std = mean.detach()[1:3], inv_std.detach()[1:3]
    part = x.detach()[:, 1:3]
    backward(part, part, None, None, None, mean, inv_std, True, 1e-5, [True, False, False])
    assert not ran()


def test_longer_storage_without_mark(ran):
    convert(nn.BatchNorm1d(4))
    x, mean, inv_std = torch.randn(8, 4), torch.zeros(100)[:4], torch.ones(100)[:4]
    backward = torch.ops.aten.native_batch_norm_backward
    backward(x, x, None, None, None, mean, inv_std, True, 1e-5, [True, False, False])
    assert not ran()
