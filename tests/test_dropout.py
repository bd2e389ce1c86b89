"""The example on dropout: the masks, the gradients through them, and how settings are chosen."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = (6, 5, 5, 5, 4)

for needed in ("sklearn", "tqdm"):
    pytest.importorskip(needed, reason=f"the example needs {needed}: pip install 'bnfast[demo]'")

from test_paper import assert_gradients  # noqa: E402


@pytest.fixture
def module(monkeypatch):
    """The example, which is not in a package."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("dropout")


def test_mask_keeps_the_expectation(module, rng):
    """A value's variance is p / (1 - p); the mean of 100,000 is within 5 standard errors."""
    count, p = 100_000, 0.3
    y = module.Dropout(p, rng)(np.ones((count // 100, 100)))
    assert set(np.unique(y)) == {0, 1 / (1 - p)}
    assert abs(y.mean() - 1) < 5 * np.sqrt(p / (1 - p) / count)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward_uses_the_mask_of_its_forward(module, rng, dtype):
    dropout = module.Dropout(0.5, rng)
    one = np.ones((40, 30), dtype)
    first, second = dropout(one), dropout(one)
    assert first.dtype == dtype
    assert (first != second).any()
    dy = rng.normal(size=one.shape).astype(dtype)
    np.testing.assert_array_equal(dropout.backward(dy), dy * second)


def test_inference_is_the_identity(module, rng):
    dropout = module.Dropout(0.5, rng)
    dropout.training = False
    x = rng.normal(size=(4, 3))
    assert dropout(x) is x
    assert dropout.backward(x) is x


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_refused_probability(module, rng, probability):
    with pytest.raises(ValueError, match=f"probability is {probability}; expected 0 to less than"):
        module.Dropout(probability, rng)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_against_finite_differences(module, rng, normalized):
    """All calls have the same masks."""
    network = module.DropoutNetwork(SIZES, normalized, rng, 0.4, rng, std=1.0, dtype=np.float64)
    images, labels = rng.normal(size=(9, 6)), rng.integers(0, 4, 9)

    def loss():
        for seed, dropout in enumerate(network.dropouts):
            dropout.rng = np.random.default_rng(seed)
        return network.backward(network.forward(images), labels)

    loss()
    assert all((dropout.mask == 0).any() for dropout in network.dropouts)
    gradients = [gradient.copy() for _, gradient in network.parameters()]
    assert_gradients(network, gradients, loss)


@pytest.mark.parametrize("normalized", [False, True])
def test_network_in_inference_is_that_without_dropout(module, rng, normalized):
    plain = module.Network(SIZES, normalized, np.random.default_rng(1))
    dropped = module.DropoutNetwork(SIZES, normalized, np.random.default_rng(1), 0.5, rng)
    images = rng.normal(size=(9, 6)).astype(np.float32)
    assert (dropped.forward(images) != plain.forward(images)).any()
    for network in (plain, dropped):
        network.train(False)
        for norm in network.norms:
            norm.running_mean[:], norm.running_var[:] = 0.1, 2
    np.testing.assert_array_equal(dropped.forward(images), plain.forward(images))


def test_new_statistics_are_those_without_dropout(module, rng):
    network = module.DropoutNetwork(SIZES, True, rng, 0.5, rng, std=1.0, dtype=np.float64)
    images = rng.normal(size=(150, 6))
    network.forward(images)  # with dropout: it moves the running statistics
    network.train(False)
    module.recompute(network, images)
    x = images
    for weight, norm in zip(network.weights, network.norms, strict=False):
        u = x @ weight.T
        mean, var = u.mean(axis=0), u.var(axis=0, ddof=1)
        np.testing.assert_allclose(norm.running_mean, mean, atol=1e-12)
        np.testing.assert_allclose(norm.running_var, var, rtol=1e-12)
        x = 1 / (1 + np.exp(-(u - mean) / np.sqrt(var + norm.eps)))


def test_validation_images_are_apart(module):
    data = module.load_data()
    kept, validation, labels = module.with_validation(data)
    assert len(kept.train) + len(validation) == len(data.train)
    assert len(validation) == len(labels) == len(data.train) // 4
    rows = [sorted(map(bytes, part)) for part in (data.train, [*kept.train, *validation])]
    assert rows[0] == rows[1]  # each image once
    assert kept.test is data.test


def test_test_images_have_no_say_in_the_choice(module):
    """The setting with the best validation accuracy of the first seed, whatever the others are."""
    accuracies = {1.0: (0.5, 0.99), 2.0: (0.7, 0.6), 4.0: (0.6, 0.99)}
    outcomes = {
        module.Run(kind, rate, 0.1, seed, 10, "digits"): module.Outcome(value, *[1 - value] * 4)
        for kind in module.KINDS
        for rate, values in accuracies.items()
        for seed, value in enumerate(values)
    }
    chosen = module.choose(module.by_setting(outcomes))
    assert chosen == {kind: module.Setting(kind, 2.0, 0.1) for kind in module.KINDS}


def test_quick_run(module):
    command = [sys.executable, "-W", "error", module.__file__, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,011 images for training, 336 for validation, 450 for the test" in done.stdout
    table = done.stdout[done.stdout.index("Accuracy (%) at the best") :]
    rows = re.findall(r"^  (\S.*?) +2 +(-|0\.\d+) +([\d.]+) \(.*?\) +([\d.]+) \(", table, re.M)
    assert [(kind, probability != "-") for kind, probability, *_ in rows] == [
        ("plain", False),
        ("dropout", True),
        ("batch norm", False),
        ("both", True),
        ("batch norm, new statistics", False),
        ("both, new statistics", True),
    ]
    # With batch norm 500 steps are enough to learn something.
    assert min(float(test) for *_, test in rows[2:]) > 90
