"""`freeze` with an example: the frozen model's output is compared with the model's."""

import pytest
import torch
from freeze_cases import SHAPES, Pair
from test_freeze_values import trained
from torch import nn

from bnfast.torch import freeze, report


class Outputs(Pair):
    def forward(self, x, y=None, *, factor=1):
        out = super().forward(x)
        return {"out": [out * factor, (x if y is None else y, "text")], "sum": out.sum((1, 2, 3))}


def test_examples_of_any_form():
    model, x = trained(Outputs()), torch.randn(SHAPES[0])
    for example in (x, (x, x), [x], {"x": x, "factor": 2}):
        assert len(report(freeze(model, example=example)).folded) == 1


def test_an_example_that_differs(monkeypatch):
    from bnfast.torch import folding

    true = folding.affine_of

    def wrong(norm):
        return true(norm)._replace(shift=true(norm).shift + 1e-2)

    monkeypatch.setattr(folding, "affine_of", wrong)
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(
        RuntimeError,
        match=r"frozen model's output differs from the model's by up to 0\.01; expected at most",
    ):
        freeze(model, example=torch.randn(SHAPES[0]))
    assert len(report(freeze(model)).folded) == 1


def test_examples_that_cannot_be_compared():
    class Nothing(Pair):
        def forward(self, x):
            super().forward(x)

    with pytest.raises(ValueError, match="example gives an output without a tensor"):
        freeze(Nothing(), example=torch.randn(SHAPES[0]))
