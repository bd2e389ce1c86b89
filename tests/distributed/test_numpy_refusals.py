"""If one rank cannot do a call, no rank does it: NumPy arrays, torch.distributed and MPI."""

import sys

import numpy as np
import numpy_refusals as program
import pytest
from cases import bits
from judged import AT_FAULT, check_interrupted, check_raised, check_whole
from launch import LAUNCHES, launch

import bnfast


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda way: f"{way[0]}-{way[1]}")
def ranks(request, tmp_path_factory):
    """The results of each scenario: a list of dicts, by rank."""
    transport, size = request.param
    return launch("numpy_refusals", transport, size, tmp_path_factory.mktemp(transport))


class Step:
    """The step that all ranks together must have made, computed in one process."""

    def __init__(self, size, residual=False, **options):
        self.size, self.residual = size, residual
        self.layer = bnfast.BatchNorm(3, **options)

    def whole(self, part, *batch):
        return np.concatenate([part(rank, *batch) for rank in range(self.size)])

    def forward(self, batch=0):
        residual = self.whole(program.rows, 2) if self.residual else None
        return self.layer(self.whole(program.rows, batch), residual)

    def backward(self):
        return self.layer.backward(self.whole(program.gradient))


def check_states(states, layer, batches):
    for state in states:
        assert {name: bits(a) for name, a in state.items()} == {
            name: bits(a) for name, a in states[0].items()
        }
        assert state["num_batches_tracked"] == batches
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(state[name], getattr(layer, name), rtol=1e-5)


@AT_FAULT
@pytest.mark.parametrize("name", program.FORWARD)
def test_forward(ranks, name, bad):
    """Statistics, counters, gradients and outputs stay; the next call works on all ranks."""
    raised, same, y, states = zip(*(rank["forward"][name, bad] for rank in ranks), strict=True)
    check_raised(raised, bad, program.FORWARD[name][1])
    assert all(same)
    step = Step(len(ranks), residual=True, momentum=program.MOMENTUM)
    step.forward()
    check_whole(y, step.forward(1))
    check_states(states, step.layer, 2)


@AT_FAULT
@pytest.mark.parametrize("name", program.BACKWARD)
def test_backward(ranks, name, bad):
    found = [rank["backward"][name, bad] for rank in ranks]
    raised, same, dx, dresidual, grads, states = zip(*found, strict=True)
    check_raised(raised, bad, program.BACKWARD[name][1])
    assert all(same)
    step = Step(len(ranks), residual=True, momentum=program.MOMENTUM)
    step.forward()
    want = step.backward()
    check_whole(dx, want[0])
    check_whole(dresidual, want[1])
    weight_grad, bias_grad = map(sum, zip(*grads, strict=True))
    np.testing.assert_allclose(weight_grad, step.layer.weight_grad, rtol=1e-5)
    np.testing.assert_allclose(bias_grad, step.layer.bias_grad, rtol=1e-5)
    step.forward(1)
    check_states(states, step.layer, 2)


@AT_FAULT
def test_overwritten_input(ranks, bad):
    found = [rank["overwritten_input"][bad] for rank in ranks]
    raised, untouched, dx = zip(*found, strict=True)
    check_raised(raised, bad, "RuntimeError: backward after a forward with out=x")
    assert all(untouched)
    step = Step(len(ranks))
    step.forward()
    check_whole(dx, step.backward())


@AT_FAULT
@pytest.mark.parametrize("name", program.ALL_REDUCE)
def test_moments_of_all(ranks, name, bad):
    raised, merged = zip(*(rank["moments_of_all"][name, bad] for rank in ranks), strict=True)
    check_raised(raised, bad, program.ALL_REDUCE[name][1])
    parts = [bnfast.moments(program.rows(rank)) for rank in range(len(ranks))]
    assert all(found == bnfast.Moments.merge_all(parts) for found in merged)


def test_too_many_values_together(ranks):
    found = [rank["too_many_values_together"] for rank in ranks]
    size = len(ranks)
    for raised, most in found:
        assert raised == found[0][0]
        assert raised.kind == "ValueError"
        assert f"{size * 2**62} together; expected at most {2**63 - 1}" in raised.text
        assert most.count == size * ((2**63 - 1) // size)


def test_options_read_once(ranks):
    y, mean, var = zip(*(rank["options_read_once"] for rank in ranks), strict=True)
    step = Step(
        len(ranks), eps=0.5, momentum=program.MOMENTUM, ddof=0, activation=("leaky_relu", 0.25)
    )
    step.layer.weight[...] = [1, 2, 3]
    check_whole(y, step.forward())
    for one in zip(mean, var, strict=True):
        np.testing.assert_allclose(one[0], step.layer.running_mean, rtol=1e-5)
        np.testing.assert_allclose(one[1], step.layer.running_var, rtol=1e-5)


@AT_FAULT
def test_numbers_that_raise(ranks, bad):
    found = [rank["numbers_that_raise"][bad] for rank in ranks]
    finite, states, tiny = zip(*found, strict=True)
    assert all(finite)
    for state in states:
        assert {name: bits(a) for name, a in state.items()} == {
            name: bits(a) for name, a in states[0].items()
        }
        assert np.isinf(state["running_var"]).all()
    assert all(state["num_batches_tracked"] == 1 for state in tiny)
    assert all(bits(state["running_mean"]) == bits(tiny[0]["running_mean"]) for state in tiny)


def test_types_that_differ(ranks):
    found = [rank["types_that_differ"] for rank in ranks]
    y, dx, mean = zip(*found, strict=True)
    assert [part.dtype for part in y] == [np.float64] + [np.float32] * (len(ranks) - 1)
    assert [part.dtype for part in mean] == [part.dtype for part in y]
    step = Step(len(ranks))
    check_whole(y, step.forward())
    check_whole(dx, step.backward())
    for one in mean:
        np.testing.assert_allclose(one, step.layer.running_mean, rtol=1e-5)


@AT_FAULT
def test_a_bad_batch_of_recomputing(ranks, bad):
    found = [rank["a_bad_batch_of_recomputing"][bad] for rank in ranks]
    raised, same, states = zip(*found, strict=True)
    check_raised(raised, bad, "ValueError: x has shape (4, 2)")
    assert all(same)
    step = Step(len(ranks))
    whole = [step.whole(program.rows, batch) for batch in (0, 1)]
    bnfast.recompute_statistics(step.layer, whole, [step.layer])
    check_states(states, step.layer, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
@AT_FAULT
def test_memory_that_runs_out(ranks, bad):
    found = [rank["memory_that_runs_out"][bad] for rank in ranks]
    forward, same, backward, untouched, y, dx = zip(*found, strict=True)
    check_raised(forward, bad, "MemoryError: ")
    check_raised(backward, bad, "MemoryError: ")
    assert all(same)
    assert all(untouched)
    step = Step(len(ranks))
    check_whole(y, step.forward())
    check_whole(dx, step.backward())


@AT_FAULT
def test_interrupted(ranks, bad):
    """In the first gather the others are told; in a backward's only gather they cannot be."""
    found = [rank["interrupted"][bad] for rank in ranks]
    raised, after_one, states, raised_back, dx = zip(*found, strict=True)
    step = Step(len(ranks), momentum=program.MOMENTUM)
    assert not check_interrupted(raised, bad)
    check_states(after_one, step.layer, 0)
    want = step.forward()
    check_states(states, step.layer, 1)
    assert want.shape[0] == 4 * len(ranks)
    check_interrupted(raised_back, bad)
    check_whole(dx, step.backward())


@AT_FAULT
def test_interrupted_between_gathers(ranks, bad):
    """Statistics changed on all ranks or on none, also on the interrupted one."""
    found = [rank["interrupted_between_gathers"][bad] for rank in ranks]
    raised, after_one, states = zip(*found, strict=True)
    step = Step(len(ranks), momentum=program.MOMENTUM)
    gone_on = check_interrupted(raised, bad)
    if gone_on:
        step.forward()
    check_states(after_one, step.layer, int(gone_on))
    step.forward()
    check_states(states, step.layer, 1 + gone_on)
