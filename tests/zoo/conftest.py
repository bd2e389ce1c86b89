"""Tests over the model libraries' architectures: left out unless all of them are installed.

`make test-zoo` installs them into an environment of their own.
"""

import importlib.util

import vision

if importlib.util.find_spec("torch") is None or vision.missing():
    collect_ignore_glob = ["*.py"]
else:
    vision.stay_offline()
    vision.define_missing_operators()
