"""Print the tables of `paper.py`."""

from __future__ import annotations

import math
from typing import Any


def report(results: dict[str, Any]) -> None:
    """Print what was trained, every table, and what the experiment has shown."""
    images = f"{results['train_images']:,} training and {results['test_images']:,} test images"
    print(f"\n{results['data']}: {images}, {results['split']}")
    print(
        f"{results['steps']:,} steps of {results['batch']} images, tested every {results['every']}"
    )
    _print_grid(results)
    _print_speedup(results)
    _print_inference(results)
    print()
    for text, holds in results["verdicts"].items():
        print(f"  {'yes' if holds else 'NO':5}{text}")


def _count(steps: float) -> str:
    """A number of steps, or a dash if the target was never reached."""
    return f"{steps:,.0f}" if math.isfinite(steps) else "-"


def _change(change: dict[str, float]) -> str:
    """How many answers changed, and how much if any did."""
    largest = f", by up to {change['largest']:.1e}" if change["changed"] else ""
    return f"{change['changed']} of {change['rows']:,}{largest}"


def _print_grid(results: dict[str, Any]) -> None:
    """The whole grid, with each network's best rate marked."""
    print(f"\nTest accuracy (%) at each learning rate, mean of {results['seeds']} seed(s)")
    print("* best rate of the network: the highest accuracy averaged over the run")
    milestone = f"steps to {results['milestone']:.0%}"
    print(f"  {'network':12}{'rate':>8}{'over run':>10}{'best':>8}{'final':>8}{milestone:>14}")
    for row in results["grid"]:
        star = "*" if row is results["best"][row["network"]] else " "
        accuracies = f"{row['mean']:>10.2%}{row['best']:>8.2%}{row['final']:>8.2%}".replace("%", "")
        print(
            f"{star} {row['network']:12}{row['rate']:>8g}{accuracies}{_count(row['milestone']):>14}"
        )


def _print_speedup(results: dict[str, Any]) -> None:
    """The steps to the plain network's best accuracy, and the paper's beside them."""
    line = "  {:30}{:>10}{:>10}{:>12}{:>8}".format
    print("\nSteps to the plain network's best test accuracy, each network at its best rate")
    print(line("", "its best", "plain", "normalized", "ratio"))
    for row in results["speedup"]:
        steps = _count(row["plain"]), _count(row["normalized"])
        print(line(f"seed {row['seed']}", f"{row['target']:.2%}", *steps, f"{row['ratio']:.3f}"))
    for name in ("mean", "median"):
        print(line(name, "", "", "", f"{results[name + '_ratio']:.3f}"))
    slow, fast = (results["best"][name]["milestone"] for name in ("plain", "normalized"))
    ratio = f"{fast / slow:.3f}" if math.isfinite(fast + slow) else "-"
    fixed = f"{results['milestone']:.2%}"
    print(line("a fixed target, mean of seeds", fixed, _count(slow), _count(fast), ratio))
    ratio = f"{results['paper']['ratio']:.3f}"
    print(line("the paper's ImageNet, BN-x5 *", "72.20%", "31.0M", "2.1M", ratio))
    print(
        "* another network and other data: Inception, against itself normalized, with 5 times the"
    )
    print("  learning rate and other changes: the paper's best ('only 7% of the training steps')")


def _print_inference(results: dict[str, Any]) -> None:
    """The results of `inference`."""
    found = results["inference"]
    line = "  {:48}{}".format
    part = found["statistics"]
    print(
        f"\nStatistics for inference, normalized network of seed {results['watched_seed']}: largest"
    )
    print("error of a mean, in standard deviations, and of a variance, relative")
    for title, key in (
        ("population (first layer) against two passes", "population_error"),
        ("moving average against population (all layers)", "moving_average_error"),
    ):
        mean, variance = part[key]
        print(line(title, f"{mean:.1e}, {variance:.1e}"))
    print(line("test accuracy with the population's", f"{part['accuracy_population']:.2%}"))
    print(line("test accuracy with the moving average", f"{part['accuracy_moving_average']:.2%}"))

    part = found["batches"]
    print("\nAnswers that change in any bit with their batch (one by one, in sevens, all at once)")
    for layer, change in enumerate(part["normalization"], 1):
        print(line(f"frozen normalization {layer}, equal inputs", _change(change)))
    print(line("frozen network, each row its own product", _change(part["fixed_product"])))
    print(line("frozen network, BLAS, which rounds by the shape", _change(part["blas_product"])))
    print(line("training mode, in sevens against all at once", _change(part["training_mode"])))

    part = found["folding"]
    print("\nNormalization folded into the linear layers")
    print(line("largest logit", f"{part['largest_logit']:.1f}"))
    print(line("largest difference of a logit", f"{part['largest_difference']:.1e}"))
    print(line("answers changed", part["answers_changed"]))

    print(
        f"\nImages per second, batches of {results['test_images']:,}, one thread"
        " (matrix products and tanh take the time)"
    )
    for name, rate in found["images_per_second"].items():
        print(line(name, f"{rate:,.0f}"))
