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


@pytest.fixture
def fresh(monkeypatch):
    """Reset graphs and counts for each test."""
    from collections import Counter

    import torch

    from bnfast.torch import compiled

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_fused", Counter())
    monkeypatch.setattr(compiled, "_apart", Counter())


@pytest.fixture
def fused():
    """What batch norms became since the last call: ({kind: times}, {reason: times})."""
    from bnfast.torch import compiled

    last = compiled.fused_so_far()

    def since_last():
        nonlocal last
        now = compiled.fused_so_far()
        news = tuple(
            {k: n - b.get(k, 0) for k, n in a.items() if n != b.get(k, 0)}
            for a, b in zip(now, last, strict=True)
        )
        last = now
        return news

    return since_last
