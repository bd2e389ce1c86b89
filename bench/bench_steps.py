"""pytest-benchmark suite: forward, backward and inference by shape, layout and variant.

Run and compared as bench_kernels.py says. "default" calls make their own result.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import STEPS, VARIANTS
from peer_bnfast import Ours
from suite import CASES, data_of, label


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("out", ["given", "default"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_step(benchmark: Any, case: Any, variant: str, out: str, step: str) -> None:
    data = data_of(*case, variant)
    name = "bnfast" if out == "given" else "bnfast default"
    benchmark(Ours().runs(data, data.sets[0], step)[name].call)
