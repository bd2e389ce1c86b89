"""examples/scaler_out_of_core.py computes what it says, in the memory it is allowed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SANITIZED

import bnfast

pytest.importorskip("sklearn", minversion="1.6")

EXAMPLE = Path(__file__).parents[2] / "examples" / "scaler_out_of_core.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="not run from a source tree")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
@pytest.mark.skipif(SANITIZED, reason="keeps freed memory")
def test_a_table_of_six_times_the_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--megabytes", "180", "--allowed", "30", "--directory", tmp_path],
        env=os.environ | {"PYTHONPATH": str(Path(bnfast.__file__).parents[1])},
        check=True, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(r"whole table refused\n", done.stdout)
    (used,) = re.findall(r"30 MB allowed, (\d+) MB used at most", done.stdout)
    assert 0 < int(used) <= 30
    # A mean is that of results within 7 of 0, each within five roundings of 2**-24 and one of the
    # mean, a thousand deviations; a variance is off by twice as much, and by the scale's rounding.
    for what in ("from 0", "from 1"):
        (error,) = re.findall(rf"at most (\S+) {what} after", done.stdout)
        assert 0 < float(error) < 20 * 2.0**-24
    assert "transform: 100%" in done.stderr
