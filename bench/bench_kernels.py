"""pytest-benchmark suites: forward, backward, inference and moments by shape, layout and variant.

make bench ARGS="-k forward"
make bench ARGS="--benchmark-autosave"        # then, after a change,
make bench ARGS="--benchmark-compare"
"""

import numpy as np
import pytest
import shapes

import bnfast

VARIANTS = {"plain": (None, False), "relu": ("relu", False), "add_relu": ("relu", True)}
CASES = [
    (shape, layout)
    for shape in shapes.ALL
    for layout in (("nchw", "nhwc") if len(shape) > 2 else ("dense",))
]


def name(case):
    shape, layout = case
    return f"{'x'.join(map(str, shape))}-{layout}"


class Problem:
    """Arrays of one case, outputs included, so that no page is new while the clock runs."""

    def __init__(self, case, variant="plain"):
        shape, layout = case
        memory, self.axis = shapes.in_layout(shape, layout)
        self.activation, with_residual = VARIANTS[variant]
        rng = np.random.default_rng(0)
        self.x, self.dy, residual = (rng.standard_normal(memory, np.float32) for _ in range(3))
        self.residual = residual if with_residual else None
        channels = memory[self.axis]
        self.weight, self.bias = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self.mean, self.var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.out = np.empty_like(self.x)

    def batch_norm(self, training):
        return bnfast.batch_norm(
            self.x, self.mean, self.var, self.weight, self.bias, training, axis=self.axis,
            activation=self.activation, residual=self.residual, out=self.out,
        )  # fmt: skip

    def backward(self, stats, y):
        return bnfast.batch_norm_backward(
            self.dy, self.x, stats, self.weight, self.bias, axis=self.axis,
            activation=self.activation, residual=self.residual, y=y, out=self.out,
        )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("training", [True, False], ids=["forward", "inference"])
def test_batch_norm(benchmark, case, variant, training):
    benchmark(Problem(case, variant).batch_norm, training)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_backward(benchmark, case, variant):
    p = Problem(case, variant)
    y, stats = bnfast.batch_norm_forward(
        p.x, p.weight, p.bias, axis=p.axis, activation=p.activation, residual=p.residual
    )
    benchmark(p.backward, stats, y if p.residual is not None else None)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_moments(benchmark, case):
    p = Problem(case)
    benchmark(bnfast.moments, p.x, axis=p.axis)


def test_small_frozen_call(benchmark):
    x = np.ones((1, 16, 4, 4), np.float32)
    benchmark(bnfast.BatchNorm2d(16).freeze(), x)


def test_small_functional_call(benchmark):
    p = Problem(((1, 16, 4, 4), "nchw"))
    benchmark(bnfast.batch_norm, p.x, p.mean, p.var, p.weight, p.bias)
