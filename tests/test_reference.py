"""The reference compared with definitions that do not use its formulas."""

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, make_problem
from tolerance import gamma, unit


def central_difference(f, at, direction, h):
    return (f(at + h * direction) - f(at - h * direction)) / (2 * h)


STEP = np.longdouble(2) ** -15


def assert_derivative(f, at, direction, want, h=STEP):
    """A central difference is off by c h^2, so the one with 2 h differs
    from it by 3 c h^2; rounding adds a few hundred units of f over h.
    """
    fine = central_difference(f, at, direction, h)
    truncation = abs(central_difference(f, at, direction, 2 * h) - fine)
    rounding = 1000 * unit(np.longdouble) * max(1, abs(f(at))) / h
    assert truncation + rounding < 1e-6 * max(1, abs(want))
    assert abs(fine - want) <= truncation + rounding


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("wrt", range(4), ids=reference.Gradients._fields)
@pytest.mark.parametrize("given", [False, True], ids=["batch", "constants"])
def test_gradients_are_derivatives(activation, wrt, given, rng):
    p = make_problem((4, 3, 5), np.float64, activation=activation, residual=True, seed=3)
    x, gamma_, beta, eps, axis, residual, _ = p.exact()
    arguments = [x, gamma_, beta, residual]
    constants = (x.mean(axis=(0, 2)), x.var(axis=(0, 2)))

    def loss(argument):
        x, g, b, r = (*arguments[:wrt], argument, *arguments[wrt + 1 :])
        if given:
            y = reference.inference(x, *constants, g, b, eps, axis, r, activation)
        else:
            y = reference.forward(x, g, b, eps, axis, r, activation)
        return np.sum(p.dy * y)

    if given:
        gradients = reference.inference_backward(p.dy, x, *constants, *p.exact()[1:])
    else:
        gradients = reference.backward(p.dy, *p.exact())
    direction = rng.standard_normal(arguments[wrt].shape).astype(np.longdouble)
    want = np.sum(gradients[wrt] * direction)
    assert_derivative(loss, arguments[wrt], direction, want)


def test_welford_agrees_with_the_definition(rng):
    values = rng.standard_normal(1000) + 10
    count, mean, m2 = reference.welford(values.tolist())
    # Chan, Golub and LeVeque (1983): the recurrence's error is of the order
    # n u kappa, kappa^2 = 1 + (mean / deviation)^2.
    bound = gamma(values.size) * np.hypot(1, 10 / values.std())
    assert count == 1000
    assert mean == pytest.approx(values.mean(), rel=bound)
    assert m2 / count == pytest.approx(values.var(), rel=2 * bound)


def test_population_of_all_values(rng):
    values = rng.standard_normal((12, 2, 3))
    mean, var = reference.population([values[:5], values[5:6], values[6:]])
    assert np.array_equal(mean, values.mean(axis=(0, 2)))
    assert np.allclose(var, values.var(axis=(0, 2), ddof=1), rtol=gamma(40), atol=0)


def test_population_as_paper_estimate(rng):
    """Algorithm 2's average of unbiased batch variances has the same expectation."""
    batches = rng.standard_normal((2000, 60, 1))
    _, var = reference.population(batches)
    papers = np.mean([b.var(axis=0, ddof=1) for b in batches])
    # Both estimate 1 from 120,000 values: standard error sqrt(2 / 120000).
    assert abs(papers - var[0]) < 6 * np.sqrt(2 / 120_000)
