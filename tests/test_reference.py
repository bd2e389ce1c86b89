"""The reference compared with definitions that do not use its formulas."""

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, make_problem
from tolerance import gamma
from wide import UNIT, wide


def central_difference(f, at, direction, h):
    return (f(at + h * direction) - f(at - h * direction)) / (2 * h)


STEP = wide(2) ** -15


def assert_derivative(f, at, direction, want, h=STEP):
    """A central difference is off by c h^2, so the one with 2 h differs
    from it by 3 c h^2; rounding adds a few hundred units of f over h.
    """
    fine = central_difference(f, at, direction, h)
    truncation = abs(central_difference(f, at, direction, 2 * h) - fine)
    rounding = 1000 * UNIT * max(1, abs(f(at))) / h
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
        gradients = reference.inference_backward(wide(p.dy), x, *constants, *p.exact()[1:])
    else:
        gradients = reference.backward(wide(p.dy), *p.exact())
    direction = wide(rng.standard_normal(arguments[wrt].shape))
    want = np.sum(gradients[wrt] * direction)
    assert_derivative(loss, arguments[wrt], direction, want)


def weights_for(p, rng):
    """Weights of which some are 0, shaped like x."""
    mask = rng.uniform(0.25, 2, (4, 5)) * (rng.random((4, 5)) < 0.7)
    return wide(reference.weights_of(mask, p.x))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("wrt", range(4), ids=reference.Gradients._fields)
@pytest.mark.parametrize("renorm", [False, True], ids=["batch", "renorm"])
def test_weighted_gradients_are_derivatives(activation, wrt, renorm, rng):
    """r and d of a renormalization are constants."""
    p = make_problem((4, 3, 5), np.float64, activation=activation, residual=True, seed=4)
    x, gamma_, beta, eps, axis, residual, _ = p.exact()
    weights = weights_for(p, rng)
    given = (rng.uniform(0.5, 2, 3), rng.standard_normal(3)) if renorm else ()
    forward, backward = (
        (reference.renorm_forward, reference.renorm_backward)
        if renorm
        else (reference.weighted_forward, reference.weighted_backward)
    )
    arguments = [x, gamma_, beta, residual]

    def loss(argument):
        x, g, b, r = (*arguments[:wrt], argument, *arguments[wrt + 1 :])
        return np.sum(p.dy * forward(x, weights, *given, g, b, eps, axis, r, activation))

    gradients = backward(
        wide(p.dy), x, weights, *given, gamma_, beta, eps, axis, residual, activation
    )
    direction = wide(rng.standard_normal(arguments[wrt].shape))
    want = np.sum(gradients[wrt] * direction)
    assert_derivative(loss, arguments[wrt], direction, want)


def test_whole_weights_are_copies_of_a_value(rng):
    """Weights 0, 1 and 3 are the value left out, once and three times."""
    x, times = rng.standard_normal((3, 2)), [0, 1, 3]
    weights = reference.weights_of(times, x)
    copies = np.repeat(x, times, axis=0)
    got = reference.weighted_mean(x, weights), reference.weighted_variance(x, weights)
    want = reference.batch_mean(copies), reference.batch_variance(copies)
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_renormalization_without_limits_is_that_by_the_running_statistics(rng):
    """Section 3: with r and d as they are, the output is the one of inference."""
    x, mean, variance = rng.standard_normal((9, 3)), rng.standard_normal(3), rng.uniform(1, 2, 3)
    weights = np.ones_like(x)
    batch = reference.batch_mean(x), reference.batch_variance(x)
    r, d = reference.correction(*batch, mean, variance, 1e-5, np.inf, np.inf)
    got = reference.renorm_forward(x, weights, r, d, np.ones(3), np.zeros(3), 1e-5)
    want = reference.inference(x, mean, variance, np.ones(3), np.zeros(3), 1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


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
