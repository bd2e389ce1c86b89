"""From the source tree to another machine: sdist, wheel, clean install, missing parts."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Where `make docs`, the examples and `make bench` write. An sdist has none of it.
WRITTEN = (
    "docs/_build/",
    "docs/_figures/",
    "docs/api/generated/",
    "examples/figures/",
    "bench/results/",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists() or not (ROOT / "src").is_dir(),
        reason="not run from a source tree",
    ),
]


def run(*command, cwd, **environ):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def succeed(*command, cwd):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Copy the source tree, so that building does not change the original.

    Without anything compiled, but with files in all folders of WRITTEN.
    """
    copy = tmp_path_factory.mktemp("tree") / "bnfast"
    built = ("*.so", "*.o", "*.a", "_core.c", "build", "_build", "_figures", "dist", "wheelhouse")
    ignore = shutil.ignore_patterns(
        *built, "*.egg-info", "__pycache__", ".git", ".venv*", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    for folder in WRITTEN:
        (copy / folder / "inner").mkdir(parents=True, exist_ok=True)
        (copy / folder / "inner" / "written.svg").touch()
    return copy


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    succeed(sys.executable, "-m", "build", "--sdist", "--outdir", out, tree, cwd=out)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Build from the sdist, in isolation, as pip does for a user."""
    out = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, sdist, cwd=out)
    (path,) = out.glob("*.whl")
    return path


def test_the_sdist_carries_all_sources(tree, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("src", "bnfast", "tests", "bench", "examples", "tools", "docs")
    files = [path for folder in folders for path in (tree / folder).rglob("*") if path.is_file()]
    files += [path for path in tree.iterdir() if path.is_file() and path.name != ".gitignore"]
    sources = {path.relative_to(tree).as_posix() for path in files}
    written = {name for name in sources if name.startswith((*WRITTEN, "bnfast/_core.c"))}
    assert len(written) >= len(WRITTEN)
    assert sources - written <= names
    assert not written & names
    assert {"src/bnfast.h", "src/kernels.inc.h", "bnfast/_core.pyx", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".a", "_core.c", ".pyc"))]


def test_the_wheel_carries_every_module(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(tree).as_posix() for path in (tree / "bnfast").rglob("*.py")}
    assert "bnfast/onnx/__init__.py" in modules
    assert modules <= names


def test_the_wheel_carries_no_sources_and_is_small(wheel):
    assert wheel.stat().st_size < 1_850_000  # and OpenMP's runtime, 0.12 MB, below 2 MB
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = {name for name in names if not name.startswith("bnfast-")}
    assert all(name.startswith("bnfast/") for name in package)
    suffixes = {Path(name).suffix for name in package if Path(name).name != "py.typed"}
    assert suffixes == {".py", ".pyi", ".so"}
    assert "bnfast/py.typed" in package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path):
    environment = tmp_path / "environment"
    succeed(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    succeed(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    code = (
        "import numpy as np, bnfast, sys\n"
        "x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)\n"
        "y, stats = bnfast.batch_norm_forward(x)\n"
        "assert np.allclose(stats.mean, x.mean((0, 2)))\n"
        "assert abs(y.mean((0, 2))).max() < 1e-6\n"
        "print(bnfast.__file__)\n"
    )
    done = succeed(python, "-I", "-W", "error", "-c", code, cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(environment)
    listed = succeed(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    packages = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert packages - {"pip", "setuptools", "wheel"} == {"bnfast", "numpy"}


@pytest.fixture(scope="module")
def plain_c(tree, tmp_path_factory):
    """A folder to import from, built as if setup.py did not know the processor."""
    folder = tmp_path_factory.mktemp("plain_c")
    shutil.copytree(tree, folder / "source")
    setup = folder / "source" / "setup.py"
    text = setup.read_text("utf-8")
    for known in ("x86_64", "aarch64"):
        assert f'"{known}": {{' in text
        text = text.replace(f'"{known}": {{', f'"not {known}": {{')
    setup.write_text(text, "utf-8")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder)
    succeed(*command, folder / "source", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


class TestUnknownProcessor:
    """A processor without an instruction set in setup.py: only plain C is built, and works."""

    def run(self, folder, *arguments, **environ):
        environ = {"PYTHONPATH": str(folder), "BNFAST_ISA": "", **environ}
        return run(sys.executable, "-W", "error", *arguments, cwd=folder, **environ)

    def test_show_config_reports_plain_c(self, plain_c):
        done = self.run(plain_c, "-m", "bnfast")
        assert done.returncode == 0, done.stderr
        shown = {line[:16].strip(): line[16:] for line in done.stdout.splitlines()}
        assert shown["kernels"] == "scalar (plain C: no others were built for this processor)"
        assert shown["built"] == shown["runnable here"] == "scalar"

    def test_pinning_other_set_names_available_one(self, plain_c):
        done = self.run(plain_c, "-c", "import bnfast", BNFAST_ISA="avx2")
        assert done.returncode == 1
        message = done.stderr.strip().splitlines()[-1]
        assert message == "ImportError: BNFAST_ISA is 'avx2'; this processor and build have scalar"

    def test_passes_the_tests_of_the_functions(self, plain_c):
        names = ("moments", "functional_forward", "functional_backward", "dispatch")
        tests = [ROOT / "tests" / f"test_{name}.py" for name in names]
        options = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider")
        command = ("-m", "pytest", "-v", "-m", "not slow", *options, *tests)
        done = self.run(plain_c, *command)
        assert done.returncode == 0, done.stdout[-3000:]
        # One test for each set that can run shows which build was tested.
        assert re.findall(r"TestShowConfig::test_of_each_set\[(.+)\] PASSED", done.stdout) == [
            "scalar"
        ]


def test_a_missing_compiler_is_named(sdist, tmp_path):
    failed = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist),
        cwd=tmp_path,
        CC="/nonexistent/cc",
    )
    assert failed.returncode != 0
    assert "/nonexistent/cc" in failed.stdout + failed.stderr
    assert "C compiler" in failed.stdout + failed.stderr


def test_a_compiler_without_openmp_is_named(sdist, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *-fopenmp*) echo "cc: error: no -fopenmp here" >&2; exit 1;; esac\n'
        'exec gcc "$@"\n'
    )
    compiler.chmod(0o755)
    failed = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist),
        cwd=tmp_path,
        CC=str(compiler),
    )
    assert failed.returncode != 0
    assert "OpenMP" in failed.stdout + failed.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("variables", "environ", "message"),
    [
        (
            ["PYTHON=/nonexistent/python"],
            {},
            "bnfast: no /nonexistent/python: install Python >= 3.10",
        ),
        ([], {"CC": "/nonexistent/cc"}, "bnfast: no C compiler (/nonexistent/cc): install one"),
    ],
)
def test_make_names_what_is_missing(tree, tmp_path, variables, environ, message):
    command = ["make", "test", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", *variables]
    failed = run(*command, cwd=tree, MAKEFLAGS="", **environ)
    assert failed.returncode != 0
    assert message in failed.stderr
