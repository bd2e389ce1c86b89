"""The scenarios of `bnfast.torch.recompute_statistics` over a data set that ranks share."""

import copy

import numpy as np
import torch
from launch import attempt
from torch import nn

import bnfast.torch
from bnfast.torch import recompute_statistics

ROWS = 30


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 3, 4, 5)) * [[[1]], [[3]], [[0.1]]] + [[[0]], [[1e4]], [[-2]]]
    return torch.from_numpy(x + np.linspace(0, 5, ROWS)[:, None, None, None])


def network():
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(3), nn.SyncBatchNorm(4)
    return nn.Sequential(first, nn.Conv2d(3, 4, 3), second, nn.ReLU()).double()


def batches_of(rank, size):
    """An uneven number of batches of uneven sizes; the last rank has one."""
    mine = data()[sum(range(rank + 1)) : sum(range(rank + 2))] if rank < size - 1 else None
    if mine is None:
        return [data()[sum(range(rank + 1)) :]]
    return list(mine.split(2)) if len(mine) > 1 else [mine]


def state_of(model):
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def statistics(this):
    model = network()
    recompute_statistics(
        model, batches_of(this.rank, this.size), group=this.group or torch.distributed.group.WORLD
    )
    return state_of(model)


def a_rank_without_batches(this):
    model = network()
    mine = list(data().split(11)) if this.rank == 0 else []
    recompute_statistics(model, mine, group=torch.distributed.group.WORLD)
    return state_of(model)


class _Broken:
    """A data set that raises before its end."""

    def __iter__(self):
        yield data()[:4]
        raise OSError("the disk is gone")


def _refused(this, bad, **wrong):
    model = network()
    before = state_of(model)
    given = {"batches": batches_of(this.rank, this.size), "layers": None}
    if this.rank == bad:
        given |= wrong
    error = attempt(recompute_statistics, model, **given, group=torch.distributed.group.WORLD)
    same = all((before[name] == value).all() for name, value in state_of(model).items())
    # and the next call works on all ranks
    recompute_statistics(
        model, batches_of(this.rank, this.size), group=torch.distributed.group.WORLD
    )
    return error, same, state_of(model)


REFUSALS = {
    "batches": ({"batches": _Broken()}, "OSError: the disk is gone"),
    "layers": ({"layers": ["no"]}, "ValueError: layers[0] is 'no'"),
    "wrong input": ({"batches": [torch.ones(2, 5, 4, 4)]}, "RuntimeError: "),
}


def refusals(this):
    return {
        (name, bad): _refused(this, bad, **wrong)
        for name, (wrong, _) in REFUSALS.items()
        for bad in (0, this.size - 1)
    }


def nobody_has_values(this):
    model = network()
    before = copy.deepcopy(state_of(model))
    error = attempt(recompute_statistics, model, [], group=torch.distributed.group.WORLD)
    return error, all((before[name] == value).all() for name, value in state_of(model).items())


def other_layers(this):
    """Ranks that give different layers."""
    model = network().eval()
    layers = [0] if this.rank else [0, 2]
    layers = [model[i] for i in layers]
    return attempt(
        recompute_statistics, model, [data()], layers=layers, group=torch.distributed.group.WORLD
    )


def a_part_of_the_ranks(this):
    group = this.group_of([0, 1])
    if group is None:
        return None
    model = network()
    recompute_statistics(model, [data()[this.rank :: 2]], group=group)
    return state_of(model)


class Masked(nn.Module):
    """A model that passes its masks on, to a layer over ranks or not."""

    def __init__(self, kind):
        super().__init__()
        self.norm = kind(3).double()

    def forward(self, x, mask=None):
        return self.norm(x, mask=mask)


def weights():
    """One weight of each position, of which one in nine is 0."""
    return np.random.default_rng(1).integers(0, 9, (ROWS, 4, 5)) / 4


def masks(this):
    """Weights on the first rank, bool on the second, none on a third."""
    mine = slice(this.rank, None, this.size)
    x, mask = data()[mine], torch.from_numpy(weights()[mine])
    mask = (mask, mask > 0, None)[this.rank]
    cuts = (slice(0, 4), slice(4, None))
    batches = [{"x": x[cut], "mask": None if mask is None else mask[cut]} for cut in cuts]
    found = []
    for kind in (bnfast.torch.BatchNorm2d, bnfast.torch.SyncBatchNorm):
        model = Masked(kind)
        recompute_statistics(model, batches, group=torch.distributed.group.WORLD)
        found.append(state_of(model))
    return found


def masks_of_little_weight(this):
    model = Masked(bnfast.torch.BatchNorm2d)
    before = state_of(model)
    batch = {"x": data()[:4], "mask": torch.full((4, 4, 5), 0.25 / 80)}
    error = attempt(recompute_statistics, model, [batch], group=torch.distributed.group.WORLD)
    return error, all((before[name] == value).all() for name, value in state_of(model).items())


SCENARIOS = [
    statistics,
    a_rank_without_batches,
    refusals,
    nobody_has_values,
    other_layers,
    a_part_of_the_ranks,
    masks,
    masks_of_little_weight,
]
