"""With `enable()`: what a forward keeps for its backward, and changes to it in between."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import bnfast.torch

aten = torch.ops.aten
MEAN = 1e4  # at this mean float32 resolves a thousandth of a standard deviation
KINDS = [torch.float32, torch.bfloat16]


def forward(x, dtype=torch.float32):
    weight = torch.ones(x.shape[1], dtype=dtype)
    return aten.native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)


def backward(dy, x, save_mean, save_invstd):
    weight = torch.ones(x.shape[1], dtype=save_mean.dtype)
    return aten.native_batch_norm_backward(
        dy, x, weight, None, None, save_mean, save_invstd, True, 1e-5, [True, True, True]
    )


@pytest.fixture(params=KINDS, ids=str)
def batch(request, calls):
    """An input, a gradient, and the statistics that its forward kept."""
    x = torch.randn(64, 5, 4, 4) + (MEAN if request.param is torch.float32 else 10)
    x, dy = x.to(request.param), torch.randn(x.shape).to(request.param)
    return x, dy, *forward(x, request.param)[1:]


def of_visible(dy, x, save_mean, save_invstd):
    """The gradients from the visible values only: in float64 copies, nothing is kept after them."""
    wide = (t.double() for t in (dy, x, save_mean, save_invstd))
    return [t.to(x.dtype) for t in backward(*wide)]


def of_exact(dy, x):
    x = x.double()
    return [t.to(dy.dtype) for t in backward(dy.double(), x, *forward(x, torch.float64)[1:])]


def difference(a, b):
    return max((p.double() - q.double()).abs().max().item() for p, q in zip(a, b, strict=True))


def test_backward_uses_exact_statistics(batch):
    x, dy, *saved = batch
    eps = torch.finfo(x.dtype).eps
    largest = max(t.abs().max().item() for t in of_exact(dy, x))
    assert difference(backward(dy, x, *saved), of_exact(dy, x)) <= eps * largest
    assert difference(of_visible(dy, x, *saved), of_exact(dy, x)) > 4 * eps


def cut(t):
    return t.repeat(2)[: len(t)]


def offset(t):
    return torch.cat([t[:1], t])[1:]


def moved_within_storage(t):
    """The visible values somewhere else in a storage that has the mark of another forward."""
    room = forward(torch.randn(4, 40).to(t.dtype), t.dtype)[1]
    return room[: len(t)].copy_(t)


def offset_with_all_behind(t):
    """The whole storage, inside another one."""
    stored = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    room = torch.cat([torch.zeros(64, dtype=torch.uint8), stored])
    return room[64:].view(t.dtype)[: len(t)]


def before_what_was_kept(t):
    """The tensor has memory for the visible values only."""
    stored = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    visible = torch.frombuffer(bytearray(stored.tolist()), dtype=t.dtype, count=len(t))
    assert visible.untyped_storage().nbytes() == t.nbytes
    return visible


def overwritten(t):
    return t.copy_(torch.randn_like(t))


COPIES = {
    "clone": torch.clone,
    "cut": cut,
    "offset": offset,
    "in another's storage": moved_within_storage,
    "offset with all behind": offset_with_all_behind,
    "without what was kept": before_what_was_kept,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_pytorchs_accuracy(batch, how):
    x, dy, mean, inv_std = batch
    want = of_visible(dy, x, mean, inv_std)
    got = backward(dy, x, COPIES[how](mean), inv_std)
    largest = max(t.abs().max().item() for t in want)
    assert difference(got, want) <= torch.finfo(x.dtype).eps * largest


@pytest.mark.parametrize("which", [0, 1], ids=["save_mean", "save_invstd"])
@pytest.mark.parametrize(
    "how", [overwritten, lambda t: t.mul_(1.5), lambda t: t.fill_(float("nan"))]
)
def test_overwritten_statistics_are_used(batch, how, which):
    x, dy, *saved = batch
    how(saved[which])
    want = of_visible(dy, x, *saved)
    for a, b in zip(backward(dy, x, *saved), want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=torch.finfo(x.dtype).eps * 4, atol=1e-5, equal_nan=True
        )


def test_nan_statistics_stay_in_their_channel(calls):
    x = torch.randn(8, 3, 4)
    x[0, 1, 0] = float("nan")
    x = x.requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    (dx,) = torch.autograd.grad(y, x, torch.randn(x.shape))
    assert dx[:, 1].isnan().all()
    assert not dx[:, ::2].isnan().any()


def test_checkpoints_and_hooks_keep_exact_statistics(calls):
    x = (torch.randn(64, 5, 4, 4) + MEAN).requires_grad_()
    dy = torch.randn(x.shape)

    def norm(x):
        return F.batch_norm(x, None, None, training=True)

    (want,) = torch.autograd.grad(norm(x), x, dy)
    (got,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False), x, dy)
    assert torch.equal(got, want)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        (got,) = torch.autograd.grad(norm(x), x, dy)
    assert torch.equal(got, want)
    with torch.autograd.graph.save_on_cpu():
        (got,) = torch.autograd.grad(norm(x), x, dy)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)  # of copies


@pytest.mark.parametrize("forward_here", [True, False])
def test_backward_on_other_kernels_than_forward(forward_here):
    x = torch.randn(16, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(x.shape, dtype=x.dtype)
    bnfast.torch.disable()
    (want,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, dy)
    switches = [bnfast.torch.disable, bnfast.torch.enable]
    switches[forward_here]()
    y = F.batch_norm(x, None, None, training=True)
    switches[not forward_here]()
    (got,) = torch.autograd.grad(y, x, dy)
    bnfast.torch.disable()
    torch.testing.assert_close(got, want)


def inner(requires_grad=True):
    return torch.randn(8, 3, 4, requires_grad=requires_grad) * 1


def raised(change):
    """What a backward raises after a change of its input."""
    x, weight = inner(), torch.ones(3, requires_grad=True) * 1
    y = F.batch_norm(x, None, None, weight, training=True)
    change(x, weight)
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: x.untyped_storage().resize_(0),
        lambda x, w: w.untyped_storage().resize_(0),
        lambda x, w: x.add_(1),
        lambda x, w: w.add_(1),
    ],
    ids=["x freed", "weight freed", "x changed", "weight changed"],
)
def test_changed_input_raises_as_pytorch(change, calls):
    ours = raised(change)
    bnfast.torch.disable()
    theirs = raised(change)
    bnfast.torch.enable()
    assert ours == theirs


def test_forward_of_freed_memory_raises_as_pytorch(calls):
    x = torch.randn(8, 3, 4)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        F.batch_norm(x, None, None, training=True)


def test_results_are_in_pytorch_memory(calls):
    y, save_mean, _ = forward(torch.randn(8, 3, 4))
    assert y._base is None
    assert save_mean._base is None
    y.resize_(16, 3, 4)
    y.untyped_storage().resize_(0)
