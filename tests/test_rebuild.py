"""What setup.py compiles again after an edit, and that variants do not meet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from program import ROOT, setup

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no cc on this machine"),
]


class Compiler:
    """What setup.py asks of setuptools' compiler, over cc."""

    compiler_type, compiler_so, include_dirs = "unix", ("cc",), ()

    def __init__(self):
        self.compiled = []

    def object_filenames(self, sources, output_dir):
        return [str(Path(output_dir, Path(source).stem + ".o")) for source in sources]

    def compile(self, sources, output_dir, extra_postargs):
        (source,) = sources
        (target,) = self.object_filenames(sources, output_dir)
        subprocess.run(["cc", "-c", source, "-o", target, *extra_postargs], check=True)
        self.compiled.append(Path(source).name)


@pytest.fixture
def build(tmp_path):
    """Compile a.c, which includes one header by way of another, and b.c; tell which it was."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "a.c").write_text('#include "outer.h"\nint a = N;\n')
    (folder / "b.c").write_text("int b;\n")
    (folder / "outer.h").write_text('#include "inner.h"\n')
    (folder / "inner.h").write_text("#define N 1\n")
    names = setup()

    def run(flags=()):
        compiler = Compiler()
        options = names["options_of"](compiler, flags)
        units = [(str(folder / name), str(folder), options) for name in ("a.c", "b.c")]
        names["compile_outdated"](compiler, units)
        return sorted(compiler.compiled)

    run.folder = folder
    assert run() == ["a.c", "b.c"]
    return run


def edit(path):
    """Give a file a later time than everything has, without waiting for the clock."""
    later = path.stat().st_mtime + 10
    os.utime(path, (later, later))


def test_nothing_is_compiled_twice(build):
    assert build() == []


@pytest.mark.parametrize(
    ("file", "again"),
    [("b.c", ["b.c"]), ("a.c", ["a.c"]), ("outer.h", ["a.c"]), ("inner.h", ["a.c"])],
)
def test_an_edit_compiles_what_includes_the_file(build, file, again):
    edit(build.folder / file)
    assert build() == again


def test_other_flags_compile_everything(build):
    assert build(["-O1"]) == ["a.c", "b.c"]
    assert build(["-O1"]) == []
    assert build() == ["a.c", "b.c"]


@pytest.mark.parametrize("lost", ["a.o", "a.d", "a.command"])
def test_what_is_lost_is_made_again(build, lost):
    (build.folder / lost).unlink()
    assert build() == ["a.c"]


def test_a_header_that_is_no_more_is_asked_for_again(build):
    (build.folder / "inner.h").unlink()
    (build.folder / "outer.h").write_text("#define N 2\n")
    assert build() == ["a.c"]
    assert build() == []


def test_what_failed_is_tried_again(build):
    source = build.folder / "a.c"
    source.write_text("no C")
    edit(source)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            build()


def test_an_edit_during_a_compilation_is_not_lost(build, monkeypatch):
    compile_it = Compiler.compile

    def compile_and_edit(self, sources, output_dir, extra_postargs):
        compile_it(self, sources, output_dir, extra_postargs)
        (object_file,) = self.object_filenames(sources, output_dir)
        (build.folder / "b.c").write_text("int edited;\n")
        edit(Path(object_file))  # which is finished after the edit

    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "compile", compile_and_edit)
        (build.folder / "b.o").unlink()
        assert build() == ["b.c"]
    assert build() == ["b.c"]


class Archiver:
    """What setup.py asks of setuptools' compiler for a static library."""

    def library_filename(self, name):
        return f"lib{name}.a"

    def create_static_lib(self, objects, name, output_dir):
        library = Path(output_dir, self.library_filename(name))
        subprocess.run(["ar", "rcs", library, *objects], check=True)


def test_a_library_has_no_objects_of_sources_that_are_no_more(build):
    create_library, folder = setup()["create_library"], str(build.folder)
    for name in ("a", "b"):
        create_library(Archiver(), folder, "some", [f"{folder}/{name}.o"])
    library = build.folder / "libsome.a"
    listed = subprocess.run(["ar", "t", library], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == ["b.o"]


VARIANTS = (
    {},
    {"BNFAST_DEBUG": "1"},
    {"BNFAST_COVERAGE": "1"},
    {"BNFAST_SANITIZE": "address,undefined"},
    {"BNFAST_SANITIZE": "thread"},
    {"BNFAST_SANITIZE": "address,undefined", "BNFAST_DEBUG": "1"},
)


def test_each_variant_has_a_folder_of_its_own(monkeypatch):
    for name in ("BNFAST_DEBUG", "BNFAST_COVERAGE", "BNFAST_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    folders = {setup(**variant)["OBJECTS"] for variant in VARIANTS}
    assert len(folders) == len(VARIANTS)
    names = setup(BNFAST_DEBUG="1")
    assert Path(names["BUILD"]) == Path("build/debug")
    assert {"-Og", "-g", "-UNDEBUG"} <= set(dict(names["LIBRARIES"])["bnfast_scalar_f32"]["cflags"])
    assert Path(setup(BNFAST_SANITIZE="address,undefined")["BUILD"]).name == "address-undefined"
