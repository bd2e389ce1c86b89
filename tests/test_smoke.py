"""What ``pytest -m smoke`` runs: each part of the library, once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE

from bnfast import _core

# What each part's smoke tests are called: one of what it computes, and one of an error.
BAD_INPUT = r"test_bad_input_table.py::test_whole_message\["
AREAS = {
    "forward": (r"test_functional_forward.py::.*test_training", BAD_INPUT + "batch_norm_forward"),
    "backward": (r"test_functional_backward.py::", BAD_INPUT + "batch_norm_backward"),
    "inference": (r"test_functional_forward.py::.*test_inference", BAD_INPUT + "normalize"),
    "moments": (r"test_moments.py::", BAD_INPUT + "moments"),
    "layers": (r"test_layers.py::", BAD_INPUT + "BatchNorm"),
    "fold": (r"test_inference.py::test_fold_linear", BAD_INPUT + "fold"),
    "threads": (r"test_reproducible.py::TestThreads", BAD_INPUT + "set_num_threads"),
    "masks": (r"test_masked.py::test_every_mask", BAD_INPUT + r"batch_norm_forward\(x, mask="),
    "virtual batches": (
        r"test_virtual_batches.py::test_sizes",
        BAD_INPUT + r"batch_norm_forward\(x, virtual_batch_size=",
    ),
    "renormalization": (r"test_batch_renorm.py::", BAD_INPUT + "BatchRenorm"),
}


@pytest.fixture(scope="module")
def collected():
    """The names of the smoke tests: collected only, in a process of their own."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "smoke", str(tests)],
        env=os.environ | {"BNFAST_ISA": _core.isa()},
        capture_output=True, text=True, timeout=120 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("area", AREAS)
def test_every_area_is_run_and_refuses_something(area, collected):
    for pattern in AREAS[area]:
        assert any(re.search(pattern, name) for name in collected), pattern


@pytest.mark.parametrize("area", ["forward", "backward", "inference"])
def test_both_layouts_are_run(area, collected):
    names = [name for name in collected if re.search(AREAS[area][0], name)]
    for layout in ("planar", "interleaved"):
        assert any(layout in name for name in names), layout


def test_one_instruction_set_and_float32_alone(collected):
    others = {*_core.config()["isas_built"], "float64", "float16", "bfloat16"} - {_core.isa()}
    of_kernels = [name for name in collected if BAD_INPUT[:20] not in name]
    assert not [n for n in of_kernels if others & set(re.split(r"[\[\]-]", n))]
    assert any(f"[{_core.isa()}-" in name for name in of_kernels)


def test_they_are_few(collected):
    assert len(collected) < 500
