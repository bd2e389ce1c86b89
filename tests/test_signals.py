"""A signal handler's exception leaves a call unchanged; statistics update completely or not at all.

A handler runs between any two steps of Python. A trace function does, too, and at a chosen place:
it raises at each line that a call runs, one after the other. Real signals come at random times.
"""

import gc
import random
import signal
import sys
import time

import numpy as np
import pytest
from cases import bits, with_gaps
from processes import run_alone

import bnfast

X = np.random.default_rng(7).standard_normal((6, 4)).astype(np.float32)
STRIDED = np.random.default_rng(8).standard_normal((6, 4, 3)).astype(np.float32)[::-1]
W = np.array([0.5, 1, 2, 4], np.float32)
STATS = bnfast.batch_norm_forward(X)[1]
MOMENTS = bnfast.moments(X)
FROZEN = bnfast.BatchNorm(4, activation="relu").freeze()
STATE = ("running_mean", "running_var", "num_batches_tracked", "weight_grad", "bias_grad")


class Alarm(Exception):
    """An exception of the caller's own."""


RAISED = (TimeoutError, ValueError, AttributeError, RecursionError, Alarm)


class Sub(np.ndarray):
    pass


# --- Good calls


def layer(**options):
    made = bnfast.BatchNorm(4, **options)
    made.running_mean[:], made.running_var[:] = W, W + 1
    return made


def layer_over(arrange):
    """A layer whose running statistics are updated in copies."""
    made = layer()
    made.running_mean, made.running_var = arrange(made.running_mean), arrange(made.running_var)
    return made


def layer_after_a_forward():
    made = layer()
    made(X)
    return made


LAYERS = {
    "in training": (layer, lambda made: made(X)),
    "of averages": (lambda: layer(momentum=None), lambda made: made(X)),
    "of a subclass": (lambda: layer_over(lambda a: a.view(Sub)), lambda made: made(X)),
    "of gaps": (lambda: layer_over(with_gaps), lambda made: made(X)),
    "of foreign byte order": (lambda: layer_over(lambda a: a.astype(">f4")), lambda made: made(X)),
    "of a list": (layer, lambda made: made(X.tolist(), update_stats=1)),
    "of strided data": (layer, lambda made: made(STRIDED, STRIDED, np.zeros_like(STRIDED))),
    "with a subclass's gradients": (layer_after_a_forward, lambda made: made.backward(X.view(Sub))),
    "in evaluation": (lambda: layer().eval(), lambda made: made(X)),
    "frozen": (layer, lambda made: made.freeze()),
    "reset": (layer, lambda made: made.train(np.True_)),
}  # fmt: skip
FUNCTIONS = {
    "training": lambda: bnfast.batch_norm(X, W.copy(), W.copy(), W, W, True),
    "training by integers": lambda: bnfast.batch_norm(
        X, W.copy(), W.copy(), W, W, 1, 1, 1, axis=np.int64(1), ddof=np.int8(1),
        activation=("leaky_relu", 1)),
    "training by numbers of NumPy's": lambda: bnfast.batch_norm(
        X, W.copy(), W.copy(), W, W, np.True_, np.float32(0.1), np.array(1e-5), axis=np.array(1)),
    "inference": lambda: bnfast.batch_norm(STRIDED, W, W, W.astype(np.float16), W.tolist(), eps=1),
    "forward": lambda: bnfast.batch_norm_forward(X.tolist(), W, W, activation="relu"),
    "backward": lambda: bnfast.batch_norm_backward(
        STRIDED, STRIDED, bnfast.batch_norm_forward(STRIDED)[1], needs=("x", "weight")),
    "normalize": lambda: bnfast.normalize(memoryview(X), W, W, [1.0, 2, 3, 4], (4.0, 3, 2, 1)),
    "scale_shift": lambda: bnfast.scale_shift(STRIDED, W, None, out=np.zeros_like(STRIDED)),
    "frozen": lambda: FROZEN(X[::-1].view(Sub), memoryview(X)),
    "a frozen one": lambda: bnfast.FrozenBatchNorm(W, W.tolist(), W.view(Sub), np.int8(1), "relu"),
    "moments": lambda: bnfast.moments(X.tolist(), axis=np.int64(1)),
    "Moments": lambda: bnfast.Moments(np.int64(3), [1.0, 2], (3.0, 4)).var(1),
    "from_population": lambda: bnfast.BatchStats.from_population(W, W.tolist(), 1),
    "BatchNorm": lambda: bnfast.BatchNorm(np.int64(4), 1, 0, 1, 1, dtype="float64"),
    "BatchNorm of a type": lambda: bnfast.BatchNorm(4, dtype=np.dtype(np.float64)),
    "BatchNorm of a class": lambda: bnfast.BatchNorm(4, dtype=float, activation="relu"),
    "fold": lambda: bnfast.fold(np.ones((4, 2)), None, FROZEN_LINEAR, out_axis=np.int8(0)),
}  # fmt: skip
FROZEN_LINEAR = bnfast.BatchNorm(4).freeze()
# Refused calls: making the error message must not swallow an alarm either.
REFUSED = {
    "a text for eps": lambda: bnfast.batch_norm_forward(X, eps="1"),
    "a list for eps": lambda: bnfast.batch_norm_forward(X, eps=[1.0] * 50),
    "an endless integer for eps": lambda: bnfast.batch_norm_forward(X, eps=10**5000),
    "a number for axis": lambda: bnfast.moments(X, axis=1.0),
    "an array for training": lambda: bnfast.batch_norm(X, W, W, training=np.ones(3)),
    "ragged data": lambda: bnfast.moments([[1, 2], [3]]),
    "text for a dtype": lambda: bnfast.BatchNorm(4, dtype="foo"),
}  # fmt: skip


def state(made):
    """The state that a call of a layer may change; nothing for other calls."""
    return [bits(a) for name in STATE if (a := getattr(made, name, None)) is not None]


# --- An exception at each place


class At:
    """Raises this exception at the nth line of others' code, in any function."""

    def __init__(self, n, error=None):
        self.n, self.error, self.places = n, error, 0

    def __enter__(self):
        gc.disable()  # what others have called at a collection is not part of the call
        self.found = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *raised):
        sys.settrace(self.found)
        gc.enable()

    def trace(self, frame, event, argument):
        if frame.f_globals is globals():
            return self.trace  # lines of this file
        if event == "line":
            self.places += 1
            if self.places == self.n:
                raise self.error
        return self.trace


def places(call, *given):
    """The number of lines that a call runs, after the first use has made everything."""
    for _ in range(2):
        with At(0) as counted:
            try:
                call(*given)
            except (TypeError, ValueError):
                assert call in REFUSED.values()
    return counted.places


def raised_at(n, error, call, *given):
    """What a call raises if this exception is raised at its nth line."""
    try:
        with At(n, error):
            call(*given)
    except Exception as caught:  # noqa: BLE001
        return caught
    return None


@pytest.mark.parametrize("call", [*FUNCTIONS.values(), *REFUSED.values()],
                         ids=[*FUNCTIONS, *REFUSED])  # fmt: skip
def test_signal_exception_passes_through(call):
    for kind in RAISED:
        for n in range(1, places(call) + 1):
            alarm = kind("raised by a handler")
            assert raised_at(n, alarm, call) is alarm, n


@pytest.mark.parametrize(("make", "call"), LAYERS.values(), ids=LAYERS)
def test_layer_updates_completely_or_not_at_all(make, call):
    after = make()
    call(after)
    for kind in (TimeoutError, ValueError, Alarm):
        for n in range(1, places(call, make()) + 1):
            made, alarm = make(), kind("raised by a handler")
            before = state(made)
            assert raised_at(n, alarm, call, made) is alarm, n
            assert state(made) in (before, state(after)), n


def test_moments_update_completely_or_not_at_all():
    after = bnfast.moments(X).update(X)
    for n in range(1, places(bnfast.moments(X).update, X) + 1):
        total, alarm = bnfast.moments(X), Alarm("raised by a handler")
        assert raised_at(n, alarm, total.update, X) is alarm, n
        assert total in (MOMENTS, after)


# --- Real signals


def ring(make, call, times):
    """Call under an alarm that comes at some time during most calls."""
    drawn, waiting = random.Random(1), False

    def handle(number, frame):
        if waiting:
            raise TimeoutError("raised by a handler")

    signal.signal(signal.SIGALRM, handle)
    begun = time.perf_counter()
    for _ in range(20):
        after = make()
        call(after)
    last = (time.perf_counter() - begun) / 20
    before, after = state(make()), state(after)
    for _ in range(times):
        made = make()
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + drawn.random() * last)
        try:  # no context manager, since an alarm may come inside one
            waiting = True
            try:
                call(made)
            finally:
                waiting = False
        except TimeoutError:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert state(made) in (before, after)


def ring_all(times):
    for make, call in LAYERS.values():
        ring(make, call, times)
    for call in FUNCTIONS.values():
        ring(lambda: None, lambda made, call=call: call(), times)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarms")
def test_real_signals():
    run_alone(ring_all, 500)
