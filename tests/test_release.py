"""One version, in the package; the changelog's newest entry has it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "check_release.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not run from a source tree")


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_release", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_changelog_has_this_version(check):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert check.problems_of_log(changelog, check.version()) == []


def test_citation_has_this_version(check):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert check.problems_of_citation(citation, check.version()) == []
    assert "None" in check.problems_of_citation("", "0.2.0")[0]
    assert "0.1.0" in check.problems_of_citation("version: 0.1.0\n", "0.2.0")[0]


def test_version_read_without_import(check):
    import bnfast

    assert check.version() == bnfast.__version__


@pytest.mark.parametrize(
    ("headings", "problem"),
    [
        ("", "no entries"),
        ("## 0.3.0 (2030-01-02)", "the package's version is 0.2.0"),
        ("## Unreleased (0.3.0)", "the package's version is 0.2.0"),
        ("## 0.2.0", "expected"),
        ("## 0.2.0 (2 January 2030)", "isoformat"),
        ("## 0.2.0 (2030-01-02)\n## Unreleased (0.1.0)", "no date"),
        ("## 0.2.0 (2030-01-02)\n## 0.1.0 (2030-01-03)", "older than the one below"),
        ("## Unreleased (0.2.0)\n## 0.1.1 (2029-01-01)\n## 0.1.0 (2029-01-02)", "do not descend"),
    ],
)
def test_changelog_problems_reported(check, headings, problem):
    (said,) = check.problems_of_log(headings, "0.2.0")
    assert problem in said


def test_a_release_is_tagged_and_dated(check):
    dated, undated = "## 0.2.0 (2030-01-02)", "## Unreleased (0.2.0)"
    assert check.problems_of_release("v0.2.0", dated, "0.2.0") == []
    assert check.problems_of_release("v0.2.1", dated, "0.2.0") != []
    assert check.problems_of_release("v0.2.0", undated, "0.2.0") != []


def test_a_release_says_where_the_project_lives(check):
    (problem,) = check.problems_of_urls({})
    assert "Homepage, Documentation, Source, Issues, Changelog" in problem
    urls = dict.fromkeys(check.URLS, "https://example.org")
    assert check.problems_of_urls({"urls": urls}) == []
    del urls["Issues"]
    assert check.problems_of_urls({"urls": urls}) == [
        "pyproject.toml has no [project.urls] for Issues"
    ]
