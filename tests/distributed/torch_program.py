"""The scenarios of every rank with PyTorch's tensors: `bnfast.torch`'s `SyncBatchNorm`."""

import copy
import functools
from itertools import pairwise

import masked_batches
import numpy as np
import torch
import torch.distributed as dist
from cases import by_direction, make_problem
from launch import attempt
from numpy_program import MOMENTUM
from splits import SHAPES, SPLITS, rows_of
from torch import nn

import bnfast.torch
from bnfast import _core
from bnfast.torch import SyncBatchNorm, convert_sync_batchnorm
from bnfast.torch.fused import DTYPES

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "interleaved": torch.contiguous_format,
}
PROBLEMS = {
    f"{layout}, {split}, {np.dtype(dtype).name}, {activation}{', residual' * residual}": (
        layout,
        split,
        {"dtype": dtype, "activation": activation, "residual": residual},
    )
    for layout in FORMATS
    for split in SPLITS
    for dtype in (np.float32, np.float64)
    for activation, residual in ((None, False), (None, True), ("relu", False), ("relu6", True))
}


def problem(name):
    """One of PROBLEMS, its memory format, and its split over the ranks."""
    layout, split, options = PROBLEMS[name]
    shape = SHAPES["interleaved" if layout == "interleaved" else "planar"]
    p = make_problem(shape, **options)
    p.x[:, 1] += 1000
    return FORMATS[layout], split, p


def tensor_of(a, memory_format):
    return torch.from_numpy(np.ascontiguousarray(a)).contiguous(memory_format=memory_format)


def layer_for(p, kind, **options):
    dtype = torch.from_numpy(p.weight).dtype
    layer = kind(p.channels, eps=p.eps, momentum=MOMENTUM, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(p.weight))
        layer.bias.copy_(torch.from_numpy(p.bias))
    return layer


def step(layer, p, cut, memory_format, mask=None):
    x = tensor_of(p.x[cut], memory_format).requires_grad_()
    residual = None
    if p.residual is not None:
        residual = tensor_of(p.residual[cut], memory_format).requires_grad_()
    y = layer(x, residual, p.activation, mask=mask)
    y.backward(tensor_of(p.dy[cut], memory_format))
    return {
        "y": y.detach().numpy(),
        "same format": y.stride() == x.stride(),
        "dx": x.grad.numpy(),
        "dresidual": None if residual is None else residual.grad.numpy(),
        "weight_grad": layer.weight.grad.numpy(),
        "bias_grad": layer.bias.grad.numpy(),
        **{key: value.numpy() for key, value in layer.state_dict().items()},
    }


def training_steps(this):
    found = {}
    for name in PROBLEMS:
        memory_format, split, p = problem(name)
        cut = rows_of(split, this.rank, this.size)
        _core.reset_dispatches()
        found[name] = step(layer_for(p, SyncBatchNorm), p, cut, memory_format)
        found[name]["dispatches"] = _core.dispatches()
    return found


def counted(scenario):
    """The results of a scenario, and the kernels that it ran: {direction: times}."""

    @functools.wraps(scenario)
    def run(this):
        _core.reset_dispatches()
        found = scenario(this)
        return found, by_direction(_core.dispatches())

    return run


@counted
def bfloat16_steps(this):
    """Half data with float32 parameters, if this build has kernels for them."""
    if torch.bfloat16 not in DTYPES:
        return None
    p = make_problem(SHAPES["planar"])
    x = torch.from_numpy(p.x).bfloat16()[rows_of("uneven", this.rank, this.size)].requires_grad_()
    layer = SyncBatchNorm(p.channels)
    y = layer(x)
    y.backward(y.detach())
    return y.detach().float().numpy(), layer.running_mean.numpy(), x.grad.float().numpy()


def some_gradients(this):
    """If no rank needs x's gradient nothing is exchanged; a rank with a part, more than one."""
    p = make_problem(SHAPES["planar"])
    x = torch.from_numpy(p.x[rows_of("uneven", this.rank, this.size)])
    found = {}
    for weight, bias in ((True, True), (True, False), (False, True)):
        layer = SyncBatchNorm(p.channels)
        layer.weight.requires_grad_(weight)
        layer.bias.requires_grad_(bias)
        y = layer(x)
        if this.rank == 0:  # alone
            y.sum().backward()
        found[weight, bias] = (layer.weight.grad is None, layer.bias.grad is None)
    residual = torch.zeros_like(x).requires_grad_()
    bare = SyncBatchNorm(p.channels, affine=False)
    y = bare(x, residual, "relu")
    if this.rank == 0:
        y.sum().backward()
        found["residual"] = residual.grad.sum().item() == (y > 0).sum().item()
    return found


def network(channels=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 64, 5),
    ).double()


def batches(count=4):
    torch.manual_seed(1)
    return [(torch.randn(9, 3, 8, 8).double(), torch.randint(5, (9,))) for _ in range(count)]


def train(model, cut=slice(None), scale=1.0):
    """Losses over the rows of a cut, as shares of the whole batch's mean."""
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for x, label in batches():
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(model(x[cut]), label[cut], reduction="sum") / len(x)
        (loss * scale).backward()
        sgd.step()
        losses.append(loss.item())
    return losses


@counted
def data_parallel(this):
    """DistributedDataParallel around it; it averages gradients, hence the scale."""
    model = convert_sync_batchnorm(network())
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = train(wrapped, rows_of("uneven", this.rank, this.size), float(this.size))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    return losses, state


@counted
def a_part_of_the_ranks(this):
    """A group of the first two ranks; the third one's layer is in another group."""
    first = dist.new_group([0, 1])
    rest = dist.new_group(list(range(2, this.size))) if this.size > 2 else None
    layer = SyncBatchNorm(3, process_group=first if this.rank < 2 else rest)
    layer(torch.full((2, 3), float(this.rank)) + torch.arange(2)[:, None])
    return layer.running_mean.numpy()


def not_a_member(this):
    group = dist.new_group([0])
    if this.rank == 0:
        return None
    return attempt(SyncBatchNorm(3, process_group=group), torch.ones(2, 3))


BAD_CALLS = {
    "another dtype": lambda x: (x.int(),),
    "double beside float32 parameters": lambda x: (x.double(),),
    "rank": lambda x: (x[:, 0],),
    "channels": lambda x: (x[:, :2],),
    "a residual of another shape": lambda x: (x, x[:2]),
    "a sparse tensor": lambda x: (x.to_sparse(),),
}


def bad_input_on_one(this):
    found = {}
    for name, spoil in BAD_CALLS.items():
        layer = SyncBatchNorm(3)
        x = torch.arange(12.0).reshape(4, 3)
        call = spoil(x) if this.rank == this.size - 1 else (x,)
        raised = attempt(layer, *call)
        untouched = layer.num_batches_tracked.item() == 0 and not layer.running_mean.any()
        layer(x)
        found[name] = raised, bool(untouched), layer.running_mean.numpy()
    return found


def another_device(this):
    layer = SyncBatchNorm(3)
    return attempt(layer, torch.ones(2, 3, device="meta"))


def one_value_in_all(this):
    layer = SyncBatchNorm(3)
    raised = attempt(layer, torch.ones(int(this.rank == 0), 3))
    return raised, layer.num_batches_tracked.item()


def nothing_at_all(this):
    layer = SyncBatchNorm(3)
    x = torch.ones(0, 3, 2).requires_grad_()
    layer(x).sum().backward()
    return (
        tuple(x.grad.shape),
        layer.weight.grad.tolist(),
        layer.num_batches_tracked.item(),
        layer.running_mean.tolist(),
    )


@counted
def evaluation(this):
    layer = SyncBatchNorm(3).eval()
    return [layer(torch.ones(2, 3)).tolist() for _ in range(this.rank + 1)]


@counted
def checkpointed(this):
    """A recomputed forward is exchanged again, and counts once if requested."""
    layer = SyncBatchNorm(3)
    x = torch.arange(12.0).reshape(4, 3).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        layer, x, use_reentrant=False, context_fn=bnfast.torch.checkpoint_contexts
    )
    y.sum().backward()
    return layer.num_batches_tracked.item()


@counted
def compiled(this):
    """Left out of the graphs, so it still runs over all ranks."""
    torch.manual_seed(0)
    layer = SyncBatchNorm(3)
    model = torch.compile(nn.Sequential(nn.Linear(3, 3), layer), backend="eager")
    model(torch.full((2, 3), float(this.rank)) + torch.arange(2)[:, None])
    return layer.running_mean.numpy()


@counted
def cumulative_average(this):
    layer = SyncBatchNorm(3, momentum=None)
    for i in range(3):
        layer(torch.full((2, 3), float(this.rank * i)))
    return layer.running_mean.numpy(), layer.num_batches_tracked.item()


@counted
def copies(this):
    layer = SyncBatchNorm(3, process_group=this.group_of(list(range(this.size))))
    twin = copy.deepcopy(layer)
    x = torch.full((2, 3), float(this.rank))
    apart = all(
        a.data_ptr() != b.data_ptr()
        for pair in pairwise([layer, twin])
        for a, b in zip(*(m.state_dict().values() for m in pair), strict=True)
    )
    return (
        twin.process_group is layer.process_group,
        apart,
        torch.equal(layer(x), twin(x)),
        layer.running_var.tolist(),
    )


@counted
def masked_steps(this):
    found = {}
    for name in masked_batches.PROBLEMS:
        p, cuts, masks, _ = masked_batches.problem(name, this.size)
        mask, cut = masks[this.rank], cuts[this.rank]
        given = mask if mask is None or this.rank == 0 else torch.from_numpy(mask)
        for layout in ("contiguous", "channels_last")[: p.x.ndim // 2]:
            layer = layer_for(p, SyncBatchNorm)
            found[name, layout] = step(layer, p, cut, FORMATS[layout], given)
    return found


def masks_that_count_too_little(this):
    """Refused on all ranks; the next call works."""
    found = {}
    x = torch.arange(12.0).reshape(4, 3) + this.rank
    for mask in masked_batches.TOO_LITTLE:
        layer = SyncBatchNorm(3)
        before = copy.deepcopy(layer.state_dict())
        raised = attempt(layer, x, mask=mask(this.rank))
        same = all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
        layer(x, mask=torch.arange(4) != 2)
        state = {key: value.numpy() for key, value in layer.state_dict().items()}
        found[mask.__name__] = raised, same, state
    return found


def empty_masks(this):
    layer = SyncBatchNorm(3)
    x = torch.ones(0, 3, 2).requires_grad_()
    layer(x, mask=torch.ones(0, 2)).sum().backward()
    return tuple(x.grad.shape), layer.num_batches_tracked.item(), layer.running_mean.tolist()


def masks_in_evaluation(this):
    """Not read, and nothing is exchanged."""
    layer = SyncBatchNorm(3).eval()
    mask = torch.zeros(2)
    return [layer(torch.ones(2, 3), mask=mask).tolist() for _ in range(this.rank + 1)]


SCENARIOS = [
    training_steps,
    bfloat16_steps,
    some_gradients,
    data_parallel,
    a_part_of_the_ranks,
    not_a_member,
    bad_input_on_one,
    another_device,
    one_value_in_all,
    nothing_at_all,
    evaluation,
    checkpointed,
    compiled,
    cumulative_average,
    copies,
    masked_steps,
    masks_that_count_too_little,
    empty_masks,
    masks_in_evaluation,
]
