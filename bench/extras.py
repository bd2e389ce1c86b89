"""What is not a row of shapes: the smallest calls, the import, half types."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import shapes
from timing import Contestant, Progress, measure

import bnfast

BEYOND_CACHES = (32, 256, 56, 56)


def measure_all() -> dict[str, Any]:
    Progress.say("small calls, import time, half types")
    return {"small_calls": small_calls(), "import_seconds": import_time(), "half": half()}


def small_calls() -> dict[str, float]:
    """Seconds of each call."""
    contestants = [Contestant(name, [call]) for name, call in (calls() | torch_call()).items()]
    return {name: timing.median for name, timing in measure(contestants, 50).items()}


def given() -> tuple[np.ndarray, ...]:
    """x, mean, var, weight, bias: so small that a call is all overhead."""
    return np.ones(shapes.TINY[0], np.float32), *(np.ones(16, np.float32) for _ in range(4))


def calls() -> dict[str, Callable[[], Any]]:
    """Calls on (1, 16, 4, 4), by name. Results are fresh unless the name says otherwise."""
    arguments = x, _, _, weight, bias = given()
    frozen, out = bnfast.BatchNorm2d(16).freeze(), np.empty_like(x)
    stats = bnfast.batch_norm_forward(x)[1]
    return {
        "FrozenBatchNorm": lambda: frozen(x),
        "FrozenBatchNorm, out=": lambda: frozen(x, out=out),
        "batch_norm": lambda: bnfast.batch_norm(*arguments),
        "batch_norm, out=": lambda: bnfast.batch_norm(*arguments, out=out),
        "batch_norm, training": lambda: bnfast.batch_norm(*arguments, True),
        "batch_norm_forward": lambda: bnfast.batch_norm_forward(x, weight, bias),
        "batch_norm_backward": lambda: bnfast.batch_norm_backward(x, x, stats, weight, bias),
    }


def torch_call() -> dict[str, Callable[[], Any]]:
    if "torch" not in sys.modules:  # not asked for, or not here
        return {}
    import torch

    tensors = [torch.from_numpy(array) for array in given()]
    return {"torch, inference": lambda: torch.nn.functional.batch_norm(*tensors)}


def import_time(repeats: int = 9) -> float:
    """Seconds that importing bnfast adds to NumPy's import, files and bytecode cached.

    As installers leave it: they compile to bytecode, whatever PYTHONDONTWRITEBYTECODE says here.
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
    """Inference in float16 over the same in float32, beyond the cache; why not, where refused."""
    calls = {name: half_call(name) for name in ("float32", "float16")}
    try:
        calls["float16"]()
    except TypeError as refused:
        return {"refused": str(refused).partition(";")[0]}
    times = measure([Contestant(name, [call]) for name, call in calls.items()])
    return {"ratio": times["float16"].median / times["float32"].median}


def half_call(dtype: str) -> Any:
    x = np.ones(BEYOND_CACHES, dtype)
    mean, out = np.ones(BEYOND_CACHES[1], np.float32), np.empty_like(x)
    return lambda: bnfast.batch_norm(x, mean, mean, out=out)
