"""Batch normalization as in its paper, in plain NumPy.

S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift", arXiv:1502.03167 (2015).

Every line below is one line of the paper. Nothing is fused, reused or rearranged,
and speed does not matter. Arithmetic is float64, or that of `wide` for wide
arrays (so the tests have an oracle that is better than float64 data). A "channel"
is one index along `axis`. For a dense layer it is the paper's activation x^(k) of
Algorithm 1; for a convolution it is the feature map of section 3.2, whose values at
all positions and in all examples are normalized together. `m` is the number of
these values.
"""

from typing import NamedTuple

import numpy as np
from wide import PI, is_wide, wide


class Gradients(NamedTuple):
    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    residual: np.ndarray


# --- Channels ---------------------------------------------------------------


def real(a):
    """`a` in float64, or as it is if it is wide."""
    return a if is_wide(a) else np.asarray(a).astype(np.float64)


def over_channel(sum_or_mean, x, axis):
    """Sum or mean over everything except the channels: one number per channel."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return sum_or_mean(x, axis=others)


def to_shape(per_channel, x, axis):
    """One number per channel, shaped so that it broadcasts against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return real(per_channel).reshape(shape)


def values_per_channel(x, axis):
    """The paper's m (m' = m * p * q in section 3.2)."""
    return x.size // x.shape[axis]


# --- Statistics --------------------------------------------------------------


def batch_mean(x, axis=1):
    """Algorithm 1, line 1:  mu_B = 1/m sum_i x_i"""
    return over_channel(np.mean, real(x), axis)


def batch_variance(x, axis=1):
    """Algorithm 1, line 2:  sigma^2_B = 1/m sum_i (x_i - mu_B)^2"""
    x = real(x)
    mu = to_shape(batch_mean(x, axis), x, axis)
    return over_channel(np.mean, (x - mu) ** 2, axis)


def population(batches, axis=1):
    """E[x] and Var[x] over a whole training set, the variance unbiased.

    Algorithm 2, line 10, has E[x] = E_B[mu_B] and
    Var[x] = m/(m-1) E_B[sigma^2_B]: estimates from equal batches. Here it is
    the value that they estimate: all batches are one set of values.
    """
    values = np.concatenate([np.moveaxis(real(x), axis, 1) for x in batches])
    m = values_per_channel(values, 1)
    return batch_mean(values), batch_variance(values) * m / (m - 1)


def running_average(old, new, momentum):
    """Section 3.1: moving averages track the model as it trains."""
    return (1 - momentum) * real(old) + momentum * real(new)


def welford(values):
    """Count, mean and M2 of a sequence by Welford's recurrence (1962).

    B. P. Welford, "Note on a method for calculating corrected sums of squares
    and products", Technometrics 4:3:  with every value x,
        M_k = M_{k-1} + (x - M_{k-1}) / k
        S_k = S_{k-1} + (x - M_{k-1}) (x - M_k)
    """
    count, mean, m2 = 0, 0.0, 0.0
    for x in values:
        count += 1
        from_old_mean = x - mean
        mean = mean + from_old_mean / count
        m2 = m2 + from_old_mean * (x - mean)
    return count, mean, m2


# --- The transform -----------------------------------------------------------


def normalized(x, mean, variance, eps, axis=1):
    """Algorithm 1, line 3:  x^_i = (x_i - mu) / sqrt(sigma^2 + eps)"""
    x = real(x)
    mu, sigma2 = to_shape(mean, x, axis), to_shape(variance, x, axis)
    return (x - mu) / np.sqrt(sigma2 + eps)


def before_activation(x, mean, variance, gamma, beta, eps, axis=1, residual=None):
    """Algorithm 1, line 4:  y_i = gamma x^_i + beta, plus a residual branch."""
    x_hat = normalized(x, mean, variance, eps, axis)
    y = to_shape(gamma, x_hat, axis) * x_hat + to_shape(beta, x_hat, axis)
    return y if residual is None else y + real(residual)


def forward(x, gamma, beta, eps, axis=1, residual=None, activation=None):
    """Algorithm 1: the transform over a batch, by the batch's own statistics."""
    mu, sigma2 = batch_mean(x, axis), batch_variance(x, axis)
    return inference(x, mu, sigma2, gamma, beta, eps, axis, residual, activation)


def inference(x, mean, variance, gamma, beta, eps, axis=1, residual=None, activation=None):
    """Algorithm 2, line 11: the same map with constant statistics."""
    z = before_activation(x, mean, variance, gamma, beta, eps, axis, residual)
    return activate(z, activation)


# --- Its gradient --------------------------------------------------------------


def backward(dy, x, gamma, beta, eps, axis=1, residual=None, activation=None):
    """Section 3, the six equations after Algorithm 1, in the paper's order."""
    x = real(x)
    m = values_per_channel(x, axis)
    mu, sigma2 = batch_mean(x, axis), batch_variance(x, axis)
    z = before_activation(x, mu, sigma2, gamma, beta, eps, axis, residual)
    x_hat = normalized(x, mu, sigma2, eps, axis)
    dl_dy = real(dy) * activation_slope(z, activation)

    centered = x - to_shape(mu, x, axis)
    root = np.sqrt(to_shape(sigma2, x, axis) + eps)

    dl_dx_hat = dl_dy * to_shape(gamma, x, axis)
    dl_dsigma2 = over_channel(np.sum, dl_dx_hat * centered * -0.5 * root**-3, axis)
    dl_dmu = over_channel(np.sum, dl_dx_hat * -1 / root, axis) + (
        dl_dsigma2 * over_channel(np.sum, -2 * centered, axis) / m
    )
    dl_dx = (
        dl_dx_hat / root
        + to_shape(dl_dsigma2, x, axis) * 2 * centered / m
        + to_shape(dl_dmu, x, axis) / m
    )
    dl_dgamma = over_channel(np.sum, dl_dy * x_hat, axis)
    dl_dbeta = over_channel(np.sum, dl_dy, axis)
    return Gradients(dl_dx, dl_dgamma, dl_dbeta, dl_dy)


def inference_backward(
    dy, x, mean, variance, gamma, beta, eps, axis=1, residual=None, activation=None
):
    """The gradient if mean and variance are constants (Algorithm 2)."""
    z = before_activation(x, mean, variance, gamma, beta, eps, axis, residual)
    x_hat = normalized(x, mean, variance, eps, axis)
    dl_dy = real(dy) * activation_slope(z, activation)
    root = np.sqrt(to_shape(variance, x_hat, axis) + eps)
    return Gradients(
        dl_dy * to_shape(gamma, x_hat, axis) / root,
        over_channel(np.sum, dl_dy * x_hat, axis),
        over_channel(np.sum, dl_dy, axis),
        dl_dy,
    )


# --- Batches with a mask: a value counts as often as its weight says -------------


def weights_of(mask, x, axis=1):
    """One weight per value of x, from a mask with 1 on the channel axis or without that axis."""
    mask = real(mask)
    if mask.ndim < x.ndim:
        mask = np.expand_dims(mask, axis % x.ndim)
    return np.broadcast_to(mask, x.shape)


def counted(x, weights):
    """x, and 0 in place of what does not count, which may be NaN."""
    return np.where(weights > 0, real(x), 0)


def weighted_mean(x, weights, axis=1):
    """sum_i w_i x_i / W, where W = sum_i w_i takes the place of m"""
    total = over_channel(np.sum, weights, axis)
    return over_channel(np.sum, weights * counted(x, weights), axis) / total


def weighted_variance(x, weights, axis=1):
    """sum_i w_i (x_i - mu)^2 / W"""
    x = counted(x, weights)
    mu = to_shape(weighted_mean(x, weights, axis), x, axis)
    return weighted_mean((x - mu) ** 2, weights, axis)


def weighted_forward(x, weights, gamma, beta, eps, axis=1, residual=None, activation=None):
    """Algorithm 1. What does not count is transformed, too."""
    mu, sigma2 = weighted_mean(x, weights, axis), weighted_variance(x, weights, axis)
    return inference(x, mu, sigma2, gamma, beta, eps, axis, residual, activation)


def weighted_backward(dy, x, weights, gamma, beta, eps, axis=1, residual=None, activation=None):
    """As `backward`. Every output depends on mu and sigma^2, and these on x_i by w_i / W:
    dl/dx_i = gamma / sqrt(sigma^2 + eps) (g_i - w_i/W sum_j g_j - w_i/W x^_i sum_j g_j x^_j).
    """
    x = real(x)
    share = weights / to_shape(over_channel(np.sum, weights, axis), x, axis)
    mu, sigma2 = weighted_mean(x, weights, axis), weighted_variance(x, weights, axis)
    constant = inference_backward(dy, x, mu, sigma2, gamma, beta, eps, axis, residual, activation)
    x_hat = normalized(x, mu, sigma2, eps, axis)
    root = np.sqrt(to_shape(sigma2, x, axis) + eps)
    through_mu = to_shape(constant.beta, x, axis)
    through_sigma2 = x_hat * to_shape(constant.gamma, x, axis)
    scale = to_shape(gamma, x, axis) / root
    return constant._replace(x=constant.x - scale * share * (through_mu + through_sigma2))


# --- Virtual batches ---------------------------------------------------------------


def runs(n, size):
    """The rows of each virtual batch: `size` of them, the last one what is left."""
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


# --- Batch renormalization ----------------------------------------------------------
#
# S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
# Batch-Normalized Models", arXiv:1702.03275 (2017). Its sigma is sqrt(sigma^2 + eps).


def correction(mean, variance, running_mean, running_variance, eps, r_max, d_max):
    """Algorithm 1:  r = clip(sigma_B / sigma),  d = clip((mu_B - mu) / sigma)"""
    sigma_b, sigma = np.sqrt(real(variance) + eps), np.sqrt(real(running_variance) + eps)
    r = np.clip(sigma_b / sigma, 1 / real(r_max), r_max)
    d = np.clip((real(mean) - real(running_mean)) / sigma, -d_max, d_max)
    return r, d


def renormalized(x, mean, variance, r, d, gamma, beta, eps, axis=1, residual=None):
    """x^_i = (x_i - mu_B) / sigma_B r + d,  y_i = gamma x^_i + beta"""
    x_hat = normalized(x, mean, variance, eps, axis)
    x_hat = x_hat * to_shape(r, x_hat, axis) + to_shape(d, x_hat, axis)
    y = to_shape(gamma, x_hat, axis) * x_hat + to_shape(beta, x_hat, axis)
    return y if residual is None else y + real(residual)


def renorm_forward(
    x, weights, r, d, gamma, beta, eps, axis=1, residual=None, activation=None
):  # fmt: skip
    mu, sigma2 = weighted_mean(x, weights, axis), weighted_variance(x, weights, axis)
    return activate(renormalized(x, mu, sigma2, r, d, gamma, beta, eps, axis, residual), activation)


def renorm_backward(
    dy, x, weights, r, d, gamma, beta, eps, axis=1, residual=None, activation=None
):  # fmt: skip
    """The five equations of its section 3, in their order; r and d are constants, and w_i / W is
    the paper's 1 / m.
    """
    x = real(x)
    share = weights / to_shape(over_channel(np.sum, weights, axis), x, axis)
    mu, sigma2 = weighted_mean(x, weights, axis), weighted_variance(x, weights, axis)
    z = renormalized(x, mu, sigma2, r, d, gamma, beta, eps, axis, residual)
    dl_dy = real(dy) * activation_slope(z, activation)
    centered, sigma = x - to_shape(mu, x, axis), np.sqrt(to_shape(sigma2, x, axis) + eps)
    wide_r, wide_d = to_shape(r, x, axis), to_shape(d, x, axis)

    dl_dx_hat = dl_dy * to_shape(gamma, x, axis)
    dl_dsigma = over_channel(np.sum, dl_dx_hat * centered * -wide_r / sigma**2, axis)
    dl_dmu = over_channel(np.sum, dl_dx_hat * -wide_r / sigma, axis)
    dl_dx = (
        dl_dx_hat * wide_r / sigma
        + to_shape(dl_dsigma, x, axis) * centered * share / sigma
        + to_shape(dl_dmu, x, axis) * share
    )
    dl_dgamma = over_channel(np.sum, dl_dy * (centered / sigma * wide_r + wide_d), axis)
    dl_dbeta = over_channel(np.sum, dl_dy, axis)
    return Gradients(dl_dx, dl_dgamma, dl_dbeta, dl_dy)


# --- Nonlinearities: section 3.2's g in  z = g(BN(Wu)) -------------------------


def name_and_slope(activation):
    """("leaky_relu", slope) gives the slope; "leaky_relu" has the usual 0.01."""
    return activation if isinstance(activation, tuple) else (activation, 0.01)


def activate(z, activation):
    """g(z)"""
    name, slope = name_and_slope(activation)
    return {
        None: lambda: z,
        "relu": lambda: np.maximum(z, 0),
        "relu6": lambda: np.minimum(np.maximum(z, 0), 6),
        "leaky_relu": lambda: np.where(z > 0, z, slope * z),
        "hardswish": lambda: z * (np.clip(z + 3, 0, 6) / 6),
        "sigmoid": lambda: sigmoid(z),
        "tanh": lambda: np.tanh(z),
        "silu": lambda: z * sigmoid(z),
        "gelu": lambda: z * normal_distribution(z),
    }[name]()


def activation_slope(z, activation):
    """g'(z); at a kink PyTorch's choice: the slope from the left of 0 and -3 and
    from the right of 6 and 3."""
    name, slope = name_and_slope(activation)
    return {
        None: lambda: np.ones_like(z),
        "relu": lambda: np.where(z > 0, 1, 0),
        "relu6": lambda: np.where((z > 0) & (z < 6), 1, 0),
        "leaky_relu": lambda: np.where(z > 0, 1, slope),
        "hardswish": lambda: np.where(z <= -3, 0, np.where(z >= 3, 1, z / 3 + 0.5)),
        "sigmoid": lambda: sigmoid(z) * sigmoid(-z),
        "tanh": lambda: np.cosh(z) ** -2,
        "silu": lambda: sigmoid(z) * (1 + z * sigmoid(-z)),
        "gelu": lambda: normal_distribution(z) + z * normal_density(z),
    }[name]()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def normal_density(z):
    """phi(z)"""
    pi = wide(PI[0]) + PI[1]
    return np.exp(-z * z / 2) / np.sqrt(2 * pi)


def normal_distribution(z):
    """Phi(z), the integral of phi up to z, also where it is tiny: NumPy has none.

    For |z| below 2 by 1/2 + phi(z) (z + z^3/3 + z^5/(3*5) + ...); beyond by Laplace's fraction for
    the tail, phi(a) / (a + 1/(a + 2/(a + 3/(a + ...)))), from the inside.
    """
    near = np.clip(z, -2, 2)
    term = total = near
    for odd in range(3, 100, 2):
        term = term * near * near / odd
        total = total + term
    a = np.maximum(np.abs(z), 2)
    fraction = a
    for k in range(150, 0, -1):
        fraction = a + k / fraction
    tail = normal_density(a) / fraction
    beyond = np.where(z < 0, tail, 1 - tail)
    return np.where(np.abs(z) < 2, 0.5 + normal_density(near) * total, beyond)
