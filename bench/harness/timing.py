"""Time contestants in turn, under the same conditions.

A round times every contestant once. Rounds go through the list forwards and backwards in turn, so
that a slow drift of the machine affects all equally. Before each timed block its contestant runs
once untimed (unless a call takes very long), so that the state of caches and threads is its own
and not the previous contestant's. Calls shorter than a block are repeated within it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BLOCK = 100e-6  # seconds; the cost of reading the clock shows in shorter ones
LONG = 20e-3  # seconds; what the caches held before does not matter to such a call


@dataclass
class Contestant:
    name: str
    calls: list[Callable[[], Any]]  # one for each set of arrays, called in turn
    rest: float = 0.0  # seconds to wait first: for peers with threads other than OpenMP's
    repeats: int = 1
    long: bool = False
    times: dict[int, float] = field(default_factory=dict)  # by round

    def run(self, turn: Iterator[int], repeats: int) -> float:
        calls, sets = self.calls, len(self.calls)
        order = [calls[next(turn) % sets] for _ in range(repeats)]
        start = time.perf_counter()
        for call in order:
            call()
        return (time.perf_counter() - start) / repeats

    def timed(self, turn: Iterator[int]) -> float:
        if self.rest:
            time.sleep(self.rest)
        if not self.long:
            self.run(turn, 1)
        return self.run(turn, self.repeats)


@dataclass
class Timing:
    median: float
    least: float
    rounds: int
    stalls: int  # rounds over twice the median, mostly caused by the scheduler
    paired: float  # median of its time over the first contestant's in the same round


def measure(
    contestants: list[Contestant], rounds: int = 30, budget: float = 1.0, fewest: int = 7
) -> dict[str, Timing]:
    """Time all contestants.

    A slow one skips rounds to stay below `budget` seconds, but takes part in at least `fewest`.
    """
    turn = iter(range(sys.maxsize))
    plans = {c.name: _plan(c, turn, rounds, budget, fewest) for c in contestants}
    with _without_collector():
        for number in range(rounds):
            for contestant in contestants if number % 2 else reversed(contestants):
                if number in plans[contestant.name]:
                    contestant.times[number] = contestant.timed(turn)
    return {c.name: _summary(c, contestants[0]) for c in contestants}


def _plan(c: Contestant, turn: Iterator[int], rounds: int, budget: float, fewest: int) -> set[int]:
    """Return the rounds that a contestant takes part in."""
    c.run(turn, 1)  # the very first call may compile, allocate, start threads
    once = c.run(turn, 1)
    c.long, c.times = once > LONG, {}
    c.repeats = max(1, min(1000, int(BLOCK / once)))
    affordable = int(budget / (once * (1 + c.repeats)))
    return spread(max(fewest, affordable), rounds)


def spread(wanted: int, rounds: int) -> set[int]:
    """Return as many of the rounds as wanted, evenly spaced.

    >>> sorted(spread(3, 9))
    [0, 3, 6]
    """
    if wanted >= rounds:
        return set(range(rounds))
    return {k * rounds // wanted for k in range(wanted)}


def _summary(c: Contestant, first: Contestant) -> Timing:
    times = list(c.times.values())
    median = statistics.median(times)
    paired = statistics.median(t / first.times[k] for k, t in c.times.items() if k in first.times)
    return Timing(median, min(times), len(times), sum(t > 2 * median for t in times), paired)


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Progress:
    """Prints on stderr what is being measured, its number, and the time left."""

    def __init__(self, weights: list[float]) -> None:
        self.weights, self.done = weights, 0
        self.start = time.perf_counter()

    def next(self, what: str) -> None:
        finished = sum(self.weights[: self.done])
        spent = time.perf_counter() - self.start
        left = spent / finished * (sum(self.weights) - finished) if finished else None
        self.done += 1
        self.say(f"[{self.done}/{len(self.weights)}] {what}{_left(left)}")

    @staticmethod
    def say(line: str) -> None:
        """Print a line: over the last one on a terminal, below it in a log."""
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        minutes = (time.perf_counter() - self.start) / 60
        self.say(f"{self.done} measured in {minutes:.1f} minutes")
        print(file=sys.stderr)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f", {minutes} min {rest:02d} s left" if minutes else f", {rest} s left"
