"""Which module calls feed which, in every forward of a model, for every input.

`following` gives the graphs of all paths through a forward. The graphs are never run. If a forward
cannot be followed, there is no guess: `reach` says which modules it may use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .following import graphs_of, has_hooks, is_sequence
from .reach import reached_by_hooks, reached_from

if TYPE_CHECKING:
    from collections.abc import Callable

# Attributes of a parameter that do not depend on its values.
_LASTING = {"device", "dtype", "shape", "ndim", "is_cuda", "requires_grad"}


class Flow:
    """The calls of a model's modules.

    Parameters
    ----------
    model : torch.nn.Module
    is_whole : callable
        Says which modules are known by their class and need not be followed.

    Attributes
    ----------
    calls : dict of int to list of torch.fx.Node
        By `id` of a module, the calls of it in all graphs. ``node.meta["module"]`` is the module.
    read : set of int
        Modules whose tensors a forward uses without calling the module.
    lost : dict of int to str
        Modules that may be used by a forward that could not be followed, and which forward it is.
    """

    def __init__(self, model: nn.Module, is_whole: Callable[[nn.Module], bool]) -> None:
        self.calls: dict[int, list[fx.Node]] = {}
        self.read: set[int] = set()
        self.lost: dict[int, str] = {}
        self._followed: dict[str, tuple[nn.Module, list[fx.Graph]]] = {}
        parts = [(path or "(model)", m) for path, m in model.named_modules()]
        parts = [(name, m) for name, m in parts if _has_forward(m) and not is_whole(m)]
        sequences = []
        for name, module in parts:
            if is_sequence(module) and module is not model and not has_hooks(module):
                sequences.append((name, module))
            else:
                self._follow(name, module)
        # A forward that was followed up to the call of a sequence was also followed through it.
        for name, module in sequences:
            if id(module) in self.lost:
                self._follow(name, module)

    def _follow(self, name: str, module: nn.Module) -> None:
        graphs = graphs_of(module)
        for other in reached_by_hooks(module):
            self.lost.setdefault(id(other), f"a hook of {name} may get at it")
        if isinstance(graphs, str):
            why = f"the forward of {name}, which may get at it, cannot be followed: {graphs}"
            for other in reached_from(module):
                self.lost.setdefault(id(other), why)
            return
        self._followed[name] = module, graphs
        for graph in graphs:
            self._add(module, graph)

    def changed(self, put_in: set[int]) -> list[tuple[str, nn.Module]]:
        """Return the modules whose forwards behave differently since other modules were replaced.

        Forwards that look at the class of a module, or at its attributes, may do so.
        """
        found = []
        for name, (module, before) in self._followed.items():
            after = graphs_of(module)
            if isinstance(after, str) or _steps(module, before, put_in) != _steps(
                module, after, put_in
            ):
                found.append((name, module))
        return found

    def _add(self, module: nn.Module, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_module":
                called = module.get_submodule(node.target)
                node.meta["module"] = called
                self.calls.setdefault(id(called), []).append(node)
            elif node.op == "get_attr" and node.meta.get("of values"):
                self.read.update(id(m) for m in module.modules())
            elif node.op == "get_attr" and not all(map(_asks_lasting, node.users)):
                owner = node.target.rpartition(".")[0]
                self.read.add(id(module.get_submodule(owner)))


def _steps(module: nn.Module, graphs: list[fx.Graph], put_in: set[int]) -> list[list[Any]]:
    """Return the steps of graphs, without the calls of some modules."""
    return [
        [
            (node.op, node.target)
            for node in graph.nodes
            if node.op != "call_module" or id(module.get_submodule(node.target)) not in put_in
        ]
        for graph in graphs
    ]


def _has_forward(module: nn.Module) -> bool:
    """Whether a module may call others that fold. Containers cannot be called."""
    without: Any = nn.Module.forward
    if isinstance(module, torch.jit.ScriptModule) or not any(True for _ in module.children()):
        return False
    return type(module).forward is not without or "forward" in vars(module)


def _asks_lasting(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is getattr and node.args[1] in _LASTING
