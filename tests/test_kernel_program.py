"""The kernels of each instruction set in a C program of their own, judged from here.

For this processor's sets, and for AArch64's under an emulated processor: qemu-user runs what
a cross compiler builds, so that NEON is tested on machines that do not have it.
"""

import platform
import shutil
import sys
from pathlib import Path

import pytest
from cases import WITHOUT_FMA

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import program

ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
NEON_PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"  # of Debian and Ubuntu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (program.ROOT / "setup.py").exists(), reason="not a source tree"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no cc on this machine"),
]
needs_emulator = pytest.mark.skipif(
    ON_ARM or not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"NEON here needs {CROSS_COMPILER} and {EMULATOR}: apt install {NEON_PACKAGES}",
)
needs_valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="no valgrind on this machine"
)


@pytest.fixture(scope="module")
def cases():
    return program.make_cases()


@pytest.fixture(scope="module")
def case_file(cases, tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases"
    program.write(cases, path)
    return path


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return program.build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    return program.build(folder, CROSS_COMPILER, "linux-aarch64")


@pytest.fixture(scope="module")
def answers(cases, case_file, native, tmp_path_factory):
    """By instruction set, what each that this processor has answers."""
    folder = tmp_path_factory.mktemp("answers")
    found = {}
    for isa in program.run(native).split():
        program.run(native, isa, case_file, folder / isa)
        found[isa] = program.read(cases, folder / isa)
    return found


def test_every_set_of_this_processor_is_right(cases, answers):
    assert "scalar" in answers
    for found in answers.values():
        for case, got in zip(cases, found, strict=True):
            program.check(case, got)


def test_sets_agree_to_the_bit(cases, answers):
    for sets in (set(answers) & WITHOUT_FMA, set(answers) - WITHOUT_FMA):
        one, *others = [answers[isa] for isa in sorted(sets)] or [None]
        for other in others:
            assert program.differences(cases, one, other) == []


@needs_valgrind
@pytest.mark.parametrize("isa", ["scalar", "sse2", "avx2", "neon"])  # valgrind knows no AVX-512
def test_valgrind_sees_no_error(isa, native, case_file, tmp_path):
    if isa not in program.run(native).split():
        pytest.skip(f"no {isa} on this processor")
    valgrind = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full")
    program.run(*valgrind, native, isa, case_file, tmp_path / "answer")


def emulated(*options):
    return (EMULATOR, *options, "-L", "/usr/aarch64-linux-gnu")


@needs_emulator
class TestNEON:
    def test_is_what_an_aarch64_build_runs(self, aarch64):
        assert program.run(*emulated(), aarch64).split() == ["scalar", "neon"]

    # cortex-a57 has the first version of the architecture and no extension of it.
    @pytest.mark.parametrize("processor", ["max", "cortex-a57"])
    @pytest.mark.parametrize("isa", ["scalar", "neon"])
    def test_is_right_and_has_the_bits_of_other_fma_sets(
        self, isa, processor, cases, case_file, aarch64, answers, tmp_path
    ):
        program.run(*emulated("-cpu", processor), aarch64, isa, case_file, tmp_path / "answer")
        found = program.read(cases, tmp_path / "answer")
        for case, got in zip(cases, found, strict=True):
            program.check(case, got)
        for other in set(answers) - WITHOUT_FMA:
            assert program.differences(cases, found, answers[other]) == [], other
