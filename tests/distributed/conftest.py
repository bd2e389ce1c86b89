"""Fixtures: the rank that fails."""

import pytest


@pytest.fixture
def bad(ranks, at_fault):
    return 0 if at_fault == "first" else len(ranks) - 1
