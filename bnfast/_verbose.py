"""``BNFAST_VERBOSE=1``: print at exit, to stderr, which kernels ran and how often.

One line per kind of call, as oneDNN prints them: comma-separated, with a fixed first field, so
that they can be found among other output.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

HEAD = "bnfast_verbose,process,direction,type,layout,instruction set,variant,calls"


def _is_asked(environ: Mapping[str, str]) -> bool:
    own = environ.get("BNFAST_VERBOSE", "").strip()
    if own not in ("", "0", "1"):
        raise ImportError(f"BNFAST_VERBOSE is {own!r:.60}; expected 1 or 0")
    return own == "1"


def _start() -> None:
    """Print at the end of this process, and of each that it forks, what that process ran."""
    import atexit

    from . import _core

    atexit.register(_print_dispatches, os.getpid())
    if hasattr(os, "register_at_fork"):  # Windows does not fork
        # A child has its parent's counts, which the parent prints.
        os.register_at_fork(after_in_child=_core.reset_dispatches)


def _print_dispatches(importer: int) -> None:
    """Print the counts; none is an answer too, of the process that imported bnfast."""
    from . import _core

    process = os.getpid()
    lines = [
        ",".join(["bnfast_verbose", str(process), *kind, str(calls)])
        for kind, calls in _core.dispatches().items()
    ]
    if sys.stderr is not None and (lines or process == importer):
        sys.stderr.write("\n".join([HEAD, *lines, ""]))  # at once: other processes write, too


if _is_asked(os.environ):
    _start()
