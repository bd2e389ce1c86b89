"""Tests over the model libraries' architectures: skipped unless all of them are installed.

`make test-zoo` installs them into a separate environment.
"""

import importlib.util

import pytest
import vision

if importlib.util.find_spec("torch") is None or vision.missing():
    collect_ignore_glob = ["*.py"]
else:
    vision.stay_offline()
    vision.define_missing_operators()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """For images this small, waiting for a second thread takes longer than its work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
