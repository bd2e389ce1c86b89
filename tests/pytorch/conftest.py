"""Tests of `bnfast.torch`: skipped if PyTorch is not installed.

The folder is not called `torch`, or `import torch` would find it where PyTorch is missing.
"""

import importlib.util

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*.py"]


@pytest.fixture
def ran(dispatches):
    """The kernels that ran since the last call: {(direction, dtype, layout, variant): times}."""

    def since_last():
        return {(d, t, y, v): times for (d, t, y, _, v), times in dispatches().items()}

    return since_last


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(1502_03167)


@pytest.fixture
def calls():
    """Enable bnfast; a function that returns the counts since its last call: (ran, left)."""
    import bnfast.torch
    from bnfast.torch import _aten

    def since_last():
        counts = _aten.counts()
        _aten.forget_counts()
        return counts

    with bnfast.torch.enabled():
        since_last()
        yield since_last
