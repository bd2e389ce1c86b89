"""Run a page's blocks from top to bottom, as one program: `python follow.py page.md`.

In the folder of the files that the page reads. Writes `followed.pickle`: for each block the reason
why it could not run here, and otherwise the layers and arrays that there were after it.
"""

import importlib.util
import pickle
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pages import blocks

from bnfast import BatchNorm


def missing(block):
    """Return why a block cannot run here, or None."""
    for package in block.needs:
        if importlib.util.find_spec(package) is None:
            return f"needs {package}"
    for file in re.findall(r'"(model\.\w+)"', block.code):
        if not Path(file).exists():
            return f"needs {file}, and what writes it"
    return None


def is_kept(value):
    if isinstance(value, dict):
        return bool(value) and all(isinstance(v, BatchNorm) for v in value.values())
    return isinstance(value, BatchNorm | np.ndarray)


def follow(page):
    scope, outcomes, without = {"__name__": "__main__"}, [], {}
    for block in blocks(page.read_text(encoding="utf-8")):
        # A block may go on with what the last one of its package read.
        reason = without.get(block.needs) or missing(block)
        if reason is not None:
            without[block.needs] = reason
        else:
            exec(compile(block.code, f"{page}:{block.line}", "exec"), scope)
        kept = {name: value for name, value in scope.items() if is_kept(value)}
        outcomes.append((reason, pickle.dumps(kept)))  # as they are now: later blocks go on
    return outcomes


if __name__ == "__main__":
    Path("followed.pickle").write_bytes(pickle.dumps(follow(Path(sys.argv[1]))))
