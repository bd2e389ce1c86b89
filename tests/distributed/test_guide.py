"""The code in docs/guide/distributed.md, on Dask in scikit_learn.md, and in docstrings runs."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bnfast import distributed

GUIDES = Path(__file__).parents[2] / "docs" / "guide"
MODEL = (
    "import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))\n"
)
STEP = "\nmodel(torch.randn(4, 3)).sum().backward()\n"
# PyTorch sometimes aborts when its threads end; that is not tested here.
END = "\nimport os, torch\ntorch.distributed.barrier()\nos._exit(0)\n"
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def example(mark, page="distributed.md"):
    """A page's only example that contains a text."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", text, re.DOTALL)
    (found,) = [block for block in blocks if mark in block]
    return found


def run(tmp_path, code, *launcher):
    program = tmp_path / "program.py"
    program.write_text(code)
    command = [sys.executable, *launcher, program]
    done = subprocess.run(
        command, check=False, timeout=120, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("before", "mark", "after"),
    [
        ("", "all_reduce(bnfast.moments(x))", "\nassert everyone.count == 200\n"),
        (MODEL, "convert_sync_batchnorm(model)", STEP),
    ],
    ids=["arrays", "model"],
)
def test_ranks(tmp_path, before, mark, after):
    pytest.importorskip("torch")
    run(tmp_path, before + example(mark) + after + END, *RANKS)


@pytest.fixture
def features(tmp_path):
    """A zarr file in the folder of the program."""
    pytest.importorskip("zarr")
    da = pytest.importorskip("dask.array")
    x = da.random.default_rng(0).normal(5, 2, (1000, 3), chunks=(100, 3)).astype("float32")
    x.to_zarr(str(tmp_path / "features.zarr"))


@pytest.mark.usefixtures("features")
def test_the_scaler_of_dask(tmp_path):
    pytest.importorskip("sklearn", minversion="1.6")
    after = "\nassert abs(da.from_zarr('standardised.zarr').std().compute() - 1) < 1e-6\n"
    run(tmp_path, example("scaler.transform(X)", "scikit_learn.md") + after)


@pytest.mark.usefixtures("features")
def test_dask(tmp_path):
    after = "\nassert da.from_zarr('normalized.zarr').shape == (1000, 3)\nassert m.count == 1000\n"
    run(tmp_path, example("dask_moments(x, axis=1)") + after)


@pytest.mark.parametrize("name", ["SyncBatchNorm", "all_reduce"])
def test_docstrings_on_ranks(tmp_path, name):
    pytest.importorskip("torch")
    code = (
        "import doctest\nfrom bnfast import distributed\n"
        f"(test,) = doctest.DocTestFinder(recurse=False).find(distributed.{name}, globs={{}})\n"
        "assert test.examples\n"
        "doctest.DebugRunner().run(test)"
    )
    run(tmp_path, code + END, *RANKS)


@pytest.mark.parametrize("name", ["dask_moments", "dask_normalize"])
def test_docstrings_of_dask(name):
    pytest.importorskip("dask.array")
    (test,) = doctest.DocTestFinder().find(getattr(distributed, name), globs={})
    assert test.examples
    doctest.DebugRunner().run(test)
