"""A small ResNet on scikit-learn's digits in PyTorch, trained on bnfast, then folded.

    python examples/torch_resnet.py [--epochs 15]

It is trained and converted with one line. A copy is trained on bnfast from the same start, and the
two are compared. Then each batch norm of the trained network is folded into the convolution before
it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time

import torch
from digits import load_data
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnfast.torch

SEED = 0
RATE = 0.01
BATCH = 64


class Block(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + x)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32), Block(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def images(flat: Tensor) -> Tensor:
    return flat.float().reshape(-1, 1, 8, 8)


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int) -> list[float]:
    """Return the loss of each step; the batches are the same for every model."""
    order = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return (model.eval()(x).argmax(1) == labels).float().mean().item()


def folded(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its batch norms folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    for parent in model.modules():
        names = list(dict(parent.named_children()))
        for first, second in itertools.pairwise(names):
            conv, norm = getattr(parent, first), getattr(parent, second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs
    data = load_data()
    x, test = images(torch.from_numpy(data.train)), images(torch.from_numpy(data.test))
    labels, test_labels = torch.from_numpy(data.train_labels), torch.from_numpy(data.test_labels)

    plain = network()
    ours = bnfast.torch.convert(copy.deepcopy(plain))
    print(bnfast.torch.report(ours))
    losses = {}
    for name, model in (("PyTorch", plain), ("bnfast", ours)):
        start = time.perf_counter()
        losses[name] = train(model, x, labels, epochs)
        print(
            f"{name}: {len(losses[name])} steps in {time.perf_counter() - start:.1f} s, last loss "
            f"{losses[name][-1]:.4f}, test accuracy {100 * accuracy(model, test, test_labels):.1f}%"
        )
    first = max(abs(a - b) for a, b in list(zip(*losses.values(), strict=True))[:10])
    print(f"losses of the first ten steps differ by {first:.1e} at most")

    without = folded(bnfast.torch.revert(copy.deepcopy(ours)))
    with torch.no_grad():
        apart = (without(test) - ours.eval()(test)).abs().max().item()
    left = sum(isinstance(m, nn.BatchNorm2d) for m in without.modules())
    print(f"folded: {left} batch norms left, logits differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
