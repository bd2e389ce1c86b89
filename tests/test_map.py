"""The map in CONTRIBUTING.md: it names the files that there are, and no others."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not run from a source tree")
# Folders whose files have a line each. Of others the map names the folder.
WHOLE = ("bnfast/", "src/", "tools/", "examples/")
NAME = re.compile(r"[\w.-]+/|[\w.-]*\w\.\w+|Makefile|LICENSE")


def named():
    """The paths that the map names. Two or more spaces end a name."""
    text = PAGE.read_text("utf-8")
    (block,) = re.findall(r"## Map\n\n```text\n(.*?)```", text, re.S)
    paths, folders = set(), []
    for line in block.splitlines():
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        for name in re.split(r" {2,}", line.strip()):
            if not NAME.fullmatch(name):
                break  # the description
            paths.add("".join(folders) + name)
        if name.endswith("/") or line.strip().split()[0].endswith("/"):
            folders.append(line.strip().split()[0])
    return paths


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of the repository")
    found = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in found.stdout.split() if (ROOT / name).exists()}


def test_every_name_exists():
    assert sorted(name for name in named() if not (ROOT / name).exists()) == []


def test_every_file_is_named(tracked):
    assert sorted(name for name in tracked if name.startswith(WHOLE)) == sorted(
        name for name in named() if name.startswith(WHOLE) and not name.endswith("/")
    )


def test_every_folder_is_named(tracked):
    folders = {str(Path(name).parent) + "/" for name in tracked}
    inner = {f for f in folders if f.startswith(WHOLE) or re.fullmatch(r"tests/\w+/", f)}
    outer = {f for f in folders if f.count("/") == 1 and not f.startswith(".")}
    assert sorted((inner | outer) - named()) == []
