"""Batch statistics across processes: torch.distributed, MPI and Dask.

Moments form a monoid: the moments of a batch in pieces are those of the pieces, merged. Here the
pieces are on several processes. They are either ranks of a `torch.distributed` group or of an
mpi4py communicator, which gather each other's moments and merge them in the order of ranks
(`all_reduce`, `SyncBatchNorm`), or blocks of a Dask array, merged in a tree that depends on the
chunks alone (`dask_moments`). Either way the same data give the same bits, on every rank and in
every run.

Imported only by name, and nothing here imports PyTorch, mpi4py or Dask before it is used.
"""

from .dask_arrays import dask_moments, dask_normalize
from .forward import Move as Move
from .layer import SyncBatchNorm
from .merging import Counted as Counted
from .merging import Merging as Merging
from .merging import all_reduce
from .ranks import Ranks as Ranks
from .ranks import ranks_of as ranks_of
from .summing import Summing as Summing

# The other names are for bnfast.torch.
__all__ = ["SyncBatchNorm", "all_reduce", "dask_moments", "dask_normalize"]
