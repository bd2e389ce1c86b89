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

    Batch norm, the addition of a tensor of the same shape behind it, and the activation behind
    that (ReLU, ReLU6, LeakyReLU, Hardswish, Sigmoid, Tanh, SiLU, exact GELU) become one call of an
    operator of bnfast's, and so do their gradients, where nothing else reads what lies between. The
    rest runs as it is, by PyTorch's own operators: no code is generated and no compiler needed.
    `torch.compile` calls this function; ``backend=bnfast.torch.backend`` is the same as the name.

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
