"""What a mask costs, and what a loop over ghost batches costs: forward and backward, float32.

    python -m bench.studies.batch_kinds [--threads 1] [--rounds 15] [--quick]

Masks, on (32, 512, 500) as (N, C, L) and as (N, L, C): no mask; half of each sequence on average,
as padding leaves it; half of the values at random; weights. Beside bnfast are the ways to do the
same in PyTorch: by the formulas (autograd), and by taking the values that count out of the array
and putting the results back. Flax and Keras (on JAX, compiled) take bool masks; Keras' are for
(N, L, C). Ghost batches: one call, a loop over bnfast's calls, the loop of TabNet for PyTorch, and
all rows as one batch.

All contestants of a table take turns. A ratio is the median over the rounds of one contestant's
time over another's in the same round. Every answer is compared with the formulas in float64, before
it is timed. What is not installed is left out, with the reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

import bnfast
from bench.harness import machine
from bench.harness.compiled import Missing
from bench.harness.timing import Contestant, measure
from bench.report.table import number, table

EPS = 1e-5
SPEECH, FEATURES = (32, 512, 500), (16384, 128)
GHOSTS = (128, 512)
MASKS = ("none", "lengths", "random", "weights")
WRONG = 1e-3
REST = 10e-3  # seconds: XLA's threads do not run beside OpenMP's, which spin for a while
Step = Callable[[], Any]


class Answer(NamedTuple):
    """Output and gradient of a step."""

    y: np.ndarray
    dx: np.ndarray


class Problem(NamedTuple):
    """A batch in one layout, with a mask or without one."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None  # (N, L)
    axis: int

    @property
    def channels(self) -> int:
        return self.x.shape[self.axis]

    @property
    def broadcast(self) -> np.ndarray | None:
        """The mask with the rank of x."""
        return None if self.mask is None else np.expand_dims(self.mask, self.axis)


def mask_of(kind: str, n: int, length: int, rng: np.random.Generator) -> np.ndarray | None:
    if kind == "none":
        return None
    if kind == "weights":
        return rng.uniform(0.1, 2, (n, length)).astype(np.float32)
    if kind == "random":
        return rng.random((n, length)) < 0.5
    # As many sequences shorter than half as longer ones.
    lengths = np.linspace(length // 20, length - length // 20, n).round().astype(int)
    return bnfast.lengths_mask(rng.permutation(lengths), length)


def problem(shape: tuple[int, int, int], layout: str, kind: str) -> Problem:
    rng = np.random.default_rng(0)
    n, channels, length = shape
    sizes = shape if layout == "NCL" else (n, length, channels)
    axis = 1 if layout == "NCL" else 2
    mask = mask_of(kind, n, length, rng)
    x = rng.standard_normal(sizes, np.float32) + np.float32(1)
    dy = rng.standard_normal(sizes, np.float32)
    if mask is not None and mask.dtype == bool:
        dy *= np.expand_dims(mask, axis)  # a loss that ignores what does not count
    return Problem(x, dy, mask, axis)


def right_answer(p: Problem) -> Answer:
    """The formulas, in float64."""
    axes = tuple(k for k in range(p.x.ndim) if k != p.axis)
    x, dy = p.x.astype(np.float64), p.dy.astype(np.float64)
    w = np.ones((1, 1, 1)) if p.mask is None else p.broadcast.astype(np.float64)
    total = np.broadcast_to(w, [1 if k == p.axis else n for k, n in enumerate(x.shape)]).sum()
    mean = (w * x).sum(axes, keepdims=True) / total
    inv_std = 1 / np.sqrt((w * (x - mean) ** 2).sum(axes, keepdims=True) / total + EPS)
    y = (x - mean) * inv_std
    through = dy.sum(axes, keepdims=True) + y * (dy * y).sum(axes, keepdims=True)
    return Answer(y, inv_std * (dy - w * through / total))


def error(found: Answer, right: Answer) -> float:
    return max(
        float(np.max(abs(a - b)) / np.max(abs(b))) for a, b in zip(found, right, strict=True)
    )


# ---- contestants: a problem -> a step, and how to read what it returns


def ours(p: Problem) -> tuple[Step, Callable[[Any], Answer]]:
    y, dx = np.empty_like(p.x), np.empty_like(p.x)
    weight, bias = np.ones(p.channels, np.float32), np.zeros(p.channels, np.float32)
    named = {"axis": p.axis, "mask": p.mask}

    def step() -> Answer:
        _, stats = bnfast.batch_norm_forward(p.x, weight, bias, eps=EPS, out=y, **named)
        bnfast.batch_norm_backward(p.dy, p.x, stats, weight, bias, out=dx, **named)
        return Answer(y, dx)

    return step, lambda answer: answer


def torch_of() -> Any:
    try:
        import torch
    except ImportError as missing:
        raise Missing("torch is not installed") from missing
    return torch


def torch_step(p: Problem, forward: Callable[..., Any]) -> tuple[Step, Callable[[Any], Answer]]:
    """Return a step of a function of x, weight and bias under autograd."""
    torch = torch_of()
    x, dy = torch.from_numpy(p.x).requires_grad_(), torch.from_numpy(p.dy)
    weight, bias = torch.ones(p.channels).requires_grad_(), torch.zeros(p.channels).requires_grad_()

    def step() -> Any:
        y = forward(x, weight, bias)
        return y.detach(), torch.autograd.grad(y, (x, weight, bias), dy)[0]

    return step, lambda found: Answer(*(tensor.numpy() for tensor in found))


def torch_formulas(p: Problem) -> tuple[Step, Callable[[Any], Answer]]:
    """A masked batch norm as it is written by hand; without a mask, PyTorch's own."""
    torch = torch_of()
    if p.mask is None:
        return torch_step(p, lambda x, *params: own_batch_norm(x, p.axis, params))
    w = torch.from_numpy(p.broadcast.astype(np.float32))
    axes = tuple(k for k in range(p.x.ndim) if k != p.axis)
    shape = [-1 if k == p.axis else 1 for k in range(p.x.ndim)]

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        total = w.sum()
        mean = (x * w).sum(axes, keepdim=True) / total
        centred = x - mean
        var = (w * centred.square()).sum(axes, keepdim=True) / total
        scale = torch.rsqrt(var + EPS) * weight.view(shape)
        return centred * scale + bias.view(shape)

    return torch_step(p, forward)


def own_batch_norm(x: Any, axis: int, parameters: tuple[Any, Any]) -> Any:
    torch = torch_of()
    y = torch.nn.functional.batch_norm(
        x.movedim(axis, 1), None, None, *parameters, training=True, eps=EPS
    )
    return y.movedim(1, axis)


def torch_gathered(p: Problem) -> tuple[Step, Callable[[Any], Answer]]:
    """The values that count in an array of their own, and the results put back; zero elsewhere."""
    torch = torch_of()
    if p.mask is None or p.mask.dtype != bool:
        raise Missing("for bool masks")
    mask = torch.from_numpy(p.mask)

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        last = x.movedim(p.axis, -1)
        rows = torch.nn.functional.batch_norm(
            last[mask], None, None, weight, bias, training=True, eps=EPS
        )
        return torch.zeros_like(last).masked_scatter(mask[..., None], rows).movedim(-1, p.axis)

    return torch_step(p, forward)


def jax_step(p: Problem, forward: Callable[..., Any], *arguments: Any) -> Any:
    """Return a compiled step of a function of x and the arguments."""
    import jax

    @jax.jit
    def both(x: Any, dy: Any, *arguments: Any) -> Any:
        y, backward = jax.vjp(forward, x, *arguments)
        return y, *backward(dy)

    given = [jax.device_put(array) for array in (p.x, p.dy)]
    return (
        lambda: jax.block_until_ready(both(*given, *arguments)),
        lambda found: Answer(np.asarray(found[0]), np.asarray(found[1])),
    )


def flax_layer(p: Problem) -> tuple[Step, Callable[[Any], Answer]]:
    try:
        import flax.linen
        import jax
    except ImportError as missing:
        raise Missing(f"{missing.name} is not installed") from missing
    if p.mask is not None and p.mask.dtype != bool:
        raise Missing("flax has no weights")
    layer = flax.linen.BatchNorm(use_running_average=False, axis=p.axis, epsilon=EPS)
    variables = layer.init(jax.random.key(0), p.x)
    mask, stats = p.broadcast, variables["batch_stats"]

    def forward(x: Any, params: Any) -> Any:
        given = {"params": params, "batch_stats": stats}
        return layer.apply(given, x, mask=mask, mutable=["batch_stats"])[0]

    return jax_step(p, forward, variables["params"])


def keras_layer(p: Problem) -> tuple[Step, Callable[[Any], Answer]]:
    try:
        import jax  # noqa: F401  # the backend
        import keras
    except ImportError as missing:
        raise Missing(f"{missing.name} is not installed") from missing
    if keras.backend.backend() != "jax":
        raise Missing(f"keras runs on {keras.backend.backend()}; expected jax")
    if p.mask is not None and (p.mask.dtype != bool or p.axis != 2):
        raise Missing("keras has bool masks of (N, L, C)")
    layer = keras.layers.BatchNormalization(axis=p.axis, epsilon=EPS)
    layer.build(p.x.shape)
    fixed = [variable.value for variable in layer.non_trainable_variables]

    def forward(x: Any, parameters: Any) -> Any:
        return layer.stateless_call(parameters, fixed, x, training=True, mask=p.mask)[0]

    return jax_step(p, forward, [variable.value for variable in layer.trainable_variables])


MASKED = {
    "bnfast": ours,
    "torch, formulas": torch_formulas,
    "torch, gathered": torch_gathered,
    "flax": flax_layer,
    "keras": keras_layer,
}
BASES = {"torch, gathered": "torch, formulas"}  # whose time without a mask is also another's
ON_XLA = ("flax", "keras")


# ---- ghost batches


def ghost_call(x: np.ndarray, dy: np.ndarray, size: int) -> Step:
    layer = bnfast.BatchNorm1d(x.shape[1], eps=EPS, virtual_batch_size=size)
    y = np.empty_like(x)

    def step() -> Answer:
        return Answer(layer(x, out=y), layer.backward(dy))

    return step


def ghost_loop(x: np.ndarray, dy: np.ndarray, size: int) -> Step:
    layers = [bnfast.BatchNorm1d(x.shape[1], eps=EPS) for _ in range(0, len(x), size)]
    y, dx = np.empty_like(x), np.empty_like(x)
    parts = [slice(start, start + size) for start in range(0, len(x), size)]

    def step() -> Answer:
        for layer, rows in zip(layers, parts, strict=True):
            layer(x[rows], out=y[rows])
        for layer, rows in zip(layers, parts, strict=True):
            dx[rows] = layer.backward(dy[rows])
        return Answer(y, dx)

    return step


def ghost_torch(x: np.ndarray, dy: np.ndarray, size: int) -> Step:
    """The loop of TabNet for PyTorch: chunk, one layer for all, cat."""
    torch = torch_of()
    layer = torch.nn.BatchNorm1d(x.shape[1], eps=EPS)
    given, gradient = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)
    count = -(-len(x) // size)

    def step() -> Answer:
        y = torch.cat([layer(rows) for rows in given.chunk(count)])
        dx = torch.autograd.grad(y, (given, *layer.parameters()), gradient)[0]
        return Answer(y.detach().numpy(), dx.numpy())

    return step


GHOSTLY = {
    "bnfast, one call": ghost_call,
    "bnfast, a loop": ghost_loop,
    "torch, a loop": ghost_torch,
}


# ---- measuring


def checked(
    name: str, step: Step, read: Callable[[Any], Answer], right: Answer, p: Problem
) -> None:
    """End the study at a wrong answer; where nothing counts, ways may differ."""
    found = read(step())
    if p.mask is not None and p.mask.dtype == bool:
        found, right = (Answer(*(a * p.broadcast for a in both)) for both in (found, right))
    if not (wrong := error(found, right)) < WRONG:
        raise SystemExit(f"{name} is wrong by {wrong:.1e}")


def over(one: Contestant, other: Contestant) -> float:
    """The median of one's time over the other's, of the rounds that both took part in."""
    shared = one.times.keys() & other.times.keys()
    return statistics.median(one.times[k] / other.times[k] for k in shared)


def masks(layout: str, shape: tuple[int, int, int], rounds: int) -> list[str]:
    """Return a table: a row for each mask and contestant, all timed in turn."""
    contestants, reasons = {}, []
    for kind in MASKS:
        p = problem(shape, layout, kind)
        right = right_answer(p)
        for name, make in MASKED.items():
            try:
                step, read = make(p)
            except Missing as reason:
                if kind == "none" and "installed" in str(reason):
                    reasons.append(f"{name} left out: {reason}")
                continue
            checked(f"{name}, {layout}, {kind}", step, read, right, p)
            rest = REST if name in ON_XLA else 0.0
            contestants[kind, name] = Contestant(f"{kind} {name}", [step], rest)
    measure(list(contestants.values()), rounds, budget=8.0, fewest=5)
    rows = []
    for (kind, name), contestant in contestants.items():
        plain = contestants.get(("none", BASES.get(name, name)))
        same = contestants[kind, "bnfast"]
        median = statistics.median(contestant.times.values())
        ratios = ["" if base is None else f"{over(contestant, base):.2f}" for base in (plain, same)]
        rows.append([kind, name, number(1e3 * median), *ratios])
    header = ["mask", "who", "ms", "over no mask", "over bnfast"]
    return [f"{layout} {shape}", *table(header, rows, markdown=True), *reasons]


def ghosts(shape: tuple[int, int], rounds: int) -> list[str]:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    rows, reasons = [], []
    for size in GHOSTS:
        parts = [
            right_answer(Problem(x[k : k + size, :, None], dy[k : k + size, :, None], None, 1))
            for k in range(0, len(x), size)
        ]
        right = Answer(*(np.concatenate(part)[..., 0] for part in zip(*parts, strict=True)))
        contestants = {}
        for name, make in GHOSTLY.items():
            try:
                step = make(x, dy, size)
            except Missing as reason:
                reasons.append(f"{name} left out: {reason}")
                continue
            checked(f"{name}, {size}", step, lambda a: a, right, Problem(x, dy, None, 1))
            contestants[name] = Contestant(name, [step])
        contestants["bnfast, all rows"] = Contestant("all rows", [ghost_call(x, dy, len(x))])
        measure(list(contestants.values()), rounds, budget=8.0, fewest=5)
        first = contestants["bnfast, one call"]
        for name, contestant in contestants.items():
            median = statistics.median(contestant.times.values())
            rows.append([str(size), name, number(1e3 * median), f"{over(contestant, first):.2f}"])
    header = ["rows a run", "who", "ms", "over one call"]
    return [f"ghost batches of {shape}", *table(header, rows, markdown=True), *reasons]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small arrays, five rounds")
    options = parser.parse_args(arguments)
    speech, features = (SPEECH, FEATURES) if not options.quick else ((4, 64, 50), (1024, 32))
    rounds = 5 if options.quick else options.rounds

    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["NPROC"] = str(options.threads)  # XLA's threads
    bnfast.set_num_threads(options.threads)
    with suppress(Missing):  # said with the tables
        torch_of().set_num_threads(options.threads)

    before = machine.cpu_seconds()
    tables = [masks(layout, speech, rounds) for layout in ("NCL", "NLC")]
    tables.append(ghosts(features, rounds))
    described = machine.describe() | {"others": machine.share_of_others(before)}
    print("\n".join(machine.lines(described)), f"threads: {options.threads}", sep="\n")
    for lines in tables:
        print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
