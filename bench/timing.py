"""Contestants measured in turn, under the same conditions.

A round times every contestant once, forwards and then backwards through the list, so that a slow
drift of the machine falls on all alike. Before each timed block its own contestant runs once,
untimed (unless it takes very long): what caches hold and whether threads are awake is then its
own doing and not that of whoever ran before. Calls shorter than a block are repeated within it.
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

BLOCK = 100e-6  # seconds: shorter and the clock itself shows
LONG = 20e-3  # a call after which what was in caches before it is of no account


@dataclass
class Contestant:
    name: str
    calls: list[Callable[[], Any]]  # one a set of arrays: in turn, so that none is still cached
    rest: float = 0.0  # seconds to wait first: for those whose threads are not OpenMP's
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
    stalls: int  # rounds over twice the median: the scheduler's
    paired: float  # the median of its time over the first contestant's in the same round


def measure(
    contestants: list[Contestant], rounds: int = 30, budget: float = 1.0, fewest: int = 7
) -> dict[str, Timing]:
    """Time all contestants.

    The slow ones sit rounds out to stay below `budget` seconds each, all but `fewest`.
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
    """The rounds that a contestant takes part in."""
    c.run(turn, 1)  # the first call of all may compile, allocate, start threads
    once = c.run(turn, 1)
    c.long, c.times = once > LONG, {}
    c.repeats = max(1, min(1000, int(BLOCK / once)))
    affordable = int(budget / (once * (1 + c.repeats)))
    return spread(max(fewest, affordable), rounds)


def spread(wanted: int, rounds: int) -> set[int]:
    """As many of the rounds as wanted, evenly spaced.

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
    """Says on stderr what is being measured, as how many of how many, and the time left."""

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
        """Over the last line on a terminal, below it in a log."""
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
