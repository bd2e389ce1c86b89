"""pytest-benchmark suite: the smallest calls, where all is overhead, and the import.

Run and compared as bench_kernels.py says.
"""

from __future__ import annotations

from typing import Any

import extras
import pytest


@pytest.mark.parametrize("name", extras.calls())
def test_small_call(benchmark: Any, name: str) -> None:
    benchmark(extras.calls()[name])


@pytest.mark.parametrize("packages", ["numpy", "numpy, bnfast"])
def test_import(benchmark: Any, packages: str) -> None:
    benchmark.pedantic(extras.import_in_subprocess, (packages,), rounds=7, warmup_rounds=1)
