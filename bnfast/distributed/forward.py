"""A forward whose batch is on all ranks: the running update and the output, written by hand.

They are written out here because `_core.forward` takes the moments of `x` alone, not those of a
batch that `x` is a part of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnfast import _arrays, _core, _options
from bnfast.functional import BatchStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnfast._types import Activation, Tensor, Vector
    from bnfast.moments import Moments


class Move(NamedTuple):
    """The running update of one batch, from the old values: doing it twice is as doing it once."""

    # For mean and variance: a function that writes new values, and the old values.
    running: Sequence[tuple[Callable[[Vector], object], Vector]]
    momentum: float
    ddof: int
    # Adds the batch to the counter.
    count_batch: Callable[[], object] | None

    def __call__(self, batch: Moments) -> None:
        """Write the new running statistics and count the batch."""
        if self.running and batch.count:
            for (write, old), new in zip(
                self.running, (batch.mean, batch.var(self.ddof)), strict=True
            ):
                write((1 - self.momentum) * old + self.momentum * new)
        if self.count_batch is not None:
            self.count_batch()


def plain_activation(value: Any) -> Activation:
    """Return an activation as a plain str or tuple: using these runs no code of the caller."""
    return _options.plain_activation(value, _core.ACTIVATIONS)


class ForwardCall(NamedTuple):
    """A training forward with all its arguments read and checked, and memory for its result."""

    x: Tensor
    residual: Tensor | None
    seen: _arrays.Canonical
    target: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: Activation
    observer: Callable[[Moments], None] | None
    move: Move | None
    mine: Moments

    def finish(self, batch: Moments) -> tuple[Tensor, BatchStats]:
        """Return the output, and the statistics that it was normalised with."""
        with np.errstate(all="ignore"):
            var = batch.var()
            stats = BatchStats(batch.mean, var, 1 / np.sqrt(var + self.eps), batch.count)
            if self.observer is not None:
                self.observer(batch)
        _core.normalize(
            self.seen.x,
            batch.mean,
            var,
            self.weight,
            self.bias,
            self.eps,
            self.seen.axis,
            self.seen.residual,
            self.activation,
            self.target,
        )
        return self.seen.give(self.target), stats
