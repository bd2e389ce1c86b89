"""tools/wheels.py and tools/repair_wheel.py: which Python gets which wheel."""

import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "tools" / "wheels.py").exists():
    pytest.skip("not run from a source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(ROOT / "tools"))
    import repair_wheel
    import wheels

    sys.path.remove(str(ROOT / "tools"))
    return wheels, repair_wheel


def test_a_tag_says_the_version_and_whether_there_is_a_gil(tools):
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    free = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    assert tools[0].tag_of(sys.executable) == f"{python}-{python}{free}"
    assert tools[0].tag_of("/nonexistent/python3") is None


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["cp310-cp310", "cp39-cp39"], []),
        (["cp314-cp314t"], []),
        (["cp310-cp310", "cp312-cp312"], ["cp312-cp312"]),
        (
            ["cp313-cp313", "cp311-cp311", "cp315-cp315t", "cp314-cp314"],
            ["cp311-cp311", "cp314-cp314"],
        ),
    ],
)
def test_the_stable_abi_is_tried_on_the_oldest_and_the_newest_python(tools, tags, expected):
    assert tools[0].abi3_pythons({tag: tag for tag in tags}) == expected


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bnfast-1-cp311-cp311-manylinux_2_17_x86_64.whl", None),
        ("bnfast-1-cp311-abi3-musllinux_1_2_aarch64.whl", None),
        ("bnfast-1-cp311-cp311-linux_x86_64.whl", "neither a manylinux nor a musllinux wheel"),
    ],
)
def test_a_wheel_for_this_machine_alone_is_refused(tools, tmp_path, name, problem):
    wheel = tmp_path / name
    wheel.write_bytes(b"x")
    assert tools[1].problem_of(wheel) == problem


def test_the_oldest_python_of_the_stable_abi_is_said_once_more(tools):
    """setup.py names the wheel, and tools/wheels.py looks for it."""
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert f"ABI3_OLDEST = (3, {tools[0].ABI3_OLDEST})\n" in setup
