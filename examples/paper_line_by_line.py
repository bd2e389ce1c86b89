"""The batch normalization paper, line by line: its equations as NumPy, in their order.

Ioffe and Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift* (2015, arXiv:1502.03167v3), sections 1 to 3.4. Section 4.1 is
`examples/paper.py`. The page docs/paper.md explains what is here a piece at a time.

A batch is an array of shape (m, d): a row is an example, a column is one activation.
The paper's x_i^(k) is x[i, k]; the paper counts from 1 and NumPy from 0.

    python examples/paper_line_by_line.py      # prints every result, in a second
"""

import numpy as np

import bnfast


def row(values):
    """Numbers as text; rounding to -0 is printed as 0."""
    return "  ".join(f"{value:.4f}" for value in np.ravel(np.round(values, 4) + 0.0))


def jacobian(f, at, h=1e-5):
    """Every partial derivative of f, measured: change one input a little, and look.

    The shape is that of f(at) followed by that of `at`: (d,) -> (d,) gives (d, d).
    If f gives one number, this is the gradient, with the shape of `at`.
    """
    columns = []
    for j in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[j] = h
        columns.append((f(at + step) - f(at - step)) / (2 * h))
    return np.stack(columns, axis=-1).reshape(np.shape(f(at)) + at.shape)


# --- Section 1: the loss, arg min, the mini-batch ---------------------------------------


def losses(theta, x, t):
    """Section 1's l(x_i, Theta) of each example. theta (d,), x (N, d), t (N,) -> (N,)"""
    return (x @ theta - t) ** 2 / 2


def gradients(theta, x, t):
    """Its derivative by Theta, of each example: (N, d), a row the shape of theta."""
    return (x @ theta - t)[:, np.newaxis] * x


def make_data(n):
    """Examples x (n, 3) and what should come out for them, t (n,)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3))
    t = x @ np.array([1.0, -2.0, 0.5]) + rng.normal(size=n)
    return x, t


def show_arg_min():
    x, t = make_data(1000)  # (1000, 3), (1000,)
    tried = np.linspace(-4, 4, 801)  # values of the second parameter: 801 of them
    loss = [np.mean(losses(np.array([1.0, theta, 0.5]), x, t)) for theta in tried]
    print(f"min:     {np.min(loss):.4f}   the smallest loss")
    print(f"arg min: {tried[np.argmin(loss)]:.4f}  the Theta that has it")


def show_mini_batch():
    x, t = make_data(1000)  # (1000, 3), (1000,)
    theta = np.zeros(3)  # (3,)
    all_examples = gradients(theta, x, t).mean(axis=0)  # (3,)
    print("m = 1000:", row(all_examples))
    for m in (4, 60):
        estimate = 1 / m * np.sum(gradients(theta, x[:m], t[:m]), axis=0)  # (3,)
        print(f"m = {m:4}:", row(estimate))


def f1(u, theta1):
    """The layers below. u (m, 5), theta1 (3, 5) -> x (m, 3)"""
    return u @ theta1.T


def f2(x, theta2, t):
    """The sub-network above, with the loss. x (m, 3), theta2 (3,), t (m,) -> (m,)"""
    return losses(theta2, x, t)


def show_sub_network():
    rng = np.random.default_rng(0)
    u, t = rng.normal(1, 1, size=(60, 5)), rng.normal(size=60)  # (60, 5), (60,)
    theta1, theta2 = rng.normal(size=(3, 5)), rng.normal(size=3)  # (3, 5), (3,)
    x = f1(u, theta1)  # (60, 3): the input of the sub-network

    whole = jacobian(lambda theta: np.mean(f2(f1(u, theta1), theta, t)), theta2)  # (3,)
    alone = gradients(theta2, x, t).mean(axis=0)  # (3,)
    print("gradient for Theta2, whole network:", row(whole))
    print("gradient for Theta2, F2 alone:     ", row(alone))

    step = jacobian(lambda theta: np.mean(f2(f1(u, theta), theta2, t)), theta1)  # (3, 5)
    moved = f1(u, theta1 - 0.1 * step)  # (60, 3)
    print("mean of x before the step of Theta1:", row(x.mean(axis=0)))
    print("mean of x after the step:           ", row(moved.mean(axis=0)))


def g(x):
    """The sigmoid, element by element: any shape -> the same shape."""
    return 1 / (1 + np.exp(-x))


def g_slope(x):
    """g'(x), its derivative: any shape -> the same shape."""
    return g(x) * (1 - g(x))


def show_saturation():
    for x in (0.0, 1.0, 2.0, 5.0, 10.0):  # one number each
        print(f"x = {x:4.1f}   g(x) = {g(x):.5f}   g'(x) = {g_slope(x):.5f}")


# --- Section 2: a step that forgets the mean --------------------------------------------


def descend(u, t, g, g_slope, ignore_mean, steps=1000, rate=0.1):
    """Learn b alone. u, t (N,) -> b, loss and output at every step: (steps + 1, ...)"""
    n, b, history = len(u), 0.0, []
    for _ in range(steps + 1):
        x = u + b  # (N,)
        x_hat = x - np.mean(x)  # (N,)
        z = g(x_hat)  # (N,): the layer's output
        loss = np.mean((z - t) ** 2) / 2  # one number
        history.append((b, loss, z))

        dl_dx_hat = (z - t) / n * g_slope(x_hat)  # (N,)
        dx_db = 1.0  # x = u + b
        dmean_db = 0.0 if ignore_mean else 1.0  # E[x] = E[u] + b
        dl_db = np.sum(dl_dx_hat * (dx_db - dmean_db))  # one number
        delta_b = -rate * dl_db
        b = b + delta_b
    return [np.array(values) for values in zip(*history, strict=True)]


def counterexample(ignore_mean, sigmoid):
    """The same u and t for each way: 60 examples."""
    u = np.random.default_rng(0).normal(size=60)  # (60,)
    if sigmoid:
        return descend(u, g(u) + 0.1, g, g_slope, ignore_mean)
    return descend(u, u + 1, lambda x_hat: x_hat, np.ones_like, ignore_mean)


def show_counterexample():
    print("gradient      z is     b: step 1  step 1000   loss: 0    1000   same output")
    for gradient in ("ignores E[x]", "right"):
        for output in ("x_hat", "g(x_hat)"):
            b, loss, z = counterexample(gradient == "ignores E[x]", output == "g(x_hat)")
            # (1001,), (1001,), (1001, 60)
            same = np.abs(z - z[0]).max() < 1e-9
            numbers = f"{b[1]:8.4f} {b[-1]:10.4f}     {loss[0]:.4f}  {loss[-1]:.4f}"
            print(f"{gradient:13} {output:8} {numbers}   {same}")


def show_mean_of_a_constant():
    u, b, delta_b = np.array([0.5, -1.0, 3.5]), 2.0, 0.25  # (3,), two numbers
    print("x:          ", row(u + b), "  mean", row(np.mean(u + b)))
    print("x + delta b:", row(u + b + delta_b), "  mean", row(np.mean(u + b + delta_b)))
    print("E[delta b]: ", row(np.mean(np.full(3, delta_b))))


def show_activation_before_the_mean():
    u = np.array([0.5, -1.0, 3.5])  # (3,)
    for b in (0.0, 2.0):
        before = g(u + b) - np.mean(g(u + b))  # (3,)
        after = g(u + b - np.mean(u + b))  # (3,)
        print(f"b = {b}: g before the mean {row(before)};  g after it {row(after)}")


def show_scaling_too():
    u = np.random.default_rng(0).normal(size=60)  # (60,)
    t, w, b = 0.5 * u + 1, 1.0, 0.0  # (60,), two numbers
    for step in range(51):
        x = w * u + b  # (60,)
        mean, deviation = np.mean(x), np.std(x)  # two numbers
        x_hat = (x - mean) / deviation  # (60,): the output
        loss = np.mean((x_hat - t) ** 2) / 2
        if step % 10 == 0:
            print(f"step {step:2}: w = {w:8.4f}, b = {b:8.4f}, loss {loss:.4f}")
        dl_dx = (x_hat - t) / 60 / deviation  # (60,): mean, deviation as constants
        w -= 0.1 * np.sum(dl_dx * u)
        b -= 0.1 * np.sum(dl_dx)


# --- Section 2: whitening and Jacobians -------------------------------------------------


def covariance(x):
    """Cov[x] = E[x x^T] - E[x] E[x]^T. x (N, d) -> (d, d)"""
    mean = x.mean(axis=0)  # (d,)
    return x.T @ x / len(x) - np.outer(mean, mean)  # (d, d)


def whiten(x):
    """Cov[x]^(-1/2) (x - E[x]). x (N, d) -> (N, d)"""
    values, vectors = np.linalg.eigh(covariance(x))  # (d,), (d, d)
    inverse_root = vectors / np.sqrt(values) @ vectors.T  # (d, d)
    return (x - x.mean(axis=0)) @ inverse_root  # (N, d)


def show_whitening():
    rng = np.random.default_rng(0)
    mix = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    x = rng.normal(size=(1000, 3)) @ mix  # (1000, 3): correlated columns
    for name, values in (("Cov[x]", x), ("Cov[whitened x]", whiten(x))):
        print(name)
        for line in covariance(values):
            print("  ", row(line))
    small = rng.normal(size=(60, 100))  # m = 60 examples of d = 100 activations
    rank = np.linalg.matrix_rank(covariance(small))
    print("numbers in Cov[x] for d = 100:", covariance(small).size, "instead of 100")
    print("rank of Cov[x] from m = 60:   ", rank, "of 100")


def norm(x, everything):
    """Norm(x, X), the mean alone: x (d,), everything (N, d) -> (d,)"""
    return x - everything.mean(axis=0)


def show_jacobians():
    everything = np.random.default_rng(0).normal(size=(4, 2))  # N = 4, d = 2
    by_x = jacobian(lambda x: norm(x, everything), everything[0])  # (d, d)
    by_all = jacobian(lambda all_x: norm(everything[0], all_x), everything)  # (d, N, d)
    print("dNorm/dx", by_x.shape, "=", row(by_x))
    print("dNorm/dX", by_all.shape, "for one of the N examples:", row(by_all[:, 0]))
    total = by_x + by_all.sum(axis=1)  # (d, d)
    print("if b moves all N examples, dNorm/dx + sum over N:", row(total))


# --- Section 3: Algorithm 1 -------------------------------------------------------------


def batch_mean(x):
    """mu_B. x (m, d) -> (d,)"""
    m = len(x)
    return 1 / m * np.sum(x, axis=0)


def batch_variance(x, mu):
    """sigma^2_B. x (m, d), mu (d,) -> (d,)"""
    m = len(x)
    return 1 / m * np.sum((x - mu) ** 2, axis=0)


def normalize(x, mu, sigma2, eps):
    """x_hat. x (m, d), mu (d,), sigma2 (d,), eps one number -> (m, d)"""
    return (x - mu) / np.sqrt(sigma2 + eps)


def scale_and_shift(x_hat, gamma, beta):
    """y. x_hat (m, d), gamma (d,), beta (d,) -> (m, d)"""
    return gamma * x_hat + beta


def bn(x, gamma, beta, eps=1e-5):
    """BN_gamma,beta, Algorithm 1. x (m, d), gamma (d,), beta (d,) -> y (m, d)"""
    mu = batch_mean(x)  # (d,)
    sigma2 = batch_variance(x, mu)  # (d,)
    x_hat = normalize(x, mu, sigma2, eps)  # (m, d)
    return scale_and_shift(x_hat, gamma, beta)  # (m, d)


def make_batch():
    """A batch x (6, 2), gamma (2,), beta (2,), and what should come out, t (6, 2)."""
    rng = np.random.default_rng(0)
    x = rng.normal((3.0, -1.0), (2.0, 0.5), size=(6, 2))
    return x, np.array([1.5, 0.5]), np.array([0.1, -0.2]), rng.normal(size=(6, 2))


def show_algorithm_1():
    x, gamma, beta, _ = make_batch()  # (6, 2), (2,), (2,)
    mu = batch_mean(x)  # (2,)
    sigma2 = batch_variance(x, mu)  # (2,)
    x_hat = normalize(x, mu, sigma2, 1e-5)  # (6, 2)
    y = bn(x, gamma, beta)  # (6, 2)
    print("mu     (2,):  ", row(mu))
    print("sigma2 (2,):  ", row(sigma2))
    for name, values in (("x_hat", x_hat), ("y    ", y)):
        mean, variance = values.mean(axis=0), values.var(axis=0)  # (2,)
        print(name, " (6, 2): mean", row(mean), " variance", row(variance))
    ours, _ = bnfast.batch_norm_forward(x, gamma, beta, eps=1e-5)
    print("bnfast gives the same y:", np.allclose(ours, y, rtol=1e-12, atol=1e-12))


def show_identity():
    x, _, _, _ = make_batch()  # (6, 2)
    mu = batch_mean(x)  # (2,)
    sigma2 = batch_variance(x, mu)  # (2,)
    for eps in (0.0, 1e-5):
        change = np.abs(bn(x, np.sqrt(sigma2), mu, eps) - x).max()
        print(f"eps = {eps}: y differs from x by {change:.6f} at most")


def show_linear_regime():
    for x in (0.5, 1.0, 2.0, 4.0):
        print(f"x = {x}: g(x) = {g(x):.3f}, straight line 0.5 + x/4 = {0.5 + x / 4:.3f}")


# --- Section 3: the gradients -----------------------------------------------------------


def bn_gradients(dl_dy, x, gamma, eps=1e-5):
    """The six equations of section 3. dl_dy (m, d), x (m, d), gamma (d,)"""
    m = len(x)
    mu = batch_mean(x)  # (d,)
    sigma2 = batch_variance(x, mu)  # (d,)
    x_hat = normalize(x, mu, sigma2, eps)  # (m, d)

    dl_dx_hat = dl_dy * gamma  # 1: (m, d)
    dl_dsigma2 = np.sum(  # 2: (d,)
        dl_dx_hat * (x - mu) * -1 / 2 * (sigma2 + eps) ** (-3 / 2), axis=0
    )
    dl_dmu = (  # 3: (d,)
        np.sum(dl_dx_hat * -1 / np.sqrt(sigma2 + eps), axis=0)
        + dl_dsigma2 * np.sum(-2 * (x - mu), axis=0) / m
    )
    dl_dx = (  # 4: (m, d)
        dl_dx_hat / np.sqrt(sigma2 + eps)
        + dl_dsigma2 * 2 * (x - mu) / m
        + dl_dmu / m  # (d,): the same for every example
    )
    dl_dgamma = np.sum(dl_dy * x_hat, axis=0)  # 5: (d,)
    dl_dbeta = np.sum(dl_dy, axis=0)  # 6: (d,)
    return dl_dx_hat, dl_dsigma2, dl_dmu, dl_dx, dl_dgamma, dl_dbeta


def measured_gradients(loss, x, gamma, beta, eps=1e-5):
    """The same six, by changing one number at a time. loss: y (m, d) -> one number"""
    mu = batch_mean(x)  # (d,)
    sigma2 = batch_variance(x, mu)  # (d,)
    x_hat = normalize(x, mu, sigma2, eps)  # (m, d)

    def from_x_hat(x_hat):
        return loss(scale_and_shift(x_hat, gamma, beta))

    def from_sigma2(sigma2):  # x and mu stay
        return from_x_hat(normalize(x, mu, sigma2, eps))

    def from_mu(mu):  # x stays; sigma2 is computed from mu, and changes with it
        return from_x_hat(normalize(x, mu, batch_variance(x, mu), eps))

    return (
        jacobian(from_x_hat, x_hat),  # (m, d)
        jacobian(from_sigma2, sigma2),  # (d,)
        jacobian(from_mu, mu),  # (d,)
        jacobian(lambda x: loss(bn(x, gamma, beta, eps)), x),  # (m, d)
        jacobian(lambda gamma: loss(bn(x, gamma, beta, eps)), gamma),  # (d,)
        jacobian(lambda beta: loss(bn(x, gamma, beta, eps)), beta),  # (d,)
    )


NAMES = ("dl/dx_hat", "dl/dsigma2", "dl/dmu", "dl/dx", "dl/dgamma", "dl/dbeta")


def show_gradients():
    x, gamma, beta, t = make_batch()  # (6, 2), (2,), (2,), (6, 2)
    dl_dy = bn(x, gamma, beta) - t  # (6, 2): the derivative of the loss below
    formulas = bn_gradients(dl_dy, x, gamma)
    measured = measured_gradients(lambda y: np.sum((y - t) ** 2) / 2, x, gamma, beta)
    print("            shape    first number: formula, measured   all equal")
    for name, formula, number in zip(NAMES, formulas, measured, strict=True):
        equal = np.allclose(formula, number, rtol=1e-7, atol=1e-7)
        first = f"{formula.flat[0]:12.6f}{number.flat[0]:12.6f}"
        print(f"{name:11} {formula.shape!s:8} {first}   {equal}")


def show_bnfast_gradients():
    x, gamma, beta, t = make_batch()  # (6, 2), (2,), (2,), (6, 2)
    y, stats = bnfast.batch_norm_forward(x, gamma, beta, eps=1e-5)
    ours = bnfast.batch_norm_backward(y - t, x, stats, gamma)  # dl/dy = y - t
    _, _, _, dl_dx, dl_dgamma, dl_dbeta = bn_gradients(y - t, x, gamma)
    for name, one, other in (
        ("x", ours.x, dl_dx),
        ("gamma", ours.weight, dl_dgamma),
        ("beta", ours.bias, dl_dbeta),
    ):
        print(f"dl/d{name} equal:", np.allclose(one, other, rtol=1e-10, atol=1e-10))


def simplified(dl_dy, x, gamma, eps=1e-5):
    """dl/dx after simplification. dl_dy (m, d), x (m, d), gamma (d,) -> (m, d)"""
    mu = batch_mean(x)  # (d,)
    sigma2 = batch_variance(x, mu)  # (d,)
    x_hat = normalize(x, mu, sigma2, eps)  # (m, d)
    through_mu = dl_dy.mean(axis=0)  # (d,)
    through_sigma2 = x_hat * (dl_dy * x_hat).mean(axis=0)  # (m, d)
    return gamma / np.sqrt(sigma2 + eps) * (dl_dy - through_mu - through_sigma2)


def show_simplified():
    x, gamma, beta, t = make_batch()  # (6, 2), (2,), (2,), (6, 2)
    dl_dy = bn(x, gamma, beta) - t  # (6, 2)
    dl_dx, short = bn_gradients(dl_dy, x, gamma)[3], simplified(dl_dy, x, gamma)
    second_sum = np.sum(-2 * (x - batch_mean(x)), axis=0)  # (2,)
    print("the second sum of dl/dmu:", row(second_sum))
    print("short form equal:", np.allclose(short, dl_dx, rtol=1e-10, atol=1e-10))


# --- Section 3.1: inference -------------------------------------------------------------


def make_training_set(n=6000):
    """Two activations over a training set (n, 2): true variances 4 and 1."""
    return np.random.default_rng(0).normal((1.0, -3.0), (2.0, 1.0), size=(n, 2))


def averaged(x, m):
    """Algorithm 2, line 10: batches of m. x (N, d) -> E[x] (d,), Var[x] (d,)"""
    batches = [x[i : i + m] for i in range(0, len(x), m)]  # N/m arrays of shape (m, d)
    mus = np.array([batch_mean(batch) for batch in batches])  # (N/m, d)
    sigma2s = [batch_variance(batch, mu) for batch, mu in zip(batches, mus, strict=True)]
    return mus.mean(axis=0), m / (m - 1) * np.mean(sigma2s, axis=0)


def moving(x, m, momentum=0.1):
    """Moving averages over the same batches, as layers have: E[x], Var[x] (d,)"""
    mean, var = np.zeros(x.shape[1]), np.ones(x.shape[1])  # where a new layer starts
    for i in range(0, len(x), m):
        batch = x[i : i + m]  # (m, d)
        mu = batch_mean(batch)  # (d,)
        sigma2 = m / (m - 1) * batch_variance(batch, mu)  # (d,)
        mean = (1 - momentum) * mean + momentum * mu
        var = (1 - momentum) * var + momentum * sigma2
    return mean, var


def exact(x, m):
    """All N values, by merging what bnfast knows of each batch: E[x], Var[x] (d,)"""
    total = bnfast.Moments.empty(x.shape[1])
    for i in range(0, len(x), m):
        total.update(x[i : i + m])
    return total.mean, total.var(ddof=1)


def show_population():
    x = make_training_set()  # (6000, 2)
    print("                        E[x]              Var[x]")
    for name, way in (("averaged", averaged), ("moving", moving), ("exact", exact)):
        mean, var = way(x, m=60)
        print(f"{name:10} m = 60:  {row(mean)}   {row(var)}")


def show_unbiased():
    x = make_training_set()  # (6000, 2)
    whole = x.var(axis=0, ddof=1)  # (2,)
    print("as a share of the variance of all values:")
    print("         E_B[sigma^2_B]   m/(m-1) E_B[sigma^2_B]")
    for m in (2, 10, 60):
        _, var = averaged(x, m)
        print(f"m = {m:2}:  {row((m - 1) / m * var / whole)}    {row(var / whole)}")


def show_sorted():
    x = np.sort(make_training_set(), axis=0)  # (6000, 2): batches that are not alike
    for name, way in (("averaged", averaged), ("moving", moving), ("exact", exact)):
        print(f"{name:10} Var[x]: {row(way(x, m=60)[1])}")


def inference_map(gamma, beta, mean, var, eps=1e-5):
    """Algorithm 2, line 11: y = scale * x + shift. All (d,)"""
    scale = gamma / np.sqrt(var + eps)  # (d,)
    shift = beta - gamma * mean / np.sqrt(var + eps)  # (d,)
    return scale, shift


def show_inference():
    x = make_training_set()  # (6000, 2)
    gamma, beta = np.array([1.5, 0.5]), np.array([0.1, -0.2])  # (2,), (2,)
    mean, var = exact(x, m=60)  # (2,), (2,)
    scale, shift = inference_map(gamma, beta, mean, var)  # (2,), (2,)
    y = scale * x + shift  # (6000, 2)
    ours = bnfast.batch_norm(x, mean, var, gamma, beta, training=False, eps=1e-5)
    print("scale (2,):", row(scale), "  shift (2,):", row(shift))
    print("bnfast gives the same y:", np.allclose(ours, y, rtol=1e-12, atol=1e-12))
    print("example 0 alone:                ", row(scale * x[:1] + shift))
    print("example 0 among 6000, inference:", row(y[0]))
    print("example 0 in a batch of 4, training: ", row(bn(x[:4], gamma, beta)[0]))
    print("example 0 in a batch of 60, training:", row(bn(x[:60], gamma, beta)[0]))


def show_fold():
    rng = np.random.default_rng(0)
    u, w = rng.normal(size=(8, 5)), rng.normal(size=(2, 5))  # x = u W^T is (8, 2)
    layer = bnfast.BatchNorm(2, eps=1e-5, dtype=np.float64)
    layer(u @ w.T)  # a training call: running statistics
    layer.eval()
    mean, var = layer.running_mean, layer.running_var  # (2,), (2,)
    scale, shift = inference_map(layer.weight, layer.bias, mean, var)
    folded_w, folded_b = scale[:, np.newaxis] * w, shift  # (2, 5), (2,)
    y = u @ folded_w.T + folded_b  # (8, 2): BN is gone
    print("BN(Wu) as one layer:", np.allclose(y, layer(u @ w.T), rtol=1e-12, atol=1e-12))
    fold_w, fold_b = bnfast.fold(w, None, layer)
    equal = np.allclose(fold_w, folded_w), np.allclose(fold_b, folded_b)
    print("bnfast.fold equal:  ", *equal)


# --- Section 3.2: the bias; convolutions ------------------------------------------------


def show_no_bias():
    rng = np.random.default_rng(0)
    u, w, b = rng.normal(size=(8, 5)), rng.normal(size=(2, 5)), np.array([7.0, -3.0])
    gamma, beta = np.array([1.5, 0.5]), np.array([0.1, -0.2])  # (2,), (2,)
    without = bn(u @ w.T, gamma, beta)  # (8, 2)
    with_b = bn(u @ w.T + b, gamma, beta)  # (8, 2)
    print("BN(Wu):    ", row(without[0]))
    print("BN(Wu + b):", row(with_b[0]))
    print("mean of either is beta:", row([without.mean(axis=0), with_b.mean(axis=0)]))


def bn_convolution(x, gamma, beta, eps=1e-5):
    """Per feature map. x (m, d, p, q), gamma (d,), beta (d,) -> (m, d, p, q)"""
    m, d, p, q = x.shape
    rows = np.moveaxis(x, 1, -1).reshape(m * p * q, d)  # m' = m p q values a feature map
    y = bn(rows, gamma, beta, eps)  # (m', d)
    return np.moveaxis(y.reshape(m, p, q, d), -1, 1)  # (m, d, p, q)


def show_convolution():
    x = np.random.default_rng(0).normal(2, 3, size=(8, 3, 5, 4))  # m, d, p, q
    gamma, beta = np.ones(3), np.zeros(3)  # one a feature map
    y = bn_convolution(x, gamma, beta)  # (8, 3, 5, 4)
    ours, stats = bnfast.batch_norm_forward(x, gamma, beta, eps=1e-5)
    print("m' = 8 * 5 * 4 =", stats.count, "values for each mean")
    print("means (3,):", row(stats.mean), " of y:", row(y.mean(axis=(0, 2, 3))))
    print("bnfast gives the same y:", np.allclose(ours, y, rtol=1e-12, atol=1e-12))


# --- Section 3.3: the scale of the weights ----------------------------------------------


def layer_gradients(w, u, gamma, beta, t, eps=0.0):
    """Of sum (BN(Wu) - t)^2 / 2. w (n, d), u (m, d) -> by u (m, d), by W (n, d)"""
    x = u @ w.T  # (m, n)
    dl_dy = bn(x, gamma, beta, eps) - t  # (m, n)
    dl_dx = bn_gradients(dl_dy, x, gamma, eps)[3]  # (m, n)
    return dl_dx @ w, dl_dx.T @ u  # (m, d), (n, d): chain rule for x = W u


def show_scale():
    rng = np.random.default_rng(0)
    u, w, t = rng.normal(size=(8, 3)), rng.normal(size=(2, 3)), rng.normal(size=(8, 2))
    gamma, beta, a = np.array([1.5, 0.5]), np.array([0.1, -0.2]), 10.0
    print("BN(Wu)[0]:    ", row(bn(u @ w.T, gamma, beta, eps=0)[0]))
    print("BN((aW)u)[0]: ", row(bn(u @ (a * w).T, gamma, beta, eps=0)[0]))
    du, dw = layer_gradients(w, u, gamma, beta, t)  # (8, 3), (2, 3)
    du_a, dw_a = layer_gradients(a * w, u, gamma, beta, t)
    print("dl/du[0] for W: ", row(du[0]))
    print("dl/du[0] for aW:", row(du_a[0]))
    print("dl/dW[0] for W: ", row(dw[0]))
    print("dl/d(aW)[0]:    ", row(dw_a[0]), "  times a:", row(a * dw_a[0]))
    print("sum of W * dl/dW, a unit:", row(np.sum(w * dw, axis=1)))


def show_singular_values():
    rng = np.random.default_rng(0)
    x_hat = whiten(rng.normal(size=(1000, 3)))  # (1000, 3): Cov = I
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # (3, 3)
    for name, j in (("a rotation", rotation), ("another J", rotation * (2.0, 1.0, 0.5))):
        z_hat = x_hat @ j.T  # (1000, 3): z_i = J x_i for every row
        same = np.allclose(covariance(z_hat), j @ j.T)
        values = np.linalg.svd(j, compute_uv=False)  # (3,)
        print(f"{name}: Cov[z] = J J^T: {same}, variances of z: {row(np.diag(j @ j.T))}")
        print(f"    singular values of J: {row(values)}")


# --- Section 3.4: one example among others ----------------------------------------------


def show_noise():
    rng = np.random.default_rng(0)
    x, one = make_training_set(), 1.0
    for m in (4, 60, 600):
        seen = []  # y of the example x = 1 in 1000 random batches
        for _ in range(1000):
            others = rng.choice(x[:, 0], m - 1)  # (m - 1,)
            batch = np.append(one, others)[:, np.newaxis]  # (m, 1)
            seen.append(bn(batch, np.ones(1), np.zeros(1))[0, 0])
        mean, deviation = np.mean(seen), np.std(seen)
        print(f"m = {m:3}: y of the same example is {mean:5.2f} +- {deviation:.2f}")


# --- All of it --------------------------------------------------------------------------

SECTIONS = {
    "1": (show_arg_min, show_mini_batch, show_sub_network, show_saturation),
    "2, a step that forgets the mean": (
        show_counterexample,
        show_mean_of_a_constant,
        show_activation_before_the_mean,
        show_scaling_too,
    ),
    "2, whitening": (show_whitening, show_jacobians),
    "3, Algorithm 1": (show_algorithm_1, show_identity, show_linear_regime),
    "3, gradients": (show_gradients, show_bnfast_gradients, show_simplified),
    "3.1": (show_population, show_unbiased, show_sorted, show_inference, show_fold),
    "3.2": (show_no_bias, show_convolution),
    "3.3": (show_scale, show_singular_values),
    "3.4": (show_noise,),
}


def main():
    """Print every result under the number of its section."""
    for section, functions in SECTIONS.items():
        print(f"\n--- Section {section}")
        for show in functions:
            print(f"\n{show.__name__.removeprefix('show_').replace('_', ' ')}")
            show()


if __name__ == "__main__":
    main()
