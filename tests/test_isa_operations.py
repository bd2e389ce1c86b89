"""Every operation of every simd_<isa>.h alone, in a separate C program.

For the sets of this processor; for AArch64's under an emulated processor; and for AVX-512 also
with emulated intrinsics, which tests its logic if no processor has it.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from cases import EVERY_DTYPE

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import operations
import targets

pytestmark = targets.needs_sources


@pytest.fixture(scope="module")
def requests_of():
    """The requests of a type, made once for all sets with the same answers."""
    made = {}

    def requests(dtype, fused):
        key = np.dtype(dtype).name, fused
        if key not in made:
            made[key] = operations.make_requests(dtype, fused)
        return made[key]

    return requests


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("target", targets.every_target())
def test_operations_are_right_to_the_bit(target, dtype, requests_of, tmp_path):
    program = operations.build(tmp_path, target.isa, dtype, target.flags(), target.compiler)
    operations.check(requests_of(dtype, target.fused), program, tmp_path, target.launcher)


@targets.needs_valgrind
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("target", targets.known_to_valgrind())
def test_valgrind_sees_no_error(target, dtype, requests_of, tmp_path):
    program = operations.build(tmp_path, target.isa, dtype, [*target.flags(), "-g"])
    requests = [request.first(1000) for request in requests_of(dtype, target.fused)]
    operations.check(requests, program, tmp_path, targets.VALGRIND)
