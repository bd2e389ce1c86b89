"""Every batch norm of the process on bnfast: kernels under PyTorch's own operators."""

from __future__ import annotations

import os
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

_lock = threading.Lock()
_replaced = False
_spent: list[Any] = []  # what `_spend_warning` made, kept as long as the process


def enable() -> None:
    """Let every batch norm that PyTorch runs on the CPU run on bnfast, in this process.

    The operators behind ``torch.nn.BatchNorm*``, ``torch.nn.InstanceNorm*`` and
    ``torch.nn.functional.batch_norm`` get kernels of bnfast's; modules, autograd and all else stay
    PyTorch's. Calls that bnfast does not take run as they would without it; `report` counts them.

    It may be called again, and from any thread, while others compute.

    See Also
    --------
    disable : the way back.
    enabled : for a while.
    report : what ran where.
    """
    replace_kernels()
    _aten.switch_to(True)


def disable() -> None:
    """Let PyTorch's own kernels run again, in this process.

    A backward may run on the other side than its forward did.
    """
    _aten.switch_to(False)


def is_enabled() -> bool:
    """Say whether the batch norms of this process run on bnfast."""
    return _aten.is_on()


@contextmanager
def enabled() -> Iterator[None]:
    """`enable` for a while: afterwards the process is as it was before.

    Like `enable`, it holds for all threads.
    """
    replace_kernels()
    before = _aten.switch_to(True)
    try:
        yield
    finally:
        _aten.switch_to(before)


@dataclass(frozen=True)
class Activity:
    """What became of this process' batch norms since `enable` or `convert` was first called.

    Attributes
    ----------
    ran : dict of str to int
        How many calls ran on bnfast: in "training", "evaluation" and "backward".
    left : dict of str to int
        How many were left to PyTorch's own kernels, by reason.
    compiled : dict of str to int
        What batch norms became in graphs compiled by `backend`, as "batch norm + relu", and how
        often. A graph counts once, however often it runs.
    unfused : dict of str to int
        How many of them were not fused, or with less than what follows, by reason.
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
    """Return what ran where in this process."""
    return Activity(*_aten.counts(), *fused_so_far())


def enable_if_asked() -> None:
    """`enable` where the environment says so: ``BNFAST_TORCH=1``.

    Raises
    ------
    ValueError
        If the variable is neither 1 nor 0 nor empty.
    """
    asked = os.environ.get(_VARIABLE, "").strip()
    if asked not in ("", "0", "1"):
        raise ValueError(f"{_VARIABLE} is {asked!r:.60}; expected 1 or 0")
    if asked == "1":
        enable()


# ---- Kernels are registered once and never taken back: other threads may be in them


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
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    _aten.install(str(library), torch.__version__)


def replace_kernels() -> None:
    """Put bnfast's kernels under PyTorch's operators, if they are not there.

    They hand every call back but those of a process or a thread that wants it otherwise.
    """
    global _replaced
    if _replaced:
        return
    with _lock:
        _spend_warning()
        _aten.replace()
        _replaced = True


def _renew_lock() -> None:
    """Make a new lock: a thread that held this one stayed behind in the parent."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _spend_warning() -> None:
    """Let PyTorch say for the only time in a process that a kernel was registered twice.

    It would be said of ours on C's stderr, which nobody could silence.
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
