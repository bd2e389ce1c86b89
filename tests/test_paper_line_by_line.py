"""docs/paper.md and examples/paper_line_by_line.py: they are the same, and what they say holds."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import reference

import bnfast

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper.md"
PROGRAM = ROOT / "examples" / "paper_line_by_line.py"

pytestmark = pytest.mark.skipif(
    not (PAGE.exists() and PROGRAM.exists()), reason="not run from a source tree"
)


@pytest.fixture
def paper(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(PROGRAM.parent)
    return importlib.import_module("paper_line_by_line")


@pytest.fixture
def batch(rng):
    """x (m, d), gamma, beta (d,), dl_dy (m, d); means and deviations that differ."""
    x = rng.normal((3.0, -1.0, 0.0), (2.0, 0.5, 1.0), size=(7, 3))
    return x, rng.normal(size=3), rng.normal(size=3), rng.normal(size=(7, 3))


def blocks(language):
    """Return the page's blocks in a language."""
    fence = rf"^```{language}\n(.*?)^```$"
    return re.findall(fence, PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


# --- The page and the program ---------------------------------------------------------------


def test_page_has_all_code_of_the_program_and_no_other():
    program = PROGRAM.read_text("utf-8")
    body = program[program.index("import numpy") : program.index("# --- All of it")]
    shown = "".join(blocks("python")).splitlines()
    lines = [line for line in body.splitlines() if not line.startswith("# --- ")]
    assert [line for line in shown if line] == [line for line in lines if line]


def test_page_shows_what_the_program_prints(paper, capsys):
    sessions = [block for block in blocks("pycon") if block.startswith(">>> show_")]
    shown = dict(re.fullmatch(r">>> (\w+)\(\)\n(.*)", s, re.DOTALL).groups() for s in sessions)
    in_order = [show.__name__ for section in paper.SECTIONS.values() for show in section]
    assert list(shown) == in_order
    assert in_order == [name for name in vars(paper) if name.startswith("show_")]
    paper.main()
    printed = re.sub(r"\n--- Section .*\n", "", capsys.readouterr().out)
    titles = {name: name.removeprefix("show_").replace("_", " ") for name in shown}
    assert printed == "".join(f"\n{titles[name]}\n{output}" for name, output in shown.items())


def test_lines_beside_the_gradients_are_those_of_the_function(paper):
    source = PROGRAM.read_text("utf-8")
    lines = [re.sub("^", "    ", block, flags=re.MULTILINE).rstrip() for block in blocks("py")]
    assert len(lines) == 5  # 5 and 6 stand together
    assert all(block in source for block in lines)
    assert "".join(re.findall(r"# (\d)", "".join(lines))) == "123456"


def test_lines_of_the_table_of_signs_run(paper):
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| $")]
    assert len(rows) > 25
    names = dict(vars(paper))
    signs = next(block for block in blocks("pycon") if "make_data(60)" in block)
    exec(signs.replace(">>> ", ""), names)
    for line in rows:
        (code,) = re.findall(r"`([^`]+)` \|$", line)
        exec(code, names)
    np.testing.assert_allclose(names["y"].mean(axis=0), 0.5 + 1, rtol=1e-12)  # b after b = b + 1


# --- Its functions and the reference ----------------------------------------------------------


def test_algorithm_1_is_that_of_the_reference(paper, batch):
    x, gamma, beta, _ = batch
    mu = paper.batch_mean(x)
    sigma2 = paper.batch_variance(x, mu)
    close = {"rtol": 1e-13, "atol": 1e-13}
    np.testing.assert_allclose(mu, reference.batch_mean(x), **close)
    np.testing.assert_allclose(sigma2, reference.batch_variance(x), **close)
    np.testing.assert_allclose(
        paper.normalize(x, mu, sigma2, 1e-5), reference.normalized(x, mu, sigma2, 1e-5), **close
    )
    y = paper.bn(x, gamma, beta, 1e-3)
    np.testing.assert_allclose(y, reference.forward(x, gamma, beta, 1e-3), **close)


def test_gradients_are_those_of_the_reference(paper, batch):
    x, gamma, beta, dl_dy = batch
    want = reference.backward(dl_dy, x, gamma, beta, 1e-3)
    got = paper.bn_gradients(dl_dy, x, gamma, 1e-3)
    for one, other in zip(got[3:], want[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)
    short = paper.simplified(dl_dy, x, gamma, 1e-3)
    np.testing.assert_allclose(short, want.x, rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_bnfast(paper, batch):
    x, gamma, beta, dl_dy = batch
    _, stats = bnfast.batch_norm_forward(x, gamma, beta, eps=1e-3)
    ours = bnfast.batch_norm_backward(dl_dy, x, stats, gamma)
    got = paper.bn_gradients(dl_dy, x, gamma, 1e-3)
    for one, other in zip(got[3:], ours[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_each_of_the_six_equations_is_a_derivative(paper, batch):
    """With h = 1e-5 a central difference is off by h**2 f''' / 6 and by 1e-16 / h."""
    x, gamma, beta, dl_dy = batch
    formulas = paper.bn_gradients(dl_dy, x, gamma)
    measured = paper.measured_gradients(lambda y: np.sum(dl_dy * y), x, gamma, beta)
    assert len(formulas) == len(measured) == len(paper.NAMES) == 6
    for name, one, other in zip(paper.NAMES, formulas, measured, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8, err_msg=name)


def test_inference_is_that_of_the_reference(paper, batch):
    x, gamma, beta, _ = batch
    mean, var = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 2.0])
    scale, shift = paper.inference_map(gamma, beta, mean, var, 1e-3)
    want = reference.inference(x, mean, var, gamma, beta, 1e-3)
    np.testing.assert_allclose(scale * x + shift, want, rtol=1e-12, atol=1e-13)


def test_convolution_is_that_of_the_reference(paper, rng):
    x, gamma, beta = rng.normal(size=(4, 3, 5, 2)), rng.normal(size=3), rng.normal(size=3)
    want = reference.forward(x, gamma, beta, 1e-5)
    got = paper.bn_convolution(x, gamma, beta)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def test_exact_statistics_are_the_population_of_the_reference(paper):
    x = paper.make_training_set(600)
    mean, var = paper.exact(x, m=60)
    want_mean, want_var = reference.population([x[:100], x[100:]])
    np.testing.assert_allclose(mean, want_mean, rtol=1e-13)
    np.testing.assert_allclose(var, want_var, rtol=1e-13)


def test_moving_averages_are_those_of_a_layer(paper):
    x = paper.make_training_set(600)
    layer = bnfast.BatchNorm(2, dtype=np.float64)
    for i in range(0, len(x), 60):
        layer(x[i : i + 60])
    mean, var = paper.moving(x, m=60)
    np.testing.assert_allclose(mean, layer.running_mean, rtol=1e-12)
    np.testing.assert_allclose(var, layer.running_var, rtol=1e-12)


# --- Sections 1 and 2 -----------------------------------------------------------------------


def test_sigmoid_has_the_slope_that_it_says(paper):
    x = np.array([-3.0, 0.0, 0.5, 4.0])
    slopes = np.diag(paper.jacobian(paper.g, x))
    np.testing.assert_allclose(slopes, paper.g_slope(x), rtol=1e-9, atol=1e-10)


def test_gradients_of_the_losses_are_derivatives(paper):
    x, t = paper.make_data(20)
    theta = np.array([0.5, 1.0, -1.0])
    measured = paper.jacobian(lambda theta: paper.losses(theta, x, t), theta)
    np.testing.assert_allclose(paper.gradients(theta, x, t), measured, atol=1e-9)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_bias_grows_and_loss_stays_if_the_mean_is_taken_for_a_constant(paper, sigmoid):
    b, loss, z = paper.counterexample(ignore_mean=True, sigmoid=sigmoid)
    steps = np.diff(b)
    assert steps.min() > 0.002
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)  # the same in every step
    np.testing.assert_allclose(loss, loss[0], rtol=1e-12)
    assert np.abs(z - z[0]).max() < 1e-12


@pytest.mark.parametrize("sigmoid", [False, True])
def test_right_gradient_of_the_bias_is_zero(paper, sigmoid):
    b, loss, _ = paper.counterexample(ignore_mean=False, sigmoid=sigmoid)
    assert not b.any()
    assert (loss == loss[0]).all()
    u = np.random.default_rng(0).normal(size=60)

    def loss_of(b):
        x_hat = u + b - np.mean(u + b)
        return np.mean((paper.g(x_hat) if sigmoid else x_hat) ** 2)

    assert abs(paper.jacobian(loss_of, np.array(3.0))) < 1e-10


def test_bias_before_an_activation_is_not_cancelled(paper):
    u = np.array([0.5, -1.0, 3.5])
    outputs = [paper.g(u + b) - np.mean(paper.g(u + b)) for b in (0.0, 2.0)]
    assert np.abs(outputs[1] - outputs[0]).max() > 0.1


def test_whitened_data_have_the_identity_as_covariance(paper, rng):
    x = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)) + 3
    np.testing.assert_allclose(paper.covariance(x), np.cov(x.T, ddof=0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(paper.covariance(paper.whiten(x)), np.eye(4), atol=1e-10)


def test_jacobians_cancel_where_all_examples_move(paper, rng):
    everything = rng.normal(size=(5, 3))
    by_x = paper.jacobian(lambda x: paper.norm(x, everything), everything[0])
    by_all = paper.jacobian(lambda values: paper.norm(everything[0], values), everything)
    assert by_x.shape == (3, 3)
    assert by_all.shape == (3, 5, 3)
    np.testing.assert_allclose(by_x, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(by_x + by_all.sum(axis=1), 0, atol=1e-9)


# --- Section 3 ------------------------------------------------------------------------------


def test_variance_of_x_hat_is_less_than_1_by_eps(paper, batch):
    x, _, _, _ = batch
    x_hat = paper.bn(x, 1.0, 0.0, eps=0.1)
    sigma2 = reference.batch_variance(x)
    np.testing.assert_allclose(x_hat.var(axis=0), sigma2 / (sigma2 + 0.1), rtol=1e-12)


def test_gamma_and_beta_can_give_back_the_input(paper, batch):
    x, _, _, _ = batch
    y = paper.bn(x, np.sqrt(reference.batch_variance(x)), reference.batch_mean(x), eps=0.0)
    np.testing.assert_allclose(y, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("m", [2, 10, 60])
def test_batches_lack_one_mth_of_the_variance(paper, m):
    """All variance is that within the batches and that between their means."""
    x = paper.make_training_set()
    _, var = paper.averaged(x, m)
    within = (m - 1) / m * var
    between = x.reshape(-1, m, 2).mean(axis=1).var(axis=0)
    np.testing.assert_allclose(within + between, x.var(axis=0), rtol=1e-12)
    # The standard error of a variance of N normal values is sqrt(2 / N) of it.
    share = within / (4.0, 1.0)
    np.testing.assert_allclose(share, (m - 1) / m, rtol=4 * np.sqrt(2 / (6000 - 6000 / m)))


def test_estimates_are_off_by_what_the_page_says(paper, rng):
    """Their standard errors, from 50 training sets of two activations: known to 7%."""
    ways = {"averaged": [], "exact": [], "moving": []}
    for _ in range(50):
        x = rng.normal(size=(6000, 2))
        for name, errors in ways.items():
            errors.append(getattr(paper, name)(x, m=60)[1] - 1)
    found = {name: np.sqrt(np.mean(np.square(errors))) for name, errors in ways.items()}
    assert found["averaged"] == pytest.approx(0.018, rel=0.25)
    assert found["exact"] == pytest.approx(0.018, rel=0.25)
    assert found["moving"] == pytest.approx(np.sqrt(2 / 59 * 0.1 / 1.9), rel=0.25)
    assert np.sqrt(2 / 59 * 0.1 / 1.9) == pytest.approx(0.042, abs=0.0005)


def test_only_merged_statistics_are_right_for_sorted_data(paper):
    x = np.sort(paper.make_training_set(), axis=0)
    want = x.var(axis=0, ddof=1)
    np.testing.assert_allclose(paper.exact(x, m=60)[1], want, rtol=1e-12)
    assert (paper.averaged(x, m=60)[1] < 0.01 * want).all()
    assert (paper.moving(x, m=60)[1] < 0.02 * want).all()


@pytest.mark.parametrize("a", [0.1, 2.0, 10.0])
def test_scale_of_the_weights(paper, rng, a):
    """Section 3.3: the same output and gradient below, and 1/a of the weights' gradient."""
    u, w, t = rng.normal(size=(8, 3)), rng.normal(size=(2, 3)), rng.normal(size=(8, 2))
    gamma, beta = rng.normal(size=2), rng.normal(size=2)

    def loss(w, u):
        return np.sum((paper.bn(u @ w.T, gamma, beta, 0.0) - t) ** 2) / 2

    assert loss(a * w, u) == pytest.approx(loss(w, u), rel=1e-12)
    du, dw = paper.layer_gradients(w, u, gamma, beta, t)
    du_a, dw_a = paper.layer_gradients(a * w, u, gamma, beta, t)
    np.testing.assert_allclose(du_a, du, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(a * dw_a, dw, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(du, paper.jacobian(lambda u: loss(w, u), u), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(dw, paper.jacobian(lambda w: loss(w, u), w), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(np.sum(w * dw, axis=1), 0, atol=1e-12)  # at right angles
    nearly = paper.layer_gradients(a * w, u, gamma, beta, t, eps=1e-5)[0]
    off = 1e-5 / np.var(u @ (a * w).T, axis=0).min()  # eps as a share of the variance
    np.testing.assert_allclose(nearly, du, rtol=0, atol=10 * off * np.abs(du).max())


def test_bias_before_the_transform_has_no_effect(paper, rng):
    x, beta = rng.normal(size=(8, 2)), np.array([0.1, -0.2])
    with_bias = paper.bn(x + np.array([7.0, -3.0]), np.ones(2), beta)
    np.testing.assert_allclose(with_bias, paper.bn(x, np.ones(2), beta), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(with_bias.mean(axis=0), beta, rtol=1e-12)
