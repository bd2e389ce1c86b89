"""Check that a tag, the package's version, the citation's and the changelog's newest entry agree.

PyPI shows where the project lives, so pyproject.toml has to say it, too.

python tools/check_release.py v0.1.0
"""

import ast
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
URLS = ("Homepage", "Documentation", "Source", "Issues", "Changelog")
HEADING = re.compile(
    r"^## (?:Unreleased \((?P<next>[^)]+)\)|(?P<version>\d[^ ]*) \((?P<date>[^)]+)\))$"
)


def version():
    """Return bnfast.__version__ without importing bnfast, which may not be built."""
    tree = ast.parse((ROOT / "bnfast" / "__init__.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    return ast.literal_eval(value)


def entries(changelog):
    """Return (version, date) of every entry, the newest first; date None: not released yet."""
    found = []
    for line in changelog.splitlines():
        if not line.startswith("## "):
            continue
        heading = HEADING.match(line)
        if not heading:
            raise ValueError(
                f"{line!r}; expected '## 1.2.3 (2030-12-31)' or '## Unreleased (1.2.3)'"
            )
        if heading["next"]:
            found.append((heading["next"], None))
        else:
            found.append((heading["version"], datetime.date.fromisoformat(heading["date"])))
    return found


def problems_of_log(changelog, current):
    """Return the problems of a changelog, for a package of the `current` version."""
    try:
        found = entries(changelog)
    except ValueError as error:
        return [str(error)]
    if not found:
        return ["no entries"]
    problems = []
    if found[0][0] != current:
        problems.append(f"the newest entry is of {found[0][0]}, the package's version is {current}")
    dates = [date for _, date in found]
    if None in dates[1:]:
        problems.append("an entry below the newest has no date")
    elif sorted(dates[1:], reverse=True) != dates[1:]:
        problems.append("the dates do not descend")
    elif len(dates) > 1 and dates[0] and dates[0] < dates[1]:
        problems.append("the newest entry is older than the one below it")
    return problems


def problems_of_release(tag, changelog, current):
    """Return the problems that prevent a release of `tag`."""
    problems = problems_of_log(changelog, current)
    if tag != f"v{current}":
        problems.append(f"the tag is {tag}, the package's version is {current}")
    if not problems and entries(changelog)[0][1] is None:
        problems.append("the changelog's newest entry has no date")
    return problems


def problems_of_citation(citation, current):
    """Return the problems of CITATION.cff, for a package of the `current` version."""
    found = re.search(r"^version: (.+)$", citation, re.MULTILINE)
    if found and found[1] == current:
        return []
    return [f"CITATION.cff has version {found and found[1]}, the package's version is {current}"]


def problems_of_urls(project):
    """Return which addresses a `[project]` table lacks."""
    missing = [name for name in URLS if name not in project.get("urls", {})]
    return [f"pyproject.toml has no [project.urls] for {', '.join(missing)}"] if missing else []


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    import tomllib  # of Python 3.11: the tests of 3.10 do without

    changelog, citation = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    problems = problems_of_release(sys.argv[1], changelog, version())
    problems += problems_of_citation(citation, version()) + problems_of_urls(project)
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
