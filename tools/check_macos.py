"""Compiles and links bnfast for macOS, where there is no Mac: `make check-macos`.

The compiler is PyPI's ziglang, which carries the headers of macOS. NumPy's headers are those of its
wheel for macOS; Python's are this machine's, whose types have the same sizes on both. What is made
cannot run here: it is only looked at.
"""

import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from zig_cc import compiler_for, zig

# zig's name of the target, sysconfig's of the platform, its tag of NumPy's wheel, the processor's
# number in Mach-O files
TARGETS = [
    ("aarch64-macos", "macosx-11.0-arm64", "macosx_14_0_arm64", 0x0100000C),
    ("x86_64-macos", "macosx-10.13-x86_64", "macosx_14_0_x86_64", 0x01000007),
]
MACH_O = 0xFEEDFACF
CALLS = (b"_dispatch_apply_f", b"_sysctlbyname", b"_mmap")  # of the files of this system
OPENMP = (b"GOMP_", b"__kmpc_", b"_omp_get")


def numpy_headers(folder, tag):
    """Return the folder of the headers in NumPy's wheel for another platform."""
    found = folder / "numpy/_core/include"
    if not found.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        wanted = ["--no-deps", "--only-binary=:all:", "--platform", tag, f"numpy=={np.__version__}"]
        subprocess.run([*pip, *wanted, "--dest", folder], check=True)
        (wheel,) = folder.glob("numpy-*.whl")
        with zipfile.ZipFile(wheel) as content:
            names = [n for n in content.namelist() if n.startswith("numpy/_core/include/")]
            content.extractall(folder, names)
    return found.resolve()


def build(target, platform, tag):
    """Return the extension modules that setup.py makes for another platform."""
    folder = Path("build", platform)
    compiler = shlex.join(compiler_for(target))
    environ = os.environ | {
        "_PYTHON_HOST_PLATFORM": platform,
        "CC": compiler,
        "AR": shlex.join([zig(), "ar"]),
        "CFLAGS": f"-Wno-unused-command-line-argument -I{numpy_headers(folder, tag)}",
        "LDSHARED": f"{compiler} -shared -Wl,-undefined,dynamic_lookup",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_clib", "build_ext"]
    subprocess.run([*command, "--build-lib", folder], env=environ, check=True)
    return sorted(folder.rglob("*.so"))


def faults(module, processor):
    """Yield what is wrong with an extension module."""
    content = module.read_bytes()
    magic, found = (int.from_bytes(content[i : i + 4], "little") for i in (0, 4))
    if (magic, found) != (MACH_O, processor):
        yield f"is no Mach-O file of processor {processor:#x}"
    if module.name.startswith("_core"):
        yield from (f"does not call {name.decode()}" for name in CALLS if name not in content)
    yield from (f"needs OpenMP's {name.decode()}" for name in OPENMP if name in content)


def main():
    status = 0
    for target, platform, tag, processor in TARGETS:
        for module in build(target, platform, tag):
            wrong = list(faults(module, processor))
            print(f"{module}: {module.stat().st_size} bytes, {'; '.join(wrong) or 'linked'}")
            status |= bool(wrong)
    sys.exit(status)


if __name__ == "__main__":
    main()
