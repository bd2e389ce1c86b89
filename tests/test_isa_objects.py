"""Objects with instructions that not every processor has must export nothing else.

An inline function exported by an AVX2 object may be the copy that the linker keeps, and
start-up code in such an object runs at import. Both give an illegal instruction on an older
processor.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bnfast import _core

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from program import ROOT, WARNINGS, compiled, libraries


def isa_libraries(platform=None):
    if not (ROOT / "setup.py").exists():
        return []
    return [
        (name, facts)
        for name, facts in libraries(platform)
        if any(re.search(r"kernels_\w+\.c$", source) for source in facts["sources"])
    ]


LIBRARIES = isa_libraries()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARIES, reason="no setup.py beside the tests: an installed package"),
    *(
        pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool} on this machine")
        for tool in ("cc", "nm", "readelf")
    ),
]


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def objects_of(tmp_path_factory):
    """Of each library, all compiled at once, with the flags that setup.py gives."""
    folder = tmp_path_factory.mktemp("objects")

    def compile_library(library):
        name, facts = library
        return name, [compiled((ROOT / f, facts["cflags"]), folder) for f in facts["sources"]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(compile_library, LIBRARIES))


@pytest.fixture(params=[name for name, _ in LIBRARIES])
def objects(request, objects_of):
    return objects_of[request.param]


@pytest.mark.parametrize(
    ("platform", "isas", "tables"),
    [
        ("linux-x86_64", {"scalar", "sse2", "avx2", "avx512"}, ["-DBNF_TABLES_X86_64"]),
        ("win-amd64", {"scalar", "sse2", "avx2", "avx512"}, ["-DBNF_TABLES_X86_64"]),
        ("linux-aarch64", {"scalar", "neon"}, ["-DBNF_TABLES_AARCH64"]),
        ("macosx-11.0-arm64", {"scalar", "neon"}, ["-DBNF_TABLES_AARCH64"]),
        ("linux-riscv64", {"scalar"}, []),
        ("linux-i686", {"scalar"}, []),
    ],
)
def test_sets_built_for_each_processor(platform, isas, tables):
    """dispatch.c must be told the same: a missing table is a link error, or is never used."""
    assert {name for name, _ in isa_libraries(platform)} == set(one_for_each_type(isas))
    (driver,) = [facts for name, facts in libraries(platform) if name == "bnfast_driver"]
    assert [flag for flag in driver["cflags"] if flag.startswith("-DBNF_TABLES")] == tables


def one_for_each_type(isas):
    suffixes = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
    return [f"bnfast_{isa}_{suffixes[name]}" for isa in isas for name in _core.TYPE_NAMES]


@pytest.mark.parametrize(
    ("platform", "system"),
    [
        ("linux-x86_64", {"threads_openmp", "caches_linux", "pages_posix"}),
        ("linux-riscv64", {"threads_openmp", "caches_linux", "pages_posix"}),
        ("macosx-11.0-arm64", {"threads_macos", "caches_macos", "pages_posix"}),
        ("macosx-10.13-x86_64", {"threads_macos", "caches_macos", "pages_posix"}),
        ("win-amd64", {"threads_windows", "caches_windows", "pages_windows"}),
        ("win-arm64", {"threads_windows", "caches_windows", "pages_windows"}),
    ],
)
def test_sources_of_each_system(platform, system):
    (driver,) = [facts for name, facts in libraries(platform) if name == "bnfast_driver"]
    named = {Path(source).stem for source in driver["sources"]}
    assert {name for name in named if "_" in name} == system
    assert ("-fopenmp" in driver["cflags"]) == ("threads_openmp" in system)


def test_a_python_for_both_of_apples_processors_builds_for_its_own(monkeypatch):
    monkeypatch.delenv("ARCHFLAGS", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    names = {name for name, _ in isa_libraries("macosx-10.13-universal2")}
    assert names == set(one_for_each_type(["scalar", "neon"]))


@pytest.mark.parametrize("name", [name for name, _ in LIBRARIES])
def test_no_warning(name):
    """Of those that need no optimisation: objects that `make build` made are not made again."""
    facts = dict(LIBRARIES)[name]
    command = ("cc", "-fsyntax-only", *facts["cflags"], *WARNINGS, f"-I{ROOT / 'src'}")
    run(*command, *(ROOT / source for source in facts["sources"]))


def test_one_source_per_library(objects):
    assert len(objects) == 1


def test_the_extension_has_the_table_of_each():
    built = _core.config()["isas_built"]
    assert set(one_for_each_type(built)) == {name for name, _ in LIBRARIES}
    assert "scalar" in built


def test_one_global_symbol_and_no_weak_one(objects):
    for made in objects:
        symbols = [line.split()[-2:] for line in run("nm", "--defined-only", made).splitlines()]
        # Of nm's letters, capitals are global; u (unique), v and w are weak.
        visible = [(kind, name) for kind, name in symbols if kind.isupper() or kind in "uvw"]
        assert len(visible) == 1, visible
        assert visible[0][0] in "RD", f"{visible}: a constant table, of no weak kind"


def test_no_state_and_no_start_up_code(objects):
    for made in objects:
        sections = dict(
            re.findall(
                r"(\.[\w.]+)\s+\w+\s+[0-9a-f]+\s+[0-9a-f]+\s+([0-9a-f]+)",
                run("readelf", "-SW", made),
            )
        )
        assert ".text" in sections
        assert not any(re.match(r"\.(init|ctors|fini|dtors|preinit)", s) for s in sections)
        # A table of pointers is .data.rel.ro in position-independent code; a variable would be
        # .data or .bss.
        for state in (".data", ".bss"):
            assert int(sections.get(state, "0"), 16) == 0


def test_no_undefined_symbol_but_the_c_librarys(objects):
    """An ISA object must not call functions of our other objects."""
    for made in objects:
        wanted = {line.split()[-1] for line in run("nm", "-u", made).splitlines()}
        assert not [name for name in wanted if name.startswith("bnf")]
