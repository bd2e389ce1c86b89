"""`mask=` and `virtual_batch_size` of the layers, compared with formulas in float64."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from cases import by_direction
from counted import MASKS, check, mask_for, state_of
from layers import CLASSES, TENSORS, channels_last, dense, gappy, leaf, ours_like, transposed
from test_result_strides import INPUTS, REORDERED
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import bnfast.torch
from bnfast import _core

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = (torch.float16, torch.bfloat16)
ACTIVATIONS = (None, *_core.ACTIVATIONS, ("leaky_relu", 0.3))
NAN, INF = float("nan"), float("inf")


def parameters_of(dtype):
    return torch.float32 if dtype in HALVES else dtype


def layer_for(x, kind=None, **options):
    """A layer in training whose tensors have no special values."""
    kind = kind or CLASSES[x.dim()][1]
    layer = kind(x.shape[1], dtype=parameters_of(x.dtype), **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer


def batch(arrange=dense, dtype=torch.float32, shape=(6, 5, 3, 4)):
    return arrange((torch.randn(shape) * 1.5 + 0.7).to(dtype))


# ---- Masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("mask", MASKS)
def test_values_gradients_and_statistics(mask, kind, dtype, ran):
    shape, arrange, layout = TENSORS[kind]
    x = batch(arrange, dtype, shape)
    given, weights = mask_for(mask, x)
    layer = layer_for(x)
    ran()
    check(layer, x, weights, given)
    seen = (str(dtype).removeprefix("torch."), layout, "plain")
    assert ran() == {("forward", *seen): 1, ("backward", *seen): 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("arrange", [dense, channels_last, gappy, transposed])
def test_activations_and_residuals(arrange, activation, residual, dtype):
    x = batch(arrange, dtype)
    given, weights = mask_for("weights", x)
    check(layer_for(x), x, weights, given, residual=residual, activation=activation)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("arrange", [dense, channels_last])
def test_garbage_under_the_mask_changes_nothing(arrange, garbage, activation, residual):
    x = batch(arrange)
    given, weights = mask_for("bool", x)
    assert not given.all()
    options = {"residual": residual, "activation": activation, "garbage": garbage}
    check(layer_for(x), x, weights, given, **options)


@pytest.mark.parametrize("arrange", [dense, channels_last])
def test_outputs_and_gradients_under_the_mask(arrange):
    """Where nothing is counted, the output is the usual map, and a gradient takes the direct path
    alone.
    """
    x = leaf(batch(arrange, torch.float64))
    mask = torch.ones(6, 3, 4, dtype=torch.bool)
    mask[2] = False
    layer = layer_for(x, eps=0.5)
    y = layer(x, mask=mask)
    kept = x[mask[:, 0, 0]].detach()
    scale = layer.weight / torch.sqrt(kept.var((0, 2, 3), correction=0) + 0.5)
    d = x[2] - kept.mean((0, 2, 3)).view(-1, 1, 1)
    want = d * scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(y[2], want)
    dy = torch.randn_like(x)
    y.backward(dy)
    torch.testing.assert_close(x.grad[2], dy[2] * scale.view(-1, 1, 1))
    # through mean and variance: the gradient of a sum of all outputs is that of those not counted
    assert x.grad[0].abs().max() > 0


@pytest.mark.parametrize("weights", [torch.ones(6, 3, 4), torch.ones(6, 3, 4, dtype=torch.bool)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrange", [dense, channels_last])
def test_a_mask_of_ones_is_none(arrange, dtype, weights):
    x, dy = batch(arrange, dtype), batch(arrange, dtype)
    theirs = layer_for(x, nn.BatchNorm2d)
    ours = ours_like(theirs)
    mine, own = leaf(x), leaf(x)
    want, got = theirs(own), ours(mine, mask=weights)
    want.backward(dy)
    got.backward(dy)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine.grad, own.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", [*INPUTS, *REORDERED])
@pytest.mark.parametrize("rows", [None, 2])
def test_result_strides_are_those_of_pytorch(name, rows):
    x = {**INPUTS, **REORDERED}[name]
    theirs = CLASSES[x.dim()][0](x.shape[1])
    ours = ours_like(theirs)
    ours.virtual_batch_size = rows
    mask = torch.ones(x.shape[0], *(1,) * (x.dim() - 2), dtype=torch.bool)
    assert ours(x, mask=mask).stride() == theirs(x).stride()


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 2])
def test_running_statistics_of_several_batches(dtype, momentum, rows):
    layer = layer_for(batch(dtype=dtype), momentum=momentum, virtual_batch_size=rows)
    for kind in ("bool", "weights", "rows of each run"):
        x = batch(dtype=dtype)
        if kind in MASKS:
            given, weights = mask_for(kind, x)
        else:
            given = torch.tensor([1, 0, 0.5, 0.25, 2, 1]).view(6, 1, 1)
            weights = given.double().unsqueeze(1).expand(6, 1, 3, 4)
        check(layer, x, weights, given)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"eps": 0.25}],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    x = batch()
    given, weights = mask_for("weights", x)
    check(layer_for(x, **options), x, weights, given)


def test_a_layer_without_statistics_uses_masks_in_evaluation():
    x = batch()
    given, weights = mask_for("weights", x)
    check(layer_for(x, track_running_stats=False).eval(), x, weights, given)


@pytest.mark.parametrize("rest", [(), (batch(), "relu")], ids=["", "residual, relu"])
@pytest.mark.parametrize("rows", [None, 2])
def test_evaluation_ignores_both(rest, rows):
    x = leaf(batch())
    layer = layer_for(x, virtual_batch_size=rows).eval()
    before = state_of(layer)
    plain = copy.deepcopy(layer)
    plain.virtual_batch_size = None
    given, _ = mask_for("weights", x)
    for mask in (given, given.tolist(), torch.zeros(6), torch.zeros(6, dtype=torch.bool)):
        y = layer(x, *rest, mask=mask)
        assert torch.equal(y, plain(x, *rest))
        assert y.grad_fn is not None
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


WRONG_TYPES = {
    "integers": (torch.ones(6, 3, 4, dtype=torch.int64), TypeError, "mask has dtype torch.int64"),
    "complex": (torch.ones(6, 3, 4) + 0j, TypeError, "mask has dtype torch.complex64"),
    "a NumPy array of integers": (np.ones((6, 3, 4), int), TypeError, "mask has dtype int64"),
    "a string": ("mask", TypeError, "mask"),
    "a gradient": (torch.ones(6, 3, 4, requires_grad=True), ValueError, "requires a gradient"),
}
WRONG_VALUES = {
    "shape": (torch.ones(6, 4, 3), ValueError, r"mask has shape \(6, 4, 3\); expected"),
    "rank": (torch.ones(6, 3), ValueError, r"mask has shape \(6, 3\); expected"),
    "channels": (torch.ones(6, 5, 3, 4), ValueError, r"mask has shape \(6, 5, 3, 4\); expected"),
    "none counted": (torch.zeros(6, 3, 4), ValueError, "Expected more than 1 value per channel"),
    "one counted": (
        torch.eye(12)[0].view(1, 3, 4) * torch.eye(6)[0].view(6, 1, 1),
        ValueError,
        "Expected more than 1 value per channel.* counts 1 of",
    ),
    "too little weight": (torch.full((6, 3, 4), 1e-3), ValueError, "weights that sum to 0.072"),
    "negative": (-torch.ones(6, 3, 4), ValueError, "mask has a weight of -1"),
    "not a number": (torch.full((6, 3, 4), NAN), ValueError, "mask has a weight of nan"),
    "infinite": (torch.full((6, 3, 4), INF), ValueError, "mask has a weight of inf"),
    "meta": (torch.ones(6, 3, 4, device="meta"), TypeError, "mask is a Tensor of .* on meta"),
    "sparse": (torch.ones(6, 3, 4).to_sparse(), TypeError, "mask is a Tensor"),
    "a subclass": (torch.ones(6, 3, 4).as_subclass(type("Own", (torch.Tensor,), {})), TypeError,
                   "mask is a Own"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRONG_TYPES, *WRONG_VALUES])
def test_a_refused_mask_leaves_all_as_it_was(name):
    mask, kind, words = {**WRONG_TYPES, **WRONG_VALUES}[name]
    x = leaf(batch())
    for layer in (layer_for(x), bnfast.torch.BatchRenorm2d(5)):
        before = state_of(layer)
        for rest in ((), (batch(), "relu")):
            with pytest.raises(kind, match=words):
                layer(x, *rest, mask=mask)
        torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_evaluation_refuses_masks_of_wrong_types(name):
    mask, kind, words = WRONG_TYPES[name]
    layer = layer_for(batch()).eval()
    with pytest.raises(kind, match=words):
        layer(batch(), mask=mask)


def test_little_weight_is_enough_if_no_statistics_move():
    x = batch()
    given = torch.full((6, 3, 4), 1e-3)
    weights = given.double().unsqueeze(1)
    check(layer_for(x, track_running_stats=False), x, weights, given)
    with bnfast.torch.paused_statistics():
        layer = layer_for(x)
        before = state_of(layer)
        assert layer(x, mask=given).isfinite().all()
        torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


def learning_mean(layer):
    layer.running_mean.requires_grad_()


BAD_CALLS = {
    "x's rank": (lambda layer: {"input": batch()[0]}, ValueError, "expected 4D input"),
    "x's channels": (lambda layer: {"input": batch()[:, :4]}, ValueError, "expected 5 channels"),
    "x's type": (lambda layer: {"input": batch().int()}, TypeError, "input is a Tensor"),
    "no tensor": (lambda layer: {"input": batch().numpy()}, TypeError, "input is an array"),
    "another device": (lambda layer: {"input": batch().to("meta")}, TypeError, "on meta"),
    "residual's shape": (lambda layer: {"residual": batch()[:2]}, ValueError, "residual is of"),
    "residual's type": (lambda layer: {"residual": batch().double()}, ValueError, "residual is of"),
    "activation": (lambda layer: {"activation": "mish"}, ValueError, "activation is 'mish'"),
    "eps": (lambda layer: vars(layer).update(eps=0.0), ValueError, "eps is 0"),
    "momentum": (lambda layer: vars(layer).update(momentum=NAN), ValueError, "momentum is nan"),
    "weight's type": (lambda layer: vars(layer)["_parameters"].update(
        weight=nn.Parameter(torch.ones(5).double())), TypeError, "weight has dtype torch.float64"),
    "weight's shape": (lambda layer: vars(layer)["_parameters"].update(
        weight=nn.Parameter(torch.ones(4))), ValueError, r"weight has shape \(4,\)"),
    "a running mean that learns": (learning_mean,
                                   RuntimeError, "running_mean requires a gradient"),
    "a variance without memory of its own": (lambda layer: layer._buffers.update(
        running_var=torch.ones(1).expand(5)), RuntimeError, "unsupported operation"),
    "a counter of another type": (lambda layer: layer._buffers.update(
        num_batches_tracked=torch.zeros(())), TypeError, "num_batches_tracked"),
    "a counter elsewhere": (lambda layer: layer._buffers.update(
        num_batches_tracked=torch.zeros((), dtype=torch.int64, device="meta")), TypeError,
                            "num_batches_tracked is of torch.int64 on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_refused_call_leaves_all_as_it_was(name):
    spoil, kind, words = BAD_CALLS[name]
    layer = layer_for(batch())
    call = {"input": batch(), "mask": torch.ones(6, 3, 4), **(spoil(layer) or {})}
    buffers = {name: b for name, b in layer._buffers.items() if not b.is_meta}
    before = {name: b.detach().clone() for name, b in buffers.items()}
    with pytest.raises(kind, match=words):
        layer(**call)
    for name, b in buffers.items():
        assert torch.equal(b.detach(), before[name]), name


def test_statistics_of_the_inference_mode_are_refused():
    layer = layer_for(batch())
    with torch.inference_mode():
        layer.running_var = torch.ones(5)
    mean = layer.running_mean.clone()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        layer(batch(), mask=torch.ones(6, 3, 4))
    assert torch.equal(layer.running_mean, mean)
    assert layer.num_batches_tracked == 0


def test_no_values_give_no_values():
    x = leaf(batch(shape=(0, 5, 3, 4)))
    layer = layer_for(batch())
    before = state_of(layer)
    y = layer(x, mask=torch.ones(0, 3, 4, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    after = state_of(layer)
    assert after.pop("num_batches_tracked") == before.pop("num_batches_tracked") + 1
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# ---- Autograd


def masked_step():
    x = leaf(batch())
    layer = layer_for(x)
    given, _ = mask_for("weights", x)
    return x, layer, layer(x, mask=given)


def test_a_second_backward_of_a_retained_graph():
    x, layer, y = masked_step()
    dy = torch.randn_like(y)
    found = []
    for _ in range(2):
        y.backward(dy, retain_graph=True)
        found.append([x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


def test_some_gradients():
    """Those that are not needed are not computed, and the others do not change."""
    given, _ = mask_for("weights", batch())
    x0, dy = batch(), batch()
    template = layer_for(x0)
    found = {}
    for needs in ("x", "weight", "bias", "x weight bias"):
        layer, x = copy.deepcopy(template), x0.clone().requires_grad_("x" in needs.split())
        layer.weight.requires_grad_("weight" in needs)
        layer.bias.requires_grad_("bias" in needs)
        layer(x, None, "relu", mask=given).backward(dy)
        grads = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
        for name, grad in grads.items():
            assert (grad is not None) == (name in needs)
        found[needs] = grads
    for name, grad in found["x weight bias"].items():
        assert torch.equal(found[name][name], grad)
    layer.requires_grad_(False)
    assert layer(x0, mask=given).grad_fn is None


@pytest.mark.parametrize(
    ("activation", "what"),
    [
        (None, "input"),
        ("relu", "input"),
        (None, "weight"),
        ("silu", "bias"),
        ("silu", "residual"),
        ("relu", "output"),
    ],
)
def test_a_change_of_what_is_kept_is_noticed(activation, what):
    x, r = batch().requires_grad_(), batch().requires_grad_()
    layer = layer_for(x)
    mine, beside = x * 1, r * 1
    y = layer(mine, beside, activation, mask=torch.ones(6, 3, 4))
    changed = {"input": mine, "residual": beside, "output": y, **dict(layer.named_parameters())}
    with torch.no_grad():
        changed[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_not_kept_may_change():
    """The bias, the residual and the statistics; a mask is copied."""
    x, beside = leaf(batch()), leaf(batch())
    layer, dy, weights = layer_for(x), batch(), torch.rand(6, 3, 4)

    def gradient(mask, changed=()):
        x.grad = None
        y = layer(x, beside, mask=mask)
        with torch.no_grad():
            for t in changed:
                t += 1
        y.backward(dy)
        return x.grad

    want = gradient(weights)
    rest = (layer.bias, beside, layer.running_mean, layer.running_var)
    for mask in (weights.clone(), weights.numpy().copy(), weights.double().numpy()):
        assert torch.equal(gradient(mask, (*rest, mask)), want)


def test_versions_of_statistics_move():
    layer = layer_for(batch())
    before = {name: b._version for name, b in layer.named_buffers()}
    layer(batch(), mask=torch.ones(6, 3, 4))
    for name, b in layer.named_buffers():
        assert b._version > before[name], name


def test_an_evaluation_before_training_notices_moved_statistics():
    """As with PyTorch's layer, whose evaluation keeps the running statistics for its backward."""
    layer = layer_for(batch())
    y = layer.eval()(leaf(batch()))
    layer.train()(batch(), mask=torch.ones(6, 3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rows", [None, 2])
def test_second_derivatives_are_refused(rows):
    x = leaf(batch())
    layer = layer_for(x, virtual_batch_size=rows)
    y = layer(x, mask=torch.ones(6, 3, 4))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_freed_tensors_are_refused():
    """Frameworks that shard or offload free tensors by resizing their storages."""
    x = leaf(batch())
    layer = layer_for(x)
    for mask in (torch.ones(6, 3, 4), torch.ones(6, 3, 4, dtype=torch.bool)):
        mask.untyped_storage().resize_(0)
        with pytest.raises(TypeError, match="mask is a Tensor"):
            layer(x, mask=mask)
    kept = x * 1
    y = layer(kept, mask=torch.ones(6, 3, 4))
    kept.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the input's memory was freed"):
        y.sum().backward()
    assert layer.weight.grad is None


def test_without_gradients():
    x = batch()
    layer = layer_for(x)
    given, _ = mask_for("weights", x)
    want = copy.deepcopy(layer)(x, mask=given).detach()
    for context in (torch.no_grad, torch.inference_mode):
        own = copy.deepcopy(layer)
        with context():
            y = own(x, mask=given)
        assert torch.equal(y, want)
        assert y.grad_fn is None
        assert y.is_inference() == (context is torch.inference_mode)
        assert own.num_batches_tracked == 1
    with torch.inference_mode():
        made = batch()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(made, mask=given)
    assert layer.num_batches_tracked == 0
    with torch.no_grad():
        layer(made, mask=given)
    assert layer.num_batches_tracked == 1


def test_statistics_can_be_paused():
    x = batch()
    layer = layer_for(x)
    given, _ = mask_for("weights", x)
    want = copy.deepcopy(layer)(x, mask=given)
    before = state_of(layer)
    for rows in (None, 2):
        layer.virtual_batch_size = rows
        with bnfast.torch.paused_statistics():
            y = layer(x, mask=given)
        assert rows or torch.equal(y, want)
        torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [None, 2])
def test_checkpointing_counts_once(rows):
    x = leaf(batch())
    plain = layer_for(x, virtual_batch_size=rows)
    ours = copy.deepcopy(plain)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).view(6, 1, 1) > 0
    plain(x, mask=mask).square().sum().backward()
    want, x.grad = x.grad, None
    contexts = bnfast.torch.checkpoint_contexts
    y = checkpoint(ours, x, mask=mask, use_reentrant=False, context_fn=contexts)
    y.square().sum().backward()
    assert torch.equal(x.grad, want)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


# ---- Unusual tensors, transforms and graphs


def test_negative_views_and_autocast():
    x = batch()
    layer = layer_for(x)
    given, _ = mask_for("weights", x)
    want = copy.deepcopy(layer)(-x, mask=given)
    assert torch.equal(copy.deepcopy(layer)(torch._neg_view(x), mask=given), want)
    assert torch.equal(copy.deepcopy(layer)(-x, mask=torch._neg_view(-given)), want)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(nn.Conv2d(5, 5, 1)(x), mask=given)
    assert y.dtype is torch.bfloat16
    assert layer.running_mean.dtype is torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_of_half_types(dtype):
    """Computed as with float32 ones of the same values; results in the parameters' own type."""
    x, dy = batch(dtype=dtype), batch(dtype=dtype)
    layer = layer_for(x).to(dtype)
    single = copy.deepcopy(layer).float()
    given, _ = mask_for("weights", x)
    found = []
    for own in (layer, single):
        mine = leaf(x)
        y = own(mine, mask=given)
        y.backward(dy)
        found.append([y, mine.grad, *(p.grad for p in own.parameters()), *own.buffers()])
    for got, want in zip(*found, strict=True):
        assert got.dtype in (dtype, torch.int64)
        assert torch.equal(got, want.to(got.dtype))


def in_vmap(layer, x, mask):
    return torch.func.vmap(lambda x: layer(x, mask=mask))(torch.stack([x, x]))


def in_vmap_over_masks(layer, x, mask):
    return torch.func.vmap(lambda m: layer(x, mask=m))(torch.stack([mask, mask]))


def in_functorch_gradient(layer, x, mask):
    return torch.func.grad(lambda x: layer(x, mask=mask).square().sum())(x)


def in_forward_mode(layer, x, mask):
    return torch.func.jvp(lambda x: layer(x, mask=mask), (x,), (x,))


def in_dual_numbers(layer, x, mask):
    with torch.autograd.forward_ad.dual_level():
        return layer(torch.autograd.forward_ad.make_dual(x, x), mask=mask)


def of_fake_tensors(layer, x, mask):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return layer(mode.from_tensor(x), mask=mode.from_tensor(mask))


def traced_by_jit(layer, x, mask):
    return torch.jit.trace(lambda x, mask: layer(x, mask=mask), (x, mask), check_trace=False)


def traced_by_make_fx(layer, x, mask):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda x, mask: layer(x, mask=mask))(x, mask)


@pytest.mark.parametrize(
    "transform",
    [
        in_vmap,
        in_vmap_over_masks,
        in_functorch_gradient,
        in_forward_mode,
        in_dual_numbers,
        of_fake_tensors,
        traced_by_jit,
        traced_by_make_fx,
    ],
)
@pytest.mark.parametrize("rows", [None, 2])
def test_transforms_are_refused_in_training(transform, rows):
    layer = layer_for(batch(), virtual_batch_size=rows)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="cannot be traced or transformed in training with a m"):
        transform(layer, batch(), torch.ones(6, 3, 4))
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "transform", [in_vmap, in_vmap_over_masks, in_functorch_gradient, in_forward_mode]
)
def test_transforms_in_evaluation(transform):
    layer = layer_for(batch()).eval()
    x, mask = batch(), torch.ones(6, 3, 4, dtype=torch.bool)
    want = transform(lambda x, mask: layer(x), x, mask)
    torch.testing.assert_close(transform(layer, x, mask), want)


def test_fake_masks_are_refused():
    """Outside of their mode, where only their own operators refuse them."""
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(m) for m in (torch.ones(6, 3, 4), torch.ones(6, 3, 4) > 0)]
    for fake in fakes:
        with pytest.raises(TypeError, match="mask is a FakeTensor"):
            layer_for(batch())(batch(), mask=fake)


class Sequence(nn.Module):
    """A model that passes its mask on."""

    def __init__(self, rows=None):
        super().__init__()
        self.before = nn.Conv1d(3, 5, 1)
        self.norm = bnfast.torch.BatchNorm1d(5, virtual_batch_size=rows)
        self.after = nn.Conv1d(5, 2, 1)

    def forward(self, x, mask):
        return self.after(self.norm(self.before(x), None, "relu", mask=mask))


def one_step(model, call, x, mask):
    model.zero_grad()
    y = call(x, mask)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


# PyTorch reads .grad of what enters a graph, and silences the warning of that but for tests.
IN_PARTS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@IN_PARTS
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "bnfast"])
@pytest.mark.parametrize("rows", [None, 2])
def test_compiled_models_break_their_graph_in_training(backend, rows):
    torch._dynamo.reset()
    model = Sequence(rows)
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend=backend)
    x, mask = torch.randn(6, 3, 7), torch.ones(6, 7)
    mask[:, 5:] = 0
    for _ in range(2):
        want, got = one_step(model, model, x, mask), one_step(ours, compiled, x, mask)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert ours.norm.num_batches_tracked == 2 * (3 if rows else 1)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(ours, backend=backend, fullgraph=True)(x, mask)


@IN_PARTS
@pytest.mark.parametrize("backend", ["eager", "bnfast"])
@pytest.mark.parametrize("mask", [torch.ones(6, 7), torch.ones(6, 7) > 0], ids=["floats", "bool"])
def test_compiled_models_stay_one_graph_in_evaluation(backend, mask):
    torch._dynamo.reset()
    model = Sequence(2).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(6, 3, 7)
    torch.testing.assert_close(compiled(x, mask), model(x, mask))
    torch._dynamo.reset()
    with pytest.raises(TypeError, match=r"mask has dtype torch\.int64"):
        torch.compile(model, backend=backend)(x, mask.long())


@IN_PARTS
def test_a_compiled_evaluation_takes_arrays_too():
    torch._dynamo.reset()
    model = Sequence().eval()
    compiled = torch.compile(model, backend="eager")
    x, mask = torch.randn(6, 3, 7), np.ones((6, 7), bool)
    torch.testing.assert_close(compiled(x, mask), model(x, mask))


def test_symbolic_traces_keep_the_mask():
    model = Sequence()
    x, mask = torch.randn(6, 3, 7), torch.rand(6, 7)
    traced = torch.fx.symbolic_trace(model)
    (node,) = (n for n in traced.graph.nodes if n.target == "norm")
    assert node.op == "call_module"
    assert set(node.kwargs) == {"activation", "mask"}
    assert node.kwargs["mask"].name == "mask"
    other = copy.deepcopy(model)
    torch.testing.assert_close(traced(x, mask), other(x, mask))
    assert other.norm.num_batches_tracked == traced.norm.num_batches_tracked == 1


# ---- Which layers


class Own(nn.BatchNorm2d):
    """A user's class."""

    def extra_repr(self):
        return f"own, {super().extra_repr()}"


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, Own])
def test_converted_layers(kind):
    x = batch()
    model = nn.Sequential(layer_for(x, kind))
    bnfast.torch.convert(model)
    given, weights = mask_for("weights", x)
    check(model[0], x, weights, given)
    model[0].virtual_batch_size = 2
    check(model[0], x, torch.ones(6, 1, 3, 4), None)
    if kind is Own:
        assert repr(model[0]).startswith("Own(own, 5,")
    bnfast.torch.revert(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("rank", CLASSES)
def test_layers_of_every_rank(rank):
    shape = {2: (6, 5), 3: (6, 5, 4), 4: (6, 5, 3, 4), 5: (6, 5, 2, 3, 2)}[rank]
    x = batch(shape=shape)
    layer = layer_for(x)
    given, weights = mask_for("weights", x)
    check(layer, x, weights, given)
    with pytest.raises(ValueError, match="expected"):
        layer(batch(shape=(6,)), mask=given)


def test_functional_calls_move_the_given_statistics():
    layer, x = layer_for(batch()), batch()
    given = {name: t.detach().clone() + 1 for name, t in layer.state_dict().items()}
    own = copy.deepcopy(layer)
    own.load_state_dict(given)
    before = state_of(layer)
    mask = torch.rand(6, 3, 4)
    y = torch.func.functional_call(layer, given, (x,), {"mask": mask})
    assert torch.equal(y, own(x, mask=mask))
    torch.testing.assert_close(given, dict(own.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


def test_parametrized_layers():
    class Squared(nn.Module):
        def forward(self, weight):
            return weight.square()

    x = leaf(batch())
    layer = layer_for(x)
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", Squared())
    with torch.no_grad():
        plain.weight.square_()
    given, _ = mask_for("weights", x)
    torch.testing.assert_close(layer(x, mask=given), plain(x, mask=given))
    layer(x, mask=given).square().sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


# ---- Virtual batches


def by_loop(theirs, x, rows):
    """PyTorch's layer, called on each run of rows."""
    return torch.cat([theirs(part) for part in x.split(rows)])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 7, 100])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrange", [dense, channels_last, gappy, transposed])
def test_virtual_batches_are_a_loop_over_runs(arrange, dtype, momentum, rows):
    x, dy = batch(arrange, dtype), batch(arrange, dtype)
    theirs = layer_for(x, nn.BatchNorm2d, momentum=momentum)
    ours = ours_like(theirs)
    ours.virtual_batch_size = rows
    mine, own = leaf(x), leaf(x)
    got, want = ours(mine), by_loop(theirs, own, rows)
    got.backward(dy)
    want.backward(dy)
    half = dtype in HALVES
    eps = torch.finfo(dtype).eps
    # of halves PyTorch rounds more often
    limits = {"rtol": eps, "atol": 2 * eps} if half else {}
    torch.testing.assert_close(got, want, **limits)
    torch.testing.assert_close(mine.grad, own.grad, **limits)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=max(eps, 1e-5), atol=max(eps, 1e-5))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == -(-6 // rows)


@pytest.mark.parametrize("mask", ["none", "weights", "bool"])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_virtual_batches_as_formulas(dtype, kind, rows, mask):
    shape, arrange, _ = TENSORS[kind]
    if shape == (17, 5):  # its last run would be one value
        shape = (18, 5)
    if shape == (9, 5, 1, 1):
        shape = (10, 5, 1, 1)
    x = batch(arrange, dtype, shape)
    if mask == "none":
        given, weights = None, torch.ones(shape[0], 1, *shape[2:])
    else:
        given, _ = mask_for(mask, x)
        # two values in each run
        given.view(len(x), -1)[[i for i in range(len(x)) if i % rows < 2], 0] = 1
        weights = given.double().unsqueeze(1)
    for residual, activation in ((False, None), (True, "relu"), (True, "silu")):
        layer = layer_for(x, virtual_batch_size=rows)
        check(layer, x, weights, given, residual=residual, activation=activation)


def test_a_run_of_one_value_is_refused():
    layer = layer_for(batch(shape=(5, 3)), virtual_batch_size=2)
    before = state_of(layer)
    with pytest.raises(ValueError, match=r"Expected more than 1 value .* virtual batch"):
        layer(batch(shape=(5, 3)))
    mask = torch.ones(6)
    mask[3] = 0
    with pytest.raises(ValueError, match=r"Expected more than 1 value .* counts 1 of"):
        layer(batch(shape=(6, 3)), mask=mask)
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)
    layer(batch(shape=(6, 3)))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("rows", [0, -1, 2.5, "2", 2**63, True])
def test_wrong_lengths_of_runs_are_refused(rows):
    with pytest.raises((TypeError, ValueError), match="virtual_batch_size is"):
        bnfast.torch.BatchNorm2d(3, virtual_batch_size=rows)
    layer = layer_for(batch())
    layer.virtual_batch_size = rows
    before = state_of(layer)
    with pytest.raises((TypeError, ValueError), match="virtual_batch_size is"):
        layer(batch())
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


def test_no_rows_are_no_runs():
    layer = layer_for(batch(), virtual_batch_size=2)
    before = state_of(layer)
    assert layer(batch(shape=(0, 5, 3, 4))).shape == (0, 5, 3, 4)
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


def test_virtual_batches_run_in_one_call(ran):
    x = leaf(batch())
    y = layer_for(x, virtual_batch_size=2)(x)
    assert by_direction(ran()) == {"forward": 1}
    y.sum().backward()
    assert by_direction(ran()) == {"backward": 1}


def test_copies_and_pickles_keep_virtual_batches():
    x = batch()
    layer = layer_for(x, virtual_batch_size=2)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(torch.load(file, weights_only=False))
    want = layer(x)
    for own in copies:
        assert own.virtual_batch_size == 2
        assert "virtual_batch_size=2" in repr(own)
        assert torch.equal(own(x), want)
        torch.testing.assert_close(own.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_state_is_that_of_pytorch():
    layer = layer_for(batch(), virtual_batch_size=2)
    theirs = nn.BatchNorm2d(5)
    theirs.load_state_dict(layer.state_dict())
    layer.load_state_dict(theirs.state_dict())
    assert layer.virtual_batch_size == 2


def test_pickles_without_virtual_batches_load():
    """Of layers that were pickled before the option existed."""
    layer = layer_for(batch())
    assert "virtual_batch_size" not in vars(layer)
    assert "virtual" not in repr(layer)
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.virtual_batch_size is None
    given, weights = mask_for("weights", batch())
    check(loaded, batch(), weights, given)


def test_large_batches_of_weights_of_any_size():
    """A backward sums the same weights as its forward, in whatever blocks either has."""
    x = torch.randn(40, 3, 64, 65, dtype=torch.float64).requires_grad_()
    weights = torch.rand(40, 64, 65, dtype=torch.float64) ** 8
    for rows in (None, 7):
        layer = layer_for(x, virtual_batch_size=rows)
        y = layer(x, None, "relu", mask=weights)
        y.sum().backward()
        assert x.grad.isfinite().all()
