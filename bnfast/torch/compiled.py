"""The backend of `torch.compile` that fuses batch norms with the operations after them."""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import GraphModule

_log = logging.getLogger("bnfast")


def backend(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compile a graph for ``torch.compile(model, backend="bnfast")``.

    Three operations become one call of a bnfast operator: the batch norm, the addition of a tensor
    of the same shape after it, and the activation after that (ReLU, ReLU6, LeakyReLU). Their
    gradients become one call, too. They are fused only if nothing else reads the values between
    them. All other operations run unchanged, with PyTorch's own operators. No code is generated and
    no compiler is needed. `torch.compile` calls this function; ``backend=bnfast.torch.backend``
    means the same as the name.

    Parameters
    ----------
    gm : torch.fx.GraphModule
        The graph that Dynamo captured.
    example_inputs : sequence of Tensor
        The inputs that it was captured with.
    **options
        No options are accepted.

    Returns
    -------
    callable
        A function of the graph's inputs.

    Raises
    ------
    ValueError
        If `torch.compile` was given options or a mode.

    See Also
    --------
    report : what was fused in this process, and why the rest was not.
    """
    if options:
        name, given = next(iter(options.items()))
        raise ValueError(f"{name} is {given!r:.60}; expected none: the backend has no options")
    from .capture import compiler  # it imports parts of PyTorch that take a second to load

    return compiler(gm, example_inputs)


# ---- What was fused

_lock = Lock()
_fused: Counter[str] = Counter()
_apart: Counter[str] = Counter()


def count(fused: Counter[str], apart: Counter[str]) -> None:
    """Add the counts of one graph: what its batch norms became, and why not more was fused."""
    with _lock:
        _fused.update(fused)
        _apart.update(apart)
    for what, times in fused.items():
        _log.info("%s became one operation, %d times", what, times)
    for why, times in apart.items():
        _log.info("%d batch norms were not fused (further): %s", times, why)


def fused_so_far() -> tuple[dict[str, int], dict[str, int]]:
    """Return what batch norms became in the graphs of this process, and why some were not fused."""
    with _lock:
        return dict(_fused), dict(_apart)
