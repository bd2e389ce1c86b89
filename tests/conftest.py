"""Fixtures: every instruction set of this machine, one after the other."""

import os

import hypothesis
import numpy as np
import pytest

from bnfast import _core


def pytest_addoption(parser):
    parser.addoption(
        "--matrix", metavar="FILE", help="write to FILE how many tests ran each kernel"
    )


def pytest_configure(config):
    if config.getoption("matrix"):
        from matrix import Matrix

        config.pluginmanager.register(Matrix(config.getoption("matrix")))


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
