"""Results have the strides that PyTorch's own layer gives for the same input."""

import pytest
import torch
from layers import CLASSES, channels_last, gappy, ours_like

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
SHAPES = {2: (4, 6), 3: (4, 6, 10), 4: (4, 6, 3, 5), 5: (4, 6, 2, 3, 5)}


def lying_as(*order):
    """A dense tensor whose axes are in memory in this order, the first with the largest stride."""
    shape = SHAPES[len(order)]
    x = torch.randn([shape[axis] for axis in order])
    return x.permute([order.index(axis) for axis in range(len(order))])


def check_strides(x, training):
    theirs = CLASSES[x.dim()][0](x.shape[1]).train(training)
    y, want = ours_like(theirs)(x), theirs(x)
    torch.testing.assert_close(y, want)
    assert y.stride() == want.stride()


INPUTS = {
    "(N, C)": torch.randn(4, 6),
    "(N, C) with gaps": gappy(torch.randn(4, 6)),
    "(N, C) of one row repeated": torch.randn(4, 1).expand(4, 6),
    "(N, C, L)": torch.randn(4, 6, 10),
    "NCHW": torch.randn(4, 6, 3, 5),
    "NCHW with gaps": gappy(torch.randn(4, 6, 3, 5)),
    "NHWC": channels_last(torch.randn(4, 6, 3, 5)),
    "NHWC with gaps": torch.randn(4, 3, 5, 12)[..., ::2].permute(0, 3, 1, 2),
    "one channel of several": torch.randn(4, 6, 3, 5)[:, :1],
    "NCDHW": torch.randn(4, 6, 2, 3, 5),
    "NDHWC": channels_last(torch.randn(4, 6, 2, 3, 5)),
}


@TRAINING
@pytest.mark.parametrize("name", INPUTS)
def test_of_usual_inputs(name, training):
    check_strides(INPUTS[name], training)


# Dense inputs in a memory order that PyTorch's layers do not keep.
REORDERED = {
    "(N, C).t()": lying_as(1, 0),
    "NLC": lying_as(0, 2, 1),
    "LNC": lying_as(2, 0, 1),
    "CNL": lying_as(1, 0, 2),
    "NLC of length 1": torch.randn(4, 1, 6).transpose(1, 2),
    "NCWH": lying_as(0, 1, 3, 2),
    "CNHW": lying_as(1, 0, 2, 3),
    "NWHC": lying_as(0, 3, 2, 1),
    "HWNC": lying_as(2, 3, 0, 1),
    "WHCN": lying_as(3, 2, 1, 0),
    "NHWC of size 1": torch.randn(4, 1, 1, 6).permute(0, 3, 1, 2),
    "NCDWH": lying_as(0, 1, 2, 4, 3),
    "CNDHW": lying_as(1, 0, 2, 3, 4),
    "NWHDC": lying_as(0, 4, 3, 2, 1),
}


@TRAINING
@pytest.mark.parametrize("name", REORDERED)
def test_of_reordered_inputs(name, training):
    check_strides(REORDERED[name], training)


@TRAINING
def test_result_can_be_viewed_as_pytorch_result(training):
    theirs = torch.nn.BatchNorm1d(6).train(training)
    x = lying_as(0, 2, 1)
    want = theirs(x).view(4, -1)
    torch.testing.assert_close(ours_like(theirs)(x).view(4, -1), want)
