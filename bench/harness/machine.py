"""The machine that a benchmark ran on, as the system describes it, without host names."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bnfast import _core

THP = Path("/sys/kernel/mm/transparent_hugepage")
T = TypeVar("T")
NOT_TOLD = "not told"
# A third busy thread on two cores makes a parallel region wait for the scheduler for some
# milliseconds. When other processes take more than this share of the CPU time, medians show it.
BUSY = 0.05


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return NOT_TOLD


def _cpu() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or NOT_TOLD


def _memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def describe() -> dict[str, Any]:
    built = _core.config()
    caches = built["caches"]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": _memory(),
        "caches": {key: int(caches[key]) for key in ("l1d", "l2", "l3")},
        "caches_from": caches["source"],
        "kernel": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "bnfast_isa": built["isa"],
        "bnfast_compiler": built["compiler"],
        "thp": _read(THP / "enabled"),
        "thp_defrag": _read(THP / "defrag"),
        "omp_environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_"))},
    }


def last_level_cache(machine: dict[str, Any]) -> int:
    caches = machine["caches"]
    return caches["l3"] or caches["l2"]


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds used so far by this process, and by all others and the hypervisor."""
    own = sum(os.times()[:4])
    fields = _read(Path("/proc/stat")).split("\n", 1)[0].split()[1:]
    if not fields or not fields[0].isdigit():
        return own, own
    ticks = [int(field) for field in fields]
    spent = sum(ticks[:3]) + sum(ticks[5:8])  # all but idle, I/O wait and guests
    return own, spent / os.sysconf("SC_CLK_TCK") - own


def share_of_others(before: tuple[float, float]) -> float:
    """Return the share of other processes in the CPU time used since `before`."""
    own, others = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    return round(max(others, 0.0) / max(own + others, 1e-9), 3)


def when_quiet(measure: Callable[[], T], attempts: int) -> tuple[T, float]:
    """Repeat a measurement until other processes are quiet.

    Returns the quietest attempt, and the share of CPU time that others took during it.
    """
    best: tuple[T, float] | None = None
    for _ in range(attempts):
        before = cpu_seconds()
        found = measure(), share_of_others(before)
        if best is None or found[1] < best[1]:
            best = found
        if best[1] <= BUSY:
            break
    assert best is not None
    return best


def _bytes(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def lines(machine: dict[str, Any]) -> list[str]:
    """Return the machine in words, as lines of a report."""
    l1d, l2, l3 = (_bytes(machine["caches"][key]) for key in ("l1d", "l2", "l3"))
    others = machine["others"]
    loud = "; TOO MUCH for two threads to be timed" if others > BUSY else ""
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"caches: L1d {l1d}, L2 {l2} a core, L3 {l3} ({machine['caches_from']})",
        f"{machine['kernel']}, Python {machine['python']}, NumPy {machine['numpy']}",
        f"bnfast's kernels: {machine['bnfast_isa']}, {machine['bnfast_compiler']}",
        f"transparent huge pages: {machine['thp']}; defrag: {machine['thp_defrag']}",
        f"other processes took {100 * others:.1f}% of the CPU time used{loud}",
        f"OpenMP's environment: {machine['omp_environment'] or 'as it comes'}",
    ]
