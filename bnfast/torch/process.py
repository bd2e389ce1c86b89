"""Run every batch norm of the process on bnfast: kernels under PyTorch's own operators."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _aten
from .compiled import fused_so_far

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST = (2, 13)
_VARIABLE = "BNFAST_TORCH"
# PyTorch's own library, which exports its C interface, by `sys.platform`.
_LIBRARIES = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}

_lock = threading.Lock()
_replaced = False
_spent: list[Any] = []  # objects that `_spend_warning` made, kept for the life of the process


def enable() -> None:
    """Run every batch norm that PyTorch computes on the CPU on bnfast, in this process.

    The operators behind ``torch.nn.BatchNorm*``, ``torch.nn.InstanceNorm*`` and
    ``torch.nn.functional.batch_norm`` get kernels of bnfast's; modules, autograd and all else stay
    PyTorch's. Calls that bnfast does not take run as they would without it; `report` counts them.

    It may be called several times and from any thread, while other threads compute.

    See Also
    --------
    disable : undo this.
    enabled : the same for a ``with`` block.
    report : which calls ran on bnfast and which on PyTorch.
    """
    replace_kernels()
    _aten.switch_to(True)


def disable() -> None:
    """Let PyTorch's own kernels run again, in this process.

    A backward may then run on other kernels than its forward.
    """
    _aten.switch_to(False)


def is_enabled() -> bool:
    """Return whether the batch norms of this process run on bnfast.

    Returns
    -------
    bool
    """
    return _aten.is_on()


@contextmanager
def enabled() -> Iterator[None]:
    """Call `enable` for a ``with`` block, then restore the former state.

    Like `enable`, it applies to all threads.
    """
    replace_kernels()
    before = _aten.switch_to(True)
    try:
        yield
    finally:
        _aten.switch_to(before)


@dataclass(frozen=True)
class Activity:
    """Where batch norm calls ran since `enable` or `convert` was first called in this process.

    Attributes
    ----------
    ran : dict of str to int
        How many calls ran on bnfast: in "training", "evaluation" and "backward".
    left : dict of str to int
        How many calls were left to PyTorch's own kernels, by reason.
    compiled : dict of str to int
        What batch norms became in graphs compiled by `backend`, as "batch norm + relu", and how
        often. A graph counts once, however often it runs.
    unfused : dict of str to int
        How many of them were not fused, or only partly, by reason.
    """

    ran: dict[str, int]
    left: dict[str, int]
    compiled: dict[str, int] = field(default_factory=dict)
    unfused: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{sum(self.ran.values())} calls ran on bnfast"]
        lines += [f"{what}: {calls}" for what, calls in self.ran.items()]
        lines += [f"{calls} left to PyTorch: {why}" for why, calls in self.left.items()]
        lines += [f"{times} compiled as {what}" for what, times in self.compiled.items()]
        lines += [f"{times} not fused: {why}" for why, times in self.unfused.items()]
        return "\n".join(lines)


def activity() -> Activity:
    """Return how many calls ran where in this process."""
    return Activity(*_aten.counts(), *fused_so_far())


def enable_if_asked() -> None:
    """Call `enable` if the environment asks for it: ``BNFAST_TORCH=1``.

    Raises
    ------
    ValueError
        If the variable is not 1, 0 or empty.
    """
    asked = os.environ.get(_VARIABLE, "").strip()
    if asked not in ("", "0", "1"):
        raise ValueError(f"{_VARIABLE} is {asked!r:.60}; expected 1 or 0")
    if asked == "1":
        enable()


# ---- Kernels are registered once and never removed: other threads may be running them


def install() -> None:
    """Find PyTorch's C interface, and register the kernels of bnfast's own operators.

    Raises
    ------
    ImportError
        If PyTorch is older than 2.13, or its C interface lacks what the kernels need.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST:
        raise ImportError(f"PyTorch is {torch.__version__}; bnfast.torch needs 2.13 or later")
    library = Path(torch.__file__).parent / "lib" / _LIBRARIES.get(sys.platform, "libtorch_cpu.so")
    _aten.install(str(library), torch.__version__)


def replace_kernels() -> None:
    """Register bnfast's kernels under PyTorch's operators, once.

    They pass a call on to PyTorch unless the process or the thread asked for bnfast.
    """
    global _replaced
    if _replaced:
        return
    with _lock:
        _spend_warning()
        _aten.replace()
        _replaced = True


def _renew_lock() -> None:
    """Make a new lock: the thread that held the old one does not exist after a fork."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _spend_warning() -> None:
    """Use up PyTorch's only warning per process that a kernel was registered twice.

    Otherwise PyTorch would print it for our kernels, on C's stderr, where it cannot be silenced.
    """
    if _spent:
        return
    library = torch.library.Library("bnfast_spent", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    _spent.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            library.impl("twice", lambda x: x, "CPU", allow_override=True)
