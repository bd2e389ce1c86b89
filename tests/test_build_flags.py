"""CFLAGS that are undone: arithmetic other than IEEE 754's, another set's instructions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="these are gcc's flags"),
]

HOSTILE = (
    "-Ofast -ffast-math -funsafe-math-optimizations -fassociative-math -freciprocal-math "
    "-ffinite-math-only -fno-signed-zeros -fno-trapping-math -fno-math-errno -fno-rounding-math "
    "-fsingle-precision-constant -ffp-contract=fast -march=native"
)

# The results of each set for data with NaN, infinities, denormals and signed zeros, and input that
# a build that assumes there is no NaN would accept.
ANSWERS = """
import hashlib
import numpy as np

tiny = np.array([1e-310, 1e-320])
import bnfast
from bnfast import _core

assert (tiny * 1.0 > 0).all(), "importing bnfast makes the process flush denormals"
for isa in _core.isas():
    _core.set_isa(isa)
    found = hashlib.sha256()
    for dtype in (np.float32, np.float64, np.float16):
        for shape in ((64, 5), (33, 64), (4, 3, 17), (2, 5, 40, 40)):
            x = np.random.default_rng(7).standard_normal(shape).astype(dtype)
            special = x.copy()
            special[0, 0], special[1, 1], special[0, 2] = np.nan, np.inf, -0.0
            special[1, 3 % shape[1]] = np.finfo(dtype).smallest_subnormal
            for data in (x, special):
                for activation in (None, "relu", "relu6", ("leaky_relu", 0.2)):
                    y, stats = bnfast.batch_norm_forward(data, activation=activation)
                    grads = bnfast.batch_norm_backward(x, data, stats, activation=activation)
                    z = bnfast.scale_shift(data, None, None, activation=activation)
                    for a in (y, *stats[:3], *grads[:3], z):
                        a = np.where(np.isnan(a), a.dtype.type(7), a)  # a NaN's sign is nobody's
                        found.update(a.tobytes())
    print(isa, found.hexdigest())
for name, value in (("momentum", np.nan), ("eps", np.inf), ("eps", np.nan)):
    try:
        bnfast.batch_norm(x, training=True, **{name: value})
    except ValueError:
        continue
    print(name, value, "is accepted")
"""


def answers(folder=None):
    environ = dict(os.environ) | ({"PYTHONPATH": str(folder)} if folder else {})
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS + "print(bnfast.__file__)"],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, path = done.stdout.splitlines()
    assert folder is None or str(folder) in path
    return lines


def build(tmp_path, cflags):
    """Build an extension of this tree with these CFLAGS; return a folder to import it from."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("*.so", "build", "_core.c", "__pycache__")
    for name in ("bnfast", "src"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
         tmp_path / "built", copy],
        env=os.environ | {"CFLAGS": cflags},
        check=True,
        timeout=500,
    )  # fmt: skip
    return tmp_path / "built"


def test_relaxed_arithmetic_flags_change_nothing(tmp_path):
    want = answers()
    assert want
    assert answers(build(tmp_path, HOSTILE)) == want
