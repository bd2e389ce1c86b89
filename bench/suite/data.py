"""Shared by the pytest-benchmark suites: cases, their names, and data, made once for each."""

from __future__ import annotations

from functools import lru_cache

from bench.harness import shapes
from bench.harness.cases import Case, Data

CASES = [(shape, layout) for shape in shapes.ALL for layout in shapes.layouts(shape)]


def label(case: tuple[shapes.Shape, str]) -> str:
    shape, layout = case
    return f"{shapes.label(shape)}-{layout}"


@lru_cache(maxsize=1)  # data of the largest case take 600 MB
def data_of(shape: shapes.Shape, layout: str, variant: str, dtype: str = "float32") -> Data:
    return Data(Case(shape, layout, variant, dtype))
