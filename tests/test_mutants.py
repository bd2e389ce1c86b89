"""The list of mutants names code that is there: `make mutants` itself takes hours."""

from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "src").exists(), reason="no sources beside the tests")


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m[0]}: {m[1]}"[:60])
def test_each_formula_is_there_once(mutant):
    file, text, broken = mutant
    assert (ROOT / file).read_text("utf-8").count(text) == 1
    assert text != broken
