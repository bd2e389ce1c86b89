"""BatchNorm, its rank-checked forms and FrozenBatchNorm."""

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, DTYPES, EVERY_DTYPE, bits, computed_in, make_problem, poisoned_like
from layer_cases import SHAPE, STATE, call, layer_of, state_bits, trained
from tolerance import assert_within, batch_statistics, constants, forward_bound, running_bound

import bnfast
from bnfast import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, FrozenBatchNorm


class TestAttributes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_first_values_are_pytorchs(self, dtype):
        layer = BatchNorm(4, dtype=dtype)
        assert layer.training is True
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            a = getattr(layer, name)
            assert type(a) is np.ndarray
            assert a.dtype == dtype
            assert a.tolist() == [value] * 4
        assert int(layer.num_batches_tracked) == 0
        assert (layer.num_features, layer.eps, layer.momentum) == (4, 1e-5, 0.1)
        assert layer.weight_grad.tolist() == layer.bias_grad.tolist() == [0] * 4

    def test_without_affine(self):
        layer = BatchNorm(4, affine=False)
        assert layer.weight is layer.bias is layer.weight_grad is layer.bias_grad is None
        assert set(layer.state_dict()) == set(STATE[2:])

    def test_without_running_statistics(self):
        layer = BatchNorm(4, track_running_stats=False)
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
        assert set(layer.state_dict()) == set(STATE[:2])

    def test_repr_names_the_options(self):
        text = repr(BatchNorm(37, eps=0.25, activation="relu"))
        assert all(part in text for part in ("BatchNorm", "37", "0.25", "relu"))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
class TestCall:
    """A layer calls the functions and holds their state."""

    @pytest.mark.smoke
    def test_training(self, dtype, activation, residual):
        p = make_problem(SHAPE, dtype, activation=activation, residual=residual)
        layer = layer_of(p)
        y = call(layer, p)
        want, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, eps=p.eps, **p.options)
        assert bits(y) == bits(want)
        assert int(layer.num_batches_tracked) == 1
        s = batch_statistics(p.x, 1)
        unbiased = p.m / (p.m - 1)
        bound = running_bound(0, s.mean, s.mean_error, 0.1, computed_in(dtype))
        assert_within(layer.running_mean, 0.1 * s.mean, bound)
        bound = running_bound(1, s.var * unbiased, s.var_error * unbiased, 0.1, computed_in(dtype))
        want_var = reference.running_average(np.ones(5), s.var * unbiased, 0.1)
        assert_within(layer.running_var, want_var, bound)

        got = layer.backward(p.dy)
        want = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias, **p.options)
        dx, dresidual = got if residual else (got, None)
        assert bits(dx) == bits(want.x)
        assert dresidual is want.residual is None or bits(dresidual) == bits(want.residual)
        assert bits(layer.weight_grad) == bits(want.weight.astype(computed_in(dtype)))
        assert bits(layer.bias_grad) == bits(want.bias.astype(computed_in(dtype)))

    @pytest.mark.smoke
    def test_eval(self, dtype, activation, residual):
        p = make_problem(SHAPE, dtype, activation=activation, residual=residual)
        layer = trained(p).eval()
        before = state_bits(layer)
        y = call(layer, p, out=poisoned_like(p.x))
        s = constants(layer.running_mean, layer.running_var)
        exact = p.exact()
        want = reference.inference(exact[0], s.mean, s.var, *exact[1:])
        assert_within(y, want, forward_bound(p, s))
        assert state_bits(layer) == before

    @pytest.mark.smoke
    def test_frozen_is_eval(self, dtype, activation, residual):
        p = make_problem(SHAPE, dtype, activation=activation, residual=residual)
        layer = trained(p)
        frozen = layer.freeze()
        assert isinstance(frozen, FrozenBatchNorm)
        assert layer.training, "freezing leaves the mode"
        out = poisoned_like(p.x)
        assert call(frozen, p, out=out) is out
        assert bits(out) == bits(call(layer.eval(), p))


class TestOptions:
    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    def test_axis(self, axis):
        p = make_problem((4, 5, 6), axis=axis, activation="relu")
        want, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias, **p.options)
        layer = layer_of(p)
        assert bits(layer(p.x)) == bits(want)
        assert bits(layer.eval()(p.x)) == bits(layer.freeze()(p.x))

    @pytest.mark.parametrize("ddof", [0, 1])
    def test_ddof(self, ddof):
        p = make_problem(SHAPE)
        layer = trained(p, momentum=1.0, ddof=ddof)
        s = batch_statistics(p.x, 1)
        k = p.m / (p.m - ddof)
        bound = running_bound(0, k * s.var, k * s.var_error, 1, np.float32)
        assert_within(layer.running_var, k * s.var, bound)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_momentum_is_the_cumulative_average(self, dtype):
        problems = [make_problem(SHAPE, dtype, seed=seed) for seed in range(4)]
        layer = layer_of(problems[0], momentum=None)
        mean = var = mean_bound = var_bound = 0
        for k, p in enumerate(problems):
            layer(p.x)
            s, n = batch_statistics(p.x, 1), p.m / (p.m - 1)
            step = 1 / (k + 1)
            # The former error of the running value stays in it.
            mean_bound = mean_bound + running_bound(mean, s.mean, s.mean_error, step, dtype)
            var_bound = var_bound + running_bound(var, n * s.var, n * s.var_error, step, dtype)
            mean, var = mean + step * (s.mean - mean), var + step * (n * s.var - var)
            assert int(layer.num_batches_tracked) == k + 1
            assert_within(layer.running_mean, mean, mean_bound)
            assert_within(layer.running_var, var, var_bound)

    def test_untracked_uses_the_batch_in_both_modes(self):
        p = make_problem(SHAPE)
        layer = layer_of(p, track_running_stats=False)
        want, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        assert bits(layer(p.x)) == bits(want)
        assert bits(layer.eval()(p.x)) == bits(want)

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_update_stats_false(self, momentum):
        p = make_problem(SHAPE)
        layer = layer_of(p, momentum=momentum)
        before = state_bits(layer)
        want, _ = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        assert bits(layer(p.x, update_stats=False)) == bits(want)
        assert state_bits(layer) == before
        layer.backward(p.dy)
        assert state_bits(layer) != before

    def test_without_affine(self):
        p = make_problem(SHAPE)
        layer = BatchNorm(5, affine=False)
        want, stats = bnfast.batch_norm_forward(p.x)
        assert bits(layer(p.x)) == bits(want)
        dx = bnfast.batch_norm_backward(p.dy, p.x, stats).x
        assert bits(layer.backward(p.dy)) == bits(dx)

    @pytest.mark.parametrize("dtype", EVERY_DTYPE)
    def test_layer_of_float32_takes_every_type(self, dtype):
        x = make_problem(SHAPE, dtype).x
        layer = BatchNorm(5)
        assert layer(x).dtype == dtype
        assert layer.running_mean.dtype == np.float32
        assert layer.backward(x).dtype == dtype
        assert layer.weight_grad.dtype == np.float32

    def test_empty_batch_counts_but_changes_nothing_else(self):
        layer = trained(make_problem(SHAPE))
        before = state_bits(layer)
        y = layer(np.empty((0, 5, 3, 4), np.float32))
        assert y.shape == (0, 5, 3, 4)
        after = state_bits(layer)
        assert int(layer.num_batches_tracked) == 2
        changed = {n for n in before if before[n] != after[n]}
        assert changed == {"num_batches_tracked"}
        assert layer.backward(y).shape == y.shape


RANKS = {BatchNorm1d: {2, 3}, BatchNorm2d: {4}, BatchNorm3d: {5}}


@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("cls", RANKS)
def test_rank_is_checked(cls, rank):
    x = make_problem((3,) * max(rank, 2)).x
    x = x[0] if rank == 1 else x
    layer = cls(3)
    assert isinstance(layer, BatchNorm)
    if rank in RANKS[cls]:
        assert bits(layer(x)) == bits(BatchNorm(3)(x))
        return
    before = state_bits(layer)
    expected = "|".join(str(r) for r in RANKS[cls])
    with pytest.raises(ValueError, match=rf"(?s)({expected}).*{rank}|{rank}.*({expected})"):
        layer(x)
    assert state_bits(layer) == before


class TestFrozen:
    def test_attributes(self):
        p = make_problem((4, 6, 5), axis=2, activation="relu6")
        layer = trained(p)
        frozen = layer.freeze()
        assert (frozen.axis, frozen.activation) == (2, "relu6")
        assert bits(np.float64(frozen.mean)) == bits(np.float64(layer.running_mean))
        scale = layer.weight / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
        # Four operations at most, and one rounding to the layer's type.
        assert_within(frozen.scale, scale, np.abs(scale) * (4 * 2.0**-53 + 2.0**-24))
        assert frozen.shift.tolist() == layer.bias.tolist()

    def test_is_immutable(self):
        frozen = trained(make_problem(SHAPE)).freeze()
        for name in ("mean", "scale", "shift", "axis", "activation"):
            with pytest.raises((AttributeError, TypeError)):
                setattr(frozen, name, None)
        for name in ("mean", "scale", "shift"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(frozen, name)[0] = 1

    def test_is_independent_of_the_layer(self):
        p = make_problem(SHAPE)
        layer = trained(p)
        frozen = layer.freeze()
        y = frozen(p.x)
        layer.weight += 1
        layer.running_mean += 1
        assert bits(frozen(p.x)) == bits(y)

    @pytest.mark.parametrize("mode", [True, False])
    def test_needs_running_statistics(self, mode):
        layer = BatchNorm(5, track_running_stats=False).train(mode)
        with pytest.raises(RuntimeError, match=r"(?i)running|track"):
            layer.freeze()

    def test_without_affine(self):
        p = make_problem(SHAPE)
        layer = BatchNorm(5, affine=False)
        layer(p.x)
        assert bits(layer.freeze()(p.x)) == bits(layer.eval()(p.x))

    def test_constant_channel(self):
        """A channel that never varied: only eps, and exactly the bias."""
        layer = BatchNorm(2, momentum=1.0)
        x = np.float32([[3.5, 1], [3.5, 2]])
        layer(x)
        layer.bias[:] = 0.3
        assert layer.freeze()(x)[:, 0].tolist() == [np.float32(0.3)] * 2


class TestConventions:
    @pytest.mark.parametrize("name", ["PYTORCH", "KERAS", "ONNX", "FLAX", "TENSORFLOW"])
    def test_are_options_of_a_layer(self, name):
        options = getattr(bnfast.conventions, name)
        shape = [4, 5, 6]
        layer = BatchNorm(shape[options["axis"]], **options)
        assert {k: getattr(layer, k) for k in options} == options
        assert layer(make_problem(tuple(shape)).x).shape == (4, 5, 6)
