"""What all exchanges between ranks have in common: no rank is left waiting."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Every gathered row has one entry that is never negative: a number of channels, a sum of squares
# or a status. Negative values there mean that the row has not come yet, and that its rank could
# not take part.
UNSENT, REFUSED = -2, -1


class Exchange:
    """One rank's part in the messages of one call: once begun, it is always completed.

    Whatever a call may refuse it refuses in the `with` block of an exchange, before anything is
    sent. If an exception is raised in that block, also by a signal handler while this rank waits,
    then this rank sends a refusal in place of the numbers that the others wait for. So the others
    raise as well, and all ranks stay in step.
    """

    def __enter__(self) -> None:
        """Begin; the other ranks cannot be told of an exception before this."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            # Both libraries raise RuntimeErrors where the group itself is broken. The exception
            # that is being raised already reports that.
            with suppress(RuntimeError):
                self._complete()

    def _complete(self) -> None:
        """Take part in what the other ranks still wait for."""
        raise NotImplementedError


def refusal_of(status: Sequence[float]) -> RuntimeError | None:
    """Return the error for ranks that could not take part, None if there are none."""
    refused = [rank for rank, number in enumerate(status) if number == REFUSED]
    if not refused:
        return None
    return RuntimeError(f"rank {in_words(refused)} could not take part; its own exception says why")


def in_words(values: Sequence[object]) -> str:
    """Return values separated by commas, for a message."""
    return ", ".join(map(str, values))
