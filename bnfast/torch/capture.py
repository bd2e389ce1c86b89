"""Capture forward and backward as graphs with AOTAutograd, and fuse them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch.fx.graph import _BoxedCodeGen

from .compiled import count
from .fusion import fuse
from .in_place import lower

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import GraphModule


def compiler(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return a function that computes a graph from Dynamo, and its gradients."""
    aot = aot_autograd(
        fw_compiler=_compile,
        bw_compiler=_compile,
        inference_compiler=_compile_inference,
        partition_fn=_partition,
        keep_inference_input_mutations=True,
    )
    return aot(gm, example_inputs)


def _partition(joint: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """Fuse while forward and backward are still one graph, so that both change together."""
    _fuse(joint)
    parts: tuple[GraphModule, GraphModule] = default_partition(joint, inputs, **options)
    return parts


def _compile_inference(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    _fuse(gm)
    return _compile(gm, example_inputs)


def _compile(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return a graph as a function of a list, which it empties: used memory is freed early."""
    lower(gm.graph)
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    forward = gm.forward

    def run(args: list[Any]) -> Any:
        return forward(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _fuse(gm: GraphModule) -> None:
    fused: Counter[str] = Counter()
    apart: Counter[str] = Counter()

    def seen(kind: str, reason: str | None) -> None:
        if kind:
            fused[kind] += 1
        if reason is not None:
            apart[reason] += 1

    fuse(gm.graph, seen)
    gm.graph.lint()
    count(fused, apart)
