"""The blocks of code on a page: found, and run as one program."""

import doctest
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Blocks marked py are only shown. A comment right before a block names the packages it needs.
BLOCK = re.compile(
    r"^(?:<!-- requires: (?P<needs>[^\n]+) -->\n)?"
    r"```(?P<language>python|pycon)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    code: str
    line: int
    needs: tuple[str, ...] = ()


def blocks(text):
    """Return each fenced block of a page that is run."""
    found = []
    for m in BLOCK.finditer(text):
        line = text.count("\n", 0, m.start("language")) + 1
        found.append(Block(m["language"], m["code"], line, names(m["needs"] or "")))
    return found


def names(text):
    """Return the names in a list of packages and modules."""
    return tuple(re.findall(r"[\w.]+", text))


def needed_by(text):
    """Return what a page, or the rest of one, needs: a MyST comment, which readers do not see."""
    return names(" ".join(re.findall(r"^% requires: (.+)$", text, re.MULTILINE)))


def run_docstrings(public):
    """Run the Examples sections of a module's public objects; return how many, what went wrong."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    printed, ran = [], 0
    for name in public.__all__:
        for test in finder.find(getattr(public, name), f"{public.__name__}.{name}", globs={}):
            ran += len(test.examples)
            runner.run(test, out=printed.append)
    return ran, "".join(printed)


def run(page, found):
    """Run blocks in one namespace, as a program; return what went wrong."""
    said = []
    main = ModuleType("__main__")  # torch.compile looks names up where a reader's program has them
    scope = vars(main)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for block in found:
        if block.language == "python":
            exec(compile(block.code, f"{page}:{block.line}", "exec"), scope)
            continue
        test = doctest.DocTestParser().get_doctest(
            block.code, scope, page.name, str(page), block.line
        )
        assert test.examples, f"{page}:{block.line}: a pycon block without a prompt"
        test.globs = scope  # get_doctest copies: a page's blocks share their names
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
