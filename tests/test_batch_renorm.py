"""BatchRenorm: compared with the paper's equations (Ioffe 2017), and with BatchNorm."""

import copy
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from bad_calls import mentions
from cases import (
    ACTIVATIONS,
    ALL_ORDERS,
    DTYPES,
    EVERY_DTYPE,
    MASKS,
    bits,
    computed_in,
    first_of_each,
    make_problem,
    mask_of,
    poisoned_like,
    scattered,
    weights_and_zeros,
)
from hypothesis import given
from layer_cases import STATE, state_bits
from tolerance import (
    SECOND_ORDER,
    U,
    assert_within,
    backward_bounds,
    batch_statistics,
    constants,
    forward_bound,
    gamma,
    moments_of,
    off_the_kinks,
    running_bound,
    unit,
    weighted_moments_of,
)
from wide import wide

import bnfast
from bnfast import BatchNorm, BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

PLANAR, INTERLEAVED = (4, 5, 3, 7), (33, 21)
SHAPES = pytest.mark.parametrize("shape", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
# Those of the paper, and ones that most channels exceed.
LIMITS = pytest.mark.parametrize("limits", [(3.0, 5.0), (1.25, 0.25)], ids=["wide", "narrow"])
WIDE = {"rmax": 1e12, "dmax": 1e12}


def renorm_of(p, *, seed=0, **options):
    """A layer with the problem's parameters, whose running statistics are not the batch's."""
    layer = BatchRenorm(
        p.channels, p.eps, axis=p.axis, activation=p.activation, dtype=p.weight.dtype, **options
    )
    layer.weight[:], layer.bias[:] = p.weight, p.bias
    rng = np.random.default_rng([seed, p.channels])
    layer.running_mean[:] = rng.normal(0.7, 2, p.channels)
    layer.running_var[:] = 2 * 10.0 ** rng.uniform(-1.5, 1.5, p.channels)
    return layer


def plain_of(layer, **options):
    """A BatchNorm with the state of a layer."""
    plain = BatchNorm(
        layer.num_features, layer.eps, layer.momentum, axis=layer.axis, ddof=layer.ddof,
        activation=layer.activation, dtype=layer.dtype, **options,
    )  # fmt: skip
    plain.load_state_dict(layer.state_dict())
    return plain


class Exact:
    """What a training call of a layer should give, and how far it may be from that.

    A batch renormalization is a batch norm with the weight gamma r and the bias beta + gamma d.
    Its limits are that batch norm's, and what the errors of r and d change.
    """

    def __init__(self, p, layer, mask=None):
        self.p, self.layer = p, layer
        _, self.weight, self.bias, self.eps, *_ = p.exact()
        if mask is None:
            self.weights, self.s = np.ones(p.x.shape), moments_of(p.x, p.axis)
        else:
            read = np.asarray(mask).astype(computed_in(p.x.dtype))
            self.weights = reference.weights_of(read, p.x, p.axis)
            self.s = weighted_moments_of(p.x, p.axis, self.weights)
        running = [wide(a) for a in (layer.running_mean, layer.running_var)]
        s = self.s
        self.r, self.d = reference.correction(
            s.mean, s.var, *running, self.eps, layer.rmax, layer.dmax
        )
        # Six operations make r, and six make d, with products; a limit makes errors no larger.
        sigma = np.sqrt(running[1] + self.eps)
        self.r_error = self.r * (s.var_error / (2 * (s.var + self.eps)) + 8 * U)
        self.d_error = s.mean_error / sigma + U * (
            8 * np.abs(self.d) + np.abs(self.bias / self.weight)
        )
        self.as_batch_norm = p.replace(
            weight=self.weight * self.r, bias=self.bias + self.weight * self.d
        )

    def changed(self, outcome):
        """How much the errors of r and d change an outcome, to first order."""
        exact = outcome(self.r, self.d)
        of_r = outcome(self.r + self.r_error, self.d)
        of_d = outcome(self.r, self.d + self.d_error)
        return tuple(
            1.01 * (abs(a - e) + abs(b - e)) for e, a, b in zip(exact, of_r, of_d, strict=True)
        )

    def check_forward(self, y):
        x, *rest = self.p.exact()

        def outcome(r, d):
            return (reference.renorm_forward(x, self.weights, r, d, *rest),)

        off = forward_bound(self.as_batch_norm, self.s) + self.changed(outcome)[0]
        what = f"y of {self.p.x.shape} {self.p.x.dtype}"
        assert_within(y, outcome(self.r, self.d)[0], SECOND_ORDER * off, what)

    def backward(self, layer):
        """Call the layer's backward and check all gradients."""
        p, s, kind = self.p, self.s, computed_in(self.p.x.dtype)
        off_the_kinks(self.as_batch_norm, s)  # in p.dy itself
        x, *rest = p.exact()
        dy = wide(p.dy)

        def outcome(r, d):
            return reference.renorm_backward(dy, x, self.weights, r, d, *rest)

        exact, off = outcome(self.r, self.d), self.changed(outcome)
        plain = reference.weighted_backward(dy, x, self.weights, *self.as_batch_norm.exact()[1:])
        weights = None if (self.weights == 1).all() else self.weights
        bounds = backward_bounds(self.as_batch_norm, s, plain, weights=weights)
        got = layer.backward(p.dy)
        dx, dresidual = (got, None) if p.residual is None else got
        assert_within(dx, exact.x, bounds.x + off[0], "dx")
        if p.residual is not None:
            assert_within(dresidual, exact.residual, bounds.residual + off[3], "dresidual")
        sizes = np.abs(plain.gamma * self.r) + np.abs(plain.beta * self.d)
        weight = bounds.gamma * self.r + bounds.beta * np.abs(self.d) + off[1] + 3 * U * sizes
        for a, want, bound in (
            (layer.weight_grad, exact.gamma, weight),
            (layer.bias_grad, exact.beta, bounds.beta + off[2]),
        ):
            # rounded once to the layer's type
            bound = SECOND_ORDER * (bound + unit(kind) * np.abs(want))
            assert_within(a, want, bound, "gradient of a parameter")

    def check_running(self, before, momentum=0.1):
        """As BatchNorm: by the batch's own statistics."""
        layer, s, kind = self.layer, self.s, self.layer.dtype
        total = wide(self.weights).sum() / self.p.channels
        k = total / (total - layer.ddof)
        var_error = k * s.var_error + k * (1 + k) * gamma(self.p.m) * s.var
        for got, old, new, error in (
            (layer.running_mean, before[0], s.mean, s.mean_error),
            (layer.running_var, before[1], k * s.var, var_error),
        ):
            want = reference.running_average(old, new, wide(momentum))
            assert_within(got, want, running_bound(old, new, error, momentum, kind), "running")


def check(p, layer, mask=None):
    """A training step of a layer."""
    exact = Exact(p, layer, mask)
    before = wide(layer.running_mean), wide(layer.running_var)
    count = int(layer.num_batches_tracked)
    out = poisoned_like(p.x)
    y = layer(p.x, p.residual, out, mask=mask)
    assert y is out
    exact.check_forward(y)
    exact.check_running(before)
    assert int(layer.num_batches_tracked) == count + 1
    layer.zero_grad()
    exact.backward(layer)


@LIMITS
@SHAPES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_every_variant(dtype, activation, residual, shape, limits):
    p = make_problem(shape, dtype, activation=activation, residual=residual)
    check(p, renorm_of(p, rmax=limits[0], dmax=limits[1]))


@LIMITS
@SHAPES
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.smoke
def test_every_instruction_set(isa, dtype, shape, limits):
    p = make_problem(shape, dtype, activation="relu", residual=True)
    check(p, renorm_of(p, rmax=limits[0], dmax=limits[1]))


@pytest.mark.parametrize("make", MASKS, ids=lambda make: make.__name__)
@SHAPES
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_masks(dtype, shape, make):
    p = make_problem(shape, dtype, activation="silu", residual=True)
    mask = mask_of(p, make)
    check(p, renorm_of(p), mask if mask.dtype == bool else 10 * mask)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis(axis):
    p = make_problem((4, 5, 6), axis=axis, activation="relu")
    check(p, renorm_of(p))
    check(p, renorm_of(p), mask_of(p, scattered))


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_memory_orders(dtype, order):
    p = make_problem(PLANAR, dtype, arrange=ALL_ORDERS[order], activation="relu", residual=True)
    check(p, renorm_of(p), mask_of(p, weights_and_zeros))


@pytest.mark.parametrize(
    "shape", [(2, 3), (1, 3, 2), (3, 1), (2, 3, 16_400), (16_400, 2), (65, 130)], ids=str
)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_sizes(dtype, shape):
    p = make_problem(shape, dtype)
    check(p, renorm_of(p))


def test_statistics_are_those_before_the_batch(rng):
    """Three steps of the paper's algorithm, in float64."""
    layer = BatchRenorm(3, momentum=0.25, dtype=np.float64, rmax=1.5, dmax=0.5)
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(3):
        x = rng.standard_normal((5, 3)) * 2 + 1
        batch = x.mean(axis=0), x.var(axis=0)
        r, d = reference.correction(*batch, mean, var, 1e-5, 1.5, 0.5)
        want = reference.renorm_forward(x, np.ones_like(x), r, d, np.ones(3), np.zeros(3), 1e-5)
        np.testing.assert_allclose(layer(x), want, rtol=1e-12, atol=1e-13)
        mean = reference.running_average(mean, batch[0], 0.25)
        var = reference.running_average(var, batch[1] * 5 / 4, 0.25)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)
    assert int(layer.num_batches_tracked) == 3


class TestLimits:
    @SHAPES
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_one_and_zero_are_batch_norm(self, dtype, shape):
        """Section 3: r = 1, d = 0. Only the statistics are summed otherwise, as `moments` does."""
        p = make_problem(shape, dtype, activation="relu", residual=True)
        layer = renorm_of(p, rmax=1, dmax=0)
        plain = plain_of(layer)
        s = batch_statistics(p.x, 1)
        got, want = layer(p.x, p.residual), plain(p.x, p.residual)
        assert_within(got, wide(want), 2 * forward_bound(p, s))
        off_the_kinks(p, s)
        exact = reference.backward(wide(p.dy), *p.exact())
        bounds = backward_bounds(p, s, exact)
        for a, b, bound in zip(
            layer.backward(p.dy), plain.backward(p.dy), (bounds.x, bounds.residual), strict=True
        ):
            assert_within(a, wide(b), 2 * bound)
        rounded = unit(layer.dtype)
        for name, want, bound in (
            ("weight_grad", exact.gamma, bounds.gamma),
            ("bias_grad", exact.beta, bounds.beta),
        ):
            a, b = getattr(layer, name), wide(getattr(plain, name))
            assert_within(a, b, 2 * bound + 3 * rounded * np.abs(want))

    @SHAPES
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_none_are_evaluation(self, dtype, shape):
        """Section 3: without limits the output is that by the running statistics."""
        p = make_problem(shape, dtype, activation="relu", residual=True)
        layer = renorm_of(p, **WIDE)
        s = constants(layer.running_mean, layer.running_var)
        exact = p.exact()
        want = reference.inference(exact[0], s.mean, s.var, *exact[1:])
        bound = forward_bound(p, s) + forward_bound(
            Exact(p, layer).as_batch_norm, moments_of(p.x, 1)
        )
        evaluated = copy.deepcopy(layer).eval()(p.x, p.residual)
        got = layer(p.x, p.residual)
        assert_within(got, want, bound)
        assert_within(got, wide(evaluated), 2 * bound)

    def test_a_schedule_changes_the_attributes(self):
        """Each call takes what they are then."""
        p = make_problem(PLANAR)
        layer = renorm_of(p, rmax=1, dmax=0)
        found = []
        for layer.rmax, layer.dmax in ((1, 0), (2.0, 0.5), (np.float32(3), np.int64(5))):
            fresh = renorm_of(p, rmax=layer.rmax, dmax=layer.dmax)
            found.append(bits(layer(p.x, update_stats=False)))
            assert found[-1] == bits(fresh(p.x))
        assert len(set(found)) == 3

    def test_backward_is_of_the_forwards_limits(self):
        p = make_problem(PLANAR)
        layer, same = renorm_of(p), renorm_of(p)
        layer(p.x)
        same(p.x)
        layer.rmax, layer.dmax = 1, 0
        layer.running_mean += 1
        assert bits(layer.backward(p.dy)) == bits(same.backward(p.dy))
        assert bits(layer.weight_grad) == bits(same.weight_grad)

    BAD = pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            *(("rmax", v, ValueError) for v in (0.99, 0, -1.0, np.nan, np.inf)),
            *(("dmax", v, ValueError) for v in (-0.01, -5, np.nan, np.inf)),
            *((n, v, TypeError) for n in ("rmax", "dmax") for v in ("3", None, True, [3.0], 3j)),
        ],
    )

    @BAD
    def test_constructor_refuses(self, name, value, error):
        with pytest.raises(error, match=rf"^{name} is"):
            BatchRenorm(4, **{name: value})

    @BAD
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_call_refuses(self, name, value, error, momentum):
        p = make_problem(PLANAR)
        layer = renorm_of(p, momentum=momentum)
        layer(p.x)
        setattr(layer, name, value)
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises(error, match=rf"^{name} is"):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()
        layer.backward(p.dy)  # of the last forward


def test_gradient_is_the_derivative_with_r_and_d_frozen(rng):
    """Central differences of bnfast's own forward, in float64."""
    p = make_problem((4, 3, 5), np.float64, activation="tanh", residual=True)
    for mask in (None, mask_of(p, weights_and_zeros)):
        layer = renorm_of(p, rmax=1.5, dmax=0.5)
        exact = Exact(p, layer, mask)
        r, d = exact.r.astype(np.float64), exact.d.astype(np.float64)
        layer(p.x, p.residual, mask=mask)
        dx, dresidual = layer.backward(p.dy)
        found = {"x": dx, "residual": dresidual}
        found |= {"weight": layer.weight_grad, "bias": layer.bias_grad}
        for name, gradient in found.items():
            direction = rng.standard_normal(gradient.shape)

            def loss(step, name=name, direction=direction, mask=mask, r=r, d=d):
                q = p.replace(**{name: getattr(p, name) + step * direction})
                y, _ = bnfast.batch_norm_forward(
                    q.x, q.weight * r, q.bias + q.weight * d, mask=mask, **q.options
                )
                return np.sum(p.dy * y)

            h = 2.0**-14
            fine, coarse = ((loss(s) - loss(-s)) / (2 * s) for s in (h, 2 * h))
            want = np.sum(gradient * direction)
            # As in test_masked.py: truncation, and two losses of 60 terms of size 3.
            bound = abs(coarse - fine) + 60 * 3 * 20 * np.finfo(float).eps / h
            assert bound < 1e-4 * np.sum(np.abs(gradient * direction)), "the test has no teeth"
            assert abs(fine - want) <= bound, name


class TestEvaluation:
    @SHAPES
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_is_batch_norms(self, dtype, activation, shape):
        p = make_problem(shape, dtype, activation=activation, residual=True)
        layer = renorm_of(p)
        layer(p.x, p.residual)
        layer.eval()
        plain, before = plain_of(layer).eval(), state_bits(layer)
        want = plain(p.x, p.residual)
        assert bits(layer(p.x, p.residual)) == bits(want)
        assert bits(layer(p.x, p.residual, mask=mask_of(p, scattered))) == bits(want)
        assert bits(layer.freeze()(p.x, p.residual)) == bits(want)
        assert state_bits(layer) == before

    def test_no_backward(self):
        p = make_problem(PLANAR)
        layer = renorm_of(p)
        layer(p.x)
        with pytest.raises(RuntimeError, match="evaluation mode"):
            layer.eval().backward(p.dy)
        with pytest.raises(RuntimeError, match="before a forward"):
            layer.train().backward(p.dy)

    def test_folds_as_batch_norm(self):
        p = make_problem(PLANAR)
        layer = renorm_of(p)
        weight, bias = np.ones((5, 2), np.float32), np.zeros(5, np.float32)
        for a, b in zip(
            bnfast.fold(weight, bias, layer),
            bnfast.fold(weight, bias, plain_of(layer)),
            strict=True,
        ):
            assert bits(a) == bits(b)

    def test_population_statistics(self):
        batches = [make_problem((n, 3, 4), np.float64, seed=n).x for n in (5, 8, 2)]
        layer = BatchRenorm(3, dtype=np.float64)
        bnfast.recompute_statistics(layer, batches, [layer])
        mean, var = reference.population(batches)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
        assert int(layer.num_batches_tracked) == 0
        assert layer.training


class TestState:
    def trained(self, **options):
        p = make_problem(PLANAR)
        layer = renorm_of(p, **options)
        layer(p.x)
        layer.backward(p.dy)
        return p, layer

    def test_is_batch_norms(self):
        p, layer = self.trained()
        assert tuple(layer.state_dict()) == STATE
        again = BatchRenorm(5)
        again.load_state_dict(plain_of(layer).state_dict())
        assert all(bits(getattr(again, n)) == bits(getattr(layer, n)) for n in STATE)
        assert bits(again(p.x)) == bits(layer(p.x))

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
    @pytest.mark.parametrize("cls", [BatchRenorm, BatchRenorm2d])
    def test_copies(self, cls, duplicate, momentum):
        p = make_problem(PLANAR)
        layer = cls(5, momentum=momentum, rmax=1.5, dmax=0.25)
        layer(p.x)
        again = duplicate(layer)
        assert type(again) is cls
        assert (again.rmax, again.dmax) == (1.5, 0.25)
        assert state_bits(again) == state_bits(layer)
        with pytest.raises(RuntimeError, match="before a forward"):
            again.backward(p.dy)
        assert bits(again(p.x)) == bits(layer(p.x))
        assert state_bits(again) == state_bits(layer)
        before = state_bits(layer)
        again.weight += 1
        assert state_bits(layer) == before

    def test_first_values(self):
        layer = BatchRenorm(4)
        assert (layer.rmax, layer.dmax) == (3, 5)
        assert isinstance(layer, BatchNorm)
        assert layer.training is True
        plain = BatchNorm(4)
        assert state_bits(layer) == state_bits(plain)
        assert layer.track_running_stats is True

    def test_repr_names_the_options(self):
        text = repr(BatchRenorm(37, eps=0.25, rmax=2, dmax=0.125, activation="relu"))
        assert text.startswith("BatchRenorm(37")
        assert all(f"{part}" in text for part in ("eps=0.25", "rmax=2", "dmax=0.125", "relu"))
        assert text.count("(") == text.count(")")

    @pytest.mark.parametrize("option", ["track_running_stats", "virtual_batch_size"])
    def test_options_that_it_does_not_have(self, option):
        with pytest.raises(TypeError, match=option):
            BatchRenorm(4, **{option: 2})


class TestRunningStatistics:
    def test_cumulative_average(self):
        """As BatchNorm's, to the rounding of the batch's statistics."""
        problems = [make_problem(PLANAR, np.float64, seed=seed) for seed in range(4)]
        layer = BatchRenorm(5, momentum=None, dtype=np.float64)
        plain = BatchNorm(5, momentum=None, dtype=np.float64)
        for k, p in enumerate(problems):
            layer(p.x)
            plain(p.x)
            assert int(layer.num_batches_tracked) == k + 1
            np.testing.assert_allclose(layer.running_mean, plain.running_mean, rtol=1e-13)
            np.testing.assert_allclose(layer.running_var, plain.running_var, rtol=1e-13)

    @pytest.mark.parametrize("ddof", [0, 1])
    def test_ddof(self, ddof):
        p = make_problem(PLANAR, np.float64)
        layer = renorm_of(p, momentum=1.0, ddof=ddof)
        layer(p.x)
        want = p.x.var(axis=(0, 2, 3), ddof=ddof)
        np.testing.assert_allclose(layer.running_var, want, rtol=1e-13)

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_update_stats_false(self, momentum):
        """The same output, and nothing moves."""
        p = make_problem(PLANAR)
        layer = renorm_of(p, momentum=momentum)
        before = state_bits(layer)
        y = layer(p.x, update_stats=False)
        assert state_bits(layer) == before
        dx = layer.backward(p.dy)
        same = renorm_of(p, momentum=momentum)
        assert bits(same(p.x)) == bits(y)
        assert bits(same.backward(p.dy)) == bits(dx)

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    def test_needed_in_training(self, name):
        p = make_problem(PLANAR)
        layer = renorm_of(p)
        setattr(layer, name, None)
        with pytest.raises(RuntimeError, match="running statistics"):
            layer(p.x)

    def test_not_tracked(self):
        """It is plain then, as the PyTorch modules are, and nothing moves."""
        p = make_problem(PLANAR)
        layer, plain = renorm_of(p), BatchNorm(5)
        layer(p.x)
        layer.track_running_stats = plain.track_running_stats = False
        plain.weight[:], plain.bias[:] = layer.weight, layer.bias
        before = state_bits(layer)
        assert bits(layer(p.x)) == bits(plain(p.x))
        assert state_bits(layer) == before
        assert bits(layer.backward(p.dy)) == bits(plain.backward(p.dy))
        assert bits(layer.weight_grad) == bits(plain.weight_grad)

    def test_without_affine(self):
        p = make_problem(PLANAR, np.float64)
        layer = BatchRenorm(5, affine=False, dtype=np.float64, **WIDE)
        same = BatchRenorm(5, dtype=np.float64, **WIDE)
        assert bits(layer(p.x)) == bits(same(p.x))
        assert bits(layer.backward(p.dy)) == bits(same.backward(p.dy))
        assert layer.weight_grad is layer.bias_grad is None


class TestUnderTheMask:
    @pytest.mark.parametrize("make", [first_of_each, scattered, weights_and_zeros])
    @SHAPES
    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_nothing_changes_what_counts(self, dtype, shape, make):
        p = make_problem(shape, dtype, activation="gelu")
        mask = mask_of(p, make)
        left_out = np.broadcast_to(~np.expand_dims(mask > 0, 1), shape)
        p.dy[left_out] = 0
        q = p.replace(x=p.x.copy())
        q.x[left_out] = np.nan
        layers = renorm_of(p), renorm_of(p)
        y, got = (a(r.x, mask=mask) for a, r in zip(layers, (p, q), strict=True))
        assert bits(got[~left_out]) == bits(y[~left_out])
        dx, found = (a.backward(p.dy) for a in layers)
        assert bits(found) == bits(dx)
        assert state_bits(layers[0]) == state_bits(layers[1])

    def test_ones(self):
        p = make_problem(PLANAR)
        layers = renorm_of(p), renorm_of(p)
        y, got = layers[0](p.x), layers[1](p.x, mask=np.ones((4, 3, 7), bool))
        assert bits(got) == bits(y)
        assert bits(layers[0].backward(p.dy)) == bits(layers[1].backward(p.dy))
        assert state_bits(layers[0]) == state_bits(layers[1])


@SHAPES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_in_place(shape, activation):
    p = make_problem(shape, activation=activation, residual=True)
    y = renorm_of(p)(p.x, p.residual)
    layer, x = renorm_of(p), p.x.copy()
    assert layer(x, p.residual, out=x) is x
    assert bits(x) == bits(y)
    with pytest.raises(RuntimeError, match="out=x"):
        layer.backward(p.dy)
    layer, residual = renorm_of(p), p.residual.copy()
    assert layer(p.x, residual, out=residual) is residual
    assert bits(residual) == bits(y)
    if activation == "silu":
        with pytest.raises(RuntimeError, match="out=residual"):
            layer.backward(p.dy)
        return
    same = renorm_of(p)
    same(p.x, p.residual)
    for a, b in zip(layer.backward(p.dy), same.backward(p.dy), strict=True):
        assert bits(a) == bits(b)


RANKS = {BatchRenorm1d: {2, 3}, BatchRenorm2d: {4}, BatchRenorm3d: {5}}


@pytest.mark.parametrize("rank", range(2, 7))
@pytest.mark.parametrize("cls", RANKS)
def test_rank_is_checked(cls, rank):
    x = make_problem((3,) * rank).x
    layer = cls(3)
    assert isinstance(layer, BatchRenorm)
    if rank in RANKS[cls]:
        assert bits(layer(x)) == bits(BatchRenorm(3)(x))
        return
    before = state_bits(layer)
    with pytest.raises(ValueError, match=rf"{rank}D; {cls.__name__} expected"):
        layer(x)
    assert state_bits(layer) == before


ONE = np.zeros((4, 3, 7), bool)
ONE[2, 1, 5] = True


class TestRefused:
    """A refused call changes no statistic, counter or output, and the last forward's backward."""

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"x": np.ones((4, 3, 3, 7), np.float32)}, ValueError, ("channels", 3, 5)),
            ({"x": np.ones((4, 5, 3, 7), int)}, TypeError, ("x", "int64")),
            ({"x": np.ones(5, np.float32)}, ValueError, ("x",)),
            ({"x": np.ones((1, 5), np.float32)}, ValueError, ("more than 1 value per channel",)),
            ({"residual": np.ones((4, 5, 3), np.float32)}, ValueError, ("residual",)),
            ({"out": np.ones((4, 5, 3), np.float32)}, ValueError, ("out",)),
            ({"out": "y"}, TypeError, ("out",)),
            ({"mask": np.ones((4, 3))}, ValueError, ("mask", (4, 3))),
            ({"mask": np.ones((4, 3, 7), int)}, TypeError, ("mask", "int64")),
            ({"mask": -np.ones((4, 3, 7))}, ValueError, ("mask", "-1.0")),
            ({"mask": np.full((4, 3, 7), np.nan)}, ValueError, ("mask", "nan")),
            ({"mask": 0 * ONE}, TypeError, ("mask",)),
            ({"mask": ONE ^ ONE}, ValueError, ("more than 1 value per channel", "mask")),
            ({"mask": ONE}, ValueError, ("more than 1 value per channel", "mask")),
            ({"mask": 5.0 * ONE}, ValueError, ("more than 1 value per channel", "mask")),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("options", [{}, {"momentum": None}, {"ddof": 0}], ids=str)
    def test_call(self, arguments, error, words, options):
        p = make_problem(PLANAR)
        layer = renorm_of(p, **options)
        layer(p.x)
        dx = layer.backward(p.dy)
        before, out = state_bits(layer), poisoned_like(p.x)
        given_out = {} if "x" in arguments or "out" in arguments else {"out": out}
        with pytest.raises(error, match=mentions(*words)):
            layer(**{"x": p.x, **given_out, **arguments})
        assert state_bits(layer) == before
        assert np.isnan(out).all()
        assert bits(layer.backward(p.dy)) == bits(dx)

    @pytest.mark.parametrize("mask", [ONE, 5.0 * ONE, ONE ^ ONE], ids=["one", "heavy", "none"])
    def test_fewer_than_two_also_where_nothing_moves(self, mask):
        p = make_problem(PLANAR)
        with pytest.raises(ValueError, match=mentions("more than 1 value per channel", "mask")):
            renorm_of(p)(p.x, mask=mask, update_stats=False)

    def test_light_weights(self):
        """Their sum is not above ddof: refused where running_var would move."""
        p = make_problem(PLANAR)
        mask = np.full((4, 3, 7), 0.01)
        for momentum in (0.1, None):
            layer, out = renorm_of(p, momentum=momentum), poisoned_like(p.x)
            before = state_bits(layer)
            with pytest.raises(ValueError, match=mentions("mask", "weights", "0.84")):
                layer(p.x, out=out, mask=mask)
            assert state_bits(layer) == before
            assert np.isnan(out).all()
        y = renorm_of(p)(p.x, mask=mask, update_stats=False)
        assert bits(renorm_of(p, ddof=0)(p.x, mask=mask)) == bits(y)

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_running_statistics(self, name, momentum):
        p = make_problem(PLANAR)
        layer = renorm_of(p, momentum=momentum)
        for value in (np.zeros(4, np.float32), np.zeros(5), np.zeros(5, int), [0.0] * 5):
            broken = copy.deepcopy(layer)
            setattr(broken, name, value)
            before, out = state_bits(broken), poisoned_like(p.x)
            with pytest.raises((TypeError, ValueError), match=mentions(name)):
                broken(p.x, out=out)
            assert state_bits(broken) == before
            assert np.isnan(out).all()

    def test_counter_without_room(self):
        p = make_problem(PLANAR)
        for momentum in (0.1, None):
            layer = renorm_of(p, momentum=momentum)
            layer.num_batches_tracked[...] = 2**63 - 1
            before, out = state_bits(layer), poisoned_like(p.x)
            with pytest.raises(ValueError, match=r"^num_batches_tracked is"):
                layer(p.x, out=out)
            assert state_bits(layer) == before
            assert np.isnan(out).all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 7), (4, 5, 0, 7), (0, 5)], ids=str)
def test_empty_batches(shape):
    """As in BatchNorm: they count, change nothing else, and have gradients of 0."""
    x = np.empty(shape, np.float32)
    layer = BatchRenorm(5)
    for more in ({}, {"mask": np.ones(np.delete(shape, 1), bool)}):
        before = state_bits(layer)
        y = layer(x, **more)
        assert y.shape == shape
        changed = {n for n, a in state_bits(layer).items() if before[n] != a}
        assert changed == {"num_batches_tracked"}
        assert layer.backward(y).shape == shape
        assert layer.weight_grad.tolist() == layer.bias_grad.tolist() == [0] * 5


@SHAPES
def test_nan_stays_in_its_channel(shape):
    p = make_problem(shape)
    layers = renorm_of(p), renorm_of(p)
    x = p.x.copy()
    x[(1, 2, *[0] * (x.ndim - 2))] = np.nan
    y, got = layers[0](p.x), layers[1](x)
    others = np.arange(shape[1]) != 2
    assert bits(got[:, others]) == bits(y[:, others])
    for name in ("running_mean", "running_var"):
        a, b = (getattr(layer, name)[others] for layer in layers)
        assert bits(a) == bits(b)
    dx, found = (layer.backward(p.dy) for layer in layers)
    assert bits(found[:, others]) == bits(dx[:, others])


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    for shape in ((5, 13, 61, 61), (20_003, 7)):
        p = make_problem(shape, dtype, activation="relu")
        mask, found = mask_of(p, first_of_each), []
        for n in (1, 2, 4):
            with bnfast.num_threads(n):
                layer = renorm_of(p)
                y = layer(p.x, mask=mask)
                found.append((bits(y), bits(layer.backward(p.dy)), state_bits(layer)))
        assert found[0] == found[1] == found[2]


# --- Properties -----------------------------------------------------------------------------------


@st.composite
def problems(draw, **options):
    shape = (draw(st.integers(2, 20)), *draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    options.setdefault("activation", draw(st.sampled_from(ACTIVATIONS)))
    options.setdefault("residual", draw(st.booleans()))
    return make_problem(
        shape,
        draw(st.sampled_from(DTYPES)),
        axis=draw(st.integers(1, len(shape) - 1)),
        seed=draw(st.integers(0, 2**32 - 1)),
        **options,
    )


limits = st.tuples(st.floats(1, 8), st.floats(0, 8))


class TestProperties:
    @given(problems(), limits, st.sampled_from([None, *MASKS]), st.integers(0, 99))
    def test_results_are_the_references(self, p, limits, make, seed):
        mask = None if make is None else mask_of(p, make, seed)
        if mask is not None and mask.dtype != bool:
            mask = mask + 1.0  # more than ddof in all
        check(p, renorm_of(p, seed=seed, rmax=limits[0], dmax=limits[1]), mask)

    @given(problems(), limits, st.integers(-12, 12))
    def test_scale_invariance_to_the_bit(self, p, limits, k):
        """x, the running statistics and eps in other units: a power of two rounds nothing."""
        a = 2.0**k
        layer = renorm_of(p, rmax=limits[0], dmax=limits[1])
        q = p.replace(x=(a * p.x).astype(p.x.dtype), eps=a * a * p.eps)
        other = renorm_of(q, rmax=limits[0], dmax=limits[1])
        other.running_mean *= a
        other.running_var *= a * a
        assert bits(other(q.x, q.residual)) == bits(layer(p.x, p.residual))
        assert bits(other.running_var) == bits(a * a * layer.running_var)
        got, want = other.backward(q.dy), layer.backward(p.dy)
        if p.residual is not None:
            assert bits(got[1]) == bits(want[1])
            got, want = got[0], want[0]
        assert bits(p.x.dtype.type(a) * got) == bits(want)
        assert bits(other.weight_grad) == bits(layer.weight_grad)

    @given(problems(activation=None, residual=False), limits)
    def test_output_is_within_the_limits_of_batch_norms(self, p, limits):
        """y = BN(x) r + d with weight 1 and bias 0: a map of each channel, r positive."""
        p = p.replace(weight=np.ones_like(p.weight), bias=np.zeros_like(p.bias))
        layer = renorm_of(p, rmax=limits[0], dmax=limits[1])
        y = layer(p.x).astype(np.float64)
        axes = tuple(i for i in range(p.x.ndim) if i != p.axis)
        s = moments_of(p.x, p.axis)
        off = float(forward_bound(Exact(p, layer).as_batch_norm, s).max()) + 1e-12
        assert np.all(np.abs(y.mean(axis=axes)) <= limits[1] + off)
        deviation = np.sqrt((s.var / (s.var + p.eps)).astype(np.float64))
        got = y.std(axis=axes)
        assert np.all(got <= limits[0] * deviation + 2 * off)
        assert np.all(got >= deviation / limits[0] - 2 * off)


def test_virtual_batches_are_refused():
    layer = bnfast.BatchRenorm(3)
    layer.virtual_batch_size = 2
    before = layer.state_dict()
    with pytest.raises(ValueError, match="virtual_batch_size is 2; expected None"):
        layer(np.ones((4, 3), np.float32))
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
