"""Run Python in separate processes, for code that would crash or change the tests' process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnfast import _core

HERE = Path(__file__).resolve().parent
# How many times as long to wait for another process: on an emulated processor (`make test-arm64`).
PATIENCE = int(os.environ.get("BNFAST_PATIENCE", "1"))

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_openmp = pytest.mark.skipif(
    not _core.config()["openmp"], reason="the threads of this build are not OpenMP's"
)


def run_python(code, *, timeout=60, **environ):
    """Run `code` in a separate Python that finds the tests; kill it after `timeout` seconds."""
    folders = [folder for folder in (os.environ.get("PYTHONPATH"), str(HERE)) if folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environ}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout * PATIENCE,
        check=False,
    )


def run_alone(function, *given):
    """Call a function of a test's module in a separate Python; return its output."""
    code = f"import {function.__module__} as tests; tests.{function.__name__}(*{given!r})"
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
