"""Compile a C file when it is needed and load it with ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class Missing(Exception):
    """A peer, or something it needs, is not installed; the message names it."""


def compiler() -> list[str]:
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[:1]
    if not shutil.which(command[0]):
        raise Missing(f"no C compiler ({command[0]})")
    return command


def load(source: Path, *arguments: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, source.name).with_suffix(".so")
        command = [*compiler(), *FLAGS, str(source), "-o", str(library), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[0]
            raise Missing(f"{source.name} does not compile: {reason}")
        return ctypes.CDLL(str(library))
