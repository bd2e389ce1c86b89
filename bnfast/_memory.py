"""How much memory may be kept for the next results: from the environment or the machine.

The pool itself is `src/pages.c`. `_core` calls this module once, at its first large result.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from . import _cgroup, _options

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Mapping

# A loop over one shape needs the memory of one output. Keeping more than this part of a machine's
# memory would surprise users.
PART_OF_MEMORY = 16
MOST = 2**30


def bound() -> tuple[int, str]:
    """Return the most bytes that may be kept, and where that number comes from."""
    return _asked or _from_machine()


def _from_environment(environ: Mapping[str, str]) -> tuple[int, str] | None:
    own = environ.get("BNFAST_CACHE_BYTES", "").strip()
    if not own:
        return None
    number = _options.decimal(own)
    if number is None or number >= 2**63:
        raise ImportError(
            f"BNFAST_CACHE_BYTES is {own!r:.60}; expected a number of bytes, 0 to keep none"
        )
    return number, "BNFAST_CACHE_BYTES"


def _from_machine(root: str = "/") -> tuple[int, str]:
    """Return a part of the memory this process may use, 1 GiB at most."""
    limits = [
        *((limit, "the machine's memory") for limit in _whole_memory()),
        *((limit, "the cgroup's memory") for limit in _cgroup_limits(root)),
        *((limit, "the address space's limit") for limit in _address_space()),
    ]
    memory, source = min(limits, default=(MOST * PART_OF_MEMORY, ""))
    part = memory // PART_OF_MEMORY
    return (part, f"1/{PART_OF_MEMORY} of {source}") if part < MOST else (MOST, "default")


def _cgroup_limits(root: str) -> list[int]:
    """Return the memory limits of the groups around this process; groups without one say "max"."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    folders = _cgroup.folders("memory", root)
    said = [_cgroup.read(folder, name).strip() for folder in folders for name in names]
    return [int(text) for text in said if text.isdecimal()]


def _whole_memory() -> list[int]:
    """Return the machine's memory, alone in a list; an empty list if the system does not say."""
    from . import _core

    memory = _core.physical_memory()
    return [memory] if memory else []


def _address_space() -> list[int]:
    if sys.platform == "win32":
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]


# Read at import, where an error in it can be reported.
_asked = _from_environment(os.environ)
