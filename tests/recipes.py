"""The recipes of docs/guide/checkpoints.md, run in a process of their own, and what they gave."""

import importlib.util
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT

PAGE = ROOT / "docs" / "guide" / "checkpoints.md"
FORMATS = ROOT / "tests" / "formats"
# The page's blocks, in their order.
BLOCKS = (
    "conventions",
    "npz",
    "whole npz",
    "safetensors",
    "torch",
    "keras",
    "h5py",
    "flax",
    "fold",
)
# What writes the files, and what it needs for that.
WRITERS = {
    "numpy": (),
    "safetensors": ("ml_dtypes",),
    "torch": (),
    "keras": ("jax", "h5py"),
    "flax": ("jax",),
}
# Keras on JAX, and no search for a GPU.
ENVIRON = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}


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


def missing_for(library):
    """Return the packages that are missing to write a library's files."""
    needed = (library, *WRITERS[library])
    return [package for package in needed if importlib.util.find_spec(package) is None]


def write(folder, library):
    python(folder, FORMATS / "writers.py", library)


def follow(folder):
    """Run the page in the folder of its files; return a function: what there is after a block."""
    if not PAGE.exists():
        pytest.skip("not run from a source tree")
    python(folder, FORMATS / "follow.py", PAGE)
    with open(folder / "followed.pickle", "rb") as file:
        outcomes = dict(zip(BLOCKS, pickle.load(file), strict=True))

    def after(block):
        reason, kept = outcomes[block]
        if reason is not None:
            pytest.skip(reason)
        return pickle.loads(kept)

    return after


def assert_inference(layer, x, y):
    """Another library's float32 output is within its own rounding of ours.

    Each computes scale (x - mean) + bias or x scale + (bias - mean scale) with scale rounded to
    float32: at most six roundings on either side, of terms that add up to |x| scale +
    |mean| scale + |bias|.
    """
    assert not layer.training
    wide = [1] * x.ndim
    wide[layer.axis] = -1
    scale = np.abs(layer.weight) / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    size = np.abs(x) * scale.reshape(wide)
    size = size + (np.abs(layer.running_mean) * scale + np.abs(layer.bias)).reshape(wide)
    assert np.all(np.abs(layer(x).astype(np.float64) - y) <= 12 * 2.0**-24 * size)
