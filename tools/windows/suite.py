"""bnfast's results and its suite, on the interpreter for Windows under wine."""

import os
import shutil
import subprocess
import sys

import limits
import wine
from steps import BUILD, ROOT

SUITE = BUILD / "suite"
PYTHON = wine.path(BUILD / "python" / "python.exe")
ENVIRONMENT = {"PYTHONPATH": wine.path(BUILD / "installed")}
PASSED = (0, 5)  # of pytest: all passed, there was none to run


def copy():
    """The suite and the files that it reads, without the package beside them in the source."""
    shutil.rmtree(SUITE, ignore_errors=True)
    unused = shutil.ignore_patterns("__pycache__", "_build", "zoo")
    for folder in ("tests", "docs", "examples"):
        shutil.copytree(ROOT / folder, SUITE / folder, ignore=unused)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, SUITE)


def check_bits():
    """Exit unless results have the same bits there as here, on each instruction set."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_build_flags import ANSWERS

    program = BUILD / "bits.py"
    program.write_text(ANSWERS, "utf-8")
    there = wine.output_of(PYTHON, wine.path(program), **ENVIRONMENT)
    here = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    print(f"Hashes of results, by instruction set:\n{there}", end="", flush=True)
    if here != there:
        sys.exit(f"They differ from those of this system:\n{here}")


def run(arguments):
    """Run the tests, all quick ones if none are named; return pytest's exit status.

    All run a file at a time: one that ends its process, or a test that never ends, ends no other.
    """
    copy()
    if arguments:
        return run_pytest(arguments)
    files = [file.relative_to(SUITE).as_posix() for file in sorted(SUITE.rglob("test_*.py"))]
    failed = [name for name in files if run_pytest([name]) not in PASSED]
    print("Failed:", *(failed or ["nothing"]))
    return int(bool(failed))


def run_pytest(arguments):
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += [f"--deselect={name}" for name in limits.WINE]
    return wine.run(*command, *arguments, cwd=SUITE, **ENVIRONMENT)
