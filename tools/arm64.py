"""The wheel for Linux's AArch64, cross-compiled, and the tests on it under qemu-user.

    python tools/arm64.py wheel FOLDER                   as `make cross-wheels` does
    python tools/arm64.py test [pytest's arguments]      `make test-arm64`

Makes, in build/arm64:
    root      Debian's AArch64 Python of this one's minor version, with what it links, unpacked
    wheel     bnfast, cross-compiled; `test` installs it into root beside NumPy and pytest
    python    a script that runs that Python under qemu
    suite     the tests, without the package beside them
Nothing is installed on this machine, and no root's rights are needed. What is there already stays:
remove build/arm64 to have newer packages.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "build" / "arm64"
SYSTEM = HERE / "root"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = SYSTEM / "usr/lib/python3/dist-packages"
TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
}
EMULATOR = {"qemu-aarch64": "qemu-user"}
REQUIRES = ("numpy", "pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ml_dtypes")
# An apt of its own: another architecture, and nothing installed.
APT = """
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "";
Dir::State "{folder}";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}";
"""
# What cannot run there, and why.
OF_THIS_MACHINE = "a program that this machine's compiler makes"
OF_QEMU = "a limit of memory, which qemu would need itself and does not set"
QEMUS_MEMORY = "resident memory, of which qemu's own is a part: it grows with each mapping"
LEFT_OUT = {
    "test_driver_program.py": OF_THIS_MACHINE,
    "test_isa_operations.py": f"{OF_THIS_MACHINE}; `make test-neon` has AArch64's",
    "test_kernel_program.py": f"{OF_THIS_MACHINE}; `make test-neon` has AArch64's",
    "test_forks.py::test_another_user_of_the_runtime_ran_before_the_fork": OF_THIS_MACHINE,
    "test_forks.py::test_other_user_that_did_not_run_has_no_effect": OF_THIS_MACHINE,
    "test_forks.py::test_child_imports_after_other_user_ran_in_parent": OF_THIS_MACHINE,
    "test_forks.py::test_child_imports_in_another_thread": OF_THIS_MACHINE,
    "test_memory.py::test_memory_that_runs_out": OF_QEMU,
    "test_memory.py::test_resident_memory_within_limit_and_released": QEMUS_MEMORY,
    "test_resources.py::test_call_runs_on_fewer_threads_if_none_available": OF_QEMU,
}
# How long a test may take, and how many times as long as here it waits for another process.
TIMEOUT = "--timeout=3600"
PATIENCE = {"BNFAST_PATIENCE": "10"}
# Hashes of all results, of the set that is named or the one in use.
HASH = """
import hashlib, sys
sys.path.insert(0, "tests")
from test_reproducible import FUSED, everything
from cases import DTYPES, bfloat16, make_problem
from bnfast import _core
import numpy as np
_core.set_isa(sys.argv[1] if len(sys.argv) > 1 else _core.isa())
for dtype in (*DTYPES, np.float16, bfloat16):
    found = hashlib.sha256()
    for shape in ((4, 8, 3, 3), (5, 3, 211, 11), (8191, 67), (37, 19)):
        for a in everything(make_problem(shape, dtype, **FUSED)):
            found.update(a or b"")
    print(np.dtype(dtype).name, found.hexdigest()[:16])
"""


def run(*command, **options):
    """Run a command; return what it printed, or exit with it if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        sys.exit(f"bnfast: {command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def say(text):
    print(text, flush=True)


def check(tools):
    missing = [package for tool, package in tools.items() if not shutil.which(tool)]
    if missing:
        sys.exit(
            "bnfast: what is for AArch64 needs a cross compiler, Debian's packages and, for the "
            f"tests, an emulator (Debian, Ubuntu: apt install {' '.join(missing)})"
        )


def download(folder):
    """Download Python with headers, and all that it needs, by an apt without root's rights."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    (folder / "conf").write_text(APT.format(folder=folder))
    apt = {"env": os.environ | {"APT_CONFIG": str(folder / "conf")}}
    run("apt-get", "update", **apt)
    if not run("apt-cache", "pkgnames", PYTHON, **apt):
        sys.exit(
            f"bnfast: apt's mirror has no AArch64 {PYTHON}: name a Python of the version that it "
            "has, as in 'make test-arm64 PYTHON=python3.11'"
        )
    install = ("apt-get", "install", "--yes", "--download-only", "--no-install-recommends")
    # NumPy's wheels link the last of them.
    run(*install, PYTHON, f"lib{PYTHON}-dev", "libgomp1", "libstdc++6", **apt)
    return (folder / "archives").glob("*.deb")


def make_root():
    """Unpack the packages. Their scripts are not run: nothing here needs them."""
    if (PACKAGES / "numpy").exists():
        return
    say(f"unpacking an AArch64 {PYTHON}")
    for archive in download(HERE / "apt"):
        run("dpkg-deb", "-x", archive, SYSTEM)
    platforms = ("manylinux2014_aarch64", "manylinux_2_28_aarch64")
    tags = [part for platform in platforms for part in ("--platform", platform)]
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--target", PACKAGES, "--only-binary=:all:", *tags, *REQUIRES)


def cross_environment():
    """Variables by which the build takes AArch64's compiler, headers and names."""
    lib, include = SYSTEM / "usr/lib" / PYTHON, SYSTEM / "usr/include"
    facts = "_sysconfigdata__aarch64-linux-gnu"
    (HERE / "facts").mkdir(exist_ok=True)
    shutil.copy(lib / f"{facts}.py", HERE / "facts")
    gcc = "aarch64-linux-gnu-gcc"
    return {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "_PYTHON_SYSCONFIGDATA_NAME": facts,
        "PYTHONPATH": str(HERE / "facts"),
        "CC": gcc,
        "LDSHARED": f"{gcc} -shared -s",  # this machine's `strip` does not know such files
        # Those of the C library after the cross compiler's own.
        "CFLAGS": f"-I{include / PYTHON} -idirafter {include}",
    }


def build_wheel():
    wheels = HERE / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    command = (sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", wheels)
    run(*command, cwd=ROOT, env=os.environ | cross_environment())
    (wheel,) = wheels.glob("*.whl")
    return wheel


def install(wheel):
    for old in PACKAGES.glob("bnfast*"):
        shutil.rmtree(old)
    shutil.unpack_archive(wheel, PACKAGES, "zip")


def make_python():
    """Make the script, and let Python take it for its own executable: subprocesses do."""
    python, real = HERE / "python", SYSTEM / "usr/bin" / PYTHON
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -L "{SYSTEM}" "{real}" "$@"\n')
    python.chmod(0o755)
    line = f"import sys; sys.executable = sys._base_executable = {str(python)!r}\n"
    (PACKAGES / "under-qemu.pth").write_text(line)
    return python


def copy_suite():
    suite = HERE / "suite"
    shutil.rmtree(suite, ignore_errors=True)
    for folder in ("tests", "docs"):
        shutil.copytree(ROOT / folder, suite / folder)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, suite)
    return suite


def compare_bits(python, suite):
    """With those of AVX2, which fuses the same operations, where this machine has it."""
    here = run(sys.executable, "-c", "from bnfast import _core; print(*_core.isas())", cwd=ROOT)
    found = run(python, "-c", HASH, cwd=suite)
    if "avx2" not in here.split():
        say(f"hashes of results, without AVX2 to compare with:\n{found}")
        return
    want = run(sys.executable, "-c", HASH, "avx2", cwd=ROOT)
    say(f"hashes of results, AArch64:\n{found}AVX2:\n{want}")
    if found != want:
        sys.exit("bnfast: results differ from AVX2's")


def publish(wheel, folder):
    """Put it into a folder as users would get it, with libgomp."""
    from repair_wheel import repair  # needs what only wheels are made with

    repaired = repair(wheel, folder, SYSTEM / "usr/lib/aarch64-linux-gnu/libgomp.so.1")
    say(f"{repaired.stat().st_size:>9,} bytes  {repaired.name}")


def test(wheel, arguments):
    install(wheel)
    say(f"{wheel.name} on {PYTHON}, under qemu-aarch64")
    python, suite = make_python(), copy_suite()
    compare_bits(python, suite)
    for name, reason in LEFT_OUT.items():
        say(f"left out: {name}: {reason}")
    left_out = [f"--deselect=tests/{name}" for name in LEFT_OUT]
    command = [python, "-m", "pytest", "-q", "-m", "not slow", TIMEOUT, *left_out, *arguments]
    environment = os.environ | PATIENCE
    sys.exit(subprocess.run(command, cwd=suite, env=environment, check=False).returncode)


def main():
    step, *arguments = sys.argv[1:] or [""]
    if step not in ("wheel", "test") or (step == "wheel" and len(arguments) != 1):
        sys.exit(__doc__)
    check(TOOLS | (EMULATOR if step == "test" else {}))
    HERE.mkdir(parents=True, exist_ok=True)
    make_root()
    say("compiling: some minutes")
    wheel = build_wheel()
    if step == "wheel":
        publish(wheel, Path(*arguments))
    else:
        test(wheel, arguments)


if __name__ == "__main__":
    main()
