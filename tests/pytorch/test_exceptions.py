"""Exceptions of a user's code or a signal handler inside a call are passed on unchanged."""

import signal

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import bnfast.torch
from bnfast.torch import _aten

ERRORS = pytest.mark.parametrize("kind", [TimeoutError, KeyError, KeyboardInterrupt])


@pytest.fixture
def interrupt(kind):
    """A function whose call ends in an exception from a signal handler."""
    error = kind("the user's")

    def handler(*args):
        raise error

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda *args, **options: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


class Calls(nn.Module):
    """A module that calls a function, then returns its input."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        self.call()
        return x


def in_a_forward(layer, interrupt):
    return nn.Sequential(layer, Calls(interrupt))


def in_a_hook(layer, interrupt):
    layer.register_forward_pre_hook(interrupt)
    return layer


def in_a_parameter(layer, interrupt):
    # Without `unsafe` it would be called here.
    parametrize.register_parametrization(layer, "weight", Calls(interrupt), unsafe=True)
    return layer


@ERRORS
@pytest.mark.parametrize("place", [in_a_forward, in_a_hook, in_a_parameter])
def test_from_the_users_code(place, kind, interrupt):
    model = place(bnfast.torch.BatchNorm2d(3), interrupt)
    with pytest.raises(kind, match="the user's"):
        model(torch.randn(4, 3, 2, 2))


@ERRORS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rest", [(), (None, "relu")], ids=["", "relu"])
def test_from_the_middle_of_a_forward(rest, training, kind, interrupt):
    """Called by PyTorch itself: a mode that every operator calls."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.nn.functional.batch_norm, torch.ops.bnfast.batch_norm_act):
                interrupt()
            return function(*args, **(kwargs or {}))

    layer = bnfast.torch.BatchNorm2d(3).train(training)
    running = layer.running_mean.clone(), layer.running_var.clone()
    with pytest.raises(kind, match="the user's"), Mode():
        layer(torch.randn(4, 3, 2, 2), *rest)
    assert torch.equal(layer.running_mean, running[0])
    assert torch.equal(layer.running_var, running[1])
    _aten.forget_counts()
    nn.BatchNorm2d(3)(torch.randn(4, 3, 2, 2))
    assert _aten.counts()[0] == {}, "the thread still runs everything here"
