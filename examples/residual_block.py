"""A residual block with fused calls, forward and backward, compared with separate steps.

y = relu(BN(V relu(BN(W x))) + x), with W and V convolutions of 1 x 1.  The fused
call normalizes, adds the residual and applies relu in one pass over memory. The
unfused version does one step at a time.  Both must agree, also in every gradient.

    python examples/residual_block.py
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

import bnfast

SHAPE = (16, 64, 28, 28)


class Parameters(NamedTuple):
    """The parameters of a block: two convolutions, and gamma and beta for each."""

    conv1: np.ndarray
    gamma1: np.ndarray
    beta1: np.ndarray
    conv2: np.ndarray
    gamma2: np.ndarray
    beta2: np.ndarray


def convolve(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """1 x 1: a matrix product over the channels at every position."""
    return (weight @ x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def convolve_backward(
    weight: np.ndarray, x: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of the input and of the weight."""
    flat_x, flat_dy = (a.reshape(*a.shape[:2], -1) for a in (x, dy))
    return convolve(weight.T, dy), (flat_dy @ flat_x.transpose(0, 2, 1)).sum(axis=0)


def fused(p: Parameters, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """The block in two calls forward and two backward, in addition to the convolutions."""
    h1 = convolve(p.conv1, x)
    z1, stats1 = bnfast.batch_norm_forward(h1, p.gamma1, p.beta1, activation="relu")
    h2 = convolve(p.conv2, z1)
    y, stats2 = bnfast.batch_norm_forward(h2, p.gamma2, p.beta2, residual=x, activation="relu")

    second = bnfast.batch_norm_backward(
        dy, h2, stats2, p.gamma2, p.beta2, residual=x, activation="relu", y=y
    )
    dz1, dconv2 = convolve_backward(p.conv2, z1, second.x)
    first = bnfast.batch_norm_backward(dz1, h1, stats1, p.gamma1, p.beta1, activation="relu")
    dx, dconv1 = convolve_backward(p.conv1, x, first.x)
    gradients = (dconv1, first.weight, first.bias, dconv2, second.weight, second.bias)
    return {"y": y, "x": dx + second.residual, **dict(zip(p._fields, gradients, strict=True))}


def unfused(p: Parameters, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """The block one step at a time: normalize, add, relu, and back."""
    h1 = convolve(p.conv1, x)
    n1, stats1 = bnfast.batch_norm_forward(h1, p.gamma1, p.beta1)
    z1 = np.maximum(n1, 0)
    h2 = convolve(p.conv2, z1)
    n2, stats2 = bnfast.batch_norm_forward(h2, p.gamma2, p.beta2)
    total = n2 + x
    y = np.maximum(total, 0)

    dtotal = dy * (total > 0)
    second = bnfast.batch_norm_backward(dtotal, h2, stats2, p.gamma2, p.beta2)
    dz1, dconv2 = convolve_backward(p.conv2, z1, second.x)
    first = bnfast.batch_norm_backward(dz1 * (n1 > 0), h1, stats1, p.gamma1, p.beta1)
    dx, dconv1 = convolve_backward(p.conv1, x, first.x)
    gradients = (dconv1, first.weight, first.bias, dconv2, second.weight, second.bias)
    return {"y": y, "x": dx + dtotal, **dict(zip(p._fields, gradients, strict=True))}


def main() -> int:
    """Compare output and gradients of both; the exit status says whether they agree."""
    rng = np.random.default_rng(0)
    channels = SHAPE[1]
    # float64: in float32 a sum close to zero may round to either side of relu's kink.
    convolutions = rng.normal(0, channels**-0.5, (2, channels, channels))
    gammas = rng.uniform(0.5, 1.5, (2, channels))
    betas = rng.normal(size=(2, channels))
    p = Parameters(*(a[i] for i in (0, 1) for a in (convolutions, gammas, betas)))
    x, dy = rng.normal(size=(2, *SHAPE))

    one, other = fused(p, x, dy), unfused(p, x, dy)
    print(f"A residual block on {SHAPE}, float64: largest difference of fused from unfused,")
    print("as a part of the largest value\n")
    errors = {}
    for name, value in other.items():
        errors[name] = float(np.max(abs(one[name] - value)) / np.max(abs(value)))
        title = "output" if name == "y" else f"gradient of {name}"
        print(f"  {title:22}{value.shape!s:20}{errors[name]:.1e}")
    # Sums of 12,544 values per channel, in two orders: some tens of float64's 1e-16.
    return 0 if max(errors.values()) < 1e-12 else 1


if __name__ == "__main__":
    sys.exit(main())
