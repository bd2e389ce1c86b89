"""`bnfast.torch`'s `SyncBatchNorm` on real processes, over gloo."""

import inspect

import masked_batches
import numpy as np
import pytest
from cases import bits
from judged import check_gradients, check_outputs, check_running_statistics
from launch import LAUNCHES, Raised, launch
from numpy_program import MOMENTUM

torch = pytest.importorskip("torch")

import torch_program as program  # noqa: E402
from torch import nn  # noqa: E402

import bnfast.torch  # noqa: E402
from bnfast.torch import SyncBatchNorm, convert_sync_batchnorm  # noqa: E402

TOLD = "rank {} could not take part; its own exception says why"
PROBLEMS = pytest.mark.parametrize("name", program.PROBLEMS)
# By scenario and rank: moments, then a pass that normalises; sums, then the input's gradient.
RAN = {
    "bfloat16_steps": lambda rank: {"moments": 1, "forward": 1, "backward": 2},
    "data_parallel": lambda rank: {"moments": 8, "forward": 8, "backward": 16},
    "a_part_of_the_ranks": lambda rank: (
        {"moments": 1, "forward": 1} if rank < 2 else {"forward": 1}  # alone in its group
    ),
    "compiled": lambda rank: {"moments": 1, "forward": 1},
    "cumulative_average": lambda rank: {"moments": 3, "forward": 3},
    "copies": lambda rank: {"moments": 2, "forward": 2},
    "evaluation": lambda rank: {"inference": rank + 1},
    "checkpointed": lambda rank: {"moments": 2, "forward": 2, "backward": 2},
}
SIZES = [size for transport, size in LAUNCHES if transport == "torch"]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"gloo-{size}")
def ranks(request, tmp_path_factory):
    """The results of each scenario: a list of dicts, by rank."""
    return launch("torch_program", "torch", request.param, tmp_path_factory.mktemp("torch"))


@pytest.fixture
def results(ranks, request):
    """The results of the scenario that a test is named after, by rank; checks which kernels ran."""
    name = request.node.originalname.removeprefix("test_")
    found = [rank[name] for rank in ranks]
    if name not in RAN:
        return found
    for i, (result, ran) in enumerate(found):
        assert ran == ({} if result is None else RAN[name](i)), (i, ran)
    return [result for result, _ in found]


@PROBLEMS
class TestTrainingSteps:
    @pytest.fixture
    def of(self, ranks, name):
        found = [rank["training_steps"] for rank in ranks]
        assert not isinstance(found[0], Raised), found
        return [steps[name] for steps in found]

    def test_outputs(self, of, name):
        _, _, p = program.problem(name)
        check_outputs(p, of)
        assert all(rank["same format"] for rank in of)

    def test_gradients(self, of, name):
        _, _, p = program.problem(name)
        check_gradients(p, of)

    def test_running_statistics(self, of, name):
        _, _, p = program.problem(name)
        check_running_statistics(p, of, MOMENTUM)

    def test_ran_on_bnfast(self, of, name):
        """bnfast runs all of moments, the normalising pass, sums and the input's gradient."""
        layout, _, options = program.PROBLEMS[name]
        wanted_layout = "planar" if layout == "contiguous" else "interleaved"
        activation = options["activation"]
        for rank in of:
            if not rank["y"].size:
                assert rank["dispatches"] == {}
                continue
            ran = {
                (direction, dtype, where, variant): times
                for (direction, dtype, where, _, variant), times in rank["dispatches"].items()
            }
            key = (np.dtype(options["dtype"]).name, wanted_layout)
            added = "residual" if options["residual"] else None
            forward = "+".join(filter(None, (activation, added))) or "plain"
            # Sums, then dx. With an activation dx's pass also writes the residual's gradient.
            sums, dx = activation or "plain", forward if activation else "plain"
            assert ran == {
                ("moments", *key, "plain"): 1,
                ("forward", *key, forward): 1,
                ("backward", *key, sums): 1,
                ("backward", *key, dx): 1 + (sums == dx),
            }


class TestMaskedSteps:
    """The ranks together equal one process on the whole batch and its masks, to rounding."""

    @pytest.fixture
    def steps(self, ranks):
        return [rank["masked_steps"] for rank in ranks]

    @pytest.mark.parametrize("name", masked_batches.PROBLEMS)
    def test_values_and_gradients(self, steps, name):
        p, _, _, weights = masked_batches.problem(name, len(steps))
        for layout in ("contiguous", "channels_last")[: p.x.ndim // 2]:
            of = [found[name, layout] for found, _ in steps]
            masked_batches.check_step(p, weights, of, MOMENTUM)
            assert all(rank["same format"] for rank in of)

    def test_ran_on_bnfast(self, steps):
        for found, ran in steps:
            full = sum(bool(step["y"].size) for step in found.values())
            assert ran == {"moments": full, "forward": full, "backward": 2 * full}


@pytest.mark.parametrize("mask", masked_batches.TOO_LITTLE, ids=lambda mask: mask.__name__)
def test_masks_that_count_too_little(results, mask):
    found = [rank[mask.__name__] for rank in results]
    for raised, same, state in found:
        assert raised.kind == "ValueError"
        assert raised == found[0][0]
        assert raised.text.startswith(masked_batches.TOO_LITTLE[mask])
        assert same
        assert state["num_batches_tracked"] == 1
        for name, value in state.items():
            assert bits(value) == bits(found[0][2][name])


def test_empty_masks(results):
    assert results == [((0, 3, 2), 1, [0.0] * 3)] * len(results)


def test_masks_in_evaluation(results):
    assert [len(result) for result in results] == [rank + 1 for rank in range(len(results))]


def test_bfloat16_steps(results):
    if results[0] is None:
        pytest.skip("no bfloat16 kernels, or no ml_dtypes, in this build")
    assert len({bits(mean) for _, mean, _ in results}) == 1
    y = np.concatenate([part for part, _, _ in results]).astype(np.float64)
    # Normalised values, each rounded to 8 bits: their mean and variance show only that rounding.
    assert np.abs(y.mean(axis=(0, 2, 3))).max() < 2.0**-8
    assert np.abs(y.var(axis=(0, 2, 3)) - 1).max() < 2.0**-6


def test_some_gradients(results):
    for rank, found in enumerate(results):
        for (weight, bias), (no_weight, no_bias) in (
            (key, value) for key, value in found.items() if key != "residual"
        ):
            assert no_weight == (rank > 0 or not weight)
            assert no_bias == (rank > 0 or not bias)
    assert results[0]["residual"]


def test_data_parallel(results):
    """Equals a model in one process on whole batches, after four steps, in double.

    A gradient is a sum of at most 9 * 64 terms for each of 36 weights, a step adds one to its
    parameter, and the convolutions sum 36 terms: about 1e3 roundings per step, 1e-13, which three
    more steps at a rate of 0.1 amplify by less than 1e3.
    """
    model = program.network()
    losses = program.train(model)
    shares = np.array([losses for losses, _ in results])
    np.testing.assert_allclose(shares.sum(axis=0), losses, rtol=1e-10)
    for key, value in model.state_dict().items():
        assert len({bits(state[key]) for _, state in results}) == 1, key
        np.testing.assert_allclose(results[0][1][key], value.numpy(), rtol=1e-10, atol=1e-10)


def test_a_part_of_the_ranks(results):
    """Means of the first two ranks' rows, 0, 1, 1 and 2; of the third's alone, 2 and 3."""
    want = [0.1, 0.1, 0.25]
    for got, mean in zip(results, want, strict=False):
        np.testing.assert_allclose(got, [mean] * 3, rtol=1e-6)


def test_not_a_member(results):
    assert results[0] is None
    for raised in results[1:]:
        assert raised.kind == "ValueError"
        assert "not among its members" in raised.text


@pytest.mark.parametrize("name", program.BAD_CALLS)
def test_bad_input_on_one(results, name):
    *others, (refused, untouched, mean) = [result[name] for result in results]
    assert refused.kind in ("TypeError", "ValueError")
    assert untouched
    for raised, kept, other in others:
        assert raised == Raised("RuntimeError", TOLD.format(len(results) - 1))
        assert kept
        assert bits(other) == bits(mean)
    assert mean.all()


def test_another_device(results):
    """PyTorch computes it, with its own rules."""
    assert all("expected input tensor to be on GPU" in raised.text for raised in results)


def test_one_value_in_all(results):
    for raised, tracked in results:
        assert raised.kind == "ValueError"
        assert raised.text.startswith("Expected more than 1 value per channel when training")
        assert tracked == 0


def test_nothing_at_all(results):
    assert all(result == ((0, 3, 2), [0.0] * 3, 1, [0.0] * 3) for result in results)


def test_evaluation(results):
    assert [len(result) for result in results] == [rank + 1 for rank in range(len(results))]


def test_checkpointed(results):
    assert all(tracked == 1 for tracked in results)


def test_compiled(results):
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    rows = torch.arange(2)[:, None]
    x = torch.cat([torch.full((2, 3), float(rank)) + rows for rank in range(len(results))])
    mean = 0.1 * linear(x).mean(0)
    for got in results:
        assert bits(got) == bits(results[0])
        np.testing.assert_allclose(got, mean.detach().numpy(), rtol=1e-5)


def test_cumulative_average(results):
    """Batch i's mean is i times that of the ranks' numbers, i = 0, 1, 2."""
    for mean, tracked in results:
        np.testing.assert_allclose(mean, [(len(results) - 1) / 2] * 3, rtol=1e-6)
        assert tracked == 3


def test_copies(results):
    for group, apart, equal, var in results:
        assert group
        assert apart
        assert equal
        assert var == results[0][3]


class TestWithoutAProcessGroup:
    """A plain layer, bit for bit that of the same name."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 2), (6, 4, 3, 2, 2)])
    def test_is_a_plain_layer(self, shape, training, dispatches):
        plain = {2: 1, 3: 1, 4: 2, 5: 3}[len(shape)]
        layers = [SyncBatchNorm(4), getattr(bnfast.torch, f"BatchNorm{plain}d")(4)]
        torch.manual_seed(0)
        x = torch.randn(shape)
        results = []
        for layer in layers:
            layer.train(training)
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(x)
            results.append([y, leaf.grad, layer.weight.grad, *layer.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert dispatches()

    def test_rank_one_is_refused(self):
        with pytest.raises(ValueError, match="expected at least 2D input"):
            SyncBatchNorm(4)(torch.ones(4))

    def test_constructor_and_state_are_pytorchs(self):
        options = {"eps": 0.1, "momentum": None, "affine": True, "track_running_stats": True}
        ours, theirs = SyncBatchNorm(4, **options), nn.SyncBatchNorm(4, **options)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        if "bias" in inspect.signature(nn.SyncBatchNorm).parameters:
            assert SyncBatchNorm(4, bias=False).bias is None
        assert SyncBatchNorm(4, dtype=torch.float64).weight.dtype is torch.float64


class TestConvert:
    def test_in_place_with_all_there_is(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.5), nn.Sequential())
        model[2].append(nn.BatchNorm2d(2, affine=False)).append(model[1])
        bnfast.torch.convert(model[2])
        layer, before = model[1], dict(model.named_parameters())
        calls = []
        layer.register_forward_hook(lambda *args: calls.append(args))
        group = object()
        assert convert_sync_batchnorm(model, group) is model
        assert model[1] is model[2][1] is layer
        assert all(type(m) is SyncBatchNorm for m in (model[1], model[2][0]))
        assert all(m.process_group is group for m in (model[1], model[2][0]))
        assert all(p is before[name] for name, p in model.named_parameters())
        assert layer.eps == 0.5
        layer.eval()(torch.ones(2, 4))
        assert len(calls) == 1

    def test_of_pytorchs_own(self):
        model = nn.SyncBatchNorm(3, momentum=None)
        assert type(SyncBatchNorm.convert_sync_batchnorm(model)) is SyncBatchNorm
        assert model(torch.arange(6.0).reshape(2, 3)).shape == (2, 3)

    def test_convert_keeps_one_over_its_ranks(self):
        group = object()
        model = nn.SyncBatchNorm(3, process_group=group)
        bnfast.torch.convert(model)
        assert type(model) is SyncBatchNorm
        assert model.process_group is group
        bnfast.torch.revert(model)
        assert type(model) is nn.SyncBatchNorm

    def test_leaves_derived_classes_alone(self):
        class Own(nn.BatchNorm2d):
            pass

        model = nn.Sequential(Own(3), nn.LazyBatchNorm1d(), nn.InstanceNorm2d(3))
        before = [type(m) for m in model]
        convert_sync_batchnorm(model)
        assert [type(m) for m in model] == before

    def test_is_a_leaf_for_fx(self):
        model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())).eval()
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes] == [
            "placeholder",
            "call_module",
            "call_module",
            "output",
        ]
        x = torch.randn(4, 3)
        assert torch.equal(traced(x), model(x))
