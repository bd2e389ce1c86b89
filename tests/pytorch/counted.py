"""Batch norms of what a mask counts, as formulas in float64 that autograd differentiates."""

import copy

import tolerance
import torch
from layers import CLASSES, leaf

from bnfast.torch.fused import activate

EPS = 1e-5
# What rounding may change, in units of the type's roundoff and of the largest result. A value
# passes some ten roundings, its statistics pass 16 in float32 (tolerance.BATCH_VARIANCE); a
# gradient is a sum of three such terms, none of which is larger than the largest result by much.
ROUNDINGS = {"y": 16, "dx": 64, "sum": 64, "running": 24}


def statistics(x, weights):
    """Mean, biased variance and the sum of weights; `weights` has one channel."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    weights = weights.expand(x.shape[0], 1, *x.shape[2:])
    counts, nothing = weights > 0, x.new_zeros(())
    total = weights.sum()
    mean = (weights * torch.where(counts, x, nothing)).sum(axes) / total
    d = torch.where(counts, x - per_channel(mean, x), nothing)
    return mean, (weights * d * d).sum(axes) / total, total


def per_channel(vector, x):
    return vector.view(1, -1, *(1,) * (x.dim() - 2))


def normalized(x, weights, gamma, beta, residual=None, correction=None, eps=EPS):
    """The output before its activation, and the batch's statistics.

    `correction` gets these and returns the constants r and d of a renormalisation.
    """
    mean, var, _ = found = statistics(x, weights)
    z = (x - per_channel(mean, x)) / torch.sqrt(per_channel(var, x) + eps)
    if correction is not None:
        r, d = correction(mean.detach(), var.detach())
        z = z * per_channel(r, x) + per_channel(d, x)
    z = z if gamma is None else z * per_channel(gamma, x) + per_channel(beta, x)
    return z if residual is None else z + residual, found


class Expected:
    """What one training call must give: outputs, gradients, and the statistics of each run."""

    def __init__(self, layer, x, weights, dy, residual=None, activation=None, rows=None, **options):
        self.x = wide(x)
        self.residual = None if residual is None else wide(residual)
        self.weight, self.bias = (
            None if p is None else wide(p) for p in (layer.weight, layer.bias)
        )
        rows = rows or max(len(x), 1)
        cut = [None if t is None else t.split(rows) for t in (self.x, weights.double())]
        rest = [None] * len(cut[0]) if residual is None else self.residual.split(rows)
        runs = [
            normalized(part, own, self.weight, self.bias, beside, eps=layer.eps, **options)
            for part, own, beside in zip(*cut, rest, strict=True)
        ]
        z = torch.cat([part for part, _ in runs])
        self.statistics = [[t.detach() for t in found] for _, found in runs]
        self.dy = off_the_kinks(dy, z.detach(), activation)
        y = activate(z, activation)
        y.backward(self.dy.double())
        self.y = y.detach()
        # The first of dx's terms, which may be much larger than their sum.
        gamma = torch.ones(1) if self.weight is None else self.weight.detach()
        scales = [gamma / torch.sqrt(var + layer.eps) for _, var, _ in self.statistics]
        self.steepest = max((float(s.abs().max()) for s in scales), default=0.0)
        self.steepest *= float(self.dy.abs().max()) if len(x) else 0.0

    def running(self, mean, var, momentum, counted=0):
        """Running statistics after these runs, from those before them."""
        mean, var = mean.double(), var.double()
        for i, (new, spread, total) in enumerate(self.statistics):
            share = 1 / (counted + i + 1) if momentum is None else momentum
            mean = (1 - share) * mean + share * new
            var = (1 - share) * var + share * spread * total / (total - 1)
        return mean, var


def wide(t):
    return t.detach().double().requires_grad_()


def off_the_kinks(dy, z, activation):
    """dy with zeros where rounding may decide the side of a kink."""
    width = 0.1 if dy.element_size() == 2 else 1e-3
    name = activation[0] if isinstance(activation, tuple) else activation
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in tolerance.ACTIVATIONS[name].kinks:
        near |= (z - kink).abs() < width
    kept = torch.empty_strided(dy.shape, dy.stride(), dtype=dy.dtype)
    return kept.copy_(torch.where(near, torch.zeros_like(dy), dy))


def close(got, want, dtype, what, roundings, largest=0.0):
    """Within so many roundings of a type, of the largest value; stored halves are rounded once."""
    assert got.shape == want.shape, what
    got, want = got.detach().double(), want.detach()
    largest = max(largest, float(want.abs().max())) if want.numel() else 0.0
    computed = torch.float64 if dtype is torch.float64 else torch.float32
    bound = roundings * torch.finfo(computed).eps / 2 * largest
    if dtype is not computed:
        bound = bound + torch.finfo(dtype).eps / 2 * (want.abs() + bound)
    wrong = ~((got - want).abs() <= bound)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()}, up to "
        f"{float((got - want).abs().max() / (torch.finfo(computed).eps / 2 * largest))} roundings"
    )


def check(layer, x, weights, given, *, residual=False, activation=None, garbage=None, **options):
    """One step of a layer, compared with the formula. Returns its output.

    `given` is the mask as the layer gets it, and `weights` what it means. `garbage` is written
    under the mask, where dy is then 0.
    """
    dtype, kept = x.dtype, torch.float64 if x.dtype is torch.float64 else torch.float32
    dy = like(x, torch.randn(x.shape))
    beside = like(x, torch.randn(x.shape)) if residual else None
    out = (weights == 0).expand_as(x)
    if garbage is not None:
        dy = like(dy, dy.masked_fill(out, 0))
    old = [None if t is None else t.clone() for t in (layer.running_mean, layer.running_var)]
    before = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    rows = layer.virtual_batch_size
    want = Expected(layer, x, weights, dy, beside, activation, rows, **options)
    mine = leaf(x if garbage is None else like(x, x.masked_fill(out, garbage)))
    r = None if beside is None else leaf(beside)
    for p in layer.parameters():
        p.grad = None

    y = layer(mine, r, activation, mask=given)
    assert y.dtype is dtype
    assert y.stride() == CLASSES[x.dim()][0](x.shape[1], dtype=kept)(x).stride()
    y.backward(want.dy)
    found, gradient, everywhere = y, mine.grad, want.y
    if garbage is not None:
        found, gradient = (t.detach().masked_fill(out, 0) for t in (found, gradient))
        everywhere = everywhere.masked_fill(out, 0)
    close(found, everywhere, dtype, "y", ROUNDINGS["y"])
    close(gradient, want.x.grad, dtype, "dx", ROUNDINGS["dx"], want.steepest)
    if residual:
        close(r.grad, want.residual.grad, dtype, "dresidual", ROUNDINGS["dx"])
    if layer.weight is not None:
        for name in ("weight", "bias"):
            got, exact = getattr(layer, name).grad, getattr(want, name).grad
            assert got.dtype is getattr(layer, name).dtype
            close(got, exact, got.dtype, name, ROUNDINGS["sum"])
    if before is not None:
        check_running(layer, want, old, before)
    return y


def check_running(layer, want, old, before):
    runs = len(want.statistics) if layer.training else 0
    assert layer.num_batches_tracked == before + runs
    names = ("running_mean", "running_var")
    moved = want.running(*old, layer.momentum, before) if runs else [t.double() for t in old]
    for name, exact in zip(names, moved, strict=True):
        got = getattr(layer, name)
        close(got, exact, got.dtype, name, ROUNDINGS["running"])


def like(x, values):
    """These values in the memory order of x."""
    return leaf(x).detach().copy_(values)


def state_of(layer):
    """Everything that a refused call must leave as it was."""
    return copy.deepcopy({**layer.state_dict(), **vars(layer)["_buffers"]})


# ---- Masks: what a layer gets, and the weights of (N, 1, ...) that it means


def some(*shape):
    """Bool of any shape, True for at least two of the first axis in every case."""
    found = torch.rand(shape) < 0.6
    found.view(-1)[:2] = True
    return found


def eighths(*shape):
    """Weights that all types hold: multiples of 1/8, some of them 0."""
    found = torch.randint(0, 17, shape) / 8
    found.view(-1)[:2] = 2
    return found


def with_channel(weights):
    return weights.unsqueeze(1)


def without_channels(make):
    def mask(n, *rest):
        found = make(n, *rest)
        return found, with_channel(found).double()

    return mask


def with_one_channel(make):
    def mask(n, *rest):
        found = make(n, 1, *rest)
        return found, found.double()

    return mask


def of_rows(n, *rest):
    found = some(n, *(1,) * len(rest))
    return found, with_channel(found).double()


def of_columns(n, *rest):
    found = eighths(1, *rest) if rest else eighths(n)
    return found, with_channel(found).double()


def of_numpy(n, *rest):
    found = some(n, *rest)
    return found.numpy(), with_channel(found).double()


def of_lists(n, *rest):
    found = eighths(n, *rest)
    return found.tolist(), with_channel(found).double()


def of_halves(n, *rest):
    found = eighths(n, *rest).bfloat16()
    return found, with_channel(found).double()


def of_doubles(n, *rest):
    found = eighths(n, *rest).double().numpy()
    return found, with_channel(torch.from_numpy(found))


def with_gaps(n, *rest):
    found = some(n, *rest, 2)[..., 0]
    return found, with_channel(found).double()


def transposed(n, *rest):
    found = eighths(*rest[::-1], n).permute(tuple(range(len(rest), -1, -1)))
    return found, with_channel(found).double()


MASKS = {
    "bool": without_channels(some),
    "bool of one channel": with_one_channel(some),
    "weights": without_channels(eighths),
    "weights of one channel": with_one_channel(eighths),
    "rows": of_rows,
    "columns": of_columns,
    "numpy": of_numpy,
    "lists": of_lists,
    "halves": of_halves,
    "doubles": of_doubles,
    "gaps": with_gaps,
    "transposed": transposed,
    "all": lambda n, *rest: (torch.ones(n, *rest), torch.ones(n, 1, *rest).double()),
}


def mask_for(kind, x):
    """A mask for x, and its weights in the shape (N, 1, ...)."""
    n, _, *rest = x.shape
    given, weights = MASKS[kind](n, *rest)
    return given, weights.expand(n, 1, *rest)
