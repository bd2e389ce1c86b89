"""The state of a layer: its modes, running statistics, `state_dict` and copies."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
from cases import ACTIVATIONS, bits, make_problem
from layer_cases import SHAPE, STATE, call, junk_like, layer_of, state_bits, trained

import bnfast
from bnfast import BatchNorm, BatchNorm2d, FrozenBatchNorm


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
