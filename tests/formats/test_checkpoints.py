"""The recipes of docs/guide/checkpoints.md, run on files that the libraries themselves wrote.

The page runs once, from top to bottom; each test looks at what there was after a block.
"""

import numpy as np
import pytest
import recipes

from bnfast import BatchNorm, conventions

STATE = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of the files of all libraries that are installed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for library in recipes.WRITERS:
        if not recipes.missing_for(library):
            recipes.write(folder, library)
    return folder


@pytest.fixture(scope="session")
def after(folder):
    return recipes.follow(folder)


@pytest.fixture
def written(folder):
    """A function: the folder, if a library could write its files."""

    def by(library):
        if missing := recipes.missing_for(library):
            pytest.skip(f"needs {', '.join(missing)}")
        return folder

    return by


def assert_state(layer, state, prefix):
    assert not layer.training
    for name in STATE:
        np.testing.assert_array_equal(getattr(layer, name), state[prefix + name])
    assert layer.num_batches_tracked == 17


def test_conventions(after):
    assert after("conventions")["layer"].eps == 1e-3


def test_one_layer_of_a_numpy_archive(after, folder):
    layer = after("npz")["layer"]
    assert_state(layer, np.load(folder / "expected_numpy.npz"), "layer1.0.bn1.")


def test_all_layers_of_a_numpy_archive(after, folder):
    layers = after("whole npz")["layers"]
    state = np.load(folder / "expected_numpy.npz")
    assert set(layers) == {"layer1.0.bn1.", "layer1.0.bn2."}
    for path, layer in layers.items():
        assert_state(layer, state, path)
    with np.load(folder / "batch_norms.npz") as written:
        assert set(written) == {key for key in state if ".bn" in key}
        for key, value in written.items():
            np.testing.assert_array_equal(value, state[key])


def test_safetensors(after, folder):
    layer = after("safetensors")["layer"]
    assert_state(layer, np.load(folder / "expected_safetensors.npz"), "layer1.0.bn1.")


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_safetensors_of_half_types(written, name):
    path = written("safetensors") / f"{name}.safetensors"
    import ml_dtypes  # noqa: F401 - so that NumPy, and through it safetensors, knows bfloat16
    from safetensors.numpy import load_file

    state = load_file(path)
    layer = BatchNorm(4).eval()
    layer.load_state_dict(state, prefix="layer1.0.bn2.")
    assert state["layer1.0.bn2.weight"].dtype.itemsize == 2
    assert_state(layer, {key: a.astype(np.float32) for key, a in state.items()}, "layer1.0.bn2.")


def test_keras_with_keras(after, folder):
    layer = after("keras")["layer"]
    with np.load(folder / "expected_keras.npz") as expected:
        recipes.assert_inference(layer, expected["stem_bn_x"], expected["stem_bn_y"])
    assert layer.eps == 0.01


def test_keras_without_keras(after, folder):
    layers = after("h5py")["layers"]
    assert set(layers) == {"stem_bn", "head_bn", "plain_bn"}
    with np.load(folder / "expected_keras.npz") as expected:
        for name, layer in layers.items():
            recipes.assert_inference(layer, expected[f"{name}_x"], expected[f"{name}_y"])
    assert layers["stem_bn"].momentum == pytest.approx(0.1)
    assert np.all(layers["head_bn"].weight == 1)
    assert np.all(layers["plain_bn"].bias == 0)


def test_keras_weights_file(written):
    """Numbers instead of names: gamma, beta, moving mean, moving variance."""
    folder = written("keras")
    import h5py

    layer = BatchNorm(4, **{**conventions.KERAS, "eps": 0.01}).eval()
    with h5py.File(folder / "model.weights.h5") as file:
        group = file["layers/batch_normalization/vars"]
        assert group.attrs["name"] == "stem_bn"
        layer.load_state_dict({name: group[str(i)][...] for i, name in enumerate(STATE)})
    with np.load(folder / "expected_keras.npz") as expected:
        recipes.assert_inference(layer, expected["stem_bn_x"], expected["stem_bn_y"])


def test_flax(after, folder):
    layer = after("flax")["layer"]
    with np.load(folder / "expected_flax.npz") as expected:
        recipes.assert_inference(layer, expected["x"], expected["y"])


def test_flax_nnx(written):
    folder = written("flax")
    code = (
        "from flax.serialization import msgpack_restore\nimport numpy as np\n"
        "state = msgpack_restore(open('nnx.msgpack', 'rb').read())['stem_bn']\n"
        "np.savez('nnx.npz', **state)\n"
    )
    recipes.python(folder, "-c", code)
    layer = BatchNorm(4, **conventions.FLAX).eval()
    with np.load(folder / "nnx.npz") as state, np.load(folder / "expected_flax.npz") as expected:
        names = zip(STATE, ("scale", "bias", "mean", "var"), strict=True)
        layer.load_state_dict({ours: state[theirs] for ours, theirs in names})
        recipes.assert_inference(layer, expected["x"], expected["nnx_y"])


def test_a_kernel_of_another_layout(after):
    """(height, width, in, out)."""
    left = after("fold")
    frozen = left["layer"].freeze()
    np.testing.assert_allclose(left["folded"], left["kernel"] * frozen.scale, rtol=2.0**-24)
    np.testing.assert_allclose(left["bias"], frozen.shift - frozen.mean * frozen.scale, rtol=1e-6)
