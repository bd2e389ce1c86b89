"""BatchNorm, its rank-checked forms and FrozenBatchNorm."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import reference
from cases import (
    ACTIVATIONS,
    DTYPES,
    EVERY_DTYPE,
    bits,
    computed_in,
    make_problem,
    poisoned_like,
    read_only,
)
from tolerance import assert_within, batch_statistics, constants, forward_bound, running_bound

import bnfast
from bnfast import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, FrozenBatchNorm

SHAPE = (6, 5, 3, 4)
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def layer_of(p, **options):
    """A layer with the problem's parameters."""
    layer = BatchNorm(
        p.channels, p.eps, axis=p.axis, activation=p.activation, dtype=p.weight.dtype, **options
    )
    layer.weight[:], layer.bias[:] = p.weight, p.bias
    return layer


def state_bits(layer):
    """Everything that a call may change."""
    names = (*STATE, "weight_grad", "bias_grad")
    return {n: None if getattr(layer, n) is None else bits(getattr(layer, n)) for n in names}


def trained(p, **options):
    """A layer after one training step, so that no attribute has its initial value."""
    layer = layer_of(p, **options)
    call(layer, p)
    layer.backward(p.dy)
    return layer


def call(layer, p, **more):
    return layer(p.x, residual=p.residual, **more)


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


class TestBackward:
    def test_adds_into_the_gradients(self):
        p = make_problem(SHAPE)
        layer = trained(p)
        once = layer.weight_grad.copy(), layer.bias_grad.copy()
        layer.backward(p.dy)
        for grad, first in zip((layer.weight_grad, layer.bias_grad), once, strict=True):
            # Twice a float32 is exact; the addend is rounded to float32, or the sum is.
            assert_within(grad, 2 * first.astype(np.longdouble), 2 * 2.0**-24 * 2 * np.abs(first))

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


def trained_gradients(p):
    layer = layer_of(p)
    call(layer, p)
    return layer.backward(p.dy)


class TestModes:
    @pytest.mark.parametrize("reset", ["reset_parameters", "reset_running_stats"])
    def test_resets_are_in_place(self, reset):
        """As in PyTorch, so that an optimizer's references stay valid."""
        layer = trained(make_problem(SHAPE))
        held = [getattr(layer, name) for name in (*STATE, "weight_grad", "bias_grad")]
        getattr(layer, reset)()
        assert all(
            getattr(layer, name) is a
            for name, a in zip((*STATE, "weight_grad", "bias_grad"), held, strict=True)
        )

    def test_train_and_eval_return_the_layer(self):
        layer = BatchNorm(5)
        assert layer.eval() is layer
        assert layer.training is False
        assert layer.train() is layer
        assert layer.training is True
        assert layer.train(False).training is False

    def test_reset_running_stats(self):
        layer = trained(make_problem(SHAPE))
        weight = layer.weight.copy()
        layer.reset_running_stats()
        assert layer.running_mean.tolist() == [0] * 5
        assert layer.running_var.tolist() == [1] * 5
        assert int(layer.num_batches_tracked) == 0
        assert bits(layer.weight) == bits(weight)

    def test_reset_parameters(self):
        layer = trained(make_problem(SHAPE))
        layer.reset_parameters()
        assert layer.weight.tolist() == [1] * 5
        assert layer.bias.tolist() == [0] * 5
        assert layer.running_mean.tolist() == [0] * 5
        assert int(layer.num_batches_tracked) == 0


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


@pytest.fixture
def torch():
    """PyTorch on one thread: on a busy machine its threads wait longer than they work."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


class TestStatistics:
    """Which statistics a layer uses and which it updates, after changes of its attributes.
    PyTorch's layers do the same.
    """

    def test_tracking_switched_off_in_evaluation(self):
        p = make_problem(SHAPE)
        layer = trained(p).eval()
        want = layer(p.x)
        layer.track_running_stats = False
        assert bits(layer(p.x)) == bits(want)
        assert bits(layer(p.x)) != bits(bnfast.batch_norm_forward(p.x, p.weight, p.bias)[0])

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_tracking_switched_on_without_statistics(self, momentum):
        p = make_problem(SHAPE)
        layer = layer_of(p, track_running_stats=False, momentum=momentum)
        layer.track_running_stats = True
        want = bnfast.batch_norm_forward(p.x, p.weight, p.bias)[0]
        assert bits(layer(p.x)) == bits(want)
        assert bits(layer.eval()(p.x)) == bits(want)
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None

    @pytest.mark.parametrize("missing", ["running_mean", "running_var"])
    def test_one_alone(self, missing):
        p = make_problem(SHAPE)
        layer = trained(p)
        setattr(layer, missing, None)
        before = state_bits(layer)
        for mode in (True, False):
            with pytest.raises(TypeError, match=rf"^{missing} is None"):
                layer.train(mode)(p.x)
        assert state_bits(layer) == before

    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 2, 2), (3, 4, 2, 1, 2)], ids=str)
    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
    def test_all_settings(self, shape, momentum, torch):
        """Tracked when made, tracked now, in training, with a mean, a variance, a counter."""
        dimensions = f"BatchNorm{max(len(shape) - 2, 1)}d"
        x = make_problem(shape).x
        for settings in product((True, False), repeat=6):
            made, now, training, mean, var, counter = settings
            if momentum is None and made and now and training and mean and var and not counter:
                continue  # refused: PyTorch leaves the statistics unchanged
            found = []
            for library, data in ((bnfast, x), (torch.nn, torch.from_numpy(x))):
                layer = getattr(library, dimensions)(
                    4, momentum=momentum, track_running_stats=made)  # fmt: skip
                layer(data)
                layer.train(training).track_running_stats = now
                if not mean:
                    layer.running_mean = None
                if not var:
                    layer.running_var = None
                if not counter:
                    layer.num_batches_tracked = None
                found.append(after_a_call(layer, data * 2 + 1))
            assert [a is None for a in found[0]] == [a is None for a in found[1]], settings
            for got, want in zip(*found, strict=True):
                if got is not None:
                    np.testing.assert_allclose(got, want, 1e-4, 1e-5, err_msg=str(settings))


def after_a_call(layer, data):
    """The output and the state that may change; None if there is none or the call is refused."""
    try:
        y = layer(data)
    except (TypeError, ValueError, RuntimeError):
        return [None]
    found = (y, layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [a if a is None else np.asarray(getattr(a, "data", a)) for a in found]


class TestStateDict:
    def test_round_trip(self):
        layer = trained(make_problem(SHAPE))
        again = BatchNorm(5)
        again.load_state_dict(layer.state_dict())
        for name in STATE:
            assert bits(getattr(again, name)) == bits(getattr(layer, name)), name

    def test_names_and_types_are_pytorchs(self):
        state = BatchNorm(5).state_dict()
        assert tuple(state) == STATE
        assert all(isinstance(a, np.ndarray) for a in state.values())
        assert state["num_batches_tracked"].shape == ()
        assert state["num_batches_tracked"].dtype == np.int64

    def test_is_copies(self):
        layer = trained(make_problem(SHAPE))
        state = layer.state_dict()
        before = {name: a.copy() for name, a in state.items()}
        layer.weight += 1
        call(layer, make_problem(SHAPE))
        for name, a in state.items():
            assert bits(a) == bits(before[name]), name

    def test_loads_copies_into_the_arrays_held(self):
        layer, other = BatchNorm(5), trained(make_problem(SHAPE))
        held = layer.weight
        state = other.state_dict()
        layer.load_state_dict(state)
        state["weight"] += 1
        assert layer.weight is held
        assert bits(held) == bits(other.weight)

    def test_prefix_takes_a_layer_out_of_a_checkpoint(self):
        other = trained(make_problem(SHAPE))
        prefix = "layer1.0.bn1."
        checkpoint = {prefix + name: a for name, a in other.state_dict().items()}
        checkpoint |= {"layer1.0.conv1.weight": np.zeros(3), "weight": np.full(5, 9.0)}
        layer = BatchNorm(5)
        layer.load_state_dict(checkpoint, prefix=prefix)
        assert bits(layer.weight) == bits(other.weight)
        assert bits(layer.running_var) == bits(other.running_var)

    def test_old_checkpoints_have_no_counter(self):
        state = trained(make_problem(SHAPE)).state_dict()
        del state["num_batches_tracked"]
        layer = trained(make_problem(SHAPE))
        layer.load_state_dict(state)
        assert int(layer.num_batches_tracked) == 0

    @pytest.mark.parametrize("name", STATE[:4])
    def test_missing_key(self, name):
        state = trained(make_problem(SHAPE)).state_dict()
        del state[name]
        layer = BatchNorm(5)
        before = state_bits(layer)
        with pytest.raises((KeyError, ValueError, RuntimeError), match=name):
            layer.load_state_dict(state)
        assert state_bits(layer) == before
        layer.load_state_dict(state, strict=False)
        for other in state:
            assert bits(getattr(layer, other)) == bits(state[other])

    def test_unexpected_key(self):
        state = trained(make_problem(SHAPE)).state_dict() | {"colour": np.zeros(5)}
        layer = BatchNorm(5)
        before = state_bits(layer)
        with pytest.raises((KeyError, ValueError, RuntimeError), match="colour"):
            layer.load_state_dict(state)
        assert state_bits(layer) == before
        layer.load_state_dict(state, strict=False)
        assert bits(layer.weight) == bits(state["weight"])

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("name", STATE[:4])
    def test_wrong_shape(self, name, strict):
        state = trained(make_problem(SHAPE)).state_dict() | {name: np.zeros(6, np.float32)}
        layer = BatchNorm(5)
        before = state_bits(layer)
        with pytest.raises((ValueError, RuntimeError), match=rf"(?s){name}.*(6.*5|5.*6)"):
            layer.load_state_dict(state, strict=strict)
        assert state_bits(layer) == before

    @pytest.mark.parametrize("name", STATE[:4])
    def test_wrong_type(self, name):
        state = trained(make_problem(SHAPE)).state_dict() | {name: np.ones(5, np.complex64)}
        layer = BatchNorm(5)
        before = state_bits(layer)
        with pytest.raises(TypeError, match=rf"(?s){name}.*complex64"):
            layer.load_state_dict(state)
        assert state_bits(layer) == before

    @pytest.mark.parametrize("count", [-1, np.uint64(2**63), np.iinfo(np.int64).min])
    def test_count_out_of_range(self, count):
        state = trained(make_problem(SHAPE)).state_dict() | {"num_batches_tracked": count}
        layer = BatchNorm(5)
        before = state_bits(layer)
        with pytest.raises(ValueError, match=rf"bn\.num_batches_tracked is {count}; expected 0"):
            layer.load_state_dict({f"bn.{name}": a for name, a in state.items()}, prefix="bn.")
        assert state_bits(layer) == before

    @pytest.mark.parametrize("count", [1.0, "1", [1], None])
    def test_count_of_another_type(self, count):
        state = trained(make_problem(SHAPE)).state_dict() | {"num_batches_tracked": count}
        layer = BatchNorm(5)
        before = state_bits(layer)
        with pytest.raises((TypeError, RuntimeError), match="num_batches_tracked"):
            layer.load_state_dict(state)
        assert state_bits(layer) == before

    def test_parameters_alone_leave_the_counter(self):
        """The counter belongs to the running statistics."""
        layer = trained(make_problem(SHAPE))
        layer.load_state_dict({"weight": np.ones(5)}, strict=False)
        layer.load_state_dict({}, strict=False)
        assert int(layer.num_batches_tracked) == 1
        assert layer.weight.tolist() == [1] * 5
        layer.load_state_dict({"running_var": np.ones(5)}, strict=False)
        assert int(layer.num_batches_tracked) == 0

    @pytest.mark.parametrize(
        ("state", "options", "message"),
        [
            (None, {}, "state is of type NoneType; expected a mapping"),
            ([("weight", 1)], {}, "state is of type list; expected a mapping"),
            ("weight", {}, "state is of type str; expected a mapping"),
            ({}, {"prefix": None}, "prefix is None; expected a string"),
            ({}, {"prefix": b"bn."}, "prefix is b'bn.'; expected a string"),
            ({}, {"strict": np.ones(2)}, "strict is an array of float64; expected True or False"),
        ],
        ids=str,
    )
    def test_not_a_state(self, state, options, message):
        with pytest.raises(TypeError, match=message):
            BatchNorm(5).load_state_dict(state, **options)

    def test_keys_that_are_not_names_are_ignored(self):
        state = trained(make_problem(SHAPE)).state_dict()
        layer = BatchNorm(5)
        layer.load_state_dict(state | {1: np.ones(3), ("weight",): 0})
        assert bits(layer.weight) == bits(state["weight"])

    @pytest.mark.parametrize("name", STATE[:4])
    @pytest.mark.parametrize("junk", ["read-only", "shape", "type", "list"])
    def test_all_targets_checked_first(self, name, junk):
        """Otherwise the first ones would be loaded, and the last one not."""
        state = trained(make_problem(SHAPE)).state_dict()
        layer = BatchNorm(5)
        setattr(layer, name, junk_like(getattr(layer, name), junk))
        before = state_bits(layer)
        with pytest.raises((TypeError, ValueError), match=f"the layer's {name}"):
            layer.load_state_dict(state)
        assert state_bits(layer) == before

    def test_counter_out_of_range_can_be_repaired(self):
        layer = BatchNorm(5)
        layer.num_batches_tracked[...] = -1
        layer.load_state_dict(trained(make_problem(SHAPE)).state_dict())
        assert int(layer.num_batches_tracked) == 1

    @pytest.mark.parametrize("junk", ["read-only", "shape", "type", "list"])
    def test_counter_checked_first(self, junk):
        state = trained(make_problem(SHAPE)).state_dict()
        layer = BatchNorm(5)
        layer.num_batches_tracked = junk_like(layer.num_batches_tracked, junk)
        before = state_bits(layer)
        with pytest.raises((TypeError, ValueError), match="num_batches_tracked"):
            layer.load_state_dict(state)
        assert state_bits(layer) == before

    def test_survives_an_npz_file(self, tmp_path):
        layer = trained(make_problem(SHAPE))
        np.savez(tmp_path / "bn.npz", **layer.state_dict())
        again = BatchNorm(5)
        with np.load(tmp_path / "bn.npz") as state:
            again.load_state_dict(state)
        assert bits(again.running_mean) == bits(layer.running_mean)
        assert int(again.num_batches_tracked) == 1

    def test_converts_other_float_types(self):
        state = trained(make_problem(SHAPE, np.float64)).state_dict()
        layer = BatchNorm(5)
        layer.load_state_dict(state)
        assert layer.weight.dtype == np.float32
        assert bits(layer.weight) == bits(state["weight"].astype(np.float32))


def junk_like(a, kind):
    """An array that replaces `a` and cannot be written as `a` can."""
    if kind == "list":
        return a.tolist()
    made = {
        "read-only": a.copy,
        "shape": lambda: np.zeros(6, a.dtype),
        "type": lambda: a.astype(complex),
    }[kind]()
    made.flags.writeable = kind != "read-only"
    return made


class TestInvalidAttributes:
    """Found before anything is written."""

    @pytest.mark.parametrize(
        ("counter", "error", "message"),
        [
            (read_only(np.zeros((), np.int64)), ValueError, "read-only; expected a writeable"),
            (np.zeros((), np.int32), TypeError, "expected an array of int64 of shape"),
            (np.zeros(()), TypeError, "expected an array of int64 of shape"),
            (np.zeros(1, np.int64), TypeError, "expected an array of int64 of shape"),
            (3, TypeError, "3 of type int; expected an array of int64"),
            ("3", TypeError, "'3' of type str; expected an array of int64"),
            (np.array(-1), ValueError, "-1; expected 0 to"),
            (np.array(np.iinfo(np.int64).max), ValueError, "expected 0 to 9223372036854775806"),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_counter(self, counter, error, message, momentum):
        p = make_problem(SHAPE)
        layer = trained(p, momentum=momentum)
        layer.num_batches_tracked = counter
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises(error, match=f"num_batches_tracked .*{message}"):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()
        assert layer(p.x, update_stats=False).shape == p.x.shape

    def test_no_counter_for_the_cumulative_average(self):
        p = make_problem(SHAPE)
        layer = layer_of(p, momentum=None)
        layer.num_batches_tracked = None
        before = state_bits(layer)
        with pytest.raises(TypeError, match="num_batches_tracked is None; expected an array"):
            layer(p.x)
        assert state_bits(layer) == before
        layer.momentum = 0.5
        layer(p.x)
        assert state_bits(layer) != before

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    @pytest.mark.parametrize("junk", ["read-only", "shape", "type", "list"])
    def test_running_statistics(self, name, junk):
        p = make_problem(SHAPE)
        layer = trained(p)
        setattr(layer, name, junk_like(getattr(layer, name), junk))
        before, out = state_bits(layer), poisoned_like(p.x)
        with pytest.raises((TypeError, ValueError), match=name):
            layer(p.x, out=out)
        assert state_bits(layer) == before
        assert np.isnan(out).all()

    @pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
    @pytest.mark.parametrize("junk", ["read-only", "shape", "type", "list", "None"])
    def test_gradients(self, name, junk):
        p = make_problem(SHAPE)
        layer = trained(p)
        setattr(layer, name, None if junk == "None" else junk_like(getattr(layer, name), junk))
        before = state_bits(layer)
        with pytest.raises((TypeError, ValueError), match=name):
            layer.backward(p.dy)
        assert state_bits(layer) == before

    @pytest.mark.parametrize("axis", ["1", None, 1.0, np.array([1]), (1,)], ids=repr)
    @pytest.mark.parametrize("training", [True, False])
    def test_axis(self, axis, training):
        p = make_problem(SHAPE)
        layer = layer_of(p).train(training)
        layer.axis = axis
        with pytest.raises(TypeError, match=r"axis is .*expected an integer"):
            layer(p.x)

    @pytest.mark.parametrize("weight", [np.ones(4), np.ones(1), np.ones((1, 5)), "weight"])
    def test_weight(self, weight):
        layer = trained(make_problem(SHAPE))
        layer.weight = weight
        for use in (layer.freeze, lambda: layer(make_problem(SHAPE).x)):
            with pytest.raises((TypeError, ValueError), match="weight"):
                use()


class TestNotAnArray:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("x", [[[1.0, 2.0], [3.0]], None, "x", [["a", "b"]], 1.0], ids=repr)
    def test_is_named(self, x, training):
        layer = BatchNorm(2).train(training)
        with pytest.raises((TypeError, ValueError), match=r"^x "):
            layer(x)
        with pytest.raises((TypeError, ValueError), match=r"^x "):
            BatchNorm2d(2).train(training)(x)
        assert layer.num_batches_tracked == 0

    def test_lists_of_numpys_numbers(self):
        p = make_problem((4, 5), residual=True, activation="relu")
        want = trained_gradients(p)
        layer = layer_of(p)
        layer([list(row) for row in p.x], residual=[list(row) for row in p.residual])
        got = layer.backward(p.dy)
        assert [bits(a) for a in got] == [bits(a) for a in want]

    @pytest.mark.parametrize(
        "options",
        [
            {"dtype": "foo"},
            {"dtype": None},
            {"dtype": 3},
            {"dtype": ">f4"},
            {"axis": np.array([1])},
            {"affine": np.ones(2)},
            {"track_running_stats": np.ones(2)},
            {"momentum": np.array([0.1])},
            {"eps": [1e-5]},
            {"ddof": np.array([1])},
            {"num_features": np.array([5])},
        ],
        ids=str,
    )
    def test_options(self, options):
        (name,) = options
        with pytest.raises(TypeError, match=f"^{name} is .*; expected"):
            BatchNorm(**{"num_features": 5} | options)

    def test_modes(self):
        layer = BatchNorm(5)
        with pytest.raises(TypeError, match="mode is an array"):
            layer.train(np.ones(2))
        with pytest.raises(TypeError, match="update_stats is an array"):
            layer(make_problem(SHAPE).x, update_stats=np.ones(2))
        assert layer.training
        assert layer.num_batches_tracked == 0


def copies():
    return pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))],
        ids=["deepcopy", "pickle"],
    )


@copies()
class TestCopies:
    @pytest.mark.parametrize("cls", [BatchNorm, BatchNorm2d])
    def test_of_a_layer_are_equal_and_independent(self, duplicate, cls):
        p = make_problem(SHAPE, activation="relu")
        layer = cls(5, eps=0.1, momentum=None, ddof=0, activation="relu")
        layer(p.x)
        again = duplicate(layer)
        assert type(again) is cls
        assert state_bits(again) == state_bits(layer)
        before = state_bits(layer)
        assert bits(again(p.dy)) == bits(copy.deepcopy(layer)(p.dy))
        again.weight += 1
        assert state_bits(layer) == before

    def test_keep_the_mode(self, duplicate):
        assert duplicate(BatchNorm(5).eval()).training is False

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_of_a_frozen_layer(self, duplicate, activation):
        p = make_problem(SHAPE, activation=activation)
        frozen = trained(p).freeze()
        again = duplicate(frozen)
        assert isinstance(again, FrozenBatchNorm)
        assert bits(again(p.x)) == bits(frozen(p.x))


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
