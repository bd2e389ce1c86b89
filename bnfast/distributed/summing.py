"""The gradients of weight and bias, summed over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .exchange import REFUSED, UNSENT, Exchange, refusal_of

if TYPE_CHECKING:
    from bnfast._types import Vector

    from .ranks import Ranks


class Summing(Exchange):
    """The sum of all ranks' gradients of weight and bias, in the order of ranks.

    One gather: the forward before it has already checked that all ranks have the same channels.
    """

    def __init__(self, ranks: Ranks, channels: int) -> None:
        self._ranks = ranks
        self._rows = np.full((ranks.size, 1 + 2 * channels), float(UNSENT))

    def summed(self, weight: Vector, bias: Vector) -> tuple[Vector, Vector]:
        """Return the sums of all ranks' `weight` and `bias`."""
        self._ranks.gather(np.concatenate([[0.0], weight, bias]), self._rows)
        if refusal := refusal_of(self._rows[:, 0].tolist()):
            raise refusal
        total = self._rows[0, 1:]
        with np.errstate(all="ignore"):  # a caller's setting must not make one rank alone raise
            for row in self._rows[1:, 1:]:
                total = total + row
        return total[: len(weight)], total[len(weight) :]

    def _complete(self) -> None:
        if self._rows[0, 0] == UNSENT:
            refused = np.full(self._rows.shape[1:], float(REFUSED))
            self._ranks.gather(refused, self._rows)
