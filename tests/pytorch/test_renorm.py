"""`BatchRenorm1d`, `2d` and `3d`: compared with the formula, with NumPy's layer and with PyTorch's.

Ioffe (2017), Batch Renormalization: r and d are constants in the backward.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from counted import Expected, check, mask_for, state_of
from layers import TENSORS, channels_last, dense, gappy, leaf
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnfast
import bnfast.torch
from bnfast import _core
from bnfast.torch import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, recompute_statistics

KINDS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
PLAIN = {
    BatchRenorm1d: nn.BatchNorm1d,
    BatchRenorm2d: nn.BatchNorm2d,
    BatchRenorm3d: nn.BatchNorm3d,
}
OF_NUMPY = {
    BatchRenorm1d: bnfast.BatchRenorm1d,
    BatchRenorm2d: bnfast.BatchRenorm2d,
    BatchRenorm3d: bnfast.BatchRenorm3d,
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ACTIVATIONS = (None, *_core.ACTIVATIONS, ("leaky_relu", 0.3))
# None is at its limit, r is, d is, both are, and a plain batch norm.
LIMITS = {"free": (1e9, 1e9), "r": (1.05, 1e9), "d": (1e9, 0.1), "both": (1.1, 0.2), "none": (1, 0)}


def layer_for(x, limits=(3.0, 5.0), **options):
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    rmax, dmax = limits
    layer = KINDS[x.dim()](x.shape[1], rmax=rmax, dmax=dmax, dtype=dtype, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 4)
    return layer


def batch(arrange=dense, dtype=torch.float32, shape=(6, 5, 3, 4)):
    return arrange((torch.randn(shape) * 1.5 + 0.7).to(dtype))


def correction_of(layer):
    """r and d by their definition, from the layer's statistics as they are now."""
    running = layer.running_mean.double(), torch.sqrt(layer.running_var.double() + layer.eps)
    rmax, dmax, eps = float(layer.rmax), float(layer.dmax), layer.eps

    def correction(mean, var):
        r = (torch.sqrt(var + eps) / running[1]).clamp(1 / rmax, rmax)
        return r, ((mean - running[0]) / running[1]).clamp(-dmax, dmax)

    return correction


def check_step(layer, x, given=None, weights=None, **options):
    weights = torch.ones(x.shape[0], 1, *x.shape[2:]) if weights is None else weights
    return check(layer, x, weights, given, correction=correction_of(layer), **options)


# ---- Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("limits", LIMITS)
def test_values_gradients_and_statistics(limits, kind, dtype):
    shape, arrange, _ = TENSORS[kind]
    x = batch(arrange, dtype, shape)
    check_step(layer_for(x, LIMITS[limits]), x)


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("arrange", [dense, channels_last, gappy])
def test_activations_residuals_and_masks(arrange, activation, residual, masked):
    x = batch(arrange)
    given, weights = mask_for("weights", x) if masked else (None, None)
    options = {"residual": residual, "activation": activation}
    check_step(layer_for(x, LIMITS["both"]), x, given, weights, **options)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e38])
def test_garbage_under_the_mask_changes_nothing(garbage):
    x = batch()
    given, weights = mask_for("bool", x)
    check_step(layer_for(x), x, given, weights, garbage=garbage)


def test_the_limits_matter():
    """The cases above differ: r and d are at their limits where their names say so."""
    x = batch()
    layer = layer_for(x)
    weights = torch.ones(6, 1, 3, 4)
    [(mean, var, _)] = Expected(layer, x, weights, batch()).statistics
    hit = {}
    for name, limits in LIMITS.items():
        layer.rmax, layer.dmax = limits
        r, d = correction_of(layer)(mean, var)
        at_r = ((r == layer.rmax) | (r == 1 / layer.rmax)).any()
        hit[name] = bool(at_r), bool((d.abs() == layer.dmax).any())
    assert hit == {
        "free": (False, False),
        "r": (True, False),
        "d": (False, True),
        "both": (True, True),
        "none": (True, True),
    }


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_batches(dtype, momentum):
    """The statistics as they were before each batch."""
    layer = layer_for(batch(dtype=dtype), momentum=momentum)
    for _ in range(3):
        check_step(layer, batch(dtype=dtype))


def test_without_limits_training_is_evaluation():
    """Where nothing is clipped the running statistics normalise, whatever the batch."""
    layer = layer_for(batch(), LIMITS["free"]).double()
    x = batch(dtype=torch.float64)
    want = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_with_limits_of_one_and_zero_it_is_a_batch_norm():
    x = batch(dtype=torch.float64)
    ours = layer_for(x, LIMITS["none"])
    theirs = nn.BatchNorm2d(5).double()
    theirs.load_state_dict(ours.state_dict())
    mine, own, dy = leaf(x), leaf(x), batch(dtype=torch.float64)
    ours(mine).backward(dy)
    theirs(own).backward(dy)
    torch.testing.assert_close(mine.grad, own.grad, rtol=1e-11, atol=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_limits_follow_a_schedule():
    """They are read at each call, also as numbers of NumPy and PyTorch."""
    layer = layer_for(batch(), (1.0, 0.0))
    for rmax, dmax in ((1, 0), (np.float64(1.5), np.float32(0.5)), (torch.tensor(3.0), 5)):
        layer.rmax, layer.dmax = rmax, dmax
        check_step(layer, batch())


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 3, 4), (4, 5, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_equals_the_layer_over_arrays(masked, dtype, shape):
    """The same kernels compute both, so the bits are the same."""
    x, dy = batch(dtype=dtype, shape=shape), batch(dtype=dtype, shape=shape)
    layer = layer_for(x, LIMITS["both"])
    given, _ = mask_for("weights", x) if masked else (None, None)
    array = None if given is None else given.numpy()
    numpy = OF_NUMPY[type(layer)](5, rmax=layer.rmax, dmax=layer.dmax, dtype=x.numpy().dtype)
    numpy.load_state_dict(layer.state_dict())
    for _ in range(2):
        mine = leaf(x)
        y = layer(mine, mask=given)
        y.backward(dy)
        np.testing.assert_array_equal(y.detach().numpy(), numpy(x.numpy(), mask=array))
        np.testing.assert_array_equal(mine.grad.numpy(), numpy.backward(dy.numpy()))
    np.testing.assert_allclose(layer.weight.grad.numpy(), numpy.weight_grad, rtol=1e-6)
    np.testing.assert_allclose(layer.bias.grad.numpy(), numpy.bias_grad, rtol=1e-6)
    for name, value in numpy.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name].numpy(), value)


# ---- Evaluation and state


@pytest.mark.parametrize("rest", [(), ("residual", "relu")], ids=["", "residual, relu"])
def test_evaluation_is_that_of_pytorch(rest):
    x = leaf(batch())
    ours = layer_for(x).eval()
    theirs = nn.BatchNorm2d(5).eval()
    theirs.load_state_dict(ours.state_dict())
    before = state_of(ours)
    beside = batch()
    y = ours(x, *((beside, "relu") if rest else ()))
    want = theirs(x)
    torch.testing.assert_close(y, torch.relu(want + beside) if rest else want)
    assert torch.equal(ours(x, mask=torch.zeros(6)), ours(x))
    torch.testing.assert_close(state_of(ours), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", PLAIN)
def test_state_and_class_are_those_of_pytorch(kind):
    ours, theirs = kind(5, momentum=None, eps=0.25), PLAIN[kind](5, momentum=None, eps=0.25)
    assert isinstance(ours, PLAIN[kind])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs).replace("BatchNorm", "BatchRenorm").replace(
        "stats=True)", "stats=True, rmax=3.0, dmax=5.0)"
    )
    assert kind(5, affine=False).weight is None
    assert kind(5, dtype=torch.float64).running_mean.dtype is torch.float64


def test_copies_and_pickles_keep_the_limits():
    x = batch()
    layer = layer_for(x, LIMITS["both"])
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(torch.load(file, weights_only=False))
    want = layer(x)
    for own in copies:
        assert type(own) is BatchRenorm2d
        assert (own.rmax, own.dmax) == LIMITS["both"]
        assert torch.equal(own(x), want)
        torch.testing.assert_close(own.state_dict(), layer.state_dict(), rtol=0, atol=0)


REFUSED = {
    "rmax below 1": ({"rmax": 0.5}, ValueError, "rmax is 0.5; expected 1 or more"),
    "rmax": ({"rmax": float("nan")}, ValueError, "rmax is nan"),
    "dmax below 0": ({"dmax": -1}, ValueError, "dmax is -1"),
    "dmax's type": ({"dmax": "5"}, TypeError, "dmax is '5'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_limits(name):
    options, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        BatchRenorm2d(5, **options)
    layer = layer_for(batch())
    before = state_of(layer)
    vars(layer).update(options)
    with pytest.raises(kind, match=words):
        layer(batch())
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_missing_statistics_are_refused(missing):
    layer = layer_for(batch())
    setattr(layer, missing, None)
    with pytest.raises(RuntimeError, match="BatchRenorm2d in training needs running statistics"):
        layer(batch())
    assert layer.num_batches_tracked == 0


def test_one_value_is_refused():
    layer = layer_for(batch())
    before = state_of(layer)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(batch(shape=(1, 5, 1, 1)))
    layer.virtual_batch_size = 2
    with pytest.raises(ValueError, match="virtual_batch_size"):
        layer(batch())
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


def test_no_values_give_no_values():
    x = leaf(batch(shape=(0, 5, 3, 4)))
    layer = layer_for(batch())
    before = state_of(layer)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    after = state_of(layer)
    assert after.pop("num_batches_tracked") == before.pop("num_batches_tracked") + 1
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# ---- Autograd, transforms and graphs


def test_backward_twice_and_second_derivatives():
    x = leaf(batch())
    layer = layer_for(x)
    y = layer(x)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_only_the_weight_needs_a_gradient():
    """It is made of both sums."""
    x, dy = batch(), batch()
    both = layer_for(x)
    one = copy.deepcopy(both)
    one.bias.requires_grad_(False)
    both(x).backward(dy)
    one(x).backward(dy)
    assert torch.equal(one.weight.grad, both.weight.grad)
    assert one.bias.grad is None
    bare = layer_for(x, affine=False)
    check_step(bare, x)


def test_statistics_can_be_paused():
    """They correct the batch all the same."""
    x = batch()
    layer = layer_for(x)
    want = copy.deepcopy(layer)(x)
    before = state_of(layer)
    with bnfast.torch.paused_statistics():
        assert torch.equal(layer(x), want)
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


def test_versions_of_statistics_move():
    layer = layer_for(batch())
    before = {name: b._version for name, b in layer.named_buffers()}
    layer(batch())
    for name, b in layer.named_buffers():
        assert b._version > before[name], name


def test_checkpointing_counts_once():
    x = leaf(batch())
    layer = layer_for(x)
    contexts = bnfast.torch.checkpoint_contexts
    checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert layer.num_batches_tracked == 1


def test_transforms_are_refused_in_training_alone():
    layer, x = layer_for(batch()), torch.stack([batch(), batch()])
    with pytest.raises(RuntimeError, match="cannot be traced or transformed"):
        torch.func.vmap(layer)(x)
    assert layer.num_batches_tracked == 0
    want = torch.stack([layer.eval()(part) for part in x])
    torch.testing.assert_close(torch.func.vmap(layer)(x), want)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = BatchRenorm2d(5, rmax=1.1, dmax=0.1)
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(x))))


def images():
    return torch.randn(4, 3, 7, 8)


def one_step(model, call, x):
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


# PyTorch reads .grad of what enters a graph, and silences the warning of that but for tests.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["eager", "bnfast"])
def test_compiled_models_break_their_graph_in_training(backend):
    torch._dynamo.reset()
    model = Model()
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend=backend)
    for _ in range(2):
        x = images()
        for a, b in zip(one_step(ours, compiled, x), one_step(model, model, x), strict=True):
            torch.testing.assert_close(a, b)
    assert ours.norm.num_batches_tracked == 2
    # A schedule reaches compiled models, and no graph is made again for it.
    made = torch._dynamo.utils.counters["frames"]["ok"]
    for rmax in (1.0, 1.5, 2.0):
        model.norm.rmax = ours.norm.rmax = rmax
        x = images()
        torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["frames"]["ok"] == made
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(ours, backend=backend, fullgraph=True)(x)
    ours.eval()
    torch._dynamo.reset()
    one_graph = torch.compile(ours, backend=backend, fullgraph=True)
    torch.testing.assert_close(one_graph(x), ours(x))


def test_symbolic_traces_keep_the_layer():
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    (node,) = (n for n in traced.graph.nodes if n.target == "norm")
    assert node.op == "call_module"
    other, x = copy.deepcopy(model), images()
    torch.testing.assert_close(traced(x), other(x))


# ---- In models


def test_convert_and_revert_leave_it():
    """PyTorch has no such layer: another class would train another model."""
    model = nn.Sequential(Model(), nn.BatchNorm2d(2))
    bnfast.torch.convert(model)
    assert type(model[0].norm) is BatchRenorm2d
    assert bnfast.torch.report(model).converted == ("0.norm", "1")
    assert bnfast.torch.report(model).left == {}
    bnfast.torch.convert_sync_batchnorm(model)
    assert type(model[0].norm) is BatchRenorm2d
    bnfast.torch.revert(model)
    assert type(model[0].norm) is BatchRenorm2d
    assert type(model[1]) is nn.SyncBatchNorm
    model[0](images())
    assert model[0].norm.num_batches_tracked == 1


def test_enable_leaves_it():
    x = batch()
    layer = layer_for(x)
    want = copy.deepcopy(layer)(x)
    with bnfast.torch.enabled():
        assert torch.equal(layer(x), want)


def test_freeze_folds_it_as_any_batch_norm():
    model = Model()
    with torch.no_grad():
        for p in model.norm.parameters():
            p.normal_()
    for _ in range(3):
        model(images())
    x = images()
    frozen = bnfast.torch.freeze(model, example=x)
    assert bnfast.torch.report(frozen).folded == {"norm": "conv"}
    torch.testing.assert_close(frozen(x), copy.deepcopy(model).eval()(x), rtol=1e-4, atol=1e-5)
    assert model.training
    assert type(model.norm) is BatchRenorm2d


def test_freeze_of_one_that_stays():
    """Between two activations: it evaluates as any batch norm."""
    model = nn.Sequential(nn.ReLU(), BatchRenorm2d(3), nn.ReLU())
    model(images())
    x = images()
    frozen = bnfast.torch.freeze(model, example=x)
    assert list(bnfast.torch.report(frozen).left) == ["1"]
    torch.testing.assert_close(frozen(x), copy.deepcopy(model).eval()(x))
    assert type(frozen[1]) is nn.BatchNorm2d  # which loads where bnfast is not installed


def test_population_statistics():
    """The layer normalises by its batches meanwhile, without a correction."""
    layer = layer_for(batch(), momentum=None)
    batches = [batch() + i for i in range(3)]
    limits = layer.rmax, layer.dmax
    recompute_statistics(layer, batches)
    rows = torch.cat(batches).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), rows.var(1), rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 0
    assert (layer.rmax, layer.dmax) == limits
    assert layer.training
    assert layer.track_running_stats

    model, plain = nn.Sequential(layer, nn.BatchNorm2d(5)), nn.BatchNorm2d(5)
    plain.load_state_dict(layer.state_dict())
    same = nn.Sequential(plain, copy.deepcopy(model[1]))
    for own in (model, same):
        recompute_statistics(own, batches)
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=1e-5, atol=1e-6)
