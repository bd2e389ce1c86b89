"""Masked batch norms of Flax and Keras 3 as judges: the same masks, outputs and gradients.

Masks are bool here: Flax and Keras know no others.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnfast import BatchNorm, BatchRenorm, conventions, lengths_mask

HERE = Path(__file__).resolve().parent
LIBRARIES = {
    "flax": ("flax", BatchNorm, conventions.FLAX),
    "nnx": ("flax", BatchNorm, conventions.FLAX),
    "keras": ("keras", BatchNorm, conventions.KERAS),
    "renorm": ("keras", BatchRenorm, {**conventions.KERAS, "rmax": 1.5, "dmax": 0.5}),
}
# x's shape, and which of its positions count.
CASES = {
    "sequences": ((5, 7, 4), lambda shape, rng: lengths_mask([7, 0, 3, 1, 5])),
    "scattered": ((5, 7, 4), lambda shape, rng: rng.random(shape[:-1]) < 0.6),
    "images": ((3, 5, 6, 2), lambda shape, rng: rng.random(shape[:-1]) < 0.4),
    "rows": ((9, 3), lambda shape, rng: np.arange(9) % 3 > 0),
    "all": ((9, 3), lambda shape, rng: np.ones(9, bool)),
    "two": ((9, 3), lambda shape, rng: np.isin(np.arange(9), (2, 7))),
}


def problem(case):
    """The arrays of a case: gradients arrive everywhere, also where nothing counts."""
    shape, mask = CASES[case]
    rng = np.random.default_rng(list(case.encode()))
    channels = shape[-1]
    arrays = {
        "x": rng.normal(0.7, 1.5, shape),
        "dy": rng.normal(0.2, 1, shape),
        "weight": rng.normal(1, 0.5, channels),
        "bias": rng.normal(size=channels),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }
    # Keras computes in float32.
    held = {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}
    return {**held, "mask": mask(shape, rng)}


@pytest.fixture(scope="session")
def judged(tmp_path_factory):
    """A function that makes a library compute all cases, once."""
    found = {}

    def by(library):
        for package in (LIBRARIES[library][0], "jax"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}")
        if library not in found:
            folder = tmp_path_factory.mktemp(library)
            inputs = {f"{case}/{name}": a for case in CASES for name, a in problem(case).items()}
            np.savez(folder / "inputs.npz", **inputs)
            found[library] = run(folder, library)
        return found[library]

    return by


def run(folder, library):
    """The library's answers, computed in a separate process."""
    options = json.dumps(dict(LIBRARIES[library][2]))
    done = subprocess.run(
        [sys.executable, HERE / "judges.py", library, options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "Unrecognized keyword arguments" in done.stderr and "renorm" in done.stderr:
        pytest.skip("this Keras has no batch renormalization")
    assert done.returncode == 0, done.stderr
    with np.load(folder / f"judged_{library}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_training_step(judged, library, case):
    p, want = problem(case), judged(library)
    _, cls, options = LIBRARIES[library]
    layer = cls(len(p["weight"]), dtype=np.float64, **options)
    layer.weight[:], layer.bias[:] = p["weight"], p["bias"]
    layer.running_mean[:], layer.running_var[:] = p["running_mean"], p["running_var"]
    got = {"y": layer(p["x"], mask=p["mask"])}
    got["dx"] = layer.backward(p["dy"])
    for name in ("weight_grad", "bias_grad", "running_mean", "running_var"):
        got[name] = getattr(layer, name)
    left_out = {"nnx": {"dx", "weight_grad", "bias_grad"}, "renorm": {"running_var"}}
    assert {name for name in got if f"{case}/{name}" not in want} == left_out.get(library, set())
    for name in got.keys() - left_out.get(library, set()):
        # Sums of some hundred numbers around 1, in float64; in Keras in float32.
        off = 1e-12 if LIBRARIES[library][0] == "flax" else 1e-5
        np.testing.assert_allclose(got[name], want[f"{case}/{name}"], off, off, err_msg=name)
