"""A CPython for Windows out of PyPI's packages, and what an extension is compiled against.

Panda3D's wheels for Windows carry python.org's own DLLs, for programs made with it. The standard
library's Python files are this interpreter's, which has the same minor version; python.exe is made
here.
"""

import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import forwarder
from compiler import COMPILER
from dll import make_import_library
from steps import HERE, ROOT, run

sys.path.insert(0, str(ROOT / "tools"))
import wheels

MINOR = sys.version_info[:2]
SHORT = "{}{}".format(*MINOR)
VERSION = "{}.{}".format(*MINOR)
PANDA3D = "panda3d==1.10.16"
# ml_dtypes for bfloat16; colorama is what pytest wants there, and pip looks at this system.
PACKAGES = ["numpy", *wheels.TEST_REQUIRES, "ml_dtypes", "colorama", "threadpoolctl"]
UNUSED = ("site-packages", "lib-dynload", "__pycache__", "test", "idlelib", "ensurepip", "config-*")
# Wine's stand-in for what it asks of the system ends the process.
ENDS_WINE = "_wmi.pyd"


def download(folder, *requirements, dependencies=True):
    """Get the wheels of packages for Windows."""
    options = ["--only-binary=:all:", "--platform=win_amd64", f"--python-version={VERSION}"]
    options += [] if dependencies else ["--no-deps"]
    run(sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, *requirements)


def unpack(wheels_folder, target):
    for wheel in wheels_folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(target)


def fetch_python(folder):
    download(folder, PANDA3D, dependencies=False)


def fetch_packages(folder):
    download(folder, *PACKAGES)


def unpack_libraries(wheels_folder, target):
    """Of Panda3D's wheel: DLLs, and extension modules in the folder that Python has for them."""
    (wheel,) = wheels_folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            if Path(name).parent.name == "deploy_libs" and Path(name).name != ENDS_WINE:
                inside = target / ("DLLs" if name.endswith(".pyd") else ".")
                inside.mkdir(exist_ok=True)
                (inside / Path(name).name).write_bytes(file.read(name))


def make_python(fetched, packages):
    """A step that lays the interpreter out as an installed one."""

    def make(folder):
        unpack_libraries(fetched, folder)
        library = folder / "Lib"
        ignore = shutil.ignore_patterns(*UNUSED)
        shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=ignore)
        mend_library(library)
        unpack(packages, library / "site-packages")
        forwarder.make_dll(folder, folder / forwarder.SYSTEM, COMPILER)
        forwarder.redirect(library / "site-packages")
        (folder / "libs").mkdir()
        import_library = folder / "libs" / f"libpython{SHORT}.a"
        make_import_library(folder / f"python{SHORT}.dll", import_library)
        program = [HERE / "python_main.c", import_library, "-o", folder / "python.exe"]
        run(*COMPILER, "-O2", "-s", "-municode", *program)
        copy_headers(folder / "include")

    return make


def mend_library(library):
    """Let an older patch release's library work with these DLLs, which call this on the class."""
    file = library / "importlib" / "metadata" / "__init__.py"
    text, method = file.read_text("utf-8"), "    def invalidate_caches(cls):"
    if f"    @classmethod\n{method}" not in text:
        file.write_text(text.replace(method, f"    @classmethod\n{method}"), "utf-8")


def copy_headers(target):
    """This interpreter's, which are the same on all systems, without its system's pyconfig.h."""
    headers = sysconfig.get_path("include")
    shutil.copytree(headers, target, ignore=shutil.ignore_patterns("pyconfig.h"))
    shutil.copy(HERE / "pyconfig.h", target)
