"""The moments of all ranks, merged: in a forward, and for their own sake (`all_reduce`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnfast import _errors, _masks
from bnfast.moments import Moments

from .counts import MOST_VALUES, check_count
from .exchange import REFUSED, UNSENT, Exchange, in_words, refusal_of
from .ranks import ranks_of

if TYPE_CHECKING:
    from bnfast._types import Array, Tensor

    from .forward import Move
    from .ranks import Ranks


class Merging(Exchange):
    """The merge of all ranks' moments, in the order of ranks.

    Two gathers: ranks must agree on the number of channels before they can gather as many means
    and M2.

    Parameters
    ----------
    ranks : Ranks
    training : bool
        Whether to refuse a batch that has one value per channel on all ranks together.
    """

    def __init__(self, ranks: Ranks, training: bool = False) -> None:
        self._ranks, self._training = ranks, training
        self._sizes = np.full((ranks.size, len(_Size._fields)), UNSENT, np.int64)
        self._numbers = np.empty((ranks.size, 2, 0))
        self._move: Move | None = None

    def merged(
        self, mine: Moments, move: Move | None = None, counted: Counted | None = None
    ) -> Moments:
        """Return the moments of all ranks, after `move` has updated the running statistics.

        `counted` is what a mask counts of this rank's part; None without a mask.

        These change on every rank or on none, also if an exception is raised meanwhile.
        """
        numbers = np.stack([mine.mean, mine.m2])
        self._numbers = np.full((self._ranks.size, *numbers.shape), float(UNSENT))
        self._move = move
        self._ranks.gather(np.array(_Size.of(mine, move, counted), np.int64), self._sizes)
        if disagreement := self._disagreement():
            raise disagreement
        if numbers.size:
            self._ranks.gather(numbers, self._numbers)
        if refusal := self._refusal():
            raise refusal
        return self._finish()

    def _disagreement(self) -> Exception | None:
        """Return the error that all ranks raise for the sizes, None if they agree."""
        sizes = [_Size(*row) for row in self._sizes.tolist()]
        channels, counts = [size.channels for size in sizes], [size.weight for size in sizes]
        on_all = f"ranks 0 to {self._ranks.size - 1}"
        if REFUSED in channels:
            return refusal_of(channels)
        if len(set(channels)) > 1:
            return ValueError(
                f"the moments have {in_words(channels)} channels on {on_all}; expected the same "
                "number on all"
            )
        if sum(counts) > MOST_VALUES:
            return ValueError(
                f"the moments have {in_words(counts)} values per channel on {on_all}, "
                f"{sum(counts)} together; expected at most {MOST_VALUES}"
            )
        return self._too_few(sizes) if self._training else None

    def _too_few(self, sizes: list[_Size]) -> Exception | None:
        """Return the error for a batch without a variance."""
        together = f"on all {len(sizes)} ranks together"
        positions, counted = sum(s.positions for s in sizes), sum(s.counted for s in sizes)
        if positions and counted < 2:
            found = "one" if counted == positions else f"masks that count {counted}"
            return ValueError(
                f"Expected more than 1 value per channel when training, got {found} {together}"
            )
        weight, least = sum(s.weight for s in sizes), max(s.least for s in sizes)
        if 0 < weight <= least:
            return ValueError(
                f"the masks' weights sum to {weight:g} {together}; expected more than {least}, the "
                "ddof of running_var"
            )
        return None

    def _refusal(self) -> Exception | None:
        """Return the error if a rank agreed on sizes and was interrupted afterwards."""
        return refusal_of(self._numbers[:, 1, :1].ravel().tolist())

    def _finish(self) -> Moments:
        with np.errstate(all="ignore"):  # a caller's setting must not make one rank alone raise
            batch = Moments.merge_all(
                Moments(_Size(*row).weight, mean, m2)
                for row, (mean, m2) in zip(self._sizes.tolist(), self._numbers, strict=True)
            )
            if self._move is not None:
                self._move(batch)
        return batch

    def _complete(self) -> None:
        if self._sizes[0, 0] == UNSENT:
            self._ranks.gather(np.array(_Size(REFUSED), np.int64), self._sizes)
        elif self._disagreement() is None:
            if UNSENT in self._numbers[0, 1, :1]:
                refused = np.full(self._numbers.shape[1:], float(REFUSED))
                self._ranks.gather(refused, self._numbers)
            elif self._refusal() is None:
                self._finish()


class Counted(NamedTuple):
    """What a mask counts of a part of a batch: how many of its positions have a weight above 0."""

    positions: int
    counted: int

    @classmethod
    def of(cls, mask: Array, x: Tensor, axis: int) -> Counted:
        """Return it for a mask of x."""
        weights = _masks.arrange(mask, x, axis)
        return cls(weights.positions, weights.counted(0, weights.positions))


class _Size(NamedTuple):
    """What ranks must agree on before they gather moments, in integers."""

    channels: int
    values: int = 0
    weight_bits: int = 0  # of a count that is a float, then in place of values
    positions: int = 0
    counted: int = 0
    least: int = -1  # the ddof of the running variance, above which the count must be

    @classmethod
    def of(cls, mine: Moments, move: Move | None, counted: Counted | None) -> _Size:
        """Return this rank's."""
        whole = isinstance(mine.count, int)
        values = int(mine.count) if whole else 0
        bits = 0 if whole else int(np.float64(mine.count).view(np.int64))
        found = counted or Counted(values, values)
        least = move.ddof if move is not None and move.running else -1
        return cls(len(mine.mean), values, bits, *found, least)

    @property
    def weight(self) -> float:
        """The number of values, or the sum of their weights."""
        bits = self.weight_bits
        return float(np.int64(bits).view(np.float64)) if bits else self.values


def all_reduce(moments: Moments, group: Any = None) -> Moments:
    """Return the moments of all processes of a group, merged: the same bits on each of them.

    Every process of the group must call it, as with any collective operation; a process that has
    no values passes `Moments.empty`.

    Parameters
    ----------
    moments : Moments
        The moments of this process.
    group : torch.distributed.ProcessGroup, mpi4py.MPI.Comm or None
        The processes; None is the default group of ``torch.distributed``. PyTorch's groups need a
        backend for CPU tensors, such as gloo.

    Returns
    -------
    Moments
        Of the values of all processes together, merged in the order of ranks by
        `Moments.merge_all`.

    Raises
    ------
    TypeError
        If `group` is something else, or `moments` is (then RuntimeError on the other processes).
    ValueError
        On every process, if they have different numbers of channels, or more than ``2**63 - 1``
        values per channel together. On this process alone, if it has more than that by itself, or
        if the attributes of `moments` were changed to invalid values (then RuntimeError on the
        other processes); if it is not in `group`.
    RuntimeError
        If another process could not take part; if `group` is None and there is no default one.

    Notes
    -----
    Two gathers: of the numbers of channels and values, 48 bytes per process, and of mean and M2, 16
    bytes per channel and process. If a process does not call, the others wait until the group's own
    timeout.

    Examples
    --------
    A program that ``torchrun`` starts on several processes:

    >>> import numpy as np
    >>> import torch.distributed as dist
    >>> import bnfast
    >>> from bnfast.distributed import all_reduce
    >>> dist.init_process_group("gloo")
    >>> mine = bnfast.moments(np.array([[1.0, 2.0], [3.0, 2.0]]))
    >>> all_reduce(mine).count == 2 * dist.get_world_size()
    True
    """
    exchange = Merging(ranks_of(group))
    with exchange:
        return exchange.merged(_sendable(moments))


def _sendable(given: Any) -> Moments:
    """Return a checked copy, since callers may have changed the attributes of theirs."""
    if not isinstance(given, Moments):
        raise TypeError(f"moments is {_errors.described(given)}; expected Moments")
    mine = Moments(given.count, given.mean, given.m2)
    check_count(mine.count)
    return mine
