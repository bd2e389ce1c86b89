"""`show_config` and ``python -m bnfast``: the same facts, printed, returned and as JSON."""

import json
import subprocess
import sys

import pytest

import bnfast
from bnfast import _core


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
    assert threads == {"number": 3, "source": "asked for in this thread"}


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
