"""Compiler facts: which sources are built with which flags.  All else is in pyproject.toml.

One static library per instruction set, each with its own flags, so that no
instruction of a newer processor can leak into code that runs on every one.
"""

import os
import re
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError

ROOT = os.path.dirname(os.path.abspath(__file__))

# Arithmetic is IEEE 754's whatever CFLAGS ask for: these undo -ffast-math and each of its parts,
# which give other bits and take NaN and infinities for impossible.
EXACT = [
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
    "-fno-rounding-math",
]
# Contraction would let the compiler fuse what another build does not, and change bits;
# link-time optimisation would let code cross from one instruction set to another.
COMMON = ["-std=c11", "-O2", *EXACT, "-ffp-contract=off", "-fno-lto", "-Wall", "-Wextra"]
# Python's own flags ask for debug information, ten times the code; CFLAGS=-g keeps it.
if "-g" not in os.environ.get("CFLAGS", "").split():
    COMMON.append("-g0")
# BNFAST_SANITIZE=address,undefined: a build that reports each bad access (`make sanitize`).
SANITIZERS = os.environ.get("BNFAST_SANITIZE", "")
SANITIZE = [f"-fsanitize={SANITIZERS}"] if SANITIZERS else []
if SANITIZE:
    COMMON += [*SANITIZE, "-DBNF_SANITIZED", "-O1", "-g", "-fno-omit-frame-pointer"]
# BNFAST_COVERAGE=1: a build that counts how often each line ran (`make coverage`), counting
# exactly in threads too.
COVERAGE = ["--coverage"] if os.environ.get("BNFAST_COVERAGE") == "1" else []
if COVERAGE:
    COMMON += [*COVERAGE, "-O1", "-fprofile-update=atomic"]
# BNFAST_DEBUG=1: a build for a debugger, with assertions (`make build-debug`).
DEBUG = os.environ.get("BNFAST_DEBUG") == "1"
if DEBUG:
    COMMON += ["-Og", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
# One build directory per variant and interpreter, also where pip would take a temporary one: an
# object is compiled again only where it has to be.
VARIANTS = [SANITIZERS.replace(",", "-"), "coverage" if COVERAGE else "", "debug" if DEBUG else ""]
BUILD = os.path.join("build", "-".join(filter(None, VARIANTS)))
TARGET = f"{sysconfig.get_platform()}-{sysconfig.get_config_var('SOABI')}"
OBJECTS = os.path.join(BUILD, f"objects-{TARGET}")
OPENMP = ["-fopenmp"]  # for src/threads.c
# The compiler's own conventions of other vector widths and nested braces are not ours.
KERNEL = [*COMMON, "-Wno-missing-braces"]

# The instruction sets of a processor that have kernels, and their flags. Every other processor has
# "scalar" alone: plain C for whatever the compiler takes for the baseline.
# Where CFLAGS ask for newer instructions (-march=native), each set still has its own alone, or
# else the bits of one would be another's.
X86_64 = ["-march=x86-64", "-mfpmath=sse", "-mno-avx"]
ISA_FLAGS = {
    "x86_64": {
        "scalar": X86_64,
        "sse2": X86_64,
        "avx2": [*X86_64, "-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *X86_64,
            *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mf16c"),
        ],
    },
    "aarch64": {"scalar": [], "neon": []},
}
SAME_PROCESSOR = {"amd64": "x86_64", "arm64": "aarch64"}


def processor():
    """Of the target: a cross build says which in _PYTHON_HOST_PLATFORM, and sysconfig reads it."""
    name = sysconfig.get_platform().rpartition("-")[2].lower()
    return SAME_PROCESSOR.get(name, name)


def library(name, sources, flags):
    return name, {"sources": sources, "cflags": flags, "include_dirs": ["src"]}


def libraries():
    isas = ISA_FLAGS.get(processor(), {"scalar": []})
    kernels = [
        library(f"bnfast_{isa}", [f"src/kernels_{isa}.c"], [*KERNEL, *flags])
        for isa, flags in isas.items()
    ]
    tables = [f"-DBNF_TABLES_{processor().upper()}"] if processor() in ISA_FLAGS else []
    files = ("driver", "threads", "dispatch", "tiling", "caches", "pages")
    sources = [f"src/{name}.c" for name in files]
    return [library("bnfast_driver", sources, [*COMMON, *OPENMP, *tables]), *kernels]


LIBRARIES = libraries()


def extension():
    return Extension(
        "bnfast._core",
        ["bnfast/_core.pyx"],
        include_dirs=["src", np.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),  # the first with memory handlers
        ],
        extra_compile_args=COMMON,
        # CFLAGS are in the link too, where -ffast-math adds code that changes the floating-point
        # environment of the process that loads it.
        extra_link_args=["-O2", *EXACT, *OPENMP, *SANITIZE, *COVERAGE],
    )


def torch_extension():
    """PyTorch's kernels: nothing of PyTorch's is needed to build them."""
    folder = "bnfast/torch"
    files = sorted(os.listdir(os.path.join(ROOT, folder)))
    return Extension(
        "bnfast.torch._aten",
        [f"{folder}/{file}" for file in files if file.endswith(".c")],
        include_dirs=["src"],
        # PyTorch's exceptions are thrown through a kernel's frame.
        extra_compile_args=[*COMMON, "-fexceptions"],
        extra_link_args=["-O2", *EXACT, *SANITIZE, *COVERAGE],
    )


# ---- Building: an edit compiles what includes the file, on all cores


def is_outdated(target, command):
    """Whether a file has changed since an object's compilation began, or the command has.

    The compiler lists the files (-MMD) as make reads them: "target: file file \\ file".
    """
    made_by, files = target.with_suffix(".command"), target.with_suffix(".d")
    try:
        if made_by.read_text("utf-8") != command:
            return True
        listed = files.read_text("utf-8").replace("\\\n", " ").partition(": ")[2]
        names = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", listed.strip())]
        began = made_by.stat().st_mtime_ns
        return not target.exists() or any(Path(name).stat().st_mtime_ns > began for name in names)
    except OSError:  # one of them is no more
        return True


def compile_outdated(compiler, folder, units):
    """Compile each (source, options) whose object is outdated, on all cores."""

    def compile_one(unit):
        source, options = unit
        target = Path(compiler.object_filenames([source], output_dir=folder)[0])
        command = repr((compiler.compiler_so, compiler.include_dirs, options))
        if is_outdated(target, command):
            made_by = target.with_suffix(".command")
            made_by.unlink(missing_ok=True)
            began = time.time_ns()
            compiler.compile([source], folder, **options)
            made_by.write_text(command, "utf-8")
            os.utime(made_by, ns=(began, began))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(compile_one, units))


def create_library(compiler, folder, name, objects):
    """Make a static library anew: `ar` would keep the objects of sources that are no more."""
    Path(folder, compiler.library_filename(name)).unlink(missing_ok=True)
    compiler.create_static_lib(objects, name, output_dir=folder)


def options_of(flags, **others):
    return {"extra_postargs": [*flags, "-MMD"], **others}


class BuildLibraries(build_clib):
    """Says what is missing before the first file is compiled."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = self.build_clib = OBJECTS

    def build_libraries(self, libraries):
        if not self.can_build([]):
            sys.exit(
                f"bnfast: the C compiler {self.compiler.compiler_so[0]} does not work; "
                "install one (Debian, Ubuntu: apt install gcc) or name yours in CC"
            )
        if not self.can_build(OPENMP):
            sys.exit(
                f"bnfast: the C compiler {self.compiler.compiler_so[0]} has no OpenMP "
                "(-fopenmp); install gcc, or clang with libomp, and name it in CC"
            )
        units = [
            (source, options_of(facts["cflags"], include_dirs=facts["include_dirs"]))
            for _, facts in reversed(libraries)  # what takes longest first
            for source in facts["sources"]
        ]
        compile_outdated(self.compiler, self.build_temp, units)
        for name, facts in libraries:
            objects = self.compiler.object_filenames(facts["sources"], output_dir=self.build_temp)
            create_library(self.compiler, self.build_clib, name, objects)

    def can_build(self, flags):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w", encoding="ascii") as file:
                file.write("int main(void) { return 0; }\n")
            try:
                objects = self.compiler.compile([source], folder, extra_postargs=flags)
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=flags)
            except (CCompilerError, ExecError):
                return False
        return True


class BuildExtensions(build_ext):
    """Links always: of the static libraries, setuptools does not look at the age."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = OBJECTS

    def build_extensions(self):
        units = [
            (
                source,
                options_of(
                    extension.extra_compile_args,
                    include_dirs=extension.include_dirs,
                    macros=extension.define_macros,
                ),
            )
            for extension in self.extensions
            for source in extension.sources
        ]
        compile_outdated(self.compiler, self.build_temp, units)
        self.compiler.compile = self.objects_of
        # Also copied always, in place of another variant's that is newer.
        self.force = self.compiler.force = True
        super().build_extensions()

    def objects_of(self, sources, output_dir=None, **options):
        return self.compiler.object_filenames(sources, output_dir=output_dir)


if __name__ == "__main__":
    setup(
        # Counted are the lines of the .pyx, which no other build's C names.
        ext_modules=[
            *cythonize(
                [extension()], build_dir=BUILD if COVERAGE else None, emit_linenums=bool(COVERAGE)
            ),
            torch_extension(),
        ],
        libraries=LIBRARIES,
        options={"build": {"build_base": BUILD}},
        cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtensions},
    )
