"""What was built, what was chosen on this machine, and why: `show_config`."""

from __future__ import annotations

__all__ = ["show_config"]


def show_config() -> None:
    """Print what a bug report should say: version, instruction sets, OpenMP, threads, caches.

    The same as ``python -m bnfast``. The OpenMP runtime is the file the process has loaded;
    where other packages brought runtimes of their own, all of them are listed.
    """
    width = 16
    for name, value in _config():
        print(f"{name:<{width}}{value}")


def _config() -> list[tuple[str, str]]:
    """Return what `show_config` prints, as names and values."""
    import platform
    import sys

    import numpy as np

    import bnfast

    from . import _core, _memory, _threads

    built = _core.config()
    threads, source = _threads.describe()
    kept, bound = _core.kept_memory()
    libc = " ".join(platform.libc_ver()).strip()
    return [
        ("bnfast", bnfast.__version__),
        ("python", f"{sys.version.split()[0]}, {platform.system()} {platform.machine()}, {libc}"),
        ("numpy", f"{np.__version__} (extension built for ABI {built['numpy_abi']})"),
        ("compiler", built["compiler"]),
        ("kernels", f"{built['isa']} ({_why(built['isa'], built['isas_runnable'])})"),
        ("  built", ", ".join(built["isas_built"])),
        ("  runnable here", ", ".join(built["isas_runnable"])),
        ("OpenMP", f"{built['openmp']}, {' and '.join(_openmp_runtimes()) or 'runtime unknown'}"),
        ("threads", f"{threads} ({source})"),
        ("caches", _caches(built["caches"])),
        ("kept memory", f"{_bytes(kept)} of {_bytes(bound)} at most ({_memory.bound()[1]})"),
    ]


def _why(isa: str, runnable: tuple[str, ...]) -> str:
    """Return why these kernels are in use."""
    import os

    if os.environ.get("BNFAST_ISA") == isa:
        return "pinned by BNFAST_ISA"
    if isa != runnable[-1]:
        return "set by a test"
    if isa == "scalar":
        return "plain C: no others were built for this processor"
    return "the best that this processor can run"


def _openmp_runtimes(maps: str = "/proc/self/maps") -> list[str]:
    """Return the files of the OpenMP runtimes loaded into this process, where that can be told."""
    import re

    try:
        with open(maps, encoding="utf-8", errors="replace") as file:
            paths = {line.rstrip("\n").partition("/")[2] for line in file}
    except TimeoutError:  # a signal handler's, which is an OSError too
        raise
    except OSError:
        return []
    runtime = re.compile(r"lib(gomp|omp|iomp5)\b[^/]*\.(so|dylib)[^/]*$")
    return sorted("/" + path for path in paths if runtime.search(path))


def _caches(caches: dict[str, int | str]) -> str:
    """Return cache sizes as people write them."""
    sizes = [
        f"{name} {_bytes(int(caches[key]))}"
        for name, key in (("L1d", "l1d"), ("L2", "l2"), ("L3", "l3"))
    ]
    return f"{', '.join(sizes)} ({caches['source']})"


def _bytes(size: int) -> str:
    if not size:
        return "none"
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
