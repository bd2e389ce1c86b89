"""C files of this folder, compiled when they are needed and loaded through ctypes."""

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
    """A peer, or what it needs, is not here; the message names it."""


def compiler() -> list[str]:
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[:1]
    if not shutil.which(command[0]):
        raise Missing(f"no C compiler ({command[0]})")
    return command


def load(source: str, *arguments: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, source).with_suffix(".so")
        command = [*compiler(), *FLAGS, str(Path(__file__).with_name(source)), "-o", str(library)]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            raise Missing(f"{source} does not compile: {done.stderr.strip().splitlines()[0]}")
        return ctypes.CDLL(str(library))
