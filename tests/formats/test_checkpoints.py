"""The recipes of docs/guide/checkpoints.md, run on files that the libraries themselves wrote."""

import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast import BatchNorm, conventions

# Keras on JAX, and no search for a GPU.
ENVIRON = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "guide" / "checkpoints.md"
STATE = ("weight", "bias", "running_mean", "running_var")
RNG = np.random.default_rng(20150305)


def python(folder, *arguments):
    """Run Python in a separate process: some libraries start threads at import."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A function that makes a library write its files once, and returns where they are."""
    folder = tmp_path_factory.mktemp("checkpoints")
    done = set()

    def by(library, *needs):
        for package in (library, *needs):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}")
        if library not in done:
            python(folder, HERE / "writers.py", library)
            done.add(library)
        return folder

    return by


def recipes(*words):
    """Return the page's blocks of code that mention one of `words`, as one program."""
    if not PAGE.exists():
        pytest.skip("not run from a source tree")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if any(word in block for word in words)]
    assert len(found) >= len(words)
    return "import bnfast\nimport numpy as np\nfrom bnfast import conventions\n" + "\n".join(found)


def follow(folder, *words, needs_process=False):
    """Run a recipe in the folder of the files and return its variables."""
    code = recipes(*words)
    if needs_process:  # the library starts threads at import; its layers come back pickled
        keep = "{k: v for k, v in globals().items() if isinstance(v, bnfast.BatchNorm)}"
        code += f"\nimport pickle\npickle.dump({keep}, open('result.pickle', 'wb'))\n"
        python(folder, "-c", code)
        with open(folder / "result.pickle", "rb") as file:
            return pickle.load(file)
    variables, back = {}, os.getcwd()
    os.chdir(folder)
    try:
        exec(code, variables)
    finally:
        os.chdir(back)
    return variables


def assert_inference(layer, x, y):
    """Another library's float32 output is within its own rounding of ours.

    Each computes scale (x - mean) + bias or x scale + (bias - mean scale) with scale rounded to
    float32: at most six roundings on either side, of terms that add up to |x| scale +
    |mean| scale + |bias|.
    """
    layer.eval()
    wide = [1] * x.ndim
    wide[layer.axis] = -1
    scale = np.abs(layer.weight) / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    size = np.abs(x) * scale.reshape(wide)
    size = size + (np.abs(layer.running_mean) * scale + np.abs(layer.bias)).reshape(wide)
    assert np.all(np.abs(layer(x).astype(np.float64) - y) <= 12 * 2.0**-24 * size)


def assert_state(layer, state, prefix):
    for name in STATE:
        np.testing.assert_array_equal(getattr(layer, name), state[prefix + name])
    assert layer.num_batches_tracked == 17


def test_safetensors(written):
    folder = written("safetensors", "ml_dtypes")
    got = follow(folder, "load_file")
    state = np.load(folder / "expected_safetensors.npz")
    assert_state(got["layer"], state, "layer1.0.bn1.")
    np.testing.assert_array_equal(got["frozen"].mean, state["layer1.0.bn1.running_mean"])


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_safetensors_of_half_types(written, name):
    path = written("safetensors", "ml_dtypes") / f"{name}.safetensors"
    import ml_dtypes  # noqa: F401 - so that NumPy, and through it safetensors, knows bfloat16
    from safetensors.numpy import load_file

    state = load_file(path)
    layer = BatchNorm(4)
    layer.load_state_dict(state, prefix="layer1.0.bn2.")
    assert state["layer1.0.bn2.weight"].dtype.itemsize == 2
    assert_state(layer, {key: a.astype(np.float32) for key, a in state.items()}, "layer1.0.bn2.")


def test_numpy_archives(written):
    folder = written("numpy")
    layers = follow(folder, "np.load(")["layers"]
    state = np.load(folder / "expected_numpy.npz")
    assert set(layers) == {"layer1.0.bn1.", "layer1.0.bn2."}
    for path, layer in layers.items():
        assert_state(layer, state, path)


def test_torch(written):
    folder = written("torch")
    # The recipe continues the first one, whose layer it loads again.
    start = "layer = bnfast.BatchNorm2d(6)\n"
    code = start + recipes("torch.load") + "np.savez('got.npz', **layer.state_dict())\n"
    code = code.replace(start, "import bnfast\n" + start, 1)
    python(folder, "-c", code)
    layer = BatchNorm(6)
    with np.load(folder / "got.npz") as state:
        layer.load_state_dict(state)
    assert layer.num_batches_tracked == 1
    with np.load(folder / "expected_torch.npz") as expected:
        assert_inference(layer, expected["x"], expected["y"])


def test_keras_with_keras(written):
    folder = written("keras", "jax", "h5py")
    layer = follow(folder, "keras.saving", needs_process=True)["layer"]
    with np.load(folder / "expected_keras.npz") as expected:
        assert_inference(layer, expected["stem_bn_x"], expected["stem_bn_y"])
    assert layer.eps == 0.01


def test_keras_without_keras(written):
    folder = written("keras", "jax", "h5py")
    layers = follow(folder, "def read_keras")["layers"]
    assert set(layers) == {"stem_bn", "head_bn", "plain_bn"}
    with np.load(folder / "expected_keras.npz") as expected:
        for name, layer in layers.items():
            assert_inference(layer, expected[f"{name}_x"], expected[f"{name}_y"])
    assert layers["stem_bn"].momentum == pytest.approx(0.1)
    assert np.all(layers["head_bn"].weight == 1)
    assert np.all(layers["plain_bn"].bias == 0)


def test_keras_weights_file(written):
    """Numbers instead of names: gamma, beta, moving mean, moving variance."""
    h5py = pytest.importorskip("h5py")
    folder = written("keras", "jax")
    layer = BatchNorm(4, **{**conventions.KERAS, "eps": 0.01})
    with h5py.File(folder / "model.weights.h5") as file:
        group = file["layers/batch_normalization/vars"]
        assert group.attrs["name"] == "stem_bn"
        layer.load_state_dict({name: group[str(i)][...] for i, name in enumerate(STATE)})
    with np.load(folder / "expected_keras.npz") as expected:
        assert_inference(layer, expected["stem_bn_x"], expected["stem_bn_y"])


def test_flax(written):
    folder = written("flax", "jax")
    layer = follow(folder, "msgpack_restore", needs_process=True)["layer"]
    with np.load(folder / "expected_flax.npz") as expected:
        assert_inference(layer, expected["x"], expected["y"])


def test_flax_nnx(written):
    folder = written("flax", "jax")
    code = (
        "from flax.serialization import msgpack_restore\nimport numpy as np\n"
        "state = msgpack_restore(open('nnx.msgpack', 'rb').read())['stem_bn']\n"
        "np.savez('nnx.npz', **state)\n"
    )
    python(folder, "-c", code)
    layer = BatchNorm(4, **conventions.FLAX)
    with np.load(folder / "nnx.npz") as state, np.load(folder / "expected_flax.npz") as expected:
        names = zip(STATE, ("scale", "bias", "mean", "var"), strict=True)
        layer.load_state_dict({ours: state[theirs] for ours, theirs in names})
        assert_inference(layer, expected["x"], expected["nnx_y"])


def test_a_kernel_of_another_layout():
    """The page's last recipe: (height, width, in, out)."""
    layer = BatchNorm(4, **conventions.FLAX)
    layer.running_mean[:], layer.running_var[:] = RNG.normal(size=4), RNG.uniform(0.1, 4, 4)
    given = RNG.normal(size=(3, 3, 2, 4)).astype(np.float32)
    variables = {"params": {"Conv_0": {"kernel": given}}}
    scope = {"bnfast": bnfast, "variables": variables, "layer": layer}
    exec(recipes("out_axis=-1").partition("conventions\n")[2], scope)
    frozen = layer.freeze()
    np.testing.assert_allclose(scope["kernel"], given * frozen.scale, rtol=2.0**-24)
    np.testing.assert_allclose(scope["bias"], frozen.shift - frozen.mean * frozen.scale, rtol=1e-6)
