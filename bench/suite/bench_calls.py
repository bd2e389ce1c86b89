"""pytest-benchmark suite: the smallest calls, which are nearly all overhead, and the import.

bench_kernels.py says how to run and compare it.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.harness import extras, small_calls


@pytest.mark.parametrize("name", small_calls.calls())
def test_small_call(benchmark: Any, name: str) -> None:
    benchmark(small_calls.calls()[name])


@pytest.mark.parametrize("packages", ["numpy", "numpy, bnfast"])
def test_import(benchmark: Any, packages: str) -> None:
    benchmark.pedantic(extras.import_in_subprocess, (packages,), rounds=7, warmup_rounds=1)
