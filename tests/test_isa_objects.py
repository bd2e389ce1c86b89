"""Objects with instructions that not every processor has must export nothing else.

An inline function exported by an AVX2 object may be the copy that the linker keeps, and
start-up code in such an object runs at import. Both give an illegal instruction on an older
processor.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bnfast import _core

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from program import ROOT, WARNINGS, libraries


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


def compile_library(name, facts, folder):
    """Compile one library's sources, with the flags that setup.py gives."""
    made = []
    for source in facts["sources"]:
        target = folder / Path(source).with_suffix(".o").name
        includes = [f"-I{ROOT / d}" for d in facts.get("include_dirs", [])]
        flags = [*facts.get("cflags", []), *WARNINGS, *includes]
        run("cc", "-c", "-fPIC", *flags, str(ROOT / source), "-o", str(target))
        made.append(target)
    return made


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All libraries at once: these sources have many loops, and compile slowly."""
    folders = [tmp_path_factory.mktemp(name) for name, _ in LIBRARIES]
    with ThreadPoolExecutor() as pool:
        made = pool.map(compile_library, *zip(*LIBRARIES, strict=True), folders)
        return dict(zip((name for name, _ in LIBRARIES), made, strict=True))


@pytest.fixture(params=[name for name, _ in LIBRARIES])
def objects(request, compiled):
    return compiled[request.param]


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
    assert {name for name, _ in isa_libraries(platform)} == {f"bnfast_{isa}" for isa in isas}
    (driver,) = [facts for name, facts in libraries(platform) if name == "bnfast_driver"]
    assert [flag for flag in driver["cflags"] if flag.startswith("-DBNF_TABLES")] == tables


def test_one_source_per_library(objects):
    assert len(objects) == 1


def test_the_extension_has_the_table_of_each():
    built = {f"bnfast_{isa}" for isa in _core.config()["isas_built"]}
    assert built == {name for name, _ in LIBRARIES}
    assert "bnfast_scalar" in built


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
