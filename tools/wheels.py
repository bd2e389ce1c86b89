"""Build wheels for several Pythons, and run the tests on them installed: `make wheels`.

One more wheel, of the stable ABI, is for Pythons that are newer than the others: pip takes it where
there is none for the Python itself.

    python tools/wheels.py build wheelhouse [--libgomp FILE] [python ...]
    python tools/wheels.py test wheelhouse [python ...] [-- pytest's arguments]

Every step runs in a temporary environment of its own. Wheels are built from the sdist in pip's
isolation, and tested where only they, NumPy and pytest are installed. Pythons are paths of
interpreters; by default those of 3.10 to 3.15 found on PATH and under ~/.pyenv, and free-threaded
ones (python3.14t).
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
MINORS = range(10, 16)
ABI3 = "abi3"  # the tag of the stable ABI
ABI3_OLDEST = 11
TEST_REQUIRES = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]
IDENTIFY = """
import sys, sysconfig
assert sys.implementation.name == "cpython"
python = "cp{}{}".format(*sys.version_info)
print(python + "-" + python + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""
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
    """Return the caller's environment without variables that affect new environments.

    Where the newest release of NumPy or hypothesis has no wheel for a Python (3.13t), pip takes an
    older one that has, instead of compiling the newest for minutes, or failing without Rust.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {"PIP_PREFER_BINARY": "1"} | kept


def run(*command, cwd=None, quiet=True, **environ):
    """Run a command; return its output, or exit with the output if it fails."""
    command = [str(part) for part in command]
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean() | environ,
        stdout=output,
        stderr=output,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout or ''}{done.stderr or ''}")
    return done.stdout


def tag_of(python):
    """Return an interpreter's tag, "cp314-cp314t", or None if it does not run (a pyenv shim)."""
    try:
        done = subprocess.run([python, "-c", IDENTIFY], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def present():
    """Return the interpreters of this machine, one per version and kind, by tag."""
    found = {}
    for minor in MINORS:
        names = (f"python3.{minor}", f"python3.{minor}t")
        candidates = [path for path in map(shutil.which, names) if path]
        candidates += (Path.home() / ".pyenv" / "versions").glob(f"3.{minor}*/bin/python")
        for python in sorted(map(str, candidates)):
            tag = tag_of(python)
            if tag and tag.startswith(f"cp3{minor}-"):
                found.setdefault(tag, python)
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


def pip(python, *arguments, **environ):
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments, **environ)


def takes_abi3(tag):
    """Whether a Python can load a wheel of the stable ABI: free-threaded ones cannot."""
    return not tag.endswith("t") and int(tag.partition("-")[0].removeprefix("cp3")) >= ABI3_OLDEST


def abi3_pythons(pythons):
    """Return the oldest and the newest of the Pythons that can load such a wheel; maybe none."""
    able = sorted((tag for tag in pythons if takes_abi3(tag)), key=lambda tag: int(tag[3:5]))
    return [pythons[tag] for tag in dict.fromkeys(able[:1] + able[-1:])]


def build(out, pythons, libgomp):
    for old in out.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", temporary, ROOT)
        (sdist,) = temporary.glob("*.tar.gz")
        jobs = [(tag, python, {}) for tag, python in pythons.items()]
        jobs += [(ABI3, python, {"BNFAST_ABI3": "1"}) for python in abi3_pythons(pythons)[:1]]
        for tag, python, environ in jobs:
            built = temporary / f"built-{tag}"
            inside = environment(python, temporary / tag)
            pip(inside, "wheel", "--no-deps", "-w", built, sdist, **environ)
            (wheel,) = built.glob("*.whl")
            repaired = repair(wheel, out, libgomp)
            print(f"{repaired.stat().st_size:>9,} bytes  {repaired.name}", flush=True)


def test(out, pythons, arguments):
    jobs = [*pythons.items(), *((f"cp3{ABI3_OLDEST}-{ABI3}", p) for p in abi3_pythons(pythons))]
    failed = [f"{tag} on {p}" for tag, p in jobs if not passes(out, tag, p, arguments)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def passes(out, tag, python, arguments):
    """Install a wheel into an empty environment; return whether the suite passes there."""
    wheels = list(out.glob(f"bnfast-*-{tag}-*.whl"))
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
