"""A third-party ResNet trained with and without bnfast; threads; results without copies."""

import copy

import numpy as np
import pytest
import torch

import bnfast
import bnfast.torch
from bnfast import _core

STEPS = 20


def resnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2],
        layer_type="basic", num_labels=5,
    )  # fmt: skip
    return transformers.ResNetForImageClassification(config)


def trained(model):
    """The loss of each step, on the same batches whatever the model."""
    model.train()
    data = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(8, 3, 32, 32, generator=data)
        labels = torch.randint(0, 5, (8,), generator=data)
        optimizer.zero_grad()
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_resnet_trains_alike():
    """Rounding apart, which twenty steps of a rate this low do not blow up: 1e-4 of the loss is a
    hundred times what they were seen to differ by, and a wrong gradient is off by far more."""
    plain = resnet()
    model = bnfast.torch.convert(copy.deepcopy(plain))
    layers = sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    assert len(bnfast.torch.report(model).converted) == layers
    expected = trained(plain)
    _core.reset_dispatches()
    losses = trained(model)
    ran = _core.dispatches()
    for direction in ("forward", "backward"):
        assert sum(n for key, n in ran.items() if key[0] == direction) == STEPS * layers
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    plain.load_state_dict(model.state_dict())


def test_threads_are_pytorchs(monkeypatch):
    """A shape worth several threads is planned for as many as torch.set_num_threads says."""
    seen = []
    limit = bnfast._threads.limit
    monkeypatch.setattr(bnfast._threads, "limit", lambda: seen.append(limit()) or seen[-1])
    layer = bnfast.torch.BatchNorm2d(64)
    x = torch.randn(32, 64, 28, 28)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        layer(x)
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_tensor_is_copied(memory_format):
    """What is allocated, as NumPy tells tracemalloc: one output of x's size forward, one gradient
    backward, and per-channel numbers."""
    import tracemalloc

    layer = bnfast.torch.BatchNorm2d(32)
    x = torch.randn(8, 32, 40, 40).to(memory_format=memory_format).requires_grad_()
    dy = torch.randn(8, 32, 40, 40).to(memory_format=memory_format)
    layer(x).backward(dy)
    nbytes = x.nbytes
    tracemalloc.start()
    try:
        y = layer(x)
        _, forward = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        start, _ = tracemalloc.get_traced_memory()
        y.backward(dy)
        _, backward = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert nbytes <= forward < 1.2 * nbytes
    assert backward - start < 1.2 * nbytes
