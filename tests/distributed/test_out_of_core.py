"""examples/out_of_core.py computes what it says, in the memory it is allowed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dask.array")
pytest.importorskip("distributed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "out_of_core.py"
ALLOWED = 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
@pytest.mark.parametrize("processes", [0, 2])
def test_a_file_of_four_times_the_memory(processes, tmp_path):
    options = ["--megabytes", str(4 * ALLOWED), "--allowed", str(ALLOWED)]
    options += ["--processes", str(processes), "--directory", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *options], check=True, timeout=120, capture_output=True, text=True
    )
    assert processes or "np.load of the whole file: refused" in done.stdout
    (peaks,) = re.findall(r"at most (.*) MB used", done.stdout)
    used = [int(peak) for peak in peaks.split(" + ")]
    assert len(used) == max(processes, 1)
    assert sum(used) <= ALLOWED
    # A mean is that of results within 6 of 0, each rounded by a relative 2**-24. A variance has the
    # square of the scale, rounded to float32 once, and the roundings of the same results.
    for what in ("from 0", "from 1"):
        (error,) = re.findall(rf"at most (\S+) {what} after", done.stdout)
        assert 0 < float(error) < 10 * 2.0**-24
