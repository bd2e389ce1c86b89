"""Instruction sets that C programs can run on here, and what each needs: this processor's own,
AArch64's under an emulated processor, AVX-512's with its intrinsics emulated.
"""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import program
import pytest
from cases import WITHOUT_FMA

from bnfast import _core

ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
QEMU_X86 = "qemu-x86_64"
NEON_PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"  # of Debian and Ubuntu
SIMDE, NO_SIMDE = program.find_simde()

needs_sources = [
    pytest.mark.slow,
    pytest.mark.skipif(not (program.ROOT / "setup.py").exists(), reason="not a source tree"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no cc on this machine"),
]
needs_qemu = pytest.mark.skipif(
    ON_ARM or not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"NEON here needs {CROSS_COMPILER} and {EMULATOR}: apt install {NEON_PACKAGES}",
)
needs_qemu_x86 = pytest.mark.skipif(
    not ON_X86 or shutil.which(QEMU_X86) is None,
    reason=f"older processors need {QEMU_X86}: apt install qemu-user",
)
needs_simde = [
    pytest.mark.skipif(
        not (ON_X86 and "avx2" in _core.isas()), reason="AVX-512's emulation needs AVX2"
    ),
    pytest.mark.skipif(SIMDE is None, reason=str(NO_SIMDE)),
]
needs_valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="no valgrind on this machine"
)
CLANG = "clang"


def find_archer():
    """LLVM's tool that tells ThreadSanitizer about OpenMP, installed with clang's own OpenMP."""
    if shutil.which(CLANG) is None:
        return None
    resources = program.run(CLANG, "-print-resource-dir").strip()
    found = Path(resources).parents[2].rglob("libarcher.so")
    return next(found, None)


ARCHER = find_archer()
needs_thread_sanitizer = pytest.mark.skipif(
    ARCHER is None,
    reason="ThreadSanitizer needs clang: apt install clang libclang-rt-dev libomp-dev",
)
# A frame of emulated vectors has more than the 2 MB that valgrind takes for another stack.
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full")
VALGRIND += ("--max-stackframe=8388608",)
KNOWN_TO_VALGRIND = ("scalar", "sse2", "avx2", "neon")  # not AVX-512


def qemu(*options):
    return (EMULATOR, *options, "-L", "/usr/aarch64-linux-gnu")


@dataclass(frozen=True)
class Target:
    isa: str
    fused: bool  # has a fused multiply-add
    compiler: str = "cc"
    platform: str | None = None
    launcher: tuple = ()
    emulated: bool = False

    def flags(self):
        if self.emulated:
            return program.emulation_flags(SIMDE)
        return program.flags_of(self.isa, self.platform)


def every_target():
    """A pytest parameter for each, skipped with a reason if it cannot run."""
    made = [
        pytest.param(Target(isa, isa not in WITHOUT_FMA), id=isa)
        for isa in _core.config()["isas_built"]
        if isa in _core.isas()
    ]
    emulated = Target("avx512", True, emulated=True)
    made.append(pytest.param(emulated, id="avx512 (emulated)", marks=needs_simde))
    for isa in ("scalar", "neon"):
        target = Target(isa, True, CROSS_COMPILER, "linux-aarch64", qemu())
        made.append(pytest.param(target, id=f"{isa} (qemu-aarch64)", marks=needs_qemu))
    return made


def known_to_valgrind():
    """Those of this processor, and the emulated one."""
    return [
        target
        for target in every_target()
        if target.values[0].emulated or target.id in KNOWN_TO_VALGRIND
    ]
