"""PyTorch's objects where NumPy's are expected: errors that say what to do instead."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import bnfast

CONV = nn.Conv2d(3, 3, 1)
LAYER = bnfast.BatchNorm(3).eval()
FREEZE = "a model of PyTorch's is folded by bnfast.torch.freeze"


@pytest.mark.parametrize("fold", [bnfast.fold, bnfast.fold_before])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((CONV, None, nn.BatchNorm2d(3)), "weight is of PyTorch's type Conv2d; expected an array"),
        ((CONV, CONV.bias, LAYER), "weight is of PyTorch's type Conv2d; expected an array"),
        (
            (CONV.weight, CONV.bias, LAYER),
            "weight is of PyTorch's type Parameter; expected an array, as weight.detach()",
        ),
        (
            (CONV.weight.detach(), CONV.bias, LAYER),
            "bias is of PyTorch's type Parameter; expected an array, as bias.detach()",
        ),
        (
            (CONV.weight.detach(), None, nn.BatchNorm2d(3)),
            "bn is of PyTorch's type BatchNorm2d; expected a bnfast.BatchNorm or FrozenBatchNorm",
        ),
    ],
)
def test_fold_names_what_to_pass_and_what_to_call(fold, given, expected):
    with pytest.raises(TypeError) as caught:
        fold(*given)
    assert str(caught.value) == f"{expected} ({FREEZE})"


@pytest.mark.parametrize("fold", [bnfast.fold, bnfast.fold_before])
def test_detached_tensors_fold(fold):
    weight, bias = fold(CONV.weight.detach(), CONV.bias.detach(), LAYER)
    expected = fold(CONV.weight.detach().numpy(), CONV.bias.detach().numpy(), LAYER)
    np.testing.assert_array_equal(weight, expected[0])
    np.testing.assert_array_equal(bias, expected[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"out": torch.ones(2, 3, 4)}, "out is {}; expected a NumPy array"),
        ({"eps": torch.ones(2, 3, 4)}, "eps is {}; expected a number"),
        ({"x": torch.ones(2, 3, 4).requires_grad_()}, "x is {}, which NumPy cannot read as an"),
        ({"activation": torch.ones(2, 3, 4)}, "activation is {}; expected None, 'relu'"),
    ],
)
def test_a_tensor_is_named_by_type_and_shape(options, expected):
    named = re.escape(expected.format("an object of type Tensor and shape (2, 3, 4)"))
    with pytest.raises(TypeError, match=named) as caught:
        bnfast.batch_norm_forward(**{"x": np.ones((2, 3, 4), np.float32), **options})
    assert "\n" not in str(caught.value)
