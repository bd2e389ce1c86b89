"""The pages' examples with PyTorch run, and print what the page shows."""

from collections import Counter

import numpy as np
import pytest
import recipes
from pages import ROOT, blocks, run, run_docstrings

import bnfast.torch
from bnfast.torch import _aten, compiled

GUIDE = ROOT / "docs" / "guide" / "pytorch.md"
README = ROOT / "README.md"

needs_source = pytest.mark.skipif(not GUIDE.exists(), reason="not run from a source tree")


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """A reader of a page has a new process, in which nothing was counted or enabled."""
    _aten.forget_counts()
    for name in ("_fused", "_apart"):
        monkeypatch.setattr(compiled, name, Counter())
    yield
    bnfast.torch.disable()


@needs_source
def test_guide():
    assert run(GUIDE, blocks(GUIDE.read_text(encoding="utf-8"))) == ""


@needs_source
def test_readme():
    found = [b for b in blocks(README.read_text(encoding="utf-8")) if "torch" in b.needs]
    assert len(found) == 1
    assert run(README, found) == ""
    assert bnfast.torch.report().ran == {"training": 1}


def test_docstrings():
    ran, said = run_docstrings(bnfast.torch)
    assert ran
    assert said == ""


@needs_source
def test_recipe_of_a_checkpoint(tmp_path):
    """The page runs from top to bottom on what NumPy and PyTorch wrote."""
    for library in ("numpy", "torch"):
        recipes.write(tmp_path, library)
    layer = recipes.follow(tmp_path)("torch")["layer"]
    with np.load(tmp_path / "expected_torch.npz") as expected:
        recipes.assert_inference(layer, expected["x"], expected["y"])
    assert layer.num_batches_tracked == 1
