"""The kernels of each instruction set in a separate C program, checked from here.

For this processor's sets. For AArch64's under an emulated processor: qemu-user runs what a
cross compiler builds, so that NEON is tested on machines that do not have it. And for AVX-512
with its intrinsics emulated, for the same reason.
"""

import re
import shutil
import sys
from pathlib import Path

import matrix
import pytest
from cases import WITHOUT_FMA

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import program
import targets

pytestmark = targets.needs_sources


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
    return program.build(folder, targets.CROSS_COMPILER, "linux-aarch64")


@pytest.fixture(scope="module")
def answers(cases, case_file, native, tmp_path_factory):
    """The answers of each instruction set of this processor."""
    folder = tmp_path_factory.mktemp("answers")
    found = {}
    for isa in program.run(native).split():
        program.run(native, isa, case_file, folder / isa)
        found[isa] = program.read(cases, folder / isa)
    return found


def test_every_set_of_this_processor_is_right(cases, answers):
    assert "scalar" in answers
    for isa, found in answers.items():
        for case, got in zip(cases, found, strict=True):
            program.check(case, got)
        matrix.count(cases, isa)


def test_sets_agree_to_the_bit(cases, answers):
    for sets in (set(answers) & WITHOUT_FMA, set(answers) - WITHOUT_FMA):
        one, *others = [answers[isa] for isa in sorted(sets)] or [None]
        for other in others:
            assert program.differences(cases, one, other) == []


def check_all(cases, found, answers):
    """Check that answers are right, and have the bits of this processor's sets with FMA."""
    for case, got in zip(cases, found, strict=True):
        program.check(case, got)
    for other in set(answers) - WITHOUT_FMA:
        assert program.differences(cases, found, answers[other]) == [], other


@targets.needs_valgrind
@pytest.mark.parametrize("isa", targets.KNOWN_TO_VALGRIND)
def test_valgrind_sees_no_error(isa, native, case_file, tmp_path):
    if isa not in program.run(native).split():
        pytest.skip(f"no {isa} on this processor")
    program.run(*targets.VALGRIND, native, isa, case_file, tmp_path / "answer")


@targets.needs_qemu_x86
class TestOlderProcessors:
    """What src/dispatch.c chooses on a processor that lacks something, and code that must not need
    it: an emulated processor ends with an illegal instruction as a real one does.
    """

    @pytest.mark.parametrize(
        ("processor", "sets"),
        [
            ("qemu64", ["scalar", "sse2"]),
            ("Nehalem", ["scalar", "sse2"]),
            ("max,-avx2", ["scalar", "sse2"]),
            ("max,-fma", ["scalar", "sse2"]),
            ("max,-f16c", ["scalar", "sse2"]),
            ("max,-xsave", ["scalar", "sse2"]),  # an operating system that saves no wide registers
            ("max", ["scalar", "sse2", "avx2"]),
        ],
    )
    def test_sets_that_can_run(self, processor, sets, native):
        assert program.run(targets.QEMU_X86, "-cpu", processor, native).split() == sets

    # Not AVX2: qemu 7.2 reads all 32 bytes of its masked loads, and our pages end before that.
    @pytest.mark.parametrize("isa", ["scalar", "sse2"])
    def test_baseline_sets_need_nothing_newer(
        self, isa, cases, case_file, native, answers, tmp_path
    ):
        qemu = (targets.QEMU_X86, "-cpu", "qemu64")
        program.run(*qemu, native, isa, case_file, tmp_path / "answer")
        found = program.read(cases, tmp_path / "answer")
        assert program.differences(cases, found, answers[isa]) == []


@targets.needs_qemu
class TestNEON:
    def test_aarch64_build_runs_neon(self, aarch64):
        assert program.run(*targets.qemu(), aarch64).split() == ["scalar", "neon"]

    # cortex-a57 has the first version of the architecture, without extensions.
    @pytest.mark.parametrize("processor", ["max", "cortex-a57"])
    @pytest.mark.parametrize("isa", ["scalar", "neon"])
    def test_is_right_and_has_the_bits_of_other_fma_sets(
        self, isa, processor, cases, case_file, aarch64, answers, tmp_path
    ):
        qemu = targets.qemu("-cpu", processor)
        program.run(*qemu, aarch64, isa, case_file, tmp_path / "answer")
        check_all(cases, program.read(cases, tmp_path / "answer"), answers)
        matrix.count(cases, f"{isa} of AArch64, emulated by qemu-user as -cpu {processor}")


@pytest.fixture(scope="module")
def emulating(tmp_path_factory):
    """run_cases with AVX-512's kernels on AVX2's instructions."""
    folder = tmp_path_factory.mktemp("emulating")
    return program.build(folder, jobs=program.emulated_sources(targets.SIMDE))


class TestAVX512Emulated:
    pytestmark = targets.needs_simde
    NAME = "avx512 (emulated)"

    def test_program_has_only_avx512(self, emulating):
        assert program.run(emulating).splitlines() == [self.NAME]

    @pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump on this machine")
    def test_contains_no_avx512_instruction(self, emulating):
        """None with a 512-bit or a mask register, nor a register past the sixteenth. Masked
        operations of AVX-512 are done lane by lane, not by AVX2's masked loads.
        """
        code = program.run("objdump", "-d", "--no-show-raw-insn", emulating)
        assert re.search("%ymm", code)
        assert re.findall(r".*%(?:zmm|k[0-7]|[xy]mm(?:1[6-9]|[23]\d)).*", code) == []
        assert "maskmov" not in code

    def test_is_right_and_has_the_bits_of_other_fma_sets(
        self, cases, case_file, emulating, answers, tmp_path
    ):
        program.run(emulating, self.NAME, case_file, tmp_path / "answer")
        check_all(cases, program.read(cases, tmp_path / "answer"), answers)
        matrix.count(cases, self.NAME)
        matrix.count(cases, self.NAME)

    @targets.needs_qemu_x86
    def test_runs_on_a_processor_without_it(self, cases, case_file, emulating, answers, tmp_path):
        qemu = (targets.QEMU_X86, "-cpu", "Haswell")
        program.run(*qemu, emulating, self.NAME, case_file, tmp_path / "answer")
        check_all(cases, program.read(cases, tmp_path / "answer"), answers)

    @targets.needs_valgrind
    def test_valgrind_sees_no_error(self, emulating, case_file, tmp_path):
        program.run(*targets.VALGRIND, emulating, self.NAME, case_file, tmp_path / "answer")
