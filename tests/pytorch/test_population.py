"""`bnfast.torch.recompute_statistics`: statistics of the whole data set; nothing else changes."""

import copy
import re

import numpy as np
import pytest
import torch
from layers import SmallResNet, channels_last, gappy
from torch import nn
from wide import wide

import bnfast.torch
from bnfast.torch import recompute_statistics

SPLITS = {"equal": [8] * 5, "uneven": [1, 17, 2, 20], "one": [40], "with an empty one": [39, 0, 1]}


def whole(x):
    """Mean and unbiased variance of each channel."""
    rows = np.moveaxis(wide(x.detach().numpy()), 1, 0).reshape(x.shape[1], -1)
    return rows.mean(1), rows.var(1, ddof=1)


def check(layer, x, rtol):
    mean, var = whole(x)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean.astype(float), rtol=rtol)
    np.testing.assert_allclose(layer.running_var.numpy(), var.astype(float), rtol=rtol)


def snapshot(model):
    flags = ("training", "track_running_stats", "forward", "_forward_pre_hooks")
    return {
        name: [copy.copy(vars(m).get(flag)) for flag in flags] for name, m in model.named_modules()
    }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnfast.torch.BatchNorm2d])
def test_first_layer_has_the_statistics_of_all_batches(kind, split):
    x = (
        torch.randn(40, 3, 5, 4, dtype=torch.float64) * 3
        + torch.tensor([0.0, 1e3, -7])[:, None, None]
    )
    x[:8] += 5  # batches differ
    model = nn.Sequential(kind(3, momentum=None), nn.ReLU(), nn.Flatten()).double()
    model[0].num_batches_tracked.fill_(3)
    recompute_statistics(model, x.split(SPLITS[split]))
    check(model[0], x, 1e-12)
    assert model[0].num_batches_tracked == 3
    assert model[0].momentum is None


def test_the_order_of_batches_changes_rounding_only():
    batches = list(torch.randn(40, 3, 5, dtype=torch.float64).split([1, 9, 30]))
    model = nn.BatchNorm1d(3).double()
    for order in (batches, batches[::-1]):
        recompute_statistics(model, iter(order))
        check(model, torch.cat(batches), 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_deeper_layers_see_their_batches_normalised(training):
    """By hand: each batch through the layers in training, all inputs of a layer as one."""
    model = SmallResNet().double().train(training)
    batches = torch.randn(12, 3, 8, 8, dtype=torch.float64).split([5, 7])
    copied, inputs = copy.deepcopy(model).train(), {}
    for name, m in copied.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            keep = inputs.setdefault(name, []).append
            m.register_forward_pre_hook(lambda m, args, keep=keep: keep(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            copied(batch)
    before = snapshot(model)
    recompute_statistics(model, batches)
    assert snapshot(model) == before
    assert len(inputs) == 6
    for name, seen in inputs.items():
        check(model.get_submodule(name), torch.cat(seen), 1e-9)


def test_dropout_follows_model_mode():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    x = torch.ones(4000, 2)
    recompute_statistics(model.eval(), [x])
    assert (model[1].running_var == 0).all()
    recompute_statistics(model.train(), [x])
    assert (model[1].running_var > 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [channels_last, gappy, torch.neg])
def test_types_and_layouts(dtype, layout):
    x = layout((torch.randn(16, 3, 4, 5) + 100).to(dtype))
    model = nn.BatchNorm2d(3)
    recompute_statistics(model, x.split(6))
    check(model, x.double(), 1e-6)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, bnfast.torch.SyncBatchNorm])
def test_synchronised_layers_are_plain_here(kind):
    model = nn.Sequential(kind(3), nn.ReLU())
    x = torch.randn(10, 3, 4)
    recompute_statistics(model, x.split(5))
    check(model[0], x.double(), 1e-6)
    assert "forward" not in vars(model[0])


def test_forms_of_batches():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x, factor=1.0):
            return self.bn(input=x * factor)

    model, x = Two(), torch.randn(8, 3)
    for batch, want in (
        (x, x),
        ([x, torch.zeros(8)], x),
        ((x, 3.0), x),
        ({"x": x, "factor": 2.0}, 2 * x),
    ):
        recompute_statistics(model, [batch])
        check(model.bn, want.double(), 1e-6)
    with pytest.raises(ValueError, match="a batch is empty"):
        recompute_statistics(model, [()])


def test_only_requested_layers():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)).train()
    x = torch.randn(10, 3) + 3
    recompute_statistics(model, [x], layers=[model[1], "2", "1"])
    fresh = nn.BatchNorm1d(3).state_dict()
    state = model[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in fresh.items())
    assert model[1].running_var[0] != 1
    assert model[2].running_var[0] != 1
    recompute_statistics(nn.ReLU(), None)  # nothing to do, and nothing is run
    recompute_statistics(model, None, layers=())


def test_derived_classes_and_those_without_statistics():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Own(3), nn.BatchNorm2d(3, track_running_stats=False))
    x = torch.randn(5, 3, 2, 2)
    recompute_statistics(model, [x])
    check(model[0], x.double(), 1e-6)
    with pytest.raises(RuntimeError, match=r"^1 has no running statistics to update"):
        recompute_statistics(model, [x], layers=["1"])
    with pytest.raises(RuntimeError, match="has not seen its first input"):
        recompute_statistics(nn.LazyBatchNorm2d(), [x])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x, again=True):
        y = self.other(self.bn(x))
        return self.bn(y) if again else y


def test_a_layer_called_twice_is_refused():
    model = Twice()
    before = copy.deepcopy(model.state_dict())
    modes = snapshot(model)
    once = {"x": torch.randn(4, 3), "again": False}
    with pytest.raises(RuntimeError, match=r"^bn is called 2 times for one batch"):
        recompute_statistics(model, [once, torch.randn(4, 3)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert snapshot(model) == modes
    recompute_statistics(model, [once, once])
    recompute_statistics(model, [torch.randn(4, 3)], layers=["other"])


class Fails(Exception):
    pass


class Stateful(nn.Module):
    """Its forwards change buffers, and the third raises."""

    def __init__(self):
        super().__init__()
        self.bn, self.other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        if self.seen == 3:
            raise Fails
        return self.other(self.bn(x))


@pytest.mark.parametrize("count", [2, 3])
def test_everything_else_unchanged(count):
    model = Stateful().train()
    model.other.eval()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    grad = torch.is_grad_enabled()
    for name in ("bn", "other"):
        batches = [torch.randn(4, 3)] * count
        if count == 3:
            with pytest.raises(Fails):
                recompute_statistics(model, batches, layers=[name])
        else:
            recompute_statistics(model, batches, layers=[name])
        after = model.state_dict()
        changed = {key for key in state if not torch.equal(state[key], after[key])}
        assert changed == ({f"{name}.running_mean", f"{name}.running_var"} if count == 2 else set())
        model.load_state_dict(state)
        assert snapshot(model) == before
    assert torch.is_grad_enabled() == grad
    assert all(p.grad is None for p in model.parameters())


def test_progress(capsys):
    model, counted = nn.BatchNorm1d(3), []
    batches = [torch.randn(4, 3)] * 3
    recompute_statistics(model, batches, progress=counted.append)
    assert counted == [1, 2, 3]
    recompute_statistics(model, batches, progress=True)
    assert capsys.readouterr().err.endswith("recompute_statistics: batch 3/3\n")


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"model": None}, TypeError, "model is of type builtins.NoneType"),
        ({"batches": 3}, TypeError, "batches is of type int; expected an iterable"),
        ({"batches": []}, ValueError, "batches is empty; expected at least one batch"),
        ({"batches": [torch.ones(0, 3)]}, RuntimeError, "(model) saw no values"),
        ({"layers": ["no"]}, ValueError, "layers[0] is 'no'; expected the name of a layer"),
        ({"layers": "bn"}, TypeError, "layers is 'bn'; expected an iterable"),
        ({"layers": [nn.ReLU()]}, TypeError, "layers[0] is ReLU() of type ReLU"),
        ({"layers": [nn.BatchNorm1d(3)]}, ValueError, "layers[0] is a BatchNorm1d that is not in"),
        ({"progress": "yes"}, TypeError, "progress is 'yes'"),
        ({"group": 3}, TypeError, "group is 3 of type int"),
        ({"batches": [torch.ones(1, 3)]}, ValueError, "Expected more than 1 value per channel"),
        ({"batches": [torch.ones(2, 4)]}, RuntimeError, "3"),
    ],
)
def test_refused_arguments(arguments, kind, said):
    model = nn.BatchNorm1d(3)
    before = copy.deepcopy(model.state_dict())
    given = {"model": model, "batches": [torch.randn(4, 3)], **arguments}
    with pytest.raises(kind, match=re.escape(said)):
        recompute_statistics(**given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_compiled_models():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.randn(10, 3)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(x)
    fresh = model[1].state_dict()
    compiled._orig_mod[1].load_state_dict(fresh)
    recompute_statistics(model, [x])
    recompute_statistics(compiled, [x])
    for ours, theirs in zip(model.buffers(), compiled.buffers(), strict=True):
        assert torch.equal(ours, theirs)


# ---- Masks


class Masked(nn.Module):
    """Two layers, the second of which gets a mask, too, if asked for."""

    def __init__(self, kind=bnfast.torch.BatchNorm1d, second=True, **options):
        super().__init__()
        self.first, self.last = kind(3, **options).double(), kind(3, **options).double()
        self.second = second

    def forward(self, x, mask=None):
        y = torch.relu(self.first(x, mask=mask))
        return self.last(y, mask=mask if self.second else None)


def weighted(x, weights):
    """Mean and unbiased variance of weighted values."""
    w = wide(weights.numpy())[:, None]
    x = wide(np.where(w > 0, x.detach().numpy(), 0))
    mean = (w * x).sum((0, 2)) / w.sum()
    d = np.where(w > 0, x - mean[:, None], 0)
    return mean, (w * d * d).sum((0, 2)) / (w.sum() - 1)


def check_weighted(layer, x, weights, rtol=1e-12):
    for got, want in zip(
        (layer.running_mean, layer.running_var), weighted(x, weights), strict=True
    ):
        np.testing.assert_allclose(got.numpy(), want.astype(float), rtol=rtol)


def padded(weights=False):
    """Data with garbage where nothing is counted, and its mask; each row counts two at least."""
    x = torch.randn(12, 3, 7, dtype=torch.float64) * 3 + torch.arange(12).view(12, 1, 1)
    mask = (torch.randint(0, 9, (12, 7)) / 4).double() if weights else torch.rand(12, 7) < 0.5
    mask[:, :2] = 1
    return x.masked_fill((mask == 0).unsqueeze(1), torch.nan), mask


KINDS_WITH_MASKS = {
    "BatchNorm1d": (bnfast.torch.BatchNorm1d, {}),
    "virtual batches": (bnfast.torch.BatchNorm1d, {"virtual_batch_size": 2}),
    "BatchRenorm1d": (bnfast.torch.BatchRenorm1d, {}),
    "SyncBatchNorm": (bnfast.torch.SyncBatchNorm, {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [False, True], ids=["bool", "weights"])
@pytest.mark.parametrize("kind", KINDS_WITH_MASKS)
def test_population_is_what_masks_count(kind, weights, training):
    kind, options = KINDS_WITH_MASKS[kind]
    x, mask = padded(weights)
    model = Masked(kind, **options).train(training)
    batches = [{"x": x[i:j], "mask": mask[i:j]} for i, j in ((0, 5), (5, 6), (6, 12))]
    seen = []
    model.last.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    before = snapshot(model)
    recompute_statistics(model, batches)
    assert snapshot(model) == before
    check_weighted(model.first, x, mask)
    check_weighted(model.last, torch.cat(seen), mask)
    assert model.first.num_batches_tracked == 0


def test_batches_with_and_without_masks():
    x, mask = padded()
    whole = torch.nan_to_num(x, nan=1.5)
    model = Masked(second=False)
    recompute_statistics(model, [{"x": x[:6], "mask": mask[:6]}, whole[6:]], layers=["first"])
    given, kept = torch.cat([x[:6], whole[6:]]), torch.cat([mask[:6], torch.ones(6, 7)])
    check_weighted(model.first, given, kept)


@pytest.mark.parametrize(
    ("mask", "kind", "said"),
    [
        (torch.ones(4, 8), ValueError, "mask has shape (4, 8)"),
        (torch.ones(4, 7).long(), TypeError, "mask has dtype torch.int64"),
        (torch.full((4, 7), 0.01), ValueError, "first saw values whose weights sum to 0.28"),
        (torch.zeros(4, 7), ValueError, "Expected more than 1 value per channel"),
    ],
)
def test_refused_masks_change_nothing(mask, kind, said):
    model = Masked()
    before, modes = copy.deepcopy(model.state_dict()), snapshot(model)
    x = torch.randn(4, 3, 7).double()
    with pytest.raises(kind, match=re.escape(said)):
        recompute_statistics(model, [{"x": x, "mask": mask}])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert snapshot(model) == modes


def test_a_mask_of_another_class_is_its_own():
    """What a user's forward calls a mask may be anything."""

    class Own(nn.BatchNorm1d):
        def forward(self, input, mask=None):  # noqa: A002
            return super().forward(input) * mask

    model, x = Own(3), torch.randn(8, 3, 7)
    recompute_statistics(model, [{"input": x, "mask": torch.zeros(3, 1)}])
    check(model, x.double(), 1e-6)
