"""If one rank cannot do a call, no rank does it: PyTorch's tensors and gloo."""

import sys

import numpy as np
import pytest
from cases import bits
from judged import AT_FAULT, check_interrupted, check_raised, check_whole
from launch import LAUNCHES, launch
from numpy_refusals import MOMENTUM, gradient, rows

torch = pytest.importorskip("torch")

import torch_refusals as program  # noqa: E402

SIZES = [size for transport, size in LAUNCHES if transport == "torch"]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"gloo-{size}")
def ranks(request, tmp_path_factory):
    """The results of each scenario: a list of dicts, by rank."""
    return launch("torch_refusals", "torch", request.param, tmp_path_factory.mktemp("torch"))


class Step:
    """The steps that all ranks together must have made, computed by PyTorch in one process."""

    def __init__(self, size):
        self.size, self.layer = size, torch.nn.BatchNorm1d(3, momentum=MOMENTUM)

    def whole(self, part, *batch):
        return torch.from_numpy(np.concatenate([part(rank, *batch) for rank in range(self.size)]))

    def forward(self, batch=0):
        self.x = self.whole(rows, batch).requires_grad_()
        self.y = self.layer(self.x)
        return self.y.detach().numpy()

    def backward(self):
        self.y.backward(self.whole(gradient))
        return self.x.grad.numpy()


def check_states(states, step, batches):
    for state in states:
        for name, value in state.items():
            assert bits(value) == bits(states[0][name])
            want = step.layer.state_dict()[name].numpy()
            np.testing.assert_allclose(value, want, rtol=1e-5)
        assert state["num_batches_tracked"] == batches


def check_step(y, dx, states):
    step = Step(len(y))
    check_whole(y, step.forward())
    check_whole(dx, step.backward())
    check_states(states, step, 1)


@AT_FAULT
@pytest.mark.parametrize("name", program.FORWARD)
def test_forward(ranks, name, bad):
    """Statistics and counters stay; the next call works on all ranks."""
    found = [rank["forward"][name, bad] for rank in ranks]
    raised, same, y, refused, states = zip(*found, strict=True)
    check_raised(raised, bad, program.FORWARD[name][1])
    assert all(same)
    step = Step(len(ranks))
    step.forward()
    check_states(refused, step, 1)
    want = step.forward(1) + step.whole(rows, 2).numpy()
    check_whole(y, want)
    check_states(states, step, 2)


@AT_FAULT
@pytest.mark.parametrize("name", program.BACKWARD)
def test_backward(ranks, name, bad):
    found = [rank["backward"][name, bad] for rank in ranks]
    raised, same, *good = zip(*found, strict=True)
    check_raised(raised, bad, program.BACKWARD[name][1])
    assert all(same)
    check_step(*good)


@AT_FAULT
def test_hooks_that_raise(ranks, bad):
    found = [rank["hooks_that_raise"][bad] for rank in ranks]
    kept, read, after, *good = zip(*found, strict=True)
    assert [error and error.kind for error in kept] == [
        "KeyboardInterrupt" if rank == bad else None for rank in range(len(ranks))
    ]
    check_raised(read, bad, "KeyboardInterrupt: ")
    step = Step(len(ranks))
    step.forward()
    check_states(after, step, 1)
    check_step(*good)


@AT_FAULT
def test_interrupted(ranks, bad):
    """In the first gather the others are told; in a backward's only gather they cannot be."""
    found = [rank["interrupted"][bad] for rank in ranks]
    raised, after, states, raised_back, *good = zip(*found, strict=True)
    assert not check_interrupted(raised, bad)
    step = Step(len(ranks))
    check_states(after, step, 0)
    step.forward()
    check_states(states, step, 1)
    check_interrupted(raised_back, bad)
    check_step(*good)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
@AT_FAULT
def test_memory_that_runs_out(ranks, bad):
    found = [rank["memory_that_runs_out"][bad] for rank in ranks]
    forward, same, backward, untouched, *good = zip(*found, strict=True)
    for raised in (forward, backward):
        check_raised(raised, bad, "RuntimeError: ")
        assert "can't allocate memory" in raised[bad].text
    assert all(same)
    assert all(untouched)
    check_step(*good)
