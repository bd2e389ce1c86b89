"""Turn batch norm + addition + activation into one operation, in AOTAutograd's graphs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from .in_place import functional, laid_out
from .patterns import (
    NORMS,
    Activation,
    Norm,
    activation_of,
    alike,
    has_strides,
    is_backward_of,
    value,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_aten = torch.ops.aten


@dataclass
class Found:
    """A batch norm, what it is fused with, and their gradients in the backward."""

    norm: Norm
    last: Node  # the fused operation gives its value
    gradient: Node | None  # of the batch norm
    addition: Node | None = None
    residual: Node | None = None
    activation: Activation | None = None
    slope: float = 0.0
    act_gradient: Node | None = None  # of the activation

    @property
    def kind(self) -> str:
        """Describe it in words."""
        parts = ["batch norm"]
        parts += ["addition"] if self.residual is not None else []
        parts += [self.activation.name] if self.activation is not None else []
        return " + ".join(parts)


class Apart(Exception):
    """The reason why operations are not fused."""


def fuse(graph: Graph, seen: Callable[[str, str | None], None]) -> None:
    """Replace every batch norm in a graph, and what follows it, by one bnfast operation.

    The graph may be a forward, or a forward and its backward, whose patterns are replaced
    together. `seen` is called for each batch norm with what it became ("" if it was left) and why
    it was not fused further.
    """
    _read_directly(graph)
    for node in [n for n in graph.nodes if n.target in NORMS]:
        norm = Norm(node)
        reason = norm.refused()
        if reason is None and len(norm.gradients()) > 1:
            reason = "it is differentiated twice"
        if reason is not None:
            seen("", reason)
            continue
        _keep_type(graph, norm)
        found, reason = _find(norm)
        _replace(graph, found)
        seen(found.kind, reason)


def _read_directly(graph: Graph) -> None:
    """Remove the copies through which autograd read saved values: these graphs change no value.

    With in-place activations autograd copies what they overwrite. Only inputs change, at the end.
    """
    for node in [n for n in graph.nodes if n.target in (_aten.detach.default, _aten.clone.default)]:
        source = node.args[0]
        copied = node.target is _aten.clone.default
        if (
            source.op == "placeholder"
            or any(u.op == "output" for u in node.users)
            or (copied and not all(_is_backward(u) for u in node.users))
            or not alike(source, node)
        ):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _keep_type(graph: Graph, norm: Norm) -> None:
    """Keep new statistics in the type of the old ones; PyTorch expected float32 and a cast."""
    for index, old in ((3, norm.running_mean), (4, norm.running_var)):
        new = norm.results.get(index)
        if new is None:
            continue
        for cast in list(new.users):
            if cast.target is _aten._to_copy.default and alike(cast, old):
                cast.replace_all_uses_with(new)
                new.meta = dict(cast.meta)
                graph.erase_node(cast)


# ---- What belongs together


def _find(norm: Norm) -> tuple[Found, str | None]:
    """Return the largest pattern that can be fused, and why it is not larger."""
    y = norm.results.get(0, norm.node)
    gradient = next(iter(norm.gradients()), None)
    found = Found(norm, y, gradient)
    reason = None
    try:
        found = _with_addition(found)
        found = _with_activation(found)
    except Apart as why:
        reason = str(why)
    return found, reason


def _with_addition(found: Found) -> Found:
    y = found.last
    users = list(y.users)
    if len(users) != 1 or users[0].target is not _aten.add.Tensor:
        return found
    addition = users[0]
    terms = addition.args
    residual: Any = terms[1] if terms[0] is y else terms[0]
    if addition.kwargs or residual is y or not isinstance(residual, Node):
        raise Apart("an addition that is more than a sum of two")
    if not (alike(residual, y) and alike(addition, y)):
        raise Apart("a residual of another shape, type or memory order")
    _check_order(found.norm, addition)
    _check_regions(found.norm.node, addition)
    return Found(found.norm, addition, found.gradient, addition, residual)


def _with_activation(found: Found) -> Found:
    z = found.last
    known = [(u, a) for u in z.users if (a := activation_of(u)) is not None]
    if not z.users or all(u.op == "output" for u in z.users):
        return found
    if not known:
        raise Apart(f"followed by {' and '.join(sorted({_name(u) for u in _ahead(z)}))}")
    if len(known) > 1:
        raise Apart("its result has several readers")
    last, (activation, slope) = known[0]
    if activation.takes_slope and not 0 < slope <= 1:
        raise Apart("a slope that bnfast does not have")
    act_gradient = _activation_gradient(found, last, activation, slope)
    if any(u is not last and u is not act_gradient for u in z.users):
        raise Apart("its result has several readers")
    if not alike(last, z):
        raise Apart("an activation that changes the memory order")
    if found.residual is not None and act_gradient is not None and not alike(act_gradient, z):
        raise Apart("a gradient in another memory order")
    if act_gradient is not None and any(map(_is_changed, _recomputed_from(found, activation))):
        raise Apart("an input that its gradient needs is changed in place")
    _check_order(found.norm, last)
    _check_regions(found.norm.node, last)
    return Found(
        found.norm,
        last,
        found.gradient,
        found.addition,
        found.residual,
        activation,
        slope,
        act_gradient,
    )


def _activation_gradient(
    found: Found, last: Node, activation: Activation, slope: float
) -> Node | None:
    """Return the node that computes the gradient of an activation, if the graph has it."""
    found_gradients = [
        node
        for source in (found.last, last)
        for node in source.users
        if is_backward_of(node, activation, slope) and node.args[1] is source
    ]
    if found.gradient is not None:
        if found.gradient.args[0] not in found_gradients:
            raise Apart("its gradient is not the activation's alone")
        act_gradient: Any = found.gradient.args[0]
        if found.residual is None and len(act_gradient.users) > 1:
            raise Apart("the activation's gradient has several readers")
        return act_gradient
    told = found.residual is not None and activation.from_output
    if len(found_gradients) > 1 or (found_gradients and not told):
        raise Apart("its gradient is not the activation's alone")
    return found_gradients[0] if found_gradients else None


def _recomputed_from(found: Found, activation: Activation) -> list[Node]:
    """Return what the fused gradient reads beside PyTorch's: the activation's input is recomputed.

    If there is a residual and the output is enough, the gradient reads the output instead.
    """
    if found.residual is not None and activation.from_output:
        return []
    return [n for n in (found.norm.bias, found.residual) if n is not None]


def _is_changed(node: Node) -> bool:
    """Whether a value is in an input of the graph that the graph overwrites at its end.

    The backward would read the new value. Autograd would not notice: it saves inputs after that.
    """
    while node.op == "call_function" and _is_view(node.target):
        source: Any = node.args[0]
        node = source
    return node.op == "placeholder" and any(_overwrites(user, node) for user in node.users)


def _is_view(target: Any) -> bool:
    return target is operator.getitem or getattr(target, "is_view", False)


def _overwrites(user: Node, node: Node) -> bool:
    return user.target is _aten.copy_.default and user.args[0] is node


def _check_order(norm: Norm, last: Node) -> None:
    """Check that nothing reads the other results before the fused operation."""
    for index, result in norm.results.items():
        if index != 0 and any(user < last for user in result.users):
            raise Apart("its statistics are read before")


def _check_regions(a: Node, b: Node) -> None:
    """Check that either both or neither are recomputed."""
    if any(a.meta.get(key) != b.meta.get(key) for key in ("recompute", "ac_graph_id")):
        raise Apart("the end of a checkpoint lies between them")


def _ahead(node: Node) -> list[Node]:
    """Return the nodes in the forward that read a node."""
    return [u for u in node.users if not _is_backward(u)]


def _is_backward(node: Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def _name(node: Node) -> str:
    if node.op == "output":
        return "the end of the graph"
    if node.target is functional:
        return "the addition of another batch norm"
    return str(getattr(node.target, "_opname", node.target))


# ---- Replacing it


def _replace(graph: Graph, found: Found) -> None:
    norm, gradient, act_gradient = found.norm, found.gradient, found.act_gradient
    between = [n for n in (found.addition, norm.results.get(0)) if n is not None]
    results = _replace_forward(graph, found)
    if gradient is not None:
        _replace_backward(graph, found, gradient, results)
        dead = [gradient] if act_gradient is None else [gradient, act_gradient]
    else:
        dead = []
        if act_gradient is not None:  # it stays, and can read the output instead
            for node in between:
                act_gradient.replace_input_with(node, results[0])
    dead += [found.last, *between, *norm.results.values()]
    for node in dict.fromkeys(n for n in dead if n is not norm.node):
        graph.erase_node(node)
    graph.erase_node(norm.node)


def _replace_forward(graph: Graph, found: Found) -> dict[Any, Node]:
    """Insert the operation after everything that it reads; return its results."""
    norm, last = found.norm, found.last
    name = None if found.activation is None else found.activation.name
    alone = found.addition is None and found.activation is None
    with graph.inserting_before(norm.node.next if alone else last):
        node = graph.call_function(
            functional,
            (
                *(norm.x, norm.weight, norm.bias, norm.running_mean, norm.running_var),
                *(norm.training, norm.momentum, norm.eps, found.residual, name, found.slope),
            ),
        )
        _describe(node, last, norm.node.meta["val"])
        old = {i: last if i == 0 else result for i, result in sorted(norm.results.items())}
        results = {
            i: _result(graph, node, i, result, norm.x if i == 0 else None)
            for i, result in old.items()
        }
    for i, result in old.items():
        result.replace_all_uses_with(results[i])
    return results


def _replace_backward(graph: Graph, found: Found, gradient: Node, results: dict[Any, Node]) -> None:
    norm, act_gradient = found.norm, found.act_gradient
    name = None if found.activation is None or act_gradient is None else found.activation.name
    others = [] if act_gradient is None else [u for u in act_gradient.users if u is not gradient]
    first = gradient if act_gradient is None else act_gradient
    wanted: Any = gradient.args[9]
    saved = (results[1], results[2]) if norm.training else (None, None)
    beside: Any = None
    if act_gradient is not None and found.residual is not None:
        from_output = found.activation is not None and found.activation.from_output
        beside = results[0] if from_output else found.residual
    # What a pre-activation is recomputed with.
    bias = norm.bias if act_gradient is not None and beside is not results[0] else None
    with graph.inserting_before(first):
        node = graph.call_function(
            torch.ops.bnfast.batch_norm_act_backward.default,
            (
                *(first.args[0], norm.x, norm.weight, bias, *norm.statistics, *saved),
                *(norm.training, norm.eps, beside),
                *(name, found.slope, [*wanted, bool(others)]),
            ),
        )
        _describe(node, first, (*gradient.meta["val"], first.meta["val"] if others else None))
        if others:
            residual_gradient = _result(graph, node, 3, first, norm.x)
            for user in others:
                user.replace_input_with(first, residual_gradient)
        for old in list(gradient.users):
            index: Any = old.args[1]
            x = norm.x if index == 0 else None
            old.replace_all_uses_with(_result(graph, node, index, old, x))
            graph.erase_node(old)


def _result(graph: Graph, node: Node, index: int, like: Node, x: Any = None) -> Node:
    """Return a result of an operation; if it is like x, with the strides that the graph recorded.

    PyTorch records a batch norm of a permuted tensor as permuted, but computes one that is not.
    Without this, views of it would fail.
    """
    result = graph.call_function(operator.getitem, (node, index))
    result.meta = dict(like.meta)
    wanted = value(like)
    if x is not None and wanted is not None and not has_strides(x.meta["val"], wanted):
        order = tuple(wanted.stride())
        if all(isinstance(n, int) for n in (*wanted.shape, *order)):
            result = graph.call_function(laid_out, (result, tuple(wanted.shape), order))
            result.meta = dict(like.meta)
    return result


def _describe(node: Node, like: Node, values: Sequence[Any]) -> None:
    """Copy to a new node what PyTorch knew of the old: its place, checkpoint and results."""
    node.meta = {k: v for k, v in like.meta.items() if k != "tensor_meta"}
    node.meta["val"] = tuple(values)
