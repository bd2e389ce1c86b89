"""The documentation's table of bad input, line by line."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases import bits, read_only
from numpy.lib.stride_tricks import as_strided

import bnfast

PAGE = Path(__file__).parents[1] / "docs/guide/bad_input.md"
LINES = re.findall(r"^\| `(.+)` \| `(\w+Error.*)` \|$", PAGE.read_text("utf-8"), re.MULTILINE)


def arguments():
    x = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)
    channels = {name: np.arange(1, 5, dtype=np.float32) for name in "wbmv"}
    return {"x": x, "stats": bnfast.batch_norm_forward(x)[1], **channels}


def test_every_line_of_the_table_is_read():
    table = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(LINES) == len(table) > 50


@pytest.mark.parametrize(("call", "message"), LINES)
@pytest.mark.smoke
def test_whole_message(call, message):
    given = arguments()
    before = {name: bits(a) for name, a in given.items() if isinstance(a, np.ndarray)}
    names = {**vars(bnfast), "np": np, "read_only": read_only, "as_strided": as_strided, **given}
    with pytest.raises((TypeError, ValueError, RuntimeError, MemoryError)) as caught:
        eval(call, names)
    said = str(caught.value)
    assert (f"{caught.typename}: {said}" if said else caught.typename) == message
    assert {name: bits(given[name]) for name in before} == before
