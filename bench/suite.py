"""What the pytest-benchmark suites share: cases, their names, and data made once for each."""

from __future__ import annotations

from functools import lru_cache

import shapes
from cases import Case, Data

CASES = [(shape, layout) for shape in shapes.ALL for layout in shapes.layouts(shape)]


def label(case: tuple[shapes.Shape, str]) -> str:
    shape, layout = case
    return f"{shapes.label(shape)}-{layout}"


@lru_cache(maxsize=1)  # the largest take 600 MB
def data_of(shape: shapes.Shape, layout: str, variant: str, dtype: str = "float32") -> Data:
    return Data(Case(shape, layout, variant, dtype))
