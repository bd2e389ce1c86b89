"""Build wheels for several Pythons, and run the tests on them installed: `make wheels`.

    python tools/wheels.py build wheelhouse [--libgomp FILE] [python ...]
    python tools/wheels.py test wheelhouse [python ...] [-- pytest's arguments]

Every step runs in a temporary environment of its own. Wheels are built from the sdist in pip's
isolation, and tested where only they, NumPy and pytest are installed. Pythons are paths of
interpreters; by default those of 3.10 to 3.14 found on PATH and under ~/.pyenv.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from repair_wheel import repair

ROOT = Path(__file__).resolve().parents[1]
MINORS = range(10, 15)
TEST_REQUIRES = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]
IDENTIFY = "import sys; print(sys.implementation.cache_tag.replace('cpython-', 'cp'))"
# Print where the package came from, and which runtime a user of the wheel gets who has none.
INSTALLED = """
import pathlib, re, sys, bnfast
package = pathlib.Path(bnfast.__file__).parent
assert package.is_relative_to(sys.prefix), package
maps = pathlib.Path("/proc/self/maps").read_text()
runtimes = set(re.findall(r"/\\S*libgomp\\S*", maps))
assert runtimes == {str(package / "libgomp.so.1")}, runtimes
print(package)
"""


def clean():
    """Return the caller's environment without variables that affect new environments."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def run(*command, cwd=None, quiet=True):
    """Run a command; return its output, or exit with the output if it fails."""
    command = [str(part) for part in command]
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(
        command, cwd=cwd, env=clean(), stdout=output, stderr=output, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout or ''}{done.stderr or ''}")
    return done.stdout


def tag_of(python):
    """Return an interpreter's tag, "cp312", or None if it does not run (a pyenv shim)."""
    try:
        done = subprocess.run([python, "-c", IDENTIFY], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().replace("-", "")


def present():
    """Return the interpreters of this machine, one per version, by tag."""
    found = {}
    for minor in MINORS:
        installed = (Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/python")
        on_path = shutil.which(f"python3.{minor}")
        candidates = [on_path] * bool(on_path) + sorted(map(str, installed))
        for python in candidates:
            if tag_of(python) == f"cp3{minor}":
                found.setdefault(f"cp3{minor}", python)
    return found


def chosen(pythons):
    found = {tag_of(python): python for python in pythons} if pythons else present()
    if not found or None in found:
        sys.exit(f"no Python found{f': {found[None]} does not run' if found else ''}")
    return found


def environment(python, folder):
    """Make an empty environment, and return its interpreter."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def pip(python, *arguments):
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def build(out, pythons, libgomp):
    for old in out.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", temporary, ROOT)
        (sdist,) = temporary.glob("*.tar.gz")
        for tag, python in pythons.items():
            built = temporary / f"built-{tag}"
            pip(environment(python, temporary / tag), "wheel", "--no-deps", "-w", built, sdist)
            (wheel,) = built.glob("*.whl")
            repaired = repair(wheel, out, libgomp)
            print(f"{repaired.stat().st_size:>9,} bytes  {repaired.name}", flush=True)


def test(out, pythons, arguments):
    failed = [tag for tag, python in pythons.items() if not passes(out, tag, python, arguments)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def passes(out, tag, python, arguments):
    """Install a Python's wheel into an empty environment; return whether the suite passes there."""
    wheels = list(out.glob(f"bnfast-*-{tag}-{tag}-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{len(wheels)} wheels in {out} for {python} ({tag}): `make wheels` first")
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        inside = environment(python, temporary / "environment")
        # The suite and the files it reads, without the package beside them in the source.
        suite = temporary / "suite"
        for folder in ("tests", "docs"):
            shutil.copytree(ROOT / folder, suite / folder)
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, suite)
        pip(inside, "install", wheels[0].resolve())
        print(f"== {wheels[0].name}", flush=True)
        run(inside, "-c", INSTALLED, cwd=suite, quiet=False)
        pip(inside, "install", *TEST_REQUIRES)
        command = [inside, "-m", "pytest", "-q", *arguments]
        return subprocess.run(command, cwd=suite, env=clean(), check=False).returncode == 0


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=["build", "test"])
    parser.add_argument("wheelhouse", type=Path)
    parser.add_argument("pythons", nargs="*")
    parser.add_argument("--libgomp", type=Path, help="the file to carry; default: the linked one")
    options = parser.parse_args(sys.argv[1:split])
    pythons = chosen(options.pythons)
    if options.step == "build":
        build(options.wheelhouse, pythons, options.libgomp)
    else:
        test(options.wheelhouse, pythons, sys.argv[split + 1 :])


if __name__ == "__main__":
    main()
