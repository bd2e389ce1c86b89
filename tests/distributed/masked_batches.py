"""Batches whose ranks have masks, and what they must give: by formulas over the whole batch."""

import numpy as np
import reference
from cases import bits, make_problem
from splits import SHAPES, rows_of
from tolerance import ACTIVATIONS, U, assert_within, unit
from wide import wide

# What a rank's mask is: rank 1 has the odd one.
KINDS = {
    "bool": ("bool", "bool"),
    "weights": ("weights", "weights"),
    "weights on one rank": ("bool", "weights"),
    "no mask on one rank": ("weights", None),
    "nothing counted on one rank": ("weights", "nothing"),
    "nothing counted, no mask elsewhere": (None, "nothing"),
}
PROBLEMS = {
    f"{kind}, {layout}, {split}, {np.dtype(dtype).name}, {activation}{', residual' * residual}": (
        kind,
        split,
        {"shape": SHAPES[layout], "dtype": dtype, "activation": activation, "residual": residual},
    )
    for kind in KINDS
    for layout in SHAPES
    for split in ("uneven", "an empty rank")
    for dtype, activation, residual in (
        (np.float32, None, False),
        (np.float64, "relu", True),
        (np.float32, "silu", True),
    )
}
# In units of the type's roundoff and of the largest value: some ten roundings of a value, and three
# terms of a gradient.
ROUNDINGS, ROUNDINGS_OF_GRADIENTS = 16, 64


def problem(name, size):
    """A problem, each rank's rows, their masks, and the weights of the whole batch."""
    kind, split, options = PROBLEMS[name]
    p = make_problem(**options, seed=1)
    p.x[:, 1] += 1000
    n, _, *rest = p.x.shape
    drawn = np.random.default_rng(4).integers(0, 9, (n, *rest)) / 4
    drawn[-1] = 0.75  # two values at least, whatever is left out
    drawn[0] = 1.25
    cuts = [rows_of(split, rank, size) for rank in range(size)]
    masks, weights = [], np.empty(drawn.shape)
    for rank, cut in enumerate(cuts):
        found = {
            "bool": drawn[cut] > 0.5,
            "weights": drawn[cut],
            "nothing": np.zeros(drawn[cut].shape, bool),
            None: None,
        }[KINDS[kind][rank == 1]]
        masks.append(found)
        weights[cut] = 1 if found is None else found
    nothing = np.broadcast_to((weights == 0)[:, None], p.x.shape)
    p.x[nothing], p.dy[nothing] = np.nan, 0
    return p, cuts, masks, weights


class Whole:
    """The step of one process on the whole batch."""

    def __init__(self, p, weights, ddof=1):
        x, gamma, beta, eps, _, residual, activation = p.exact()
        x = np.nan_to_num(x)
        w = wide(np.broadcast_to(weights[:, None], x.shape))
        total = w[:, 0].sum()
        self.mean = reference.over_channel(np.sum, w * x, 1) / total
        d = x - reference.to_shape(self.mean, x, 1)
        var = reference.over_channel(np.sum, w * d * d, 1) / total
        self.var = var * total / (total - ddof)
        self.counts = w > 0
        z = reference.before_activation(x, self.mean, var, gamma, beta, eps, 1, residual)
        for kink in ACTIVATIONS[reference.name_and_slope(activation)[0]].kinks:
            assert np.abs(z - kink).min() > 1e-6, "rounding decides the gradient at a kink"
        self.y = reference.activate(z, activation)
        g = wide(p.dy) * reference.activation_slope(z, activation)
        x_hat = reference.normalized(x, self.mean, var, eps)
        self.weight = reference.over_channel(np.sum, g * x_hat, 1)
        self.bias = reference.over_channel(np.sum, g, 1)
        through = reference.to_shape(self.bias, x, 1) + x_hat * reference.to_shape(
            self.weight, x, 1
        )
        scale = reference.to_shape(gamma / np.sqrt(var + eps), x, 1)
        self.dx, self.residual = scale * (g - w / total * through), g


def check_step(p, weights, of, momentum):
    """Compare the results of all ranks with the step of one process."""
    whole = Whole(p, weights)
    # The mean has float64's digits, of which deviations lose those of the mean's size.
    u = unit(p.x.dtype) + U * float(np.abs(whole.mean / np.sqrt(whole.var)).max())

    def check(got, want, roundings, what):
        assert_within(got, want, roundings * u * np.abs(want).max(), what)

    def together(name):
        """What all ranks have, without garbage where nothing is counted."""
        return np.where(whole.counts, np.concatenate([rank[name] for rank in of]), 0)

    check(together("y"), np.where(whole.counts, whole.y, 0), ROUNDINGS, "y")
    dx = np.where(whole.counts, whole.dx, 0)
    check(together("dx"), dx, ROUNDINGS_OF_GRADIENTS, "dx")
    if p.residual is not None:
        g = np.where(whole.counts, whole.residual, 0)
        check(together("dresidual"), g, ROUNDINGS_OF_GRADIENTS, "dresidual")
    for name in ("weight", "bias"):
        total = sum(wide(rank[f"{name}_grad"]) for rank in of)
        check(total, getattr(whole, name), ROUNDINGS_OF_GRADIENTS, name)
    for key, old, new in (("running_mean", 0, whole.mean), ("running_var", 1, whole.var)):
        assert len({bits(rank[key]) for rank in of}) == 1
        want = reference.running_average(old, new, wide(momentum))
        check(of[0][key], want, ROUNDINGS, key)
    assert all(rank["num_batches_tracked"] == 1 for rank in of)


# ---- Batches that have no variance: each rank's mask of four rows


def nothing(rank):
    return np.zeros(4, bool)


def one(rank):
    return np.arange(4) == (0 if rank == 1 else 9)


def one_of_weight_three(rank):
    return 3.0 * one(rank)


def weights_of_one_together(rank):
    return np.full(4, 0.01)


TOO_LITTLE = {
    nothing: "Expected more than 1 value per channel when training, got masks that count 0 on all",
    one: "Expected more than 1 value per channel when training, got masks that count 1 on all",
    one_of_weight_three: "Expected more than 1 value per channel when training, got masks that cou",
    weights_of_one_together: "the masks' weights sum to ",
}
