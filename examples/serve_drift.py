"""What a service was asked, beside its training data: have the inputs moved?

The processes of a service share one `Moments` of their inputs. It is merged with those of each
request: a count, and a mean and a sum of squares per input, whatever the number of requests.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

import bnfast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from digits import Floats

WORST = 5


class Watch:
    """Moments of all requests since the start, or since they were last forgotten.

    They are in a file without a name, which forked processes share. One write of 1 kB replaces
    them, so a process that is killed has done all of it or nothing; and the system releases its
    lock, which it does not do for locks of `multiprocessing`.
    """

    def __init__(self, training: bnfast.Moments) -> None:
        self.training = training
        self.lock = threading.Lock()  # the file's is between processes only
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the service runs
        self.write(time.time(), bnfast.Moments.empty(len(training.mean)))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads and processes out."""
        with self.lock:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self.file, fcntl.LOCK_UN)

    def read(self) -> tuple[float, bnfast.Moments]:
        channels = len(self.training.mean)
        numbers = np.frombuffer(os.pread(self.file.fileno(), 8 * (2 + 2 * channels), 0))
        since, count, values = numbers[0], int(numbers[1]), numbers[2:].reshape(2, channels)
        return float(since), bnfast.Moments(count, *values)

    def write(self, since: float, seen: bnfast.Moments) -> None:
        numbers = np.concatenate([[since, seen.count], seen.mean, seen.m2])
        os.pwrite(self.file.fileno(), numbers.tobytes(), 0)

    def add(self, inputs: Floats) -> None:
        """Add the rows of a request."""
        asked = bnfast.moments(inputs)
        with self.alone():
            since, seen = self.read()
            self.write(since, seen + asked)

    def report(self, forget: bool = False) -> dict[str, Any]:
        """Return how far the inputs have moved; then start again, if told so."""
        with self.alone():
            since, seen = self.read()
            if forget:
                self.write(time.time(), bnfast.Moments.empty(len(seen.mean)))
        report: dict[str, Any] = {"count": seen.count, "seconds": round(time.time() - since, 3)}
        if not seen.count:
            return report | {"worst": [], "kl_divergence": [], "mean_difference": []}
        moved = bnfast.drift(self.training, seen)
        order = np.argsort(-moved.kl_divergence, kind="stable")[:WORST]
        lists = {name: finite(values) for name, values in moved._asdict().items()}
        worst = [{"input": int(i)} | {name: lists[name][i] for name in lists} for i in order]
        return report | {"worst": worst} | lists


def finite(values: Floats) -> list[float | None]:
    """Return numbers for JSON, which has no infinity: that becomes null."""
    return [float(value) if np.isfinite(value) else None for value in values]
