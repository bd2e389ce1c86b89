"""A forward whose batch is on all ranks: its arguments, and what follows the exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnfast import _core
from bnfast.functional import BatchStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnfast import _arrays
    from bnfast._types import Activation, Array, Tensor, Vector
    from bnfast.moments import Moments

    from .merging import Counted


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
                write(_core.moved_average(old, new, self.momentum))
        if self.count_batch is not None:
            self.count_batch()


class ForwardCall(NamedTuple):
    """A training forward with all its arguments read and checked, and memory for its result."""

    x: Tensor
    residual: Tensor | None
    canonical: _arrays.Canonical
    target: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: Activation
    observer: Callable[[Moments], None] | None
    move: Move | None
    mine: Moments
    mask: Array | None
    counted: Counted | None

    def finish(self, batch: Moments) -> tuple[Tensor, BatchStats]:
        """Return the output, and the statistics that it was normalised with."""
        if self.observer is not None:
            with np.errstate(all="ignore"):
                self.observer(batch)
        y, (count, mean, var, inv_std) = _core.forward(
            self.canonical.x,
            None,
            None,
            self.weight,
            self.bias,
            0.0,
            self.eps,
            self.canonical.axis,
            1,
            self.canonical.residual,
            self.activation,
            self.target,
            moments=(batch.count, batch.mean, batch.m2),
            mask=self.mask,
        )
        return self.canonical.write_back(y), BatchStats(mean, var, inv_std, count)
