"""JAX: batch normalization as Flax writes it, compiled by XLA, with donated outputs.

An array that is donated to a call becomes its result, so no call asks for memory. A backward is
timed twice: `jax` is given what `jax.vjp` kept of a forward, `jax again` is one compiled function
of forward and gradients, in which XLA may compute again what it likes instead of reading it. It is
used with float32 only.

XLA has threads of its own, which wait for work without spinning. OpenMP's spin for some
milliseconds after each call and would occupy the cores that XLA needs, so it rests before its turn.
How many threads it has is asked for once, in the environment variable NPROC, when it makes a
client. A second client for another number is made after `clear_backends`, and each case's arrays
belong to the client with as many threads as the row's. With NPROC=1 all of a call runs in one
thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from bench.harness import compiled
from bench.harness.cases import EPS, Buffers, Case, Data, Run

try:
    import jax
    import jax.numpy as jnp
    from jax.extend import backend
except ImportError as error:
    raise compiled.Missing(f"{error.name} is not installed") from error
except RuntimeError as error:  # a processor that it was not built for
    raise compiled.Missing(f"jax does not start: {error}") from error

ACTIVATIONS = {None: lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}
Function = Callable[..., Any]


class Jax:
    name = "jax"
    rest = 10e-3
    version = jax.__version__

    def __init__(self) -> None:
        jax.config.update("jax_platforms", "cpu")
        # A call waits for its result anyway; handed to another thread it takes longer.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self.devices: dict[int, Any] = {}
        self.row: tuple[Data, str, int] | None = None

    def set_threads(self, n: int) -> None:
        if n not in self.devices:
            self.devices[n] = _device(n)
        self.threads, self.device = n, self.devices[n]

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        case = data.case
        if case.dtype != "float32":
            return {}
        row = (data, step, self.threads)
        if self.row != row:
            self.row, self.compiled = row, _Compiled(_functions(case, step))
        large = (buffers.x, buffers.residual, buffers.dy)
        x, residual, dy = (jax.device_put(array, self.device) for array in large)
        vectors = (data.weight, data.bias, data.mean, data.var)
        weight, bias, mean, var = (jax.device_put(vector, self.device) for vector in vectors)
        given = (weight, bias, *([residual] if case.adds else []))
        if step != "backward":
            return {"jax": self._run("jax", x, x, mean, var, *given)}
        kept = self.compiled.kept(x, *given)
        return {
            "jax": self._run("jax", x, kept, dy),
            "jax again": self._run("jax again", x, dy, x, *given),
        }

    def _run(self, name: str, like: Any, *arguments: Any) -> Run:
        return Run(_Call(self.compiled, name, like, arguments), _answer)


def _device(threads: int) -> Any:
    """Return the processor as a device of XLA's, with as many threads."""
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(threads)
    backend.clear_backends()
    try:
        return jax.devices("cpu")[0]
    finally:
        del os.environ["NPROC"]
        if before is not None:
            os.environ["NPROC"] = before


def _answer(found: Any) -> list[np.ndarray]:
    """Return y; or dx, the gradients of weight and bias, and the residual's."""
    (first, *others), gradients = found
    return [np.asarray(array) for array in (first, *gradients, *others)]


class _Compiled:
    """The functions of a row, compiled once for all its sets of arrays."""

    def __init__(self, functions: dict[str, Function]) -> None:
        self.functions = functions
        self.executables: dict[str, Function] = {}

    def executable(self, name: str, outputs: list[Any], arguments: tuple[Any, ...]) -> Function:
        if name not in self.executables:
            function = self.functions[name]

            def given_outputs(outputs: list[Any], *arguments: Any) -> Any:
                return function(*arguments)

            jitted = jax.jit(given_outputs, donate_argnums=0, keep_unused=True)
            self.executables[name] = jitted.lower(outputs, *arguments).compile()
        return self.executables[name]

    @cached_property
    def kept(self) -> Function:
        """What a forward keeps for its backward, which is a function of dy."""
        normalized = self.functions["normalized"]
        return jax.jit(lambda *given: jax.vjp(normalized, *given)[1])


class _Call:
    """A compiled function, its arguments, and the arrays that are its large results in turn.

    The function returns large results, which are shaped as `like`, and what else is the answer.
    What is computed beside these (running statistics) comes last.
    """

    def __init__(
        self, compiled: _Compiled, name: str, like: Any, arguments: tuple[Any, ...]
    ) -> None:
        count = len(jax.eval_shape(compiled.functions[name], *arguments)[0])
        self.arguments, self.outputs = arguments, [jnp.zeros_like(like) for _ in range(count)]
        self.run = compiled.executable(name, self.outputs, arguments)

    def __call__(self) -> Any:
        self.outputs, *others = jax.block_until_ready(self.run(self.outputs, *self.arguments))
        return self.outputs, others[0]


def _functions(case: Case, step: str) -> dict[str, Function]:
    if step == "forward":
        return {"jax": _training(case)}
    if step == "inference":
        return {"jax": _inference(case)}
    return {
        "normalized": _normalized(case),
        "jax": lambda kept, dy: _sorted(kept(dy)),
        "jax again": _gradients(case),
    }


def _moments(x: Any, axis: int) -> tuple[Any, Any]:
    """Return mean and variance as Flax computes them: from the sums of x and of its squares."""
    axes = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
    mean = x.mean(axes)
    return mean, jnp.maximum(0, jnp.square(x).mean(axes) - jnp.square(mean))


def _applied(case: Case, x: Any, mean: Any, var: Any, weight: Any, bias: Any, *added: Any) -> Any:
    shape = [1] * x.ndim
    shape[case.axis] = -1
    scale = jax.lax.rsqrt(var + EPS) * weight
    z = (x - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)
    return ACTIVATIONS[case.activation](sum(added, z))


def _inference(case: Case) -> Function:
    return lambda *given: ([_applied(case, *given)], [])


def _training(case: Case) -> Function:
    def function(x: Any, mean: Any, var: Any, *rest: Any) -> Any:
        now = _moments(x, case.axis)
        running = [0.9 * old + 0.1 * new for old, new in zip((mean, var), now, strict=True)]
        return [_applied(case, x, *now, *rest)], [], running

    return function


def _normalized(case: Case) -> Function:
    return lambda x, *rest: _applied(case, x, *_moments(x, case.axis), *rest)


def _sorted(gradients: Any) -> Any:
    """Return the large gradients, and those of weight and bias."""
    dx, dweight, dbias, *added = gradients
    return [dx, *added], [dweight, dbias]


def _gradients(case: Case) -> Function:
    return lambda dy, *given: _sorted(jax.vjp(_normalized(case), *given)[1](dy))
