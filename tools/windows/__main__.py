"""bnfast for Windows: built here by clang and run by wine. `make test-windows`.

    python tools/windows build [FOLDER]      the wheel, into a folder
    python tools/windows test [pytest's arguments]
    python tools/windows python [its arguments]

`test` without arguments first compares results and kernels with this system's. All is in
build/windows: an interpreter, the wheel of bnfast, the copied suite.
"""

import shutil
import sys
from pathlib import Path

import interpreter
import package
import suite
import wine
from steps import HERE, TOOLS, made

WINE = "apt install --no-install-recommends wine wine64"
COMMANDS = ("build", "test", "python")


def missing():
    """What has to be installed first."""
    if not all(map(shutil.which, ("wine", "wineboot", "wineserver"))):
        yield f"wine (Debian: {WINE})"
    try:
        import ziglang  # noqa: F401
    except ImportError:
        yield "a compiler (pip install ziglang)"
    if not (3, 11) <= interpreter.MINOR <= (3, 13):
        yield "Python 3.11 to 3.13, which PyPI has for Windows (make PYTHON=python3.11)"


def set_up():
    """Make the interpreter, if it is not there; return its folder."""
    absent = list(missing())
    if absent:
        sys.exit(f"bnfast: test-windows needs {' and '.join(absent)}")
    wanted = (interpreter.PANDA3D, interpreter.SHORT)
    fetched = made("fetched", interpreter.fetch_python, *wanted)
    packages = made("packages", interpreter.fetch_packages, *interpreter.PACKAGES, *wanted)
    files = ("interpreter.py", "forwarder.py", "dll.py", "python_main.c", "pyconfig.h")
    ours = [*(HERE / name for name in files), TOOLS / "zig_cc.py"]
    parts = [*ours, fetched, packages, sys.version]
    python = made("python", interpreter.make_python(fetched, packages), *parts)
    made("prefix", wine.make_prefix, HERE / "wine.py")
    return python


def main():
    command, *arguments = sys.argv[1:] or [""]
    if command not in COMMANDS:
        sys.exit(__doc__)
    python = set_up()
    wheel = package.build(python)
    if command == "build" and arguments:
        (folder,) = arguments
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, folder)
    if command == "python":
        sys.exit(wine.run(suite.PYTHON, *arguments, **suite.ENVIRONMENT))
    if command == "test":
        if not arguments:
            import kernels  # with the tests' own modules, which a build does not need

            kernels.check()
            suite.check_bits()
        sys.exit(suite.run(arguments))


if __name__ == "__main__":
    main()
