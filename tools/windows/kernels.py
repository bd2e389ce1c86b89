"""The C programs of tests/kernels, there and here, with the same bytes.

That the answers of this system are right is for the tests that run here to say.
"""

import shutil
import sys
from pathlib import Path

import wine
from compiler import COMPILER
from package import OBJECTS, PLATFORM
from steps import BUILD, ROOT, run

sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]
import program  # noqa: E402

FOLDER = BUILD / "kernels"


def link(compiler, facts, folder, target):
    """Link the program of this name with the libraries that setup.py has built."""
    names = [name for name, _ in facts["LIBRARIES"]]
    objects = [folder / f"lib{name}.a" for name in (*names, names[0])]
    missing = [str(file) for file in objects if not file.exists()]
    if missing:
        sys.exit(f"{missing[0]} is missing: `make build` first")
    source = program.HERE / f"{target.stem}.c"
    flags = ("-std=gnu11", "-O2", *program.WARNINGS, f"-I{ROOT / 'src'}", *facts["OPENMP"])
    run(*compiler, *flags, source, *objects, "-lm", "-lpthread", "-o", target)


def link_both(name):
    """Return a program for this system and for Windows."""
    here, there = FOLDER / name, FOLDER / f"{name}.exe"
    facts = program.setup()
    link(["cc"], facts, ROOT / facts["OBJECTS"], here)
    link(COMPILER, program.setup(PLATFORM), OBJECTS, there)
    return here, wine.path(there)


def check():
    """Exit unless all sets of this processor give the same bytes there as here."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    check_kernels()
    check_calls()


def check_kernels():
    here, there = link_both("run_cases")
    cases = program.make_cases()
    program.write(cases, FOLDER / "cases")
    sets = run(here).split()
    listed = wine.output_of(there).split()
    if listed != sets:
        sys.exit(f"Windows' program runs {listed} and this system's {sets}")
    for isa in sets:
        run(here, isa, FOLDER / "cases", FOLDER / f"{isa}.here")
        files = (wine.path(FOLDER / "cases"), wine.path(FOLDER / f"{isa}.there"))
        wine.output_of(there, isa, *files)
        if not same_bytes(FOLDER / f"{isa}.here", FOLDER / f"{isa}.there"):
            sys.exit(f"{isa}: the kernels' answers differ from this system's: {FOLDER}")
        print(f"{isa}: {len(cases)} cases of the kernels, the same bytes as here", flush=True)


def check_calls():
    """Whole calls on several threads, each in ways that must not change a bit."""
    here, there = link_both("run_calls")
    for isa in run(here).split():
        if wine.output_of(there, isa) != run(here, isa):
            sys.exit(f"{isa}: whole calls differ from this system's")
        print(f"{isa}: whole calls on threads, the same bits as here", flush=True)


def same_bytes(one: Path, other: Path):
    return one.read_bytes() == other.read_bytes()
