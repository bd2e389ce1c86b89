"""`all_reduce` and the NumPy `SyncBatchNorm` on real processes, over torch.distributed and MPI."""

import masked_batches
import numpy as np
import numpy_program as program
import pytest
from cases import bits, make_problem
from judged import check_gradients, check_outputs, check_running_statistics
from launch import LAUNCHES, Raised, launch
from tolerance import (
    assert_within,
    moments_of,
    unit,
)
from wide import wide

import bnfast
from bnfast.distributed import SyncBatchNorm, all_reduce, ranks_of

TOLD = "rank {} could not take part; its own exception says why"
PROBLEMS = pytest.mark.parametrize("name", program.PROBLEMS)


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda way: f"{way[0]}-{way[1]}")
def ranks(request, tmp_path_factory):
    """The results of each scenario: a list of dicts, by rank."""
    transport, size = request.param
    return launch("numpy_program", transport, size, tmp_path_factory.mktemp(transport))


@pytest.fixture
def results(ranks, request):
    """The results of the scenario that a test is named after, by rank."""
    name = request.node.originalname.removeprefix("test_")
    return [rank[name] for rank in ranks]


def same_on_all(results):
    """Every rank's arrays equal the first one's, to the bit."""
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in other.items():
            assert bits(value) == bits(results[0][name]), name
    return results[0]


@pytest.mark.parametrize("split", program.SPLITS)
def test_moments_of_all(results, split):
    x = make_problem(program.SHAPES["planar"]).x
    s = moments_of(x, 1)
    first = results[0][split]
    assert all(other[split] == first for other in results)
    assert first.count == x.size // x.shape[1]
    assert_within(first.mean, s.mean, s.mean_error, "mean")
    assert_within(first.var(), s.var, s.var_error, "variance")
    # In the order of ranks, with the library's own merge.
    size = len(results)
    parts = [bnfast.moments(x[program.rows_of(split, rank, size)]) for rank in range(size)]
    assert first == bnfast.Moments.merge_all(parts)


def test_moments_of_nothing(results):
    assert all(result == bnfast.Moments.empty(3) for result in results)


def test_moments_without_channels(results):
    assert all(result == bnfast.Moments.empty(0) for result in results)


@PROBLEMS
class TestTrainingSteps:
    """The ranks together must equal one process on the whole batch, to rounding."""

    @pytest.fixture
    def of(self, ranks, name):
        return [rank["training_steps"][name] for rank in ranks]

    def test_outputs(self, of, name):
        _, p = program.problem(name)
        check_outputs(p, of)

    def test_gradients(self, of, name):
        _, p = program.problem(name)
        check_gradients(p, of)

    def test_running_statistics(self, of, name):
        _, p = program.problem(name)
        check_running_statistics(p, of, program.MOMENTUM)

    def test_a_group_of_one_is_a_plain_layer(self, ranks, name):
        """To rounding: moments that are exchanged are summed in float64, those of a plain layer in
        float32, and their variances differ by up to 1e-6.
        """
        for rank in ranks:
            synced, plain = rank["a_group_of_one"][name]
            assert synced.keys() == plain.keys()
            for key, value in synced.items():
                assert (value is None) == (plain[key] is None), key
                if value is not None:
                    limit = 2e-6 * np.abs(plain[key]).max(initial=0)
                    np.testing.assert_allclose(value, plain[key], rtol=0, atol=limit, err_msg=key)


def test_cumulative_average(results):
    """The mean of three batches' moments; the distribution of rows does not matter."""
    state = same_on_all(results)
    s = moments_of(make_problem(program.SHAPES["planar"]).x, 1)
    m = wide(make_problem(program.SHAPES["planar"]).m)
    mean, var = 2 * s.mean, (1 + 4 + 9) / wide(3) * s.var * m / (m - 1)
    # Three averages, each rounded like one; no intermediate value is above the largest batch's.
    u = unit(np.float32)
    assert_within(state["running_mean"], mean, 3 * 4 * 3 * np.abs(s.mean) * u, "running_mean")
    assert_within(state["running_var"], var, 3 * 4 * 9 * s.var * u * 1.1, "running_var")
    assert state["num_batches_tracked"] == 3


def test_a_part_of_the_ranks(results):
    want = bnfast.Moments(4, [0.5] * 3, [1.0] * 3)
    assert results == [want, want, None][: len(results)]


def test_channels_that_differ(results):
    counts = ["3", "4", "3"][: len(results)]
    for raised in results:
        assert raised.kind == "ValueError"
        assert f"have {', '.join(counts)} channels on ranks" in raised.text


def test_layers_that_differ(results):
    for raised, state in results:
        assert raised.kind == "ValueError"
        assert state["num_batches_tracked"] == 0
        assert not state["running_mean"].any()


def test_no_moments_on_one(results):
    assert results[0].kind == "TypeError"
    assert all(other == Raised("RuntimeError", TOLD.format(0)) for other in results[1:])


@pytest.mark.parametrize("name", program.BAD_CALLS)
def test_bad_input_on_one(results, name):
    """All raise, nothing changes, and the next call works on all ranks."""
    *others, (refused, untouched, state) = [result[name] for result in results]
    assert refused.kind in ("TypeError", "ValueError")
    assert untouched
    for raised, kept, _ in others:
        assert raised == Raised("RuntimeError", TOLD.format(len(results) - 1))
        assert kept
    assert state["num_batches_tracked"] == 1
    same_on_all([result[name][2] for result in results])


@pytest.mark.parametrize("name", ["shape", "dtype", "kind"])
def test_bad_state_on_one(results, name):
    first, *others = [result[name] for result in results]
    assert "running_mean" in first.text
    assert all(other == Raised("RuntimeError", TOLD.format(0)) for other in others)


def test_bad_gradient_on_one(results):
    """Then a good backward, to check that the ranks still agree."""
    size = len(results)
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    x = np.concatenate([rows + np.float32(rank) for rank in range(size)])
    _, stats = bnfast.batch_norm_forward(x)
    want = bnfast.batch_norm_backward(x, x, stats).x
    for rank, (raised, weight_grad, dx) in enumerate(results):
        assert isinstance(raised, Raised)
        assert raised.text == TOLD.format(0) or rank == 0
        assert not weight_grad.any()
        # dx is the difference of terms a million times as large. It must be that of one process, up
        # to the roundings of terms of size |dy| * inv_std.
        own = want[4 * rank : 4 * rank + 4]
        bound = 8 * unit(np.float32) * np.abs(x).max() * stats.inv_std.max()
        assert_within(dx, own, bound, "dx")


def test_one_value_in_all(results):
    for raised, state in results:
        assert raised.kind == "ValueError"
        assert raised.text.startswith("Expected more than 1 value per channel when training")
        assert state["num_batches_tracked"] == 0


def test_one_value_each(results):
    got = np.concatenate(results)
    want = bnfast.batch_norm_forward(
        np.repeat(np.arange(len(got), dtype=np.float32), 3).reshape(-1, 3)
    )
    assert bits(got) == bits(want[0])


def test_nothing_at_all(results):
    for y, dx, weight_grad, state in results:
        assert y.shape == dx.shape == (0, 3)
        assert not weight_grad.any()
        assert state["num_batches_tracked"] == 1
        assert not state["running_mean"].any()


def test_not_a_number_on_one(results):
    for y, dx, state in results:
        for found in (y, dx, state["running_mean"][None], state["running_var"][None]):
            finite = np.isfinite(found).all(axis=0)
            assert finite[2]
            assert not finite[0]
        assert not np.isfinite(state["running_var"][1])


def test_evaluation(results):
    assert [len(result) for result in results] == [rank + 1 for rank in range(len(results))]


def test_untouched_statistics(results):
    for rank, (state, y) in enumerate(results):
        assert not state["running_mean"].any()
        assert state["num_batches_tracked"] == 0
        assert np.sign(y).tolist() == [[np.sign(rank - (len(results) - 1) / 2)] * 3] * 2


def test_population_statistics(results):
    """All batches of all ranks are one set of values."""
    state = same_on_all(results)
    x, size = make_problem(program.SHAPES["planar"]).x, len(results)
    cuts = [program.rows_of("uneven", rank, size) for rank in range(size)]
    seen = np.concatenate([part for cut in cuts for part in (x[cut], x[cut][:1])])
    s = moments_of(seen, 1)
    m = wide(seen.size // seen.shape[1])
    u = unit(np.float32)
    assert_within(state["running_mean"], s.mean, s.mean_error + u * np.abs(s.mean), "mean")
    var = s.var * m / (m - 1)
    assert_within(state["running_var"], var, 1.1 * s.var_error + u * var, "variance")


def test_copies(results):
    for result in results:
        assert result["group"]
        assert result["apart"]
        assert bits(result["results"][0]) == bits(result["results"][1])
        assert result["pickled"] == (None, 0.25)


@pytest.mark.parametrize("name", masked_batches.PROBLEMS)
def test_masked_steps(ranks, name):
    """The ranks together equal one process on the whole batch and its masks, to rounding."""
    p, _, _, weights = masked_batches.problem(name, len(ranks))
    of = [rank["masked_steps"][name] for rank in ranks]
    masked_batches.check_step(p, weights, of, program.MOMENTUM)


@pytest.mark.parametrize("mask", masked_batches.TOO_LITTLE, ids=lambda mask: mask.__name__)
def test_masks_that_count_too_little(results, mask):
    found = [rank[mask.__name__] for rank in results]
    for raised, same, state in found:
        assert raised.kind == "ValueError"
        assert raised == found[0][0]
        assert raised.text.startswith(masked_batches.TOO_LITTLE[mask])
        assert same
        assert state["num_batches_tracked"] == 1
    same_on_all([state for *_, state in found])


def test_little_weight_without_statistics(results):
    x = np.concatenate([np.arange(12.0).reshape(4, 3) + rank for rank in range(len(results))])
    mask = np.full(len(x), 0.25 / len(results))
    want, _ = bnfast.batch_norm_forward(x, mask=mask)
    for i, dtype in enumerate((np.float32, np.float64)):
        got = np.concatenate([rank[i] for rank in results])
        assert_within(got, want, 16 * unit(dtype) * np.abs(want).max(), dtype)


def test_little_weight_beside_an_empty_rank(results):
    """Weights of 1 together are not one value."""
    assert not [found for found in results if isinstance(found, Raised)]
    assert results[1].shape == (0, 3)


def test_empty_masks(results):
    """Nothing to count is no mask that counts nothing."""
    for y, dx, state in results:
        assert y.shape == dx.shape == (0, 3, 2)
        assert state["num_batches_tracked"] == 1
        assert not state["running_mean"].any()


def test_moments_of_weights(results):
    mine, found, nothing, rest = zip(*results, strict=True)
    assert all(one == bnfast.Moments.merge_all(mine) for one in found)
    assert all(one == bnfast.Moments.merge_all(nothing) for one in rest)
    assert [type(one.count) for one in mine] == [float] + [int] * (len(mine) - 1)
    assert rest[0].count == nothing[0].count == mine[0].count
    assert type(found[0].count) is float


def test_population_of_masks(results):
    """Each batch of all ranks counts twice: by weights, then by which of these are not 0."""
    state = same_on_all(results)
    (name,) = (n for n in masked_batches.PROBLEMS if "weights, planar, uneven, float64" in n)
    p, _, _, weights = masked_batches.problem(name, len(results))
    whole = masked_batches.Whole(p, weights + (weights > 0))
    for key, want in (("running_mean", whole.mean), ("running_var", whole.var)):
        assert_within(state[key], want, 1e-13 * np.abs(want).max(), key)
    assert state["num_batches_tracked"] == 0


class TestGroups:
    """Tests that need no processes."""

    def test_none_without_a_default(self):
        with pytest.raises(RuntimeError, match="group is None, and there is no default"):
            all_reduce(bnfast.Moments.empty(3))
        with pytest.raises(RuntimeError, match="group is None, and there is no default"):
            SyncBatchNorm(3)(np.ones((2, 3), np.float32))

    @pytest.mark.parametrize("group", [3, "gloo", object()])
    def test_something_else(self, group):
        with pytest.raises(TypeError, match=r"group is .* of type .*; expected a process group"):
            ranks_of(group)

    def test_evaluation_needs_none(self):
        x = np.ones((2, 3), np.float32)
        layer = SyncBatchNorm(3).eval()
        assert bits(layer(x)) == bits(bnfast.BatchNorm(3).eval()(x))

    def test_a_group_without_this_process(self):
        dist = pytest.importorskip("torch.distributed")
        with pytest.raises(ValueError, match="not among its members"):
            ranks_of(dist.GroupMember.NON_GROUP_MEMBER)
