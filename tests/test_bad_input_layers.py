"""Bad input of layers and frozen layers, and that nothing changes a frozen one."""

import pickle
import warnings
from contextlib import suppress

import numpy as np
import pytest
from bad_calls import DATA_TYPES, DY, OUT, PARAMETER_TYPES, POPULATION, B, R, W, X, mentions
from cases import bits, read_only

import bnfast


class TestLayers:
    """A refused call changes no statistic, counter or output."""

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"x": X[:, :3]}, ValueError, ("x", "channels", 3, 4)),
            ({"x": X.astype(np.uint16)}, TypeError, DATA_TYPES),
            ({"x": X.astype(int)}, TypeError, DATA_TYPES),
            ({"x": X[0, 0]}, ValueError, ("x",)),
            ({"x": X[:1, :, :1]}, ValueError, ("Expected more than 1 value per channel",)),
            ({"x": X, "residual": R[:5]}, ValueError, ("residual",)),
            ({"x": X, "out": OUT[:5]}, ValueError, ("out",)),
            ({"x": X, "out": read_only(OUT)}, ValueError, ("out",)),
        ],
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_refused_call(self, arguments, error, words, momentum):
        layer = bnfast.BatchNorm(4, momentum=momentum)
        layer(DY)
        before = {k: bits(a) for k, a in layer.state_dict().items()}
        with pytest.raises(error, match=mentions(*words)):
            layer(**arguments)
        assert {k: bits(a) for k, a in layer.state_dict().items()} == before
        assert np.isnan(OUT).all()

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"num_features": -1}, ValueError, ("num_features", "-1")),
            ({"num_features": 2.5}, TypeError, ("num_features", "integer")),
            ({"num_features": "4"}, TypeError, ("num_features", "integer")),
            ({"num_features": 4, "eps": np.nan}, ValueError, ("eps", "nan")),
            ({"num_features": 4, "eps": -1.0}, ValueError, ("eps", "-1.0")),
            ({"num_features": 4, "momentum": np.inf}, ValueError, ("momentum", "inf")),
            ({"num_features": 4, "ddof": 3}, ValueError, ("ddof", "3")),
            ({"num_features": 4, "dtype": np.float16}, TypeError, PARAMETER_TYPES),
            ({"num_features": 4, "dtype": int}, TypeError, PARAMETER_TYPES),
            ({"num_features": 4, "axis": 1.5}, TypeError, ("axis", "integer")),
        ],
        ids=str,
    )
    def test_constructor(self, arguments, error, words):
        with pytest.raises(error, match=mentions(*words)):
            bnfast.BatchNorm(**arguments)

    def test_frozen(self):
        frozen = bnfast.BatchNorm(4).freeze()
        for arguments, error, words in (
            ({"x": X[:, :3]}, ValueError, ("x", "channels", 3, 4)),
            ({"x": X.astype(int)}, TypeError, DATA_TYPES),
            ({"x": X, "residual": R[:5]}, ValueError, ("residual",)),
            ({"x": X, "out": OUT[:5]}, ValueError, ("out",)),
        ):
            with pytest.raises(error, match=mentions(*words)):
                frozen(**arguments)
        assert np.isnan(OUT).all()


class TestFrozen:
    def make(self):
        layer = bnfast.BatchNorm(4, activation="relu")
        layer(X)
        return layer.freeze()

    @pytest.mark.parametrize("name", ["mean", "scale", "shift"])
    def test_arrays_cannot_be_changed(self, name):
        """A read-only array that owns its memory can be made writeable, and any can be reshaped."""
        frozen = self.make()
        y = frozen(X)
        held = getattr(frozen, name)
        with pytest.raises(ValueError, match=r"(?i)writeable"):
            held.flags.writeable = True
        with pytest.raises(ValueError, match=r"(?i)writeable"):
            held.base.flags.writeable = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            held.shape = (2, 2)
            held.dtype = np.int32
        assert getattr(frozen, name).shape == (4,)
        assert getattr(frozen, name).dtype == np.float64
        assert bits(frozen(X)) == bits(y)

    @pytest.mark.parametrize("name", ["mean", "scale", "shift"])
    def test_returned_arrays_do_not_expose_memory(self, name):
        """This holds for such an array, for its base, and so on."""
        frozen, y = self.make(), self.make()(X)
        changes = (
            lambda a: setattr(a, "dtype", np.uint8),
            lambda a: setattr(a, "shape", (2, a.size // 2)),
            lambda a: a.setflags(write=True),
            lambda a: a.resize(1, refcheck=False),
            lambda a: a.__setstate__((1, (1,), np.dtype(np.float64), False, bytes(8))),
        )
        for change in changes:
            held = getattr(frozen, name)
            while isinstance(held, np.ndarray):
                with suppress(ValueError, AttributeError), warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    change(held)
                held = held.base
            assert getattr(frozen, name).shape == (4,)
            assert bits(frozen(X)) == bits(y)

    def test_population_statistics_cannot_be_changed(self):
        with pytest.raises(ValueError, match=r"(?i)writeable"):
            POPULATION.mean.flags.writeable = True

    def test_second_init_refused(self):
        frozen = self.make()
        with pytest.raises(RuntimeError, match="immutable"):
            frozen.__init__(W, W, W)

    @pytest.mark.parametrize("way", range(3))
    def test_init_inside_init_refused(self, way):
        """From an argument whose `__array__` calls it: the first call that completes counts."""
        frozen = bnfast.FrozenBatchNorm.__new__(bnfast.FrozenBatchNorm)

        class Starting:
            def __array__(self, *dtype, **copy):
                bnfast.FrozenBatchNorm.__init__(frozen, W[:3], W[:3], W[:3], 2)
                return W

        arguments = [W, W, W]
        arguments[way] = Starting()
        with pytest.raises(RuntimeError, match="immutable"):
            frozen.__init__(*arguments)
        assert frozen.mean.tolist() == W[:3].tolist()
        assert frozen(X[..., :3]).shape == (6, 4, 3)

    def test_object_without_init(self):
        frozen = bnfast.FrozenBatchNorm.__new__(bnfast.FrozenBatchNorm)
        assert repr(frozen) == "FrozenBatchNorm(never initialised)"
        for use in (
            lambda: frozen(X),
            lambda: frozen.mean,
            lambda: frozen.scale,
            lambda: frozen.shift,
            lambda: pickle.dumps(frozen),
            lambda: bnfast.fold(np.ones((4, 4)), None, frozen),
        ):
            with pytest.raises(RuntimeError, match="never initialised"):
                use()

    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"mean": W[None]}, ValueError, ("mean", (1, 4))),
            ({"mean": np.float32(1)}, ValueError, ("mean", "()")),
            ({"mean": None}, TypeError, ("mean", "object")),
            ({"scale": W[:3]}, ValueError, ("scale", (3,), (4,))),
            ({"shift": "four"}, TypeError, ("shift",)),
            ({"shift": np.ma.masked_array(W, W > 0)}, TypeError, ("shift", "masked")),
            ({"axis": "1"}, TypeError, ("axis", "integer")),
            ({"activation": "mish"}, ValueError, ("activation", "mish")),
        ],
        ids=str,
    )
    def test_constructor(self, changes, error, words):
        arguments = {"mean": W, "scale": W, "shift": B, "axis": 1, "activation": None}
        with pytest.raises(error, match=mentions(*words)):
            bnfast.FrozenBatchNorm(**arguments | changes)
