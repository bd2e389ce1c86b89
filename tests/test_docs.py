"""Every example of the pages and the README runs, and prints what the page shows."""

import doctest
import importlib
import re
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import bnfast

ROOT = Path(__file__).resolve().parents[1]
# Run by the tests of their subjects, which have the files and processes that they need.
ELSEWHERE = {"checkpoints.md", "distributed.md", "onnx.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in ELSEWHERE),
]
# Blocks marked py are only shown.
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A page, or the rest of one, may need another package: a MyST comment, which readers do not see.
REQUIRES = re.compile(r"^% requires: (.+)$", re.MULTILINE)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not run from a source tree")


def blocks(text):
    """Return (language, code, line) of each fenced block."""
    return [(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(text)]


def run(page, text):
    """Run a page's examples in one namespace; return what went wrong."""
    said = []
    main = ModuleType("__main__")  # torch.compile looks names up where a reader's program has them
    names = vars(main)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for language, code, line in blocks(text):
        if language == "python":
            exec(compile(code, f"{page}:{line}", "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
        assert test.examples, f"{page}:{line}: a pycon block without a prompt"
        test.globs = names  # get_doctest copies: a page's blocks share their names
        with as_main(main):
            runner.run(test, out=said.append, clear_globs=False)
    return "".join(said)


@contextmanager
def as_main(module):
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def forget_torch_counts(monkeypatch):
    """Make `bnfast.torch` count from nothing: a reader of a page has a new process."""
    if "bnfast.torch" in sys.modules:
        from bnfast.torch import _aten, compiled

        _aten.forget_counts()
        for name in ("_fused", "_apart"):
            monkeypatch.setattr(compiled, name, Counter())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples(page, monkeypatch):
    text = page.read_text(encoding="utf-8")
    if not blocks(text):
        pytest.skip("no examples")
    for name in re.findall(r"[\w.]+", " ".join(REQUIRES.findall(text))):
        pytest.importorskip(name)
    forget_torch_counts(monkeypatch)
    with np.errstate(all="warn"):
        assert run(page, text) == ""


def test_wrong_output_and_errors_are_reported():
    page = Path("page.md")
    assert "Expected:\n    3" in run(page, "```pycon\n>>> 1 + 1\n3\n```\n")
    assert "ZeroDivisionError" in run(page, "```pycon\n>>> 1 / 0\n```\n")
    assert run(page, "```pycon\n>>> n = 1\n```\ntext\n```pycon\n>>> n\n1\n```\n") == ""


def test_pages_with_examples_are_found():
    """Otherwise the tests above would pass on a folder with another layout."""
    found = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]
    assert len(found) > 8


@pytest.mark.parametrize(
    ("module", "peer"),
    [("bnfast", "numpy"), ("bnfast.torch", "torch"), ("bnfast.sklearn", "sklearn")],
)
def test_docstring_examples(module, peer):
    """The Examples sections of public objects run and print what they show."""
    pytest.importorskip(peer)
    public = importlib.import_module(module)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    printed, ran = [], 0
    for name in public.__all__:
        for test in finder.find(getattr(public, name), f"{module}.{name}", globs={}):
            ran += len(test.examples)
            runner.run(test, out=printed.append)
    assert ran
    assert "".join(printed) == ""


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
