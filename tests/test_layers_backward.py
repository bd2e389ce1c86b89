"""`BatchNorm.backward`: its gradients, what it keeps for them, and the mask of an activation."""

import numpy as np
import pytest
from cases import ACTIVATIONS, bits, make_problem
from layer_cases import SHAPE, call, layer_of, state_bits, trained, trained_gradients
from tolerance import assert_within
from wide import wide

import bnfast
from bnfast import BatchNorm


class TestBackward:
    @pytest.mark.smoke
    def test_adds_into_the_gradients(self):
        p = make_problem(SHAPE)
        layer = trained(p)
        once = layer.weight_grad.copy(), layer.bias_grad.copy()
        layer.backward(p.dy)
        for grad, first in zip((layer.weight_grad, layer.bias_grad), once, strict=True):
            # Twice a float32 is exact; the addend is rounded to float32, or the sum is.
            assert_within(grad, 2 * wide(first), 2 * 2.0**-24 * 2 * np.abs(first))

    def test_adds_in_place(self):
        p = make_problem(SHAPE)
        layer = layer_of(p)
        layer(p.x)
        held = layer.weight_grad
        layer.backward(p.dy)
        assert layer.weight_grad is held
        assert np.any(held != 0)

    def test_zero_grad(self):
        layer = trained(make_problem(SHAPE))
        assert np.any(layer.weight_grad != 0)
        layer.zero_grad()
        assert layer.weight_grad.tolist() == layer.bias_grad.tolist() == [0] * 5

    def test_belongs_to_last_training_forward(self):
        p, q = make_problem(SHAPE), make_problem(SHAPE, seed=1)
        layer = layer_of(p)
        layer(q.x)
        layer(p.x)
        _, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias)
        want = bnfast.batch_norm_backward(p.dy, p.x, stats, p.weight, p.bias).x
        assert bits(layer.backward(p.dy)) == bits(want)

    def test_infinities_that_cancel_leave_nan_in_their_channel(self):
        """And without a warning, which would be an exception halfway here."""
        p = make_problem(SHAPE)
        layer = layer_of(p)
        layer(p.x)
        for value in (np.inf, -np.inf):
            dy = p.dy.copy()
            dy[:, 1] = value
            layer.backward(dy)
        assert np.isnan(layer.weight_grad).tolist() == [False, True, False, False, False]
        assert np.isnan(layer.bias_grad).tolist() == [False, True, False, False, False]

    @pytest.mark.smoke
    def test_before_any_forward_is_refused(self):
        with pytest.raises(RuntimeError, match=r"(?i)forward"):
            BatchNorm(5).backward(make_problem(SHAPE).dy)

    def test_in_eval_mode_is_refused(self):
        p = make_problem(SHAPE)
        layer = trained(p).eval()
        layer(p.x)
        before = state_bits(layer)
        with pytest.raises(RuntimeError, match=r"(?i)eval"):
            layer.backward(p.dy)
        assert state_bits(layer) == before

    def test_eval_drops_what_the_forward_kept(self):
        p = make_problem(SHAPE)
        layer = trained(p).eval().train()
        with pytest.raises(RuntimeError, match=r"(?i)forward"):
            layer.backward(p.dy)

    def test_after_an_in_place_forward_is_refused(self):
        p = make_problem(SHAPE)
        layer = layer_of(p)
        x = p.x.copy()
        layer(x, out=x)
        with pytest.raises(RuntimeError, match=r"(?i)out|in place|in-place|overwr"):
            layer.backward(p.dy)
        assert layer.weight_grad.tolist() == [0] * 5

    def test_into_the_residual_of_the_forward(self):
        """layer(x, r, out=r) keeps no residual to recompute the mask from."""
        p = make_problem(SHAPE, activation="relu", residual=True)
        want = trained_gradients(p)
        layer = layer_of(p)
        r = p.residual.copy()
        layer(p.x, residual=r, out=r)
        dx, dresidual = layer.backward(p.dy)
        assert (bits(dx), bits(dresidual)) == (bits(want[0]), bits(want[1]))

    def test_refused_backward_changes_nothing(self):
        p = make_problem(SHAPE)
        layer = trained(p)
        before = state_bits(layer)
        for dy in (p.dy[:-1], p.dy.astype(np.float64), p.dy.astype(int)):
            with pytest.raises((TypeError, ValueError), match="dy"):
                layer.backward(dy)
        assert state_bits(layer) == before
        assert layer.backward(p.dy).shape == p.x.shape

    def test_refused_forward_keeps_the_last_one(self):
        p = make_problem(SHAPE)
        layer = layer_of(p)
        layer(p.x)
        want = layer.backward(p.dy)
        with pytest.raises(ValueError, match="channel"):
            layer(p.x[:, :4])
        assert bits(layer.backward(p.dy)) == bits(want)


class TestMask:
    """Computed from inputs: the caller may change the output."""

    @pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
    def test_output_may_be_changed(self, activation):
        p = make_problem(SHAPE, activation=activation, residual=True)
        want = trained_gradients(p)
        layer = layer_of(p)
        y = call(layer, p)
        y[...] = -y
        got = layer.backward(p.dy)
        assert [bits(a) for a in got] == [bits(a) for a in want]

    def test_changed_residual_is_used(self):
        """As with a changed x."""
        p = make_problem(SHAPE, activation="relu", residual=True)
        moved = p.replace(residual=p.residual + np.float32(3))
        layer = layer_of(p)
        r = p.residual.copy()
        layer(p.x, residual=r)
        r += np.float32(3)
        got, want = layer.backward(p.dy), trained_gradients(moved)
        assert [bits(a) for a in got] == [bits(a) for a in want]
        assert bits(want[1]) != bits(trained_gradients(p)[1])

    def test_only_arrays_for_the_mask_are_kept(self):
        p = make_problem(SHAPE, residual=True)
        layer = layer_of(p)
        call(layer, p)
        assert layer._saved.residual is layer._saved.y is None


def test_a_slope_is_not_read_after_the_statistics_have_moved():
    class Slope:
        reads = 0

        def __float__(self):
            self.reads += 1
            return 0.1

    problem = make_problem(SHAPE)
    slope = Slope()
    layer = BatchNorm(SHAPE[1], activation=("leaky_relu", slope))
    residual = np.ones_like(problem.x)
    before = slope.reads
    layer(problem.x, residual, out=residual)
    assert slope.reads == before + 1
