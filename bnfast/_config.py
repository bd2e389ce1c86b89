"""What was built, what was chosen on this machine, and why: `show_config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from typing import Literal

__all__ = ["show_config"]


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Any = "stdout") -> dict[str, Any] | None:
    """Print what a bug report should say: version, instruction sets, OpenMP, threads, caches.

    The same as ``python -m bnfast``. Threads are OpenMP's on Linux, Grand Central Dispatch's on
    macOS and those of Windows' own pool. The OpenMP runtime is the file the process has loaded;
    where other packages brought runtimes of their own, all of them are listed.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Whether to print, or to return the same as a dictionary and print nothing.

    Returns
    -------
    dict or None
        With ``mode="dicts"``, what ``python -m bnfast --json`` prints: texts, numbers, lists and
        dictionaries of them, sizes in bytes. The keys are ``bnfast``, ``python``, ``numpy``,
        ``compiler``, ``kernels``, ``openmp``, ``threads``, ``caches`` and ``kept_memory``.

    Raises
    ------
    TypeError, ValueError
        If `mode` is neither of the two.

    See Also
    --------
    numpy.show_config : the same of NumPy.

    Examples
    --------
    >>> import bnfast
    >>> config = bnfast.show_config(mode="dicts")
    >>> config["kernels"]["used"] in config["kernels"]["runnable"]
    True
    """
    if not isinstance(mode, str) or mode not in ("stdout", "dicts"):
        from . import _errors

        error = ValueError if isinstance(mode, str) else TypeError
        raise error(f"mode is {_errors.shown(mode)}; expected 'stdout' or 'dicts'")
    config = _config()
    if mode == "dicts":
        return config
    for name, value in _lines(config):
        print(f"{name:<16}{value}")
    return None


def _config() -> dict[str, Any]:
    """Return what `show_config` tells, in types that JSON has."""
    import platform
    import sys

    import numpy as np

    import bnfast

    from . import _core, _memory

    built = _core.config()
    threads, source = _core.threads()
    kept, limit = _core.kept_memory()
    return {
        "bnfast": bnfast.__version__,
        "python": {
            "version": sys.version.split()[0],
            "system": platform.system(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()).strip(),
        },
        "numpy": {"version": np.__version__, "built_for_abi": built["numpy_abi"]},
        "compiler": built["compiler"],
        "kernels": {
            "used": built["isa"],
            "reason": _why(built["isa"], built["isas_runnable"]),
            "built": list(built["isas_built"]),
            "runnable": list(built["isas_runnable"]),
        },
        "openmp": {"version": built["openmp"], "runtimes": _openmp_runtimes()},
        "threads": {"number": threads, "source": source, "of": built["threads_of"]},
        "caches": dict(built["caches"]),
        "kept_memory": {"bytes": kept, "limit": limit, "source": _memory.bound()[1]},
    }


def _lines(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what `show_config` prints, as names and values."""
    python, numpy, kernels = config["python"], config["numpy"], config["kernels"]
    openmp, threads, kept = config["openmp"], config["threads"], config["kept_memory"]
    runtimes = " and ".join(openmp["runtimes"]) or "runtime unknown"
    used = f"{openmp['version']}, {runtimes}" if openmp["version"] else "not used"
    libc = f", {python['libc']}" if python["libc"] else ""  # musl's version is not known
    sizes = f"{_bytes(kept['bytes'])} of {_bytes(kept['limit'])} at most"
    return [
        ("bnfast", config["bnfast"]),
        ("python", f"{python['version']}, {python['system']} {python['machine']}{libc}"),
        ("numpy", f"{numpy['version']} (extension built for ABI {numpy['built_for_abi']})"),
        ("compiler", config["compiler"]),
        ("kernels", f"{kernels['used']} ({kernels['reason']})"),
        ("  built", ", ".join(kernels["built"])),
        ("  runnable here", ", ".join(kernels["runnable"])),
        ("OpenMP", used),
        ("threads", f"{threads['number']} ({threads['source']}), {threads['of']}"),
        ("caches", _caches(config["caches"])),
        ("kept memory", f"{sizes} ({kept['source']})"),
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
    except TimeoutError:  # raised by a signal handler, and an OSError, too
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
