"""`show_config` and ``python -m bnfast``: the same facts, printed, returned and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

import bnfast
from bnfast import _config, _core

THREADS_OF = {"win32": "Windows thread pool", "darwin": "Grand Central Dispatch"}.get(
    sys.platform, "OpenMP"
)

pytestmark = pytest.mark.usefixtures("own_default")


def program(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bnfast", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_dicts_are_returned_and_nothing_is_printed(capsys):
    config = bnfast.show_config(mode="dicts")
    assert capsys.readouterr() == ("", "")
    assert config["bnfast"] == bnfast.__version__
    assert config["kernels"]["used"] == _core.isa()
    assert config["kernels"]["runnable"] == list(_core.isas())
    assert config["kept_memory"]["bytes"] == _core.kept_memory()[0]
    with bnfast.num_threads(3):
        threads = bnfast.show_config("dicts")["threads"]
    assert threads == {"number": 3, "source": "asked for in this thread", "of": THREADS_OF}


def test_a_caller_may_change_what_is_returned():
    config = bnfast.show_config(mode="dicts")
    config["caches"]["l2"] = -1
    config["kernels"]["runnable"].clear()
    assert bnfast.show_config(mode="dicts")["caches"]["l2"] >= 0
    assert bnfast.show_config(mode="dicts")["kernels"]["runnable"]


def test_stdout_is_the_default_and_returns_nothing(capsys):
    assert bnfast.show_config() is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"bnfast          {bnfast.__version__}\n")
    assert bnfast.show_config(mode="stdout") is None
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("mode", "error"), [("json", ValueError), (None, TypeError)])
def test_another_mode_is_refused(mode, error, capsys):
    with pytest.raises(error, match=f"mode is {mode!r}; expected 'stdout' or 'dicts'"):
        bnfast.show_config(mode)
    assert capsys.readouterr() == ("", "")


def test_the_program_prints_the_configuration(capsys):
    done = program()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"bnfast          {bnfast.__version__}\n")


def test_the_program_prints_json():
    done = program("--json")
    assert (done.returncode, done.stderr) == (0, "")
    config, here = json.loads(done.stdout), bnfast.show_config(mode="dicts")
    assert config.keys() == here.keys()
    for key in ("bnfast", "python", "numpy", "compiler", "caches"):
        assert config[key] == here[key]


def test_the_program_tells_its_version_and_its_arguments():
    assert program("--version").stdout == f"bnfast {bnfast.__version__}\n"
    assert "--json" in program("--help").stdout


@pytest.mark.parametrize("argument", ["--yaml", "--js", "x"])
def test_the_program_refuses_other_arguments(argument):
    done = program(argument)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"unrecognized arguments: {argument}" in done.stderr


def test_show_config_says_what_a_bug_report_needs(capsys):
    with bnfast.num_threads(3):
        bnfast.show_config()
    lines = capsys.readouterr().out.splitlines()
    shown = {line[:16].strip(): line[16:] for line in lines}
    assert shown["bnfast"] == bnfast.__version__
    assert np.__version__ in shown["numpy"]
    assert shown["kernels"].split()[0] in shown["runnable here"].split(", ")
    assert set(shown["runnable here"].split(", ")) <= set(shown["built"].split(", "))
    assert shown["threads"] == f"3 (asked for in this thread), {THREADS_OF}"
    assert shown["caches"].startswith("L1d ")
    if THREADS_OF != "OpenMP":
        assert shown["OpenMP"] == "not used"
    elif Path("/proc/self/maps").exists():
        assert "omp" in shown["OpenMP"]


def test_threads_are_explained(capsys):
    bnfast.show_config()
    assert "5 (a test)" in capsys.readouterr().out
    bnfast.set_num_threads(2)
    bnfast.show_config()
    assert "2 (set_num_threads)" in capsys.readouterr().out


def test_openmp_runtimes_are_found_in_the_map(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fd:01 12  /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f01-7f02 r--p 00001000 fd:01 12  /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f03-7f04 r-xp 00000000 fd:01 13  /v/scikit_learn.libs/libgomp-a34b3233.so.1.0.0\n"
        "7f05-7f06 r-xp 00000000 fd:01 14  /usr/lib/llvm-14/lib/libomp.so.5\n"
        "7f07-7f08 r-xp 00000000 fd:01 15  /usr/lib/libcompare.so\n"
        "7f09-7f0a rw-p 00000000 00:00 0\n"
    )
    assert _config._openmp_runtimes(str(maps)) == [
        "/usr/lib/llvm-14/lib/libomp.so.5",
        "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
        "/v/scikit_learn.libs/libgomp-a34b3233.so.1.0.0",
    ]
    assert _config._openmp_runtimes(str(tmp_path / "none")) == []


def test_a_bad_isa_names_what_the_processor_has():
    failed = run_python("import bnfast", BNFAST_ISA="mmx")
    assert failed.returncode == 1
    message = failed.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert "mmx" in message
    runnable = run_python(
        "import bnfast; print(*bnfast._core.config()['isas_runnable'])", BNFAST_ISA=None
    )
    for isa in runnable.stdout.split():
        assert isa in message


def test_every_runnable_isa_can_be_pinned():
    from bnfast import _core

    for isa in _core.config()["isas_runnable"]:
        done = run_python("import bnfast; bnfast.show_config()", BNFAST_ISA=isa)
        assert f"{isa} (pinned by BNFAST_ISA)" in done.stdout, done.stderr
