"""Count the instructions of Python calls, by valgrind's callgrind.

The counted program calls `repeat` for one call after another. valgrind writes what it has counted
each time the program enters the C library's `getppid`, so that the start of Python, imports and
warming up are left out.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

WARM_UP, CALLS = 50, 400
MARK, mark = "getppid", os.getppid
# Fixed hashes give dictionaries the same order, and one thread leaves no waiting to be counted.
SAME_EVERY_RUN = {
    "PYTHONHASHSEED": "0",
    "BNFAST_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
HINT = "valgrind is not installed (Debian, Ubuntu: apt install valgrind)"


def check_installed() -> None:
    if not shutil.which("valgrind"):
        raise SystemExit(f"bnfast: {HINT}")


def repeat(call: Callable[[], object]) -> None:
    """In the counted program: make a call many times between two marks."""
    gc.disable()
    for times in (WARM_UP, CALLS):
        for _ in range(times):
            call()
        mark()


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return os.environ | SAME_EVERY_RUN | {"PYTHONPATH": path} | variables


def run(arguments: list[str], variables: Mapping[str, str]) -> str:
    """Run Python under valgrind, and return what valgrind prints."""
    done = subprocess.run(
        ["valgrind", *arguments],
        env=environment(variables),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def count(program: list[str], number: int, **variables: str) -> list[float]:
    """Return the instructions of each of the `number` calls that a program repeats."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--dump-before={MARK}", f"--callgrind-out-file={folder}/counts"]
        run(["--tool=callgrind", *options, sys.executable, *program], variables)
        dumps = [Path(f"{folder}/counts.{i + 1}") for i in range(2 * number)]
        totals = [re.search(r"^totals: (\d+)", dump.read_text(), re.M) for dump in dumps]
    return [int(total[1]) / CALLS for total in totals[1::2] if total]
