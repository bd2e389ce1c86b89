"""The examples on what a batch is: padded sequences, ghost batches, renormalization."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not run from a source tree")


@pytest.fixture
def example(monkeypatch):
    """A function that imports a module of the examples, which are not a package."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_padded_sequences(example, capsys):
    assert example("padded_sequences").main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+ ", line)]
    assert [row.split()[0] for row in rows] == ["400", "500", "800", "1600", "400"]
    plain = [[float(cell) for cell in row.split()[-6:-3]] for row in rows]
    # More padding, larger errors; padding of NaN leaves nothing.
    assert np.all(np.diff([output for output, *_ in plain[:-1]]) > 0)
    assert np.isnan(plain[-1]).all()


def test_frames_alone_is_the_gradient(example, rng):
    """Central differences: off by h**2 of a third derivative and 1e-16 / h of the sum."""
    module, h = example("padded_sequences"), 1e-5
    x, dy = rng.normal(size=(2, 7)), rng.normal(size=(2, 7))
    found = module.frames_alone(x, dy).gradient

    def loss(x):
        return (module.frames_alone(x, dy).output * dy).sum()

    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        assert abs((loss(x + step) - loss(x - step)) / (2 * h) - found[i]) < 1e-8


def test_ghost_batches(example, capsys):
    """Its exit status is that of the comparison of one call with the loop."""
    assert example("ghost_batches").main(["--quick"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed if re.match(r" +\d", line)]
    assert [(row[0], row[1]) for row in rows] == [("128", "16"), ("256", "8"), ("1024", "2")]


def test_ghost_batches_that_differ_are_found(example, rng):
    """The example's comparison sees one wrong value."""
    module = example("ghost_batches")
    right = {"y": rng.normal(size=9), "dx": rng.normal(size=9)}
    assert module.difference(right, right) == 0
    wrong = {**right, "dx": right["dx"] + np.eye(9)[3]}
    assert module.difference(wrong, right) > 0.1


class TestRenormalisation:
    @pytest.fixture
    def module(self, example):
        for needed in ("sklearn", "tqdm"):
            pytest.importorskip(needed, reason=f"the example needs {needed}")
        return example("renormalisation")

    def test_quick_run(self, module, tmp_path):
        """Its exit status says whether renormalization helped where the images are alike."""
        command = [sys.executable, "-W", "error", module.__file__, "--quick", "--no-figures"]
        done = subprocess.run(
            [*command, "--out", tmp_path], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        ends = [float(end) for end in re.findall(r"(\d+\.\d)%", done.stdout)]
        assert len(ends) == 4
        assert min(ends) > 70
        assert list(tmp_path.iterdir()) == []

    def test_limits_open_from_batch_norm_to_the_papers(self, module):
        assert module.limits(0, 1000) == (1, 0)
        assert module.limits(1000, 1000) == (3, 5)
        rmax, dmax = np.transpose([module.limits(step, 1000) for step in range(1001)])
        assert np.all(np.diff(rmax) >= 0)
        assert np.all(np.diff(dmax) >= 0)

    def test_batches_alike_are_pairs_of_two_digits(self, module, rng):
        labels = rng.integers(0, 10, 300)
        drawn = module.batches(labels, "alike", rng)
        for _ in range(50):
            batch = next(drawn)
            assert len(set(batch)) == module.BATCH
            _, counts = np.unique(labels[batch], return_counts=True)
            assert counts.tolist() == [2, 2]

    def test_figure(self, module, tmp_path):
        pytest.importorskip("matplotlib")
        curves = {
            kind: {norm: [np.linspace(0, 1, module.TESTS)] * 2 for norm in module.NORMS}
            for kind in module.KINDS
        }
        module.draw(curves, 1000, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
