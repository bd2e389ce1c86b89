"""The scenarios of every rank with NumPy arrays: `all_reduce` and `SyncBatchNorm`."""

import copy
import pickle

import masked_batches
import numpy as np
from cases import make_problem
from launch import attempt
from splits import SHAPES, SPLITS, rows_of

import bnfast
from bnfast.distributed import SyncBatchNorm, all_reduce

PROBLEMS = {
    f"{layout}, {split}, {np.dtype(dtype).name}, {activation}{', residual' * residual}": (
        split,
        {"shape": SHAPES[layout], "dtype": dtype, "activation": activation, "residual": residual},
    )
    for layout in SHAPES
    for split in SPLITS
    for dtype in (np.float32, np.float64)
    for activation, residual in ((None, False), (None, True), ("relu", False), ("relu6", True))
}
MOMENTUM = 0.3


def problem(name):
    """One of PROBLEMS, a channel far from zero, and its split over the ranks."""
    split, options = PROBLEMS[name]
    p = make_problem(**options)
    p.x[:, 1] += 1000
    return split, p


def layer_for(p, kind, **options):
    dtype = p.weight.dtype
    layer = kind(p.channels, momentum=MOMENTUM, activation=p.activation, dtype=dtype, **options)
    layer.weight[...] = p.weight
    layer.bias[...] = p.bias
    return layer


def step(layer, p, cut, mask=None):
    """One training step on some rows; return all results."""
    residual = None if p.residual is None else p.residual[cut]
    y = layer(p.x[cut], residual, mask=mask)
    back = layer.backward(p.dy[cut])
    dx, dresidual = back if residual is not None else (back, None)
    return {
        "y": y,
        "dx": dx,
        "dresidual": dresidual,
        "weight_grad": layer.weight_grad,
        "bias_grad": layer.bias_grad,
        **layer.state_dict(),
    }


def moments_of_all(this):
    found = {}
    for split in SPLITS:
        x = make_problem(SHAPES["planar"]).x
        mine = bnfast.moments(x[rows_of(split, this.rank, this.size)])
        found[split] = all_reduce(mine, this.group)
    return found


def moments_of_nothing(this):
    return all_reduce(bnfast.Moments.empty(3), this.group)


def moments_without_channels(this):
    return all_reduce(bnfast.Moments.empty(0), this.group)


def training_steps(this):
    found = {}
    for name in PROBLEMS:
        split, p = problem(name)
        layer = layer_for(p, SyncBatchNorm, group=this.group)
        found[name] = step(layer, p, rows_of(split, this.rank, this.size))
    return found


def cumulative_average(this):
    """Three batches; the split changes with each."""
    p = make_problem(SHAPES["planar"])
    layer = SyncBatchNorm(p.channels, momentum=None, group=this.group)
    for i in range(3):
        rank = (this.rank + i) % this.size
        layer(p.x[rows_of("uneven", rank, this.size)] * np.float32(i + 1))
    return layer.state_dict()


def a_group_of_one(this):
    """Every rank alone must give the bits of a plain layer."""
    mine = [this.group_of([rank]) for rank in range(this.size)][this.rank]
    found = {}
    for name in PROBLEMS:
        _, p = problem(name)
        synced = layer_for(p, SyncBatchNorm, group=mine)
        plain = layer_for(p, bnfast.BatchNorm)
        found[name] = step(synced, p, slice(None)), step(plain, p, slice(None))
    return found


def a_part_of_the_ranks(this):
    """A group of the first two ranks. A third rank is not in it and need not call."""
    group = this.group_of([0, 1])
    if group is None:
        return None
    return all_reduce(bnfast.moments(np.full((2, 3), this.rank, float)), group)


def channels_that_differ(this):
    return attempt(all_reduce, bnfast.Moments.empty(3 + (this.rank == 1)), this.group)


def layers_that_differ(this):
    layer = SyncBatchNorm(3 + (this.rank == 1), group=this.group)
    x = np.ones((4, layer.num_features), np.float32)
    return attempt(layer, x), layer.state_dict()


def no_moments_on_one(this):
    mine = "moments" if this.rank == 0 else bnfast.Moments.empty(3)
    return attempt(all_reduce, mine, this.group)


BAD_CALLS = {
    "another dtype": lambda x: {"x": x.astype(np.int64)},
    "channels": lambda x: {"x": x[:, :2]},
    "a residual of another shape": lambda x: {"x": x, "residual": x[:2]},
    "an out that overlaps": lambda x: {"x": x[:2], "out": x[1:3]},
    "a read-only out": lambda x: {"x": x, "out": np.broadcast_to(x[:1], x.shape)},
}


def bad_input_on_one(this):
    """The last rank's call is refused. A good call follows, to check that the ranks still agree."""
    found = {}
    for name, spoil in BAD_CALLS.items():
        layer = SyncBatchNorm(3, group=this.group)
        x = np.arange(12, dtype=np.float32).reshape(4, 3)
        call = spoil(x) if this.rank == this.size - 1 else {"x": x}
        before = layer.state_dict()
        raised = attempt(layer, **call)
        same = all(np.array_equal(before[key], value) for key, value in layer.state_dict().items())
        layer(x)
        found[name] = raised, same, layer.state_dict()
    return found


def bad_state_on_one(this):
    """A layer whose running statistics were replaced by invalid ones."""
    found = {}
    for name, value in {
        "shape": np.zeros(2, np.float32),
        "dtype": np.zeros(3, np.float64),
        "kind": [0.0, 0.0, 0.0],
    }.items():
        layer = SyncBatchNorm(3, group=this.group)
        if this.rank == 0:
            layer.running_mean = value
        found[name] = attempt(layer, np.ones((4, 3), np.float32))
    return found


def bad_gradient_on_one(this):
    layer = SyncBatchNorm(3, group=this.group)
    x = np.arange(12, dtype=np.float32).reshape(4, 3) + np.float32(this.rank)
    layer(x)
    raised = attempt(layer.backward, x[:3] if this.rank == 0 else x)
    untouched = layer.weight_grad.copy()
    return raised, untouched, layer.backward(x)


def one_value_in_all(this):
    layer = SyncBatchNorm(3, group=this.group)
    x = np.ones((int(this.rank == 0), 3), np.float32)
    return attempt(layer, x), layer.state_dict()


def one_value_each(this):
    """Too few for a plain layer, but enough together."""
    layer = SyncBatchNorm(3, group=this.group)
    return layer(np.full((1, 3), this.rank, np.float32))


def nothing_at_all(this):
    layer = SyncBatchNorm(3, group=this.group)
    x = np.ones((0, 3), np.float32)
    return layer(x), layer.backward(x), layer.weight_grad, layer.state_dict()


def not_a_number_on_one(this):
    """NaN and infinity stay in their channel, on all ranks."""
    layer = SyncBatchNorm(3, group=this.group)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    if this.rank == 0:
        x[1, 0], x[2, 1] = np.nan, np.inf
    y = layer(x)
    return y, layer.backward(np.ones_like(x)), layer.state_dict()


def evaluation(this):
    """Exchanges nothing: ranks call different numbers of times."""
    layer = SyncBatchNorm(3, group=this.group).eval()
    x = np.ones((2, 3), np.float32)
    return [layer(x) for _ in range(this.rank + 1)]


def untouched_statistics(this):
    layer = SyncBatchNorm(3, group=this.group)
    layer(np.full((2, 3), this.rank, np.float32), update_stats=False)
    untracked = SyncBatchNorm(3, group=this.group, track_running_stats=False)
    y = untracked(np.full((2, 3), this.rank, np.float32))
    return layer.state_dict(), y


def population_statistics(this):
    p = make_problem(SHAPES["planar"])
    layer = SyncBatchNorm(p.channels, group=this.group)
    mine = p.x[rows_of("uneven", this.rank, this.size)]
    bnfast.recompute_statistics(layer, [mine, mine[:1], mine[:0]], [layer])
    return layer.state_dict()


def copies(this):
    layer = SyncBatchNorm(3, group=this.group_of(list(range(this.size))), affine=False)
    layer(np.full((2, 3), this.rank, np.float32))
    twin = copy.deepcopy(layer)
    x = np.full((2, 3), 2 * this.rank, np.float32)
    unpickled = pickle.loads(pickle.dumps(SyncBatchNorm(3, eps=0.25)))
    return {
        "group": twin.group is layer.group,
        "apart": not np.shares_memory(twin.running_mean, layer.running_mean),
        "results": (layer(x), twin(x)),
        "pickled": (unpickled.group, unpickled.eps),
    }


def masked_steps(this):
    found = {}
    for name in masked_batches.PROBLEMS:
        p, cuts, masks, _ = masked_batches.problem(name, this.size)
        layer = layer_for(p, SyncBatchNorm, group=this.group)
        found[name] = step(layer, p, cuts[this.rank], masks[this.rank])
    return found


def masks_that_count_too_little(this):
    """Refused on all ranks; the next call works."""
    found = {}
    x = np.arange(12, dtype=np.float32).reshape(4, 3) + this.rank
    for mask in masked_batches.TOO_LITTLE:
        layer = SyncBatchNorm(3, group=this.group)
        before = layer.state_dict()
        raised = attempt(layer, x, mask=mask(this.rank))
        same = all(np.array_equal(before[key], value) for key, value in layer.state_dict().items())
        layer(x, mask=np.arange(4) != 2)
        found[mask.__name__] = raised, same, layer.state_dict()
    return found


def little_weight_without_statistics(this):
    """Enough, where no running variance is divided by it less one."""
    layer = SyncBatchNorm(3, group=this.group, track_running_stats=False)
    x = np.arange(12, dtype=np.float64).reshape(4, 3) + this.rank
    paused = SyncBatchNorm(3, group=this.group, dtype=np.float64)
    mask = np.full(4, 0.25 / this.size)  # 1 together
    return layer(x.astype(np.float32), mask=mask), paused(x, mask=mask, update_stats=False)


def little_weight_beside_an_empty_rank(this):
    layer = SyncBatchNorm(3, group=this.group, track_running_stats=False)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    if this.rank == 1:
        return attempt(layer, x[:0])
    return attempt(layer, x, mask=np.full(4, 0.25 / (this.size - 1)))


def empty_masks(this):
    layer = SyncBatchNorm(3, group=this.group)
    x = np.ones((0, 3, 2), np.float32)
    y = layer(x, mask=np.ones((0, 2), bool))
    return y, layer.backward(x), layer.state_dict()


def moments_of_weights(this):
    """Counts that are floats on some ranks, ints on others, and 0 on one."""
    x = make_problem(SHAPES["planar"]).x[rows_of("uneven", this.rank, this.size)]
    weights = np.random.default_rng(this.rank).uniform(0, 1, (len(x), 1, 1))
    mine = bnfast.moments(x, mask=weights if this.rank == 0 else weights > 0.2)
    nothing = bnfast.moments(x, mask=weights if this.rank == 0 else np.zeros((1, 1, 1)))
    return mine, all_reduce(mine, this.group), nothing, all_reduce(nothing, this.group)


def population_of_masks(this):
    (name,) = (n for n in masked_batches.PROBLEMS if "weights, planar, uneven, float64" in n)
    p, cuts, masks, _ = masked_batches.problem(name, this.size)
    x, mask = p.x[cuts[this.rank]], masks[this.rank]
    layer = SyncBatchNorm(p.channels, group=this.group, dtype=np.float64)
    batches = [(x, mask), (x, mask > 0)]
    bnfast.recompute_statistics(lambda pair: layer(pair[0], mask=pair[1]), batches, [layer])
    return layer.state_dict()


SCENARIOS = [
    moments_of_all,
    moments_of_nothing,
    moments_without_channels,
    training_steps,
    cumulative_average,
    a_group_of_one,
    a_part_of_the_ranks,
    channels_that_differ,
    layers_that_differ,
    no_moments_on_one,
    bad_input_on_one,
    bad_state_on_one,
    bad_gradient_on_one,
    one_value_in_all,
    one_value_each,
    nothing_at_all,
    not_a_number_on_one,
    evaluation,
    untouched_statistics,
    population_statistics,
    copies,
    masked_steps,
    masks_that_count_too_little,
    little_weight_without_statistics,
    little_weight_beside_an_empty_rank,
    empty_masks,
    moments_of_weights,
    population_of_masks,
]
