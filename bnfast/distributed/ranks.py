"""The processes of a group, of torch.distributed or of MPI, and how they gather arrays."""

from __future__ import annotations

import sys
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnfast._types import Tensor


class Ranks(NamedTuple):
    """The processes of a group, of either library."""

    size: int
    # gather(mine, rows): `mine` has the same shape and dtype on every rank; `rows`, of shape
    # (size, *mine.shape), is filled with those of all, by rank. It is one step of the interpreter:
    # a signal handler runs before it or after it, never in between.
    gather: Callable[[Tensor, Tensor], object]


def ranks_of(group: Any) -> Ranks:
    """Recognise a process group: torch.distributed's (None: the default one) or mpi4py's."""
    # A group can exist only where its library has been imported.
    mpi, torch = sys.modules.get("mpi4py.MPI"), sys.modules.get("torch")
    if mpi is not None and isinstance(group, mpi.Comm):
        return _mpi_ranks(group, mpi)
    dist = torch.distributed if torch is not None and torch.distributed.is_available() else None
    if group is None:
        if dist is None or not dist.is_initialized():
            raise RuntimeError(
                "group is None, and there is no default process group; expected "
                "torch.distributed.init_process_group() to have been called, or an mpi4py "
                "communicator as group"
            )
        return _torch_ranks(dist.group.WORLD, torch)
    if dist is not None and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group has this process not among its members; expected one it is in")
    if dist is not None and isinstance(group, dist.ProcessGroup):
        return _torch_ranks(group, torch)
    raise TypeError(
        f"group is {group!r:.60} of type {type(group).__name__}; expected a process group of "
        "torch.distributed, an mpi4py communicator, or None for torch's default group"
    )


def _torch_ranks(group: Any, torch: Any) -> Ranks:
    def gather(mine: Tensor, rows: Tensor) -> object:
        given, wanted = [torch.from_numpy(mine)], [list(torch.from_numpy(rows))]
        # Not `torch.distributed.all_gather`: it takes many steps, and an exception between two of
        # them would lose the handle that is to be waited for.
        return list(map(methodcaller("wait"), map(group.allgather, [wanted], [given])))

    return Ranks(torch.distributed.get_world_size(group), gather)


def _mpi_ranks(comm: Any, mpi: Any) -> Ranks:
    if comm == mpi.COMM_NULL or comm.Is_inter():
        kind = "MPI.COMM_NULL" if comm == mpi.COMM_NULL else "an intercommunicator"
        raise ValueError(f"group is {kind}; expected an intracommunicator with this process in it")
    return Ranks(comm.Get_size(), comm.Allgather)
