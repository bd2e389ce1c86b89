"""pytest-benchmark suite: forward, backward and inference by shape, layout and variant.

bench_kernels.py says how to run and compare it. "default" calls make their own result.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.harness.cases import STEPS, VARIANTS
from bench.peers.ours import Ours
from bench.suite.data import CASES, data_of, label


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("out", ["given", "default"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_step(benchmark: Any, case: Any, variant: str, out: str, step: str) -> None:
    data = data_of(*case, variant)
    name = "bnfast" if out == "given" else "bnfast default"
    benchmark(Ours().runs(data, data.sets[0], step)[name].call)
