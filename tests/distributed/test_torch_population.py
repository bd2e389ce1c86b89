"""`bnfast.torch.recompute_statistics` over real processes: one data set, the same bits on all."""

import numpy as np
import pytest
from cases import bits
from judged import AT_FAULT, check_raised
from launch import LAUNCHES, launch
from wide import wide

torch = pytest.importorskip("torch")

import population_program as program  # noqa: E402

from bnfast.torch import recompute_statistics  # noqa: E402

SIZES = [size for transport, size in LAUNCHES if transport == "torch"]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"gloo-{size}")
def ranks(request, tmp_path_factory):
    """The results of each scenario: a list of dicts, by rank."""
    return launch("population_program", "torch", request.param, tmp_path_factory.mktemp("torch"))


def check_states(states, batches):
    """All bits are equal; the first layer has the whole's, the second's are as in one process."""
    for name, value in states[0].items():
        assert all(bits(state[name]) == bits(value) for state in states)
    x = program.data().numpy()
    seen = np.moveaxis(wide(x), 1, 0).reshape(3, -1)
    np.testing.assert_allclose(states[0]["0.running_mean"], seen.mean(1).astype(float), rtol=1e-12)
    np.testing.assert_allclose(
        states[0]["0.running_var"], seen.var(1, ddof=1).astype(float), rtol=1e-12
    )
    alone = program.network()
    recompute_statistics(alone, batches)
    for name, value in program.state_of(alone).items():
        np.testing.assert_allclose(states[0][name], value, rtol=1e-9, atol=1e-12)


def all_batches(size):
    return [batch for rank in range(size) for batch in program.batches_of(rank, size)]


def test_statistics(ranks):
    check_states([rank["statistics"] for rank in ranks], all_batches(len(ranks)))


def test_a_rank_without_batches(ranks):
    states = [rank["a_rank_without_batches"] for rank in ranks]
    check_states(states, list(program.data().split(11)))


@AT_FAULT
@pytest.mark.parametrize("name", program.REFUSALS)
def test_refusals(ranks, name, bad):
    raised, same, states = zip(*(rank["refusals"][name, bad] for rank in ranks), strict=True)
    check_raised(raised, bad, program.REFUSALS[name][1])
    assert all(same)
    check_states(states, all_batches(len(ranks)))


def test_nobody_has_values(ranks):
    for rank in ranks:
        error, same = rank["nobody_has_values"]
        assert error.kind == "RuntimeError"
        assert error.text.startswith("0 saw no values")
        assert same


def test_other_layers(ranks):
    for rank in ranks:
        assert rank["other_layers"].kind == "ValueError"
        assert "expected the same number on all" in rank["other_layers"].text


def test_a_part_of_the_ranks(ranks):
    states = [rank["a_part_of_the_ranks"] for rank in ranks[:2]]
    check_states(states, [program.data()[0::2], program.data()[1::2]])
    assert all(rank["a_part_of_the_ranks"] is None for rank in ranks[2:])


def test_masks(ranks):
    """What all ranks count, each by its own mask."""
    size = len(ranks)
    weights = program.weights()
    for rank in range(1, size):
        weights[rank::size] = weights[rank::size] > 0 if rank == 1 else 1
    x = np.moveaxis(wide(program.data().numpy()), 1, -1)
    w = weights[..., None]
    mean = (w * x).sum((0, 1, 2)) / w.sum()
    var = (w * (x - mean) ** 2).sum((0, 1, 2)) / (w.sum() - 1)
    for i in range(2):
        states = [rank["masks"][i] for rank in ranks]
        for name, value in states[0].items():
            assert all(bits(state[name]) == bits(value) for state in states)
        for name, want in (("running_mean", mean), ("running_var", var)):
            got = states[0][f"norm.{name}"]
            np.testing.assert_allclose(got, want.astype(float), rtol=1e-12)


def test_masks_of_little_weight(ranks):
    """0.25 on each rank: no variance over count - 1 is left, on any rank."""
    for rank in ranks:
        error, same = rank["masks_of_little_weight"]
        assert error.kind == "ValueError"
        assert error.text.startswith("norm saw values whose weights sum to 0.")
        assert same
