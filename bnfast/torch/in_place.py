"""Undo the cost of functionalization: change values in place again if nothing else reads them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import fused  # noqa: F401, defines the operators
from .patterns import ACTIVATIONS, alike

_aten = torch.ops.aten
_batch_norm_act = torch.ops.bnfast.batch_norm_act.default


def functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Compute as the operator, but leave the statistics: return the new ones as further results.

    Graphs use it while operations may still be removed, reordered or duplicated. It stays if the
    new statistics are read.
    """
    new = [None if s is None else s.clone() for s in (running_mean, running_var)]
    return (*_batch_norm_act(x, weight, bias, *new, *options), *(s for s in new if s is not None))


def laid_out(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Return the same values with other strides."""
    return x.new_empty_strided(shape, strides).copy_(x)


def lower(graph: Graph) -> None:
    """Let a forward or backward graph change tensors in place, once its final form is known."""
    _move_statistics(graph)
    _count_batches(graph)
    _reuse_memory(graph)


# ---- Running statistics


def _move_statistics(graph: Graph) -> None:
    nodes = [n for n in graph.nodes if n.target is functional]
    moving = set()
    for node in nodes:
        chain, copies = _chain(node)
        mean, var = node.args[3:5]
        for link in chain:
            _give(link, mean, var)
        for copy in copies:
            graph.erase_node(copy)
        moving.update(chain)
    for node in nodes:
        results = _results(node)
        for index in (3, 4):
            if index in results and not results[index].users:
                graph.erase_node(results.pop(index))
        if 3 in results or 4 in results:
            continue  # the new statistics are read: `functional` returns them
        if node.args[5] and node not in moving:  # in training, and they are not read
            _give(node, None, None)
        node.target = _batch_norm_act


def _chain(first: Node) -> tuple[list[Node], list[Node]]:
    """Return the calls that pass statistics from one to the next, and the copies that store them.

    Both are empty if anything else reads the statistics, before, between or after the calls.
    """
    stored = first.args[3:5]
    if any(not isinstance(s, Node) or s.op != "placeholder" for s in stored):
        return [], []
    if stored[0] is stored[1]:
        return [], []
    node, chain = first, [first]
    while True:
        results = _results(node)
        new = [results.get(3), results.get(4)]
        if any(n is None or len(n.users) != 1 for n in new):
            return [], []
        readers: list[Any] = [next(iter(n.users)) for n in new if n is not None]
        if all(r.target is _aten.copy_.default for r in readers):
            break
        if readers[0].target is not functional or list(readers[0].args[3:5]) != new:
            return [], []
        node = readers[0]
        chain.append(node)
    for old, moved, copy in zip(stored, new, readers, strict=True):
        assert isinstance(old, Node)
        if copy.users or list(copy.args) != [old, moved] or set(old.users) != {first, copy}:
            return [], []
    return chain, readers


def _results(node: Node) -> dict[Any, Node]:
    return {u.args[1]: u for u in node.users if u.target is operator.getitem}


def _give(node: Node, running_mean: Any, running_var: Any) -> None:
    node.args = (*node.args[:3], running_mean, running_var, *node.args[5:])


def _count_batches(graph: Graph) -> None:
    """Update all counters of batches that only increase by one in one call."""
    counters, copies = [], []
    for copy in graph.find_nodes(op="call_function", target=_aten.copy_.default):
        counter, new = copy.args[:2]
        if (
            counter.op == "placeholder"
            and isinstance(new, Node)
            and new.target is _aten.add.Tensor
            and new.args == (counter, 1)
            and not (new.kwargs or copy.kwargs or copy.users)
            and set(counter.users) == {new, copy}
            and set(new.users) == {copy}
            and alike(counter, new)
        ):
            counters.append(counter)
            copies.append(copy)
    if counters:
        with graph.inserting_before(copies[-1]):
            graph.call_function(_aten._foreach_add_.Scalar, (counters, 1))
    for copy in copies:
        new = copy.args[1]
        graph.erase_node(copy)
        graph.erase_node(new)


# ---- Everything else

# Operators that return new memory, not a view of their input.
_FRESH = {
    _batch_norm_act,
    torch.ops.bnfast.batch_norm_act_backward.default,
    functional,
    *(
        getattr(_aten, name).default
        for name in (
            *("convolution", "convolution_backward", "native_batch_norm_backward", "mm", "addmm"),
            *("max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
            *("avg_pool2d", "avg_pool2d_backward", "cat"),
            *("_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"),
        )
    ),
    *(pattern[0] for a in ACTIVATIONS for pattern in (a.forward, a.backward)),
    _aten.add.Tensor,
    _aten.mul.Tensor,
    _aten._native_batch_norm_legit.no_stats,
}
_IN_PLACE = {
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    **{
        a.forward[0]: getattr(_aten, f"{a.forward[0]._opname}_").default
        for a in ACTIVATIONS
        if hasattr(_aten, f"{a.forward[0]._opname}_")
    },
}


def _reuse_memory(graph: Graph) -> None:
    for node in graph.nodes:
        if node.target not in _IN_PLACE:
            continue
        swaps = node.target in (_aten.add.Tensor, _aten.mul.Tensor) and not node.kwargs
        for term in node.args[: 2 if swaps else 1]:
            others = [a for a in node.args if a is not term]
            if len(others) == len(node.args) - 1 and _is_free(term, node):
                node.target = _IN_PLACE[node.target]
                node.args = (term, *others)
                break


def _is_free(term: Any, reader: Node) -> bool:
    """Whether a value owns its memory, is read here for the last time, and fits the result."""
    if not isinstance(term, Node) or set(term.users) != {reader} or not alike(term, reader):
        return False
    maker = term.args[0] if term.target is operator.getitem else term
    assert isinstance(maker, Node)
    return maker.target in _FRESH or maker.target in _IN_PLACE.values()
