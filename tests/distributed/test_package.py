"""What `import bnfast.distributed` gives, what it does not import, and which pickles it reads."""

import pickle
import subprocess
import sys

import pytest
from cases import bits

from bnfast import distributed

PUBLIC = {"SyncBatchNorm", "all_reduce", "dask_moments", "dask_normalize"}
FOR_PYTORCH = {"Merging", "Move", "Ranks", "Summing", "ranks_of"}


def test_public_names():
    assert set(distributed.__all__) == PUBLIC
    assert all(callable(getattr(distributed, name)) for name in PUBLIC | FOR_PYTORCH)


def test_importing_imports_no_engine():
    program = (
        "import sys, bnfast.distributed; "
        "print([m for m in ('torch', 'mpi4py', 'dask') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])  # those that write a class as two lines
def test_a_pickle_of_the_time_when_it_was_one_module(protocol):
    layer = distributed.SyncBatchNorm(3, eps=0.25, activation="relu")
    layer.running_mean[:] = 1, 2, 3
    new = pickle.dumps(layer, protocol)
    assert new.count(b"bnfast.distributed.layer\nSyncBatchNorm\n") == 1
    old = new.replace(b"bnfast.distributed.layer\n", b"bnfast.distributed\n")
    loaded = pickle.loads(old)
    assert type(loaded) is distributed.SyncBatchNorm
    assert (loaded.eps, loaded.activation, loaded.group) == (0.25, "relu", None)
    assert bits(loaded.running_mean) == bits(layer.running_mean)
