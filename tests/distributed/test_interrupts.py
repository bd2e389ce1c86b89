"""After an exception between any two steps of one rank, the ranks still agree.

Signal handlers may raise anywhere in Python code. Here ranks are threads. A tracer raises before
each instruction in turn, and after each exception the ranks make a good call.
"""

import sys
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from cases import bits

import bnfast
from bnfast import distributed
from bnfast.distributed import Ranks, SyncBatchNorm, all_reduce

FOLDER = str(Path(distributed.__file__).parent)  # calls of functions from elsewhere are one step
SIZE = 2


def trace_instructions():
    """Python 3.12.1 traces them only for tracers that are set after a frame has asked for it."""
    sys._getframe().f_trace_opcodes = True


trace_instructions()


class Interrupt(BaseException):
    """An exception that no code expects."""


class Meeting:
    """A gather between threads: complete, or not begun."""

    def __init__(self):
        self._barrier = threading.Barrier(SIZE, timeout=120)  # a machine may pause
        self._sent = [None] * SIZE

    def ranks(self, rank):
        def gather(mine, rows):
            self._sent[rank] = mine.copy()
            self._barrier.wait()
            rows[...] = np.stack(self._sent)  # raises if one rank is at another gather
            self._barrier.wait()

        return Ranks(SIZE, gather)


class Tracer:
    """Raises before the n-th instruction after an exchange began."""

    def __init__(self, n):
        self._left, self._begun, self.raised = n, False, False

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        # Python throws away what is raised while it closes a generator that was not run to its end
        # (`any` leaves one), and since 3.12 there are instructions of the generator's in between.
        closing = event == "exception" and argument[0] is GeneratorExit
        frame.f_trace_opcodes = not closing
        if event == "return" and frame.f_code.co_name == "__enter__":
            self._begun = True
        elif event == "opcode" and self._begun and not self.raised:
            self._left -= 1
            if self._left < 0:
                self.raised = True
                # A tracer that raises is gone, and Python 3.12.1 crashes if it looks for it.
                while frame is not None:
                    frame.f_trace_opcodes = False
                    frame = frame.f_back
                raise Interrupt
        return self


def together(calls, tracer=None):
    """Return what each rank's call returns or raises; the first one's is traced."""
    found = [None] * len(calls)

    def run(rank):
        if tracer is not None:
            # A thread that is not traced turns instructions off in the functions that it shares
            # with one that is (3.13).
            sys.settrace(Tracer(sys.maxsize) if rank else tracer)  # only for this thread
        try:
            found[rank] = calls[rank]()
        except BaseException as error:  # noqa: BLE001  # the tests compare it
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def meeting(monkeypatch):
    """Use the ranks themselves as groups."""
    for module in ("layer", "merging"):
        monkeypatch.setattr(f"bnfast.distributed.{module}.ranks_of", lambda group: group)
    return Meeting()


def every_interrupt(make, call):
    """Yield, for an interrupt at each instruction, what `make` made and what its calls gave."""
    for n in count():
        made, tracer = make(), Tracer(n)
        found = together([lambda one=one: call(one) for one in made], tracer)
        if not tracer.raised:
            assert n > 100, "nothing was traced"
            return
        assert type(found[0]) is Interrupt
        yield made, found


X = [np.arange(6, dtype=np.float32).reshape(2, 3) ** 2 + rank for rank in range(SIZE)]


def layers(meeting):
    made = [SyncBatchNorm(3, group=meeting.ranks(rank), activation="relu") for rank in range(SIZE)]
    for rank, layer in enumerate(made):
        layer.x = X[rank]
    return made


def states(made):
    return [{name: bits(value) for name, value in one.state_dict().items()} for one in made]


def told(error):
    return isinstance(error, RuntimeError) and "rank 0 could not take part" in str(error)


def test_of_a_forward(meeting):
    """Statistics changed on all ranks or on none, and the next batch changes them on all."""
    good, afterwards = layers(meeting), []
    fresh = states(good)
    for _ in range(2):
        want = together([lambda layer=layer: layer(layer.x) for layer in good])
        afterwards.append(states(good))
    refused = taken = 0
    for made, (_, other) in every_interrupt(lambda: layers(meeting), lambda layer: layer(layer.x)):
        moved = not isinstance(other, Exception)
        assert moved or told(other)
        assert states(made) == (afterwards[0] if moved else fresh)
        got = together([lambda layer=layer: layer(layer.x) for layer in made])
        assert states(made) == afterwards[moved]
        assert [bits(y) for y in got] == [bits(y) for y in want]
        refused, taken = refused + (not moved), taken + moved
    assert refused > 100
    assert taken > 100


def test_of_a_backward(meeting):
    def made():
        new = layers(meeting)
        together([lambda layer=layer: layer(layer.x) for layer in new])
        return new

    good = made()
    want = together([lambda layer=layer: layer.backward(layer.x) for layer in good])
    refused = taken = 0
    for new, (_, other) in every_interrupt(made, lambda layer: layer.backward(layer.x)):
        done = not isinstance(other, Exception)
        assert done or told(other)
        assert done or not new[1].weight_grad.any()
        got = together([lambda layer=layer: layer.backward(layer.x) for layer in new])
        assert [bits(dx) for dx in got] == [bits(dx) for dx in want]
        refused, taken = refused + (not done), taken + done
    assert refused > 100
    assert taken > 10


def test_of_all_reduce(meeting):
    groups = [meeting.ranks(rank) for rank in range(SIZE)]
    mine = [bnfast.moments(x) for x in X]

    def call(rank):
        return all_reduce(mine[rank], groups[rank])

    want = bnfast.Moments.merge_all(mine)
    for _, (_, other) in every_interrupt(lambda: range(SIZE), call):
        assert told(other) or other == want
        assert together([lambda rank=rank: call(rank) for rank in range(SIZE)]) == [want] * SIZE
