"""Measurements besides the rows by shape: the smallest calls, the import, half types."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from bench.harness import small_calls
from bench.harness.cases import numpy_type
from bench.harness.timing import Contestant, Progress, measure

BEYOND_CACHES = (32, 256, 56, 56)


def measure_all() -> dict[str, Any]:
    Progress.say("small calls, import time, half types")
    return {"small_calls": small_call_times(), "import_seconds": import_time(), "half": half()}


def small_call_times() -> dict[str, float]:
    """Return the seconds of each small call."""
    calls = small_calls.calls() | torch_call()
    contestants = [Contestant(name, [call]) for name, call in calls.items()]
    return {name: timing.median for name, timing in measure(contestants, 50).items()}


def torch_call() -> dict[str, Callable[[], Any]]:
    if "torch" not in sys.modules:  # not a peer of this run
        return {}
    import torch

    tensors = [torch.from_numpy(array) for array in small_calls.arrays()]
    return {"torch, inference": lambda: torch.nn.functional.batch_norm(*tensors)}


def import_time(repeats: int = 9) -> float:
    """Return the seconds that importing bnfast adds to NumPy's import.

    Files and bytecode are cached: installers compile to bytecode, so PYTHONDONTWRITEBYTECODE
    must not have an effect here.
    """
    code = (
        "import time, numpy; start = time.perf_counter(); import bnfast; "
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        cached = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        taken = [float(in_subprocess(code, cached)) for _ in range(repeats)]
    return statistics.median(taken[1:])


def import_in_subprocess(packages: str) -> None:
    in_subprocess(f"import {packages}")


def in_subprocess(code: str, variables: dict[str, str] | None = None) -> str:
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=env)


def half() -> dict[str, Any]:
    """Return the time of inference of half types over float32's: float16's is "ratio".

    Where float16 is refused, return the reason instead.
    """
    calls = {name: half_call(name) for name in ("float32", "float16", *bfloat16())}
    try:
        calls["float16"]()
    except TypeError as refused:
        return {"refused": str(refused).partition(";")[0]}
    times = measure([Contestant(name, [call]) for name, call in calls.items()])
    over = {name: timing.median / times["float32"].median for name, timing in times.items()}
    return {"ratio": over.pop("float16")} | {name: over[name] for name in bfloat16()}


def bfloat16() -> list[str]:
    """Return its name where NumPy has it."""
    return ["bfloat16"] if importlib.util.find_spec("ml_dtypes") else []


def half_call(dtype: str) -> Any:
    x = np.ones(BEYOND_CACHES, numpy_type(dtype))
    mean, out = np.ones(BEYOND_CACHES[1], np.float32), np.empty_like(x)
    return lambda: bnfast.batch_norm(x, mean, mean, out=out)
