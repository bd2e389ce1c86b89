"""pytest-benchmark suite: each kernel, by shape, layout and type.

    make bench-suite ARGS="-k moments"
    make bench-suite ARGS="--benchmark-autosave"     # then, at another commit,
    make bench-suite ARGS="--benchmark-compare"

BNFAST_NUM_THREADS sets the number of threads, which is not part of a benchmark's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import bnfast
from bench.harness.cases import DTYPES, Data
from bench.suite.data import CASES, data_of, label


def moments(d: Data) -> Callable[[], Any]:
    return lambda: bnfast.moments(d.sets[0].x, axis=d.case.axis)


def apply(d: Data) -> Callable[[], Any]:
    b = d.sets[0]
    return lambda: bnfast.scale_shift(b.x, d.weight, d.bias, axis=d.case.axis, out=b.out)


def grad_sums(d: Data) -> Callable[[], Any]:
    b, axis = d.sets[0], d.case.axis
    stats = bnfast.batch_norm_forward(b.x, axis=axis)[1]
    needs = ("weight", "bias")
    return lambda: bnfast.batch_norm_backward(
        b.dy, b.x, stats, d.weight, d.bias, axis=axis, needs=needs
    )


def grad_input(d: Data) -> Callable[[], Any]:
    """With constant statistics, whose gradient needs no sums first."""
    b, axis = d.sets[0], d.case.axis
    stats = bnfast.BatchStats.from_population(d.mean, d.var)
    return lambda: bnfast.batch_norm_backward(
        b.dy, b.x, stats, d.weight, d.bias, axis=axis, out=b.out, needs=("x",)
    )


@pytest.mark.parametrize("kernel", [moments, apply, grad_sums, grad_input])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernel(
    benchmark: Any, case: Any, dtype: str, kernel: Callable[[Data], Callable[[], Any]]
) -> None:
    benchmark(kernel(data_of(*case, "plain", dtype)))
