"""Whole calls in a C program, without Python: src/driver.c and src/threads.c.

`kernels/run_calls.c` makes each call in every way that must not change a bit (threads, callers at
the same time, caches, floating-point environments, a fork from C) and prints a hash of all results.
"""

import os
import sys
from pathlib import Path

import pytest
from cases import WITHOUT_FMA

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import program
import targets

pytestmark = targets.needs_sources


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return program.build(tmp_path_factory.mktemp("native"), name="run_calls")


@pytest.fixture(scope="module")
def hashes(native):
    """By instruction set of this processor."""
    return {isa: program.run(native, isa) for isa in program.run(native).split()}


def broken(right, wrong, folder):
    """Return the sources of a driver with `wrong` in place of `right`."""
    path = program.ROOT / "src/driver.c"
    source = path.read_text("utf-8")
    assert source.count(right) == 1
    mutant = folder / "driver.c"
    mutant.write_text(source.replace(right, wrong), "utf-8")
    return [(mutant if job[0] == path else job[0], job[1]) for job in program.sources()]


def test_sets_agree_to_the_bit(hashes):
    assert "scalar" in hashes
    assert len({hashes[isa] for isa in set(hashes) & WITHOUT_FMA}) <= 1
    assert len({hashes[isa] for isa in set(hashes) - WITHOUT_FMA}) <= 1


def test_macos_threads_give_the_same_bits(hashes, tmp_path):
    """With a stand-in for Grand Central Dispatch, which is not here."""
    stand_in = f"-I{program.HERE / 'stand_in'}"
    jobs = [
        (path.with_name("threads_macos.c"), [stand_in, *flags])
        if path.name == "threads_openmp.c"
        else (path, flags)
        for path, flags in program.sources()
    ]
    found = program.build(tmp_path, jobs=jobs, name="run_calls")
    assert b"GOMP_parallel" not in found.read_bytes()
    for isa, want in hashes.items():
        assert program.run(found, isa) == want


@targets.needs_valgrind
class TestValgrind:
    """On one set: `test_kernel_program` runs every set's kernels under valgrind."""

    # OpenMP's own memory for its threads is not freed at the end.
    COMMAND = (*targets.VALGRIND, "--errors-for-leak-kinds=definite", "--fair-sched=yes")

    def test_finds_no_error(self, native, hashes):
        isa = [isa for isa in hashes if isa in targets.KNOWN_TO_VALGRIND][-1]
        assert program.run(*self.COMMAND, native, isa) == hashes[isa]

    def test_finds_an_error(self, tmp_path):
        jobs = broken("{ free(call->memory); }", "{ (void)call; }", tmp_path)
        found = program.build(tmp_path, jobs=jobs, name="run_calls")
        isa = [isa for isa in program.run(found).split() if isa in targets.KNOWN_TO_VALGRIND][-1]
        with pytest.raises(AssertionError, match="definitely lost"):
            program.run(*self.COMMAND, found, isa)


@targets.needs_qemu
@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_aarch64_has_the_bits_of_other_fma_sets(isa, hashes, tmp_path):
    cross = program.build(tmp_path, targets.CROSS_COMPILER, "linux-aarch64", name="run_calls")
    found = program.run(*targets.qemu(), cross, isa)
    for other in set(hashes) - WITHOUT_FMA:
        assert found == hashes[other]


@targets.needs_thread_sanitizer
class TestThreadSanitizer:
    """With clang's OpenMP: its tool Archer reports which thread waits for which; gcc has none."""

    @staticmethod
    def build(folder, jobs=None):
        flags = ("-g", "-fsanitize=thread", "-DBNF_SANITIZED")
        return program.build(folder, targets.CLANG, more=flags, jobs=jobs, name="run_calls")

    @staticmethod
    def run(*command):
        environ = {
            "OMP_TOOL_LIBRARIES": str(targets.ARCHER),
            "OMP_WAIT_POLICY": "passive",
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:die_after_fork=0:halt_on_error=1",
        }
        return program.run(*command, env=os.environ | environ)

    def test_finds_no_race(self, hashes, tmp_path):
        isa = [*hashes][-1]
        assert self.run(self.build(tmp_path), isa) == hashes[isa]

    def test_finds_a_race(self, hashes, tmp_path):
        """With all blocks of a call in one slot."""
        jobs = broken(
            "row = block * call->shape.channels;\n    call->kernels->grad_sums",
            "row = 0 * block;\n    call->kernels->grad_sums",
            tmp_path,
        )
        with pytest.raises(AssertionError, match="WARNING: ThreadSanitizer: data race"):
            self.run(self.build(tmp_path, jobs), [*hashes][-1])
