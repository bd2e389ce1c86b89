"""Compiler facts: which sources are built with which flags.  All else is in pyproject.toml.

One static library per instruction set and data type, each with its set's flags, so that no
instruction of a newer processor can leak into code that runs on every one.
"""

import os
import platform
import re
import shutil
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
# BNFAST_ABI3=1: one build for this Python and all later ones, of their stable ABI: for Pythons that
# are newer than the other wheels.
ABI3 = os.environ.get("BNFAST_ABI3") == "1"
ABI3_OLDEST = (3, 11)
ABI3_MACROS = [
    ("Py_LIMITED_API", f"0x{ABI3_OLDEST[0]:02X}{ABI3_OLDEST[1]:02X}0000"),
    ("CYTHON_LIMITED_API", "1"),
]
# One build directory per variant and interpreter, also where pip would take a temporary one: an
# object is compiled again only where it has to be.
VARIANTS = [
    SANITIZERS.replace(",", "-"),
    "coverage" if COVERAGE else "",
    "debug" if DEBUG else "",
    "abi3" if ABI3 else "",
]
BUILD = os.path.join("build", "-".join(filter(None, VARIANTS)))
TARGET = f"{sysconfig.get_platform()}-{sysconfig.get_config_var('SOABI')}"
OBJECTS = os.path.join(BUILD, f"objects-{TARGET}")
# The compiler's own conventions of other vector widths and nested braces are not ours, and clang
# need not say which loops it leaves as loops.
KERNEL = [*COMMON, "-Wno-missing-braces", "-Wno-pass-failed"]

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

# What operating systems do in ways of their own. macOS and Windows have threads that all libraries
# of a process share; elsewhere they are OpenMP's.
SYSTEM_SOURCES = {
    "macosx": ("threads_macos", "caches_macos", "pages_posix"),
    "win": ("threads_windows", "caches_windows", "pages_windows"),
}
POSIX_SOURCES = ("threads_openmp", "caches_linux", "pages_posix")


def target():
    """The system and the processor that is built for, as sysconfig names them: a cross build says
    so in _PYTHON_HOST_PLATFORM.

    A Python for both of Apple's processors builds for the one that it runs on.
    """
    system, _, rest = sysconfig.get_platform().lower().partition("-")
    name = rest.rpartition("-")[2]
    if name == "universal2":
        name = platform.machine()
        os.environ.setdefault("ARCHFLAGS", f"-arch {name}")
    return system, SAME_PROCESSOR.get(name, name)


SYSTEM, PROCESSOR = target()
SOURCES_OF_SYSTEM = SYSTEM_SOURCES.get(SYSTEM, POSIX_SOURCES)
OPENMP = ["-fopenmp"] if "threads_openmp" in SOURCES_OF_SYSTEM else []


def data_types():
    """The suffixes in src/types.inc."""
    text = Path(ROOT, "src/types.inc").read_text("utf-8")
    return re.findall(r"^TYPE\(.*, (\w+)\)$", text, re.MULTILINE)


def library(name, sources, flags):
    return name, {"sources": sources, "cflags": flags, "include_dirs": ["src"]}


def libraries():
    """The driver first, as the linker needs it, and then what takes longest to compile."""
    flags_of = ISA_FLAGS.get(PROCESSOR, {"scalar": []})
    kernels = [
        library(
            f"bnfast_{isa}_{suffix}",
            [f"src/kernels_{isa}.c"],
            [*KERNEL, *flags_of[isa], f"-DKERNELS_{suffix}"],
        )
        for suffix in data_types()
        for isa in reversed(flags_of)
    ]
    tables = [f"-DBNF_TABLES_{PROCESSOR.upper()}"] if PROCESSOR in ISA_FLAGS else []
    files = ("driver", "tiling", "dispatch", "threads", "caches", "pages", *SOURCES_OF_SYSTEM)
    sources = [f"src/{name}.c" for name in files]
    return [library("bnfast_driver", sources, [*COMMON, *OPENMP, *tables]), *kernels]


LIBRARIES = libraries()


def link_flags(more):
    """CFLAGS are in the link too, where -ffast-math adds code that changes the floating-point
    environment of the process that loads it."""
    return ["-O2", *EXACT, *more, *SANITIZE, *COVERAGE]


def extension():
    return Extension(
        "bnfast._core",
        ["bnfast/_core.pyx"],
        include_dirs=["src", np.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),  # the first with memory handlers
            *(ABI3_MACROS if ABI3 else []),
        ],
        py_limited_api=ABI3,
        extra_compile_args=COMMON,
        extra_link_args=link_flags(OPENMP),
    )


def torch_extension():
    """PyTorch's kernels: nothing of PyTorch's is needed to build them."""
    folder = "bnfast/torch"
    files = sorted(os.listdir(os.path.join(ROOT, folder)))
    return Extension(
        "bnfast.torch._aten",
        [f"{folder}/{file}" for file in files if file.endswith(".c")],
        include_dirs=["src"],
        define_macros=ABI3_MACROS if ABI3 else [],
        py_limited_api=ABI3,
        # PyTorch's exceptions are thrown through a kernel's frame.
        extra_compile_args=[*COMMON, "-fexceptions"],
        extra_link_args=link_flags([]),
    )


# ---- Compilers: flags above are gcc's, which clang shares


def is_microsofts(compiler):
    return compiler.compiler_type == "msvc"


def prepare(compiler):
    """Use clang-cl in place of Microsoft's own compiler, which cannot be told all of the flags."""
    if not is_microsofts(compiler):
        return
    found = shutil.which("clang-cl")
    if not found:
        sys.exit(
            "bnfast: no clang-cl on the PATH; install LLVM, or Visual Studio's component "
            "'C++ Clang tools for Windows'"
        )
    if not compiler.initialized:
        compiler.initialize()
    compiler.cc = found


def spelled_for(compiler, flags):
    return [f"/clang:{flag}" for flag in flags] if is_microsofts(compiler) else flags


def command_of(compiler):
    return [compiler.cc] if is_microsofts(compiler) else compiler.compiler_so


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


def compile_outdated(compiler, units):
    """Compile each (source, folder, options) whose object is outdated, on all cores."""

    def compile_one(unit):
        source, folder, options = unit
        target = Path(compiler.object_filenames([source], output_dir=folder)[0])
        command = repr((command_of(compiler), compiler.include_dirs, options))
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


def options_of(compiler, flags, **others):
    return {"extra_postargs": spelled_for(compiler, [*flags, "-MMD"]), **others}


class BuildLibraries(build_clib):
    """Says what is missing before the first file is compiled."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = self.build_clib = OBJECTS

    def build_libraries(self, libraries):
        prepare(self.compiler)
        name = command_of(self.compiler)[0]
        if not self.can_build([]):
            sys.exit(
                f"bnfast: the C compiler {name} does not work; "
                "install one (Debian, Ubuntu: apt install gcc) or name yours in CC"
            )
        if not self.can_build(OPENMP):
            sys.exit(
                f"bnfast: the C compiler {name} has no OpenMP "
                "(-fopenmp); install gcc, or clang with libomp, and name it in CC"
            )
        folders = {name: os.path.join(self.build_temp, name) for name, _ in libraries}
        units = [
            (source, folders[name], self.options_of(facts))
            for name, facts in (*libraries[1:], libraries[0])
            for source in facts["sources"]
        ]
        compile_outdated(self.compiler, units)
        for name, facts in libraries:
            objects = self.compiler.object_filenames(facts["sources"], output_dir=folders[name])
            create_library(self.compiler, self.build_clib, name, objects)

    def options_of(self, facts):
        return options_of(self.compiler, facts["cflags"], include_dirs=facts["include_dirs"])

    def can_build(self, flags):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w", encoding="ascii") as file:
                file.write("int main(void) { return 0; }\n")
            try:
                spelled = spelled_for(self.compiler, flags)
                objects = self.compiler.compile([source], folder, extra_postargs=spelled)
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
        prepare(self.compiler)
        units = [
            (
                source,
                self.build_temp,
                options_of(
                    self.compiler,
                    extension.extra_compile_args,
                    include_dirs=extension.include_dirs,
                    macros=extension.define_macros,
                ),
            )
            for extension in self.extensions
            for source in extension.sources
        ]
        compile_outdated(self.compiler, units)
        self.compiler.compile = self.objects_of
        if is_microsofts(self.compiler):
            for extension in self.extensions:
                extension.extra_link_args = []  # the linker's own defaults
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
        options={
            "build": {"build_base": BUILD},
            "bdist_wheel": {"py_limited_api": "cp{}{}".format(*ABI3_OLDEST) if ABI3 else False},
        },
        cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtensions},
    )
