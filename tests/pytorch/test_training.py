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
    """Return the loss of each step; the batches are the same for every model."""
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


def test_resnet_trains_as_pytorch():
    """Equal except for rounding, which twenty steps at a rate this low do not amplify: 1e-4 of the
    loss is a hundred times the differences that were seen, and a wrong gradient is off by far
    more.
    """
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_tensor_is_copied(memory_format):
    """Count allocations with PyTorch's profiler: one output of x's size forward, one gradient
    backward, and per-channel numbers.
    """
    layer = bnfast.torch.BatchNorm2d(32)
    x = torch.randn(8, 32, 40, 40).to(memory_format=memory_format).requires_grad_()
    dy = torch.randn(8, 32, 40, 40).to(memory_format=memory_format)
    with torch.profiler.profile(profile_memory=True) as recording:
        layer(x).backward(dy)
    events = [e for e in recording.events() if e.name == "[memory]"]
    allocated = sum(max(e.cpu_memory_usage, e.self_cpu_memory_usage, 0) for e in events)
    found = {e.key: e.cpu_memory_usage for e in recording.key_averages()}
    assert x.nbytes <= found["aten::native_batch_norm"] < 1.2 * x.nbytes, allocated
    assert x.nbytes <= found["aten::native_batch_norm_backward"] < 1.2 * x.nbytes
