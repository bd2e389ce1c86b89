"""How many threads a process uses where nobody asks: environment, affinity, cgroup quota."""

import os

import pytest
from processes import run_python

from bnfast import _threads


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, (3, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "4,2,1"}, (4, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": " 2 "}, (2, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "-2"}, None),
        ({"OMP_NUM_THREADS": ""}, None),
        ({"OMP_NUM_THREADS": "99999"}, (1024, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "9" * 5000}, None),  # more digits than Python converts to a number
        ({"BNFAST_NUM_THREADS": "6", "OMP_NUM_THREADS": "3"}, (6, "BNFAST_NUM_THREADS")),
        ({"BNFAST_NUM_THREADS": "", "OMP_NUM_THREADS": "3"}, (3, "OMP_NUM_THREADS")),
    ],
)
def test_environment(environ, expected):
    assert _threads._from_environment(environ) == expected


@pytest.mark.parametrize("value", ["many", "0", "-1", "2.5", "2,1", "1025", "9" * 5000, "\u0663"])
def test_bad_environment_variable_is_import_error(value):
    with pytest.raises(ImportError, match=rf"BNFAST_NUM_THREADS is '?{value[:50]}.*; expected"):
        _threads._from_environment({"BNFAST_NUM_THREADS": value})


def test_the_environment_counts_at_import():
    code = "import bnfast; print(bnfast.get_num_threads())"
    assert run_python(code, BNFAST_NUM_THREADS="3").stdout == "3\n"
    failed = run_python(code, BNFAST_NUM_THREADS="three")
    assert failed.returncode == 1
    assert "ImportError: BNFAST_NUM_THREADS is 'three'" in failed.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity cannot be set here")
def test_affinity_limits_the_default():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import bnfast; print(bnfast.get_num_threads())"
    )
    done = run_python(code, BNFAST_NUM_THREADS=None, OMP_NUM_THREADS=None)
    assert done.stdout == "1\n", done.stderr


def fake_machine(root, groups, **files):
    """Write a tree with `groups` as /proc/self/cgroup and `files` under /sys/fs/cgroup."""
    membership = root / "proc/self/cgroup"
    membership.parent.mkdir(parents=True)
    membership.write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V2 = {"nested": "0::/user.slice/job.scope\n", "namespace": "0::/\n"}
V1 = "5:memory:/docker/1a2b\n4:cpu,cpuacct:/docker/1a2b\n1:name=systemd:/docker/1a2b\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param(V2["namespace"], {"cpu.max": "200000 100000\n"}, 2, id="v2"),
        pytest.param(V2["namespace"], {"cpu.max": "250000 100000\n"}, 3, id="v2 rounds up"),
        pytest.param(V2["namespace"], {"cpu.max": "1000 100000\n"}, 1, id="v2 at least one"),
        pytest.param(V2["namespace"], {"cpu.max": "max 100000\n"}, None, id="v2 no limit"),
        pytest.param(V2["namespace"], {"cpu.max": "12 0\n"}, None, id="v2 no period"),
        pytest.param(V2["namespace"], {"cpu.max": "rubbish"}, None, id="v2 rubbish"),
        pytest.param(V2["namespace"], {}, None, id="v2 no file"),
        pytest.param(
            V2["nested"], {"user.slice/job.scope/cpu.max": "300000 100000"}, 3, id="v2 nested"
        ),
        pytest.param(
            V2["nested"],
            {
                "user.slice/job.scope/cpu.max": "max 100000",
                "user.slice/cpu.max": "150000 100000",
            },
            2,
            id="v2 the group around limits",
        ),
        pytest.param(
            "0::/../../other\n", {"cpu.max": "400000 100000"}, 4, id="v2 outside of the namespace"
        ),
        pytest.param(
            "1:cpu:/a\n0::/\n", {"unified/cpu.max": "200000 100000"}, 2, id="v2 beside v1"
        ),
        pytest.param(
            V1,
            {
                "cpu,cpuacct/docker/1a2b/cpu.cfs_quota_us": "350000\n",
                "cpu,cpuacct/docker/1a2b/cpu.cfs_period_us": "100000\n",
            },
            4,
            id="v1",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            1,
            id="v1 own group mounted as the root",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1 no limit",
        ),
        pytest.param("", {}, None, id="no groups"),
        pytest.param("nonsense\n\n:::\n", {}, None, id="nonsense"),
    ],
)
def test_cgroup_quota(tmp_path, groups, files, cores):
    assert _threads.cgroup_cores(fake_machine(tmp_path, groups, **files)) == cores


def test_cgroup_quota_without_proc(tmp_path):
    assert _threads.cgroup_cores(str(tmp_path)) is None


def test_the_smaller_of_affinity_and_quota(tmp_path, monkeypatch):
    root = fake_machine(tmp_path, V2["namespace"], **{"cpu.max": "200000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert _threads._from_machine(root) == (2, "cgroup CPU quota")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert _threads._from_machine(root) == (1, "cores in this process's affinity")
