"""Padded sequences: what padding does to batch normalization, and how a mask keeps it out.

Utterances of different lengths are padded to the same length. Without a mask the padding is a part
of the batch: the frames of an utterance get other values, and other gradients, for each length that
their batch is padded to. With a mask only frames count, whatever the padding holds.

    python examples/padded_sequences.py
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

import bnfast

CHANNELS = 40
LENGTHS = (310, 95, 180, 240, 60, 400, 130, 205)
PADDED = (400, 500, 800, 1600)
EPS = 1e-5


def utterance(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Return log energies, (CHANNELS, frames): louder and softer, less energy in high channels."""
    t = np.arange(frames) / 100  # seconds
    loudness = 2 * np.sin(2 * np.pi * (rng.uniform(1, 3) * t + rng.uniform()))
    tilt = np.linspace(-4, -9, CHANNELS)[:, None]
    return (tilt + loudness + rng.normal(size=(CHANNELS, frames))).astype(np.float32)


def padded(sequences: list[np.ndarray], size: int, filling: float = 0) -> np.ndarray:
    """Return the batch, (N, CHANNELS, size)."""
    x = np.full((len(sequences), CHANNELS, size), filling, np.float32)
    for row, sequence in zip(x, sequences, strict=True):
        row[:, : sequence.shape[1]] = sequence
    return x


def frames_of(batch: np.ndarray) -> np.ndarray:
    """Return the frames of a padded batch one after another: (CHANNELS, frames)."""
    rows = zip(batch, LENGTHS, strict=True)
    return np.concatenate([row[:, :length] for row, length in rows], axis=1)


class Step(NamedTuple):
    """A training step: outputs and gradients of the frames, and the mean of the batch."""

    output: np.ndarray
    gradient: np.ndarray
    mean: np.ndarray


def frames_alone(x: np.ndarray, dy: np.ndarray) -> Step:
    """The right answer: the formulas on the frames, in float64."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    mean = x.mean(axis=1, keepdims=True)
    inv_std = 1 / np.sqrt(x.var(axis=1, keepdims=True) + EPS)
    y = (x - mean) * inv_std
    through = dy.mean(axis=1, keepdims=True) + y * (dy * y).mean(axis=1, keepdims=True)
    return Step(y, inv_std * (dy - through), mean[:, 0])


def step(x: np.ndarray, dy: np.ndarray, mask: np.ndarray | None) -> Step:
    """One step of a layer; the running mean is then that of this batch."""
    layer = bnfast.BatchNorm1d(CHANNELS, eps=EPS, momentum=1.0)
    y = layer(x, mask=mask)
    dx = layer.backward(dy)
    return Step(frames_of(y), frames_of(dx), layer.running_mean)


def errors(found: Step, right: Step) -> list[float]:
    """Return the largest error of each, as a part of the largest right value."""
    pairs = zip(found, right, strict=True)
    return [float(np.max(abs(a - b)) / np.max(abs(b))) for a, b in pairs]


def main() -> int:
    """Print the errors with and without a mask; the exit status says whether the mask helped."""
    rng = np.random.default_rng(0)
    sequences = [utterance(frames, rng) for frames in LENGTHS]
    gradients = [rng.normal(size=sequence.shape) for sequence in sequences]
    right = frames_alone(*(np.concatenate(parts, axis=1) for parts in (sequences, gradients)))

    frames = f"{min(LENGTHS)} to {max(LENGTHS)} frames"
    print(
        f"{len(LENGTHS)} utterances of {frames}, {CHANNELS} channels. Largest errors of the frames'"
    )
    print("outputs and gradients, and of the mean, relative to the largest value:\n")
    three = f"{'output':>10}{'gradient':>10}{'mean':>10}"
    print(f"{'':24}{'without a mask':>30}{'with a mask':>30}")
    print(f"{'padded to':>12}{'padding':>12}{three}{three}")
    plain, masked = [], []
    for size, filling in [*((size, 0.0) for size in PADDED), (PADDED[0], np.nan)]:
        x, dy = padded(sequences, size, filling), padded(gradients, size)
        mask = bnfast.lengths_mask(LENGTHS, size)
        plain.append(errors(step(x, dy, None), right))
        masked.append(errors(step(x, dy, mask), right))
        share = "NaN" if np.isnan(filling) else f"{1 - mask.mean():.0%} zeros"
        cells = "".join(f"{error:>10.1e}" for error in (*plain[-1], *masked[-1]))
        print(f"{size:>12}{share:>12}{cells}")

    # Each of the few roundings of float32 is of a relative 6e-8.
    is_right = np.max(masked) < 1e-6
    return 0 if is_right and np.nanmin(plain) > 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
