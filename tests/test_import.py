"""What `import bnfast` provides and what it imports."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnfast

PUBLIC = {
    "batch_norm", "batch_norm_forward", "batch_norm_backward", "moments", "normalize",
    "scale_shift", "BatchStats", "Gradients", "Moments", "BatchNorm", "BatchNorm1d",
    "BatchNorm2d", "BatchNorm3d", "FrozenBatchNorm", "fold", "fold_before",
    "recompute_statistics", "conventions", "set_num_threads", "get_num_threads",
    "num_threads", "show_config", "release_memory", "__version__",
}  # fmt: skip
PACKAGE = Path(bnfast.__file__).parent

THIRD_PARTY = """
import sys
before = set(sys.modules)
import bnfast
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names) - {"numpy", "bnfast"}))
"""

# None says that PyTorch is not installed. Its operators' extension links nothing of it.
WITHOUT_TORCH = """
import importlib.machinery
import importlib.util
import sys
import bnfast

sys.modules["torch"] = None
try:
    import bnfast.torch
except ModuleNotFoundError as error:
    print(error.name)
folder = bnfast.__path__[0] + "/torch"
spec = importlib.machinery.PathFinder.find_spec("_aten", [folder])
print(importlib.util.module_from_spec(spec).counts())
"""


def in_a_new_process(program, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_public_names():
    assert set(bnfast.__all__) >= PUBLIC - {"__version__"}
    assert len(set(bnfast.__all__)) == len(bnfast.__all__)
    assert set(dir(bnfast)) >= PUBLIC
    for name in bnfast.__all__:
        assert getattr(bnfast, name) is not None


def test_star_import():
    names = {}
    exec("from bnfast import *", names)
    assert set(names) >= PUBLIC - {"__version__"}
    assert names["batch_norm"] is bnfast.batch_norm
    assert "np" not in names


def test_public_functions_have_docstrings():
    for name in PUBLIC - {"__version__", "Gradients"}:
        assert getattr(bnfast, name).__doc__, name


def test_version():
    assert isinstance(bnfast.__version__, str)
    assert bnfast.__version__.count(".") >= 1


def test_version_is_the_distributions():
    try:
        version = importlib.metadata.version("bnfast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bnfast is imported from its folder and not installed")
    assert version == bnfast.__version__


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_core.pyi").exists()


def test_needs_only_numpy():
    done = in_a_new_process(THIRD_PARTY)
    assert done.returncode == 0, done.stderr
    # An extension of the package with a dot in its name, and names like "_core", are Cython's own.
    left = [n for n in done.stdout.split() if not n.startswith(("_cython", "cython_runtime"))]
    assert left == []


def test_import_prints_nothing():
    done = in_a_new_process("import bnfast")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torch_without_pytorch():
    """The name that is missing is PyTorch's, not the extension's or one of its libraries."""
    done = in_a_new_process(WITHOUT_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["torch", "({}, {})"]


def test_result_types():
    """A type checker uses the annotations; isinstance should agree."""
    x = np.ones((3, 2), np.float32)
    y, stats = bnfast.batch_norm_forward(x)
    assert type(y) is np.ndarray
    assert isinstance(stats, bnfast.BatchStats)
    gradients = bnfast.batch_norm_backward(x, x, stats)
    assert isinstance(gradients, tuple)
    assert gradients._fields == ("x", "weight", "bias", "residual")
    assert isinstance(bnfast.moments(x), bnfast.Moments)


def submodules():
    """Those that are imported by name: in a process that may have done so, they are attributes."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    done = in_a_new_process("import bnfast; print(*dir(bnfast))")
    return sorted(n for n in names - set(done.stdout.split()) if not n.startswith("_"))


@pytest.mark.parametrize("name", ["batch_nrom", "_verbos", "torch.convert", "", "__wrapped__"])
def test_another_name_is_refused_as_python_does(name):
    with pytest.raises(AttributeError) as caught:
        getattr(bnfast, name)
    assert str(caught.value) == f"module 'bnfast' has no attribute {name!r}"
    assert (caught.value.name, caught.value.obj) == (name, bnfast)
