"""Fixtures: every instruction set of this machine, one after the other; counts and defaults."""

import os

import hypothesis
import numpy as np
import pytest

from bnfast import _core, _threads


def pytest_addoption(parser):
    parser.addoption(
        "--matrix", metavar="FILE", help="write to FILE how many tests ran each kernel"
    )


def pytest_configure(config):
    if config.getoption("matrix"):
        from matrix import Matrix

        config.pluginmanager.register(Matrix(config.getoption("matrix")))


def only_smoke(config):
    return config.option.markexpr == "smoke"


def pytest_ignore_collect(collection_path, config):
    """Read no file without a smoke test: to collect all takes longer than the smoke tests do."""
    if not only_smoke(config):
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any(b"@pytest.mark.smoke" in file.read_bytes() for file in files) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a smoke test run float32 on the instruction set in use, and no other instance."""
    if only_smoke(config):
        config.hook.pytest_deselected(items=[item for item in items if not is_smoke(item)])
        items[:] = [item for item in items if is_smoke(item)]


def is_smoke(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    one = {"isa": _core.isa(), "dtype": np.dtype(np.float32)}
    return all(parameters.get(name, value) == value for name, value in one.items())


# A test must not depend on timing, so there is no deadline. Examples are the same every time
# unless the long search is requested.
hypothesis.settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=_core.isas())
def isa(request):
    """Run the test on each instruction set of this processor."""
    active = _core.isa()
    _core.set_isa(request.param)
    assert _core.isa() == request.param
    yield request.param
    _core.set_isa(active)


@pytest.fixture
def rng():
    return np.random.default_rng(1502_03167)


@pytest.fixture
def dispatches():
    """A function that returns which kernels ran since its last call."""
    _core.reset_dispatches()

    def since_last():
        counts = _core.dispatches()
        _core.reset_dispatches()
        return counts

    return since_last


@pytest.fixture
def own_default(monkeypatch):
    """Give a test a process default of its own, and no number asked for in this thread."""
    monkeypatch.setattr(_threads, "_default", (5, "a test"))
    token = _threads._asked_here.set(None)
    yield
    _threads._asked_here.reset(token)
