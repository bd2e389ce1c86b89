"""``BNFAST_VERBOSE``: what a process prints at exit about the kernels that it ran."""

import pytest
from processes import needs_fork, run_python

from bnfast import _core, _verbose

CALLS = """
import os, sys, numpy as np, bnfast
x = np.ones((4, 3), np.float32)
bnfast.batch_norm_forward(x, activation="relu", residual=x)
bnfast.batch_norm_forward(x, activation="relu", residual=x)
bnfast.moments(np.ones((4, 3, 2)))
"""
FORWARD = ("forward", "float32", "interleaved", _core.isa(), "relu+residual", "2")
MOMENTS = ("moments", "float64", "planar", _core.isa(), "plain", "1")


def printed(code, **environ):
    """Return the fields of the lines that a program printed, by process, and what else it did."""
    done = run_python(code, **{"BNFAST_VERBOSE": "1", "BNFAST_ISA": _core.isa()} | environ)
    assert done.returncode == 0, done.stderr
    lines = {}
    for line in done.stderr.splitlines():
        mark, process, *fields = line.split(",")
        assert mark == "bnfast_verbose"
        lines.setdefault(process, set()).add(tuple(fields))
    lines.pop("process", None)
    return list(lines.values()), done


def test_it_prints_what_ran_and_how_often():
    processes, done = printed(CALLS)
    assert processes == [{FORWARD, MOMENTS}]
    assert done.stderr.splitlines()[0] == _verbose.HEAD
    assert done.stdout == ""


def test_where_nothing_ran_it_says_so():
    assert printed("import bnfast")[1].stderr == _verbose.HEAD + "\n"


@needs_fork
def test_where_nothing_forks():
    code = "import os; del os.fork, os.register_at_fork; import bnfast"
    assert printed(code)[1].stderr == _verbose.HEAD + "\n"


@pytest.mark.parametrize("value", [None, "", "0", " "])
def test_it_is_off_unless_asked(value):
    code = (
        "import atexit, numpy; before = atexit._ncallbacks()\n"
        f"{CALLS}\nprint(atexit._ncallbacks() - before)"
    )
    done = printed(code, BNFAST_VERBOSE=value)[1]
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("value", ["2", "yes", "true", "-1", "01"])
def test_other_values_are_refused(value):
    with pytest.raises(ImportError, match=f"BNFAST_VERBOSE is '{value}'; expected 1 or 0"):
        _verbose._is_asked({"BNFAST_VERBOSE": value})
    done = run_python("import bnfast", BNFAST_VERBOSE=value)
    assert done.returncode == 1
    assert f"ImportError: BNFAST_VERBOSE is '{value}'" in done.stderr


@needs_fork
def test_a_forked_process_prints_its_own_calls_alone():
    code = CALLS + (
        "if os.fork() == 0:\n    bnfast.moments(np.ones((4, 3, 2)))\n    sys.exit()\nos.wait()\n"
    )
    processes, _ = printed(code, PYTHONWARNINGS="ignore")
    assert sorted(processes, key=len) == [{MOMENTS}, {FORWARD, MOMENTS}]


@needs_fork
def test_a_forked_process_without_calls_prints_nothing():
    code = CALLS + "if os.fork() == 0:\n    sys.exit()\nos.wait()\n"
    processes, done = printed(code, PYTHONWARNINGS="ignore")
    assert processes == [{FORWARD, MOMENTS}]
    assert done.stderr.count(_verbose.HEAD) == 1


def test_a_process_without_stderr_ends_in_peace():
    assert printed(CALLS + "sys.stderr = None")[1].stderr == ""
