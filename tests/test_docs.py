"""Every example of the pages and the README runs, and prints what the page shows."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, blocks, needed_by, run, run_docstrings

import bnfast

# Run by the tests of their subjects, which have the files and processes that they need.
ELSEWHERE = {"checkpoints.md", "distributed.md", "onnx.md", "pytorch.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in ELSEWHERE),
]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not run from a source tree")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples(page):
    text = page.read_text(encoding="utf-8")
    if not blocks(text):
        pytest.skip("no examples")
    for name in needed_by(text):
        pytest.importorskip(name)
    with np.errstate(all="warn"):
        assert run(page, [block for block in blocks(text) if not block.needs]) == ""


ALONE = [
    pytest.param(page, block, id=f"{page.name}:{block.needs[0]}")
    for page in PAGES
    if page.exists()
    for block in blocks(page.read_text(encoding="utf-8"))
    if block.needs and "torch" not in block.needs  # see tests/pytorch/test_pages.py
]


@pytest.mark.parametrize(("page", "block"), ALONE)
def test_block_that_needs_a_package(page, block):
    """Such a block is a program of its own, in pages that need nothing else."""
    for name in block.needs:
        pytest.importorskip(name)
    assert run(page, [block]) == ""


def test_wrong_output_and_errors_are_reported():
    def said(text):
        return run(Path("page.md"), blocks(text))

    assert "Expected:\n    3" in said("```pycon\n>>> 1 + 1\n3\n```\n")
    assert "ZeroDivisionError" in said("```pycon\n>>> 1 / 0\n```\n")
    assert said("```pycon\n>>> n = 1\n```\ntext\n```pycon\n>>> n\n1\n```\n") == ""


def test_pages_with_examples_are_found():
    """Otherwise the tests above would pass on a folder with another layout."""
    found = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]
    assert len(found) > 8


@pytest.mark.parametrize(("module", "peer"), [("bnfast", "numpy"), ("bnfast.sklearn", "sklearn")])
def test_docstring_examples(module, peer):
    """The Examples sections of public objects run and print what they show."""
    pytest.importorskip(peer)
    ran, said = run_docstrings(importlib.import_module(module))
    assert ran
    assert said == ""


@pytest.mark.parametrize(
    ("column", "name"), [(0, "PYTORCH"), (1, "KERAS"), (2, "ONNX"), (3, "FLAX")]
)
def test_table_of_conventions(column, name):
    lines = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8").splitlines()
    rows = {}
    for line in lines:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0]] = cells[1:]
    convention = getattr(bnfast.conventions, name)
    assert float(rows["default eps"][column]) == convention["eps"]
    assert float(rows["`momentum` in bnfast"][column]) == convention["momentum"]
    assert float(rows["`ddof` in bnfast"][column]) == convention["ddof"]
    assert float(rows["channel axis"][column]) == convention["axis"]
    # The rows in a framework's own words must agree with those in ours.
    of_new, of_old = "`(1-m)·old + m·batch`", "`m·old + (1-m)·batch`"
    own = float(rows["default `m` or `a`"][column])
    weight_of_batch = {of_new: own, of_old: 1 - own}[rows["new running value"][column]]
    assert weight_of_batch == pytest.approx(convention["momentum"], rel=1e-12)
    divides_by = rows["running variance from the batch's over"][column]
    assert divides_by == ("m - 1" if convention["ddof"] else "m")
