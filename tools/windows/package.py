"""The wheel of bnfast for Windows, by setup.py as it stands, with clang for that system."""

import os
import shlex
import sys
import zipfile

from compiler import COMPILER, zig
from interpreter import SHORT
from steps import BUILD, HERE, ROOT, TOOLS, made, run

SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".inc"}
EXTENSIONS = {f"bnfast/{name}.cp{SHORT}-win_amd64.pyd" for name in ("_core", "torch/_aten")}
PLATFORM = "win-amd64"
OBJECTS = ROOT / "build" / f"objects-{PLATFORM}-cp{SHORT}-win_amd64"  # of setup.py
MODULE = "_sysconfigdata_bnfast_windows"
# Of an extension module, which nothing is linked to: not beside it, where the wheel would have it.
NO_IMPORT_LIBRARY = f"-Wl,--out-implib={shlex.quote(str(BUILD / 'unused.lib'))}"


def sources():
    yield ROOT / "setup.py"
    yield ROOT / "pyproject.toml"
    for folder in ("src", "bnfast"):
        files = (ROOT / folder).rglob("*")
        yield from sorted(f for f in files if f.suffix in SUFFIXES and f.name != "_core.c")


def facts(python):
    """What sysconfig says, and setuptools asks it, where the interpreter's system is Windows."""
    compiler = shlex.join(COMPILER)
    numpy = python / "Lib/site-packages/numpy/_core/include"
    library = str(import_library(python))
    return {
        "AR": shlex.join([zig(), "ar"]),
        "ARFLAGS": "rcs",
        "CC": compiler,
        "CCSHARED": "",
        "CFLAGS": f"-I{numpy}",  # before this system's NumPy
        "CONFINCLUDEPY": str(python / "include"),
        "CXX": compiler,
        "EXT_SUFFIX": f".cp{SHORT}-win_amd64.pyd",
        "INCLUDEPY": str(python / "include"),
        "LDCXXSHARED": f"{compiler} -shared",
        "LDSHARED": f"{compiler} -shared -s {NO_IMPORT_LIBRARY} {shlex.quote(library)}",
        "Py_ENABLE_SHARED": 0,  # LDSHARED names the library
        "SHLIB_SUFFIX": ".pyd",
        "SOABI": f"cp{SHORT}-win_amd64",
    }


def import_library(python):
    return python / "libs" / f"libpython{SHORT}.a"


def environment(folder):
    """Make setup.py build for Windows, and for nothing that the caller's CFLAGS ask for."""
    ours = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "AR", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {
        "PYTHONPATH": str(folder),
        "_PYTHON_HOST_PLATFORM": PLATFORM,
        "_PYTHON_SYSCONFIGDATA_NAME": MODULE,
    }


def make_wheel(python):
    """A step."""

    def make(folder):
        text = f"build_time_vars = {facts(python)!r}\n"
        (folder / f"{MODULE}.py").write_text(text, "utf-8")
        command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder]
        print(run(*command, cwd=ROOT, env=environment(folder)), end="")
        check(wheel_in(folder))

    return make


def wheel_in(folder):
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel):
    """Exit if a wheel is not what users of Windows would get."""
    if not wheel.name.endswith(f"-cp{SHORT}-cp{SHORT}-win_amd64.whl"):
        sys.exit(f"{wheel.name} is not named as a wheel for CPython {SHORT} on Windows")
    with zipfile.ZipFile(wheel) as file:
        names = {n for n in file.namelist() if n.endswith((".pyd", ".so", ".dll", ".lib", ".pdb"))}
        if names != EXTENSIONS:
            sys.exit(f"{wheel.name} has {sorted(names)}; expected {sorted(EXTENSIONS)}")
        for name in sorted(names):
            info = file.getinfo(name)
            print(f"{info.file_size:>9,} bytes, {info.compress_size:,} compressed  {name}")
    print(f"{wheel.stat().st_size:>9,} bytes  {wheel.name}", flush=True)


def build(python):
    """Build the wheel, unpack it where the interpreter finds it, and return it."""
    parts = [HERE / "package.py", TOOLS / "zig_cc.py", SHORT, *sources()]
    folder = made("wheel", make_wheel(python), *parts)
    made("installed", lambda target: zipfile.ZipFile(wheel_in(folder)).extractall(target), folder)
    return wheel_in(folder)
