"""A module's forward as a graph of `torch.fx`, or the reason why it is none.

A graph records what a forward did with values it could not see, once. What it would record wrongly
is refused here: changes of the module, random numbers, a switch of gradients or autocast. What may
change later is guarded (`Guard`): which modules were looked into, their options and modes, hooks.
"""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .modules import BatchNormOnCPU

_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class UntraceableError(Exception):
    """Says why a forward is not the same as any graph of it."""


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls."""
    return any(vars(module).get(name) for name in _HOOKS)


@dataclass
class Guard:
    """A module that a graph holds the inside of, and how it was then."""

    parent: nn.Module | None
    name: str
    module: nn.Module
    kind: type
    options: dict[str, Any]
    inlined: bool

    @classmethod
    def of(cls, root: nn.Module, path: str, inlined: bool) -> Guard:
        """Guard a module as it is now; `inlined` says that its mode matters, too."""
        parent, _, name = path.rpartition(".")
        module = root.get_submodule(path)
        return cls(
            root.get_submodule(parent) if path else None,
            name,
            module,
            type(module),
            _options(module, inlined),
            inlined,
        )

    def holds(self) -> bool:
        """Whether the graph still says what the module does."""
        module = self.module
        return (
            (self.parent is None or self.parent._modules.get(self.name) is module)
            and (self.parent is None or (type(module) is self.kind and not has_hooks(module)))
            and _options(module, self.inlined) == self.options
        )


def _options(module: nn.Module, with_mode: bool) -> dict[str, Any]:
    """Return a module's plain attributes, which its forward may branch on."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and (with_mode or name != "training")
    }


class _Tracer(fx.Tracer):
    """Looks into everything but PyTorch's modules, our layers, and modules with hooks."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.inlined: dict[str, nn.Module] = {}
        self._switches = switches()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if (
            isinstance(m, BatchNormOnCPU)
            or has_hooks(m)
            or "forward" in vars(m)
            or super().is_leaf_module(m, module_qualified_name)
        ):
            return True
        self.inlined[module_qualified_name] = m
        return False

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if switches() != self._switches:
            raise UntraceableError("its forward switches gradients or autocast")
        return super().create_node(*args, **kwargs)


def switches() -> tuple[bool, ...]:
    """Return what a forward may branch on, or switch, besides its module's attributes."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


def trace(root: nn.Module) -> tuple[fx.Graph, list[Guard]]:
    """Return the graph of a module's forward on tensors, its options left at their defaults.

    Parameters
    ----------
    root : torch.nn.Module

    Returns
    -------
    graph : torch.fx.Graph
        With one placeholder for every argument that has no default.
    guards : list of Guard
        What must not have changed when the graph runs.

    Raises
    ------
    UntraceableError
        If the forward depends on more than a graph can hold.
    """
    arguments = _arguments(root)
    options = {p.name: p.default for p in arguments if p.default is not p.empty}
    tracer = _Tracer()
    before = {path: dict(vars(m)) for path, m in root.named_modules()}
    drawn = random.getstate(), torch.get_rng_state()
    try:
        graph = tracer.trace(root, concrete_args=options)
    except UntraceableError:
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise UntraceableError(f"torch.fx cannot trace it: {said:.120}") from error
    finally:
        changed = _restore(root, before)
    if changed:
        raise UntraceableError(f"its forward sets attributes: {', '.join(changed)}")
    if drawn[0] != random.getstate() or not torch.equal(drawn[1], torch.get_rng_state()):
        raise UntraceableError("its forward draws random numbers that are not a function of x")
    _drop_options(graph, arguments)
    _check_output(graph)
    inlined = {"": root, **tracer.inlined}
    return graph, [Guard.of(root, path, True) for path in inlined]


def _arguments(root: nn.Module) -> list[inspect.Parameter]:
    """Return a forward's arguments; those that have no default are tensors, or it is not run."""
    arguments = list(inspect.signature(type(root).forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in arguments):
        raise UntraceableError("its forward takes more than plain arguments")
    return arguments


def _restore(root: nn.Module, before: dict[str, dict[str, Any]]) -> list[str]:
    """Undo what tracing did to the modules' attributes, and name them."""
    changed = []
    for path, attributes in before.items():
        now = vars(root.get_submodule(path))
        names = [n for n in {*now, *attributes} if now.get(n) is not attributes.get(n)]
        changed += [f"{path}.{name}".lstrip(".") for name in names]
        for name in names:
            now.pop(name, None)
        now.update({n: attributes[n] for n in names if n in attributes})
    return changed


def _drop_options(graph: fx.Graph, arguments: list[inspect.Parameter]) -> None:
    """Take out the arguments left at their defaults, and FX's own checks that they are."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, argument in zip(placeholders, arguments, strict=True):
        if argument.default is not argument.empty:
            _erase_with_users(graph, node)


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _check_output(graph: fx.Graph) -> None:
    """Refuse results that are more than tensors in tuples, lists and dicts."""

    def check(value: Any) -> None:
        if isinstance(value, fx.Node) or value is None:
            return
        if type(value) in (tuple, list):
            for part in value:
                check(part)
        elif type(value) is dict:
            check(list(value.values()))
        else:
            raise UntraceableError("its forward returns more than tensors in tuples, lists, dicts")

    output = next(node for node in graph.nodes if node.op == "output")
    check(output.args[0])
