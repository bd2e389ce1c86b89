"""Let batch norms take over the addition and the ReLU behind them, where nobody would notice.

A module whose forward `torch.fx` can trace (`trace`) gets a class of its own, of the same name,
whose forward runs the rewritten graph as long as its guards hold, and the module's own forward
otherwise. Modules stay where they are: layers are told at the call what to fuse, and hold nothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .kernels import Activation, is_transformed
from .modules import BatchNormOnCPU
from .trace import Guard, UntraceableError, has_hooks, switches, trace

_TRACES, _REASON = "_bnfast_traces", "_bnfast_unfused"
_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
)
_MOST_TRACES = 16  # of one module in its modes; a forward that needs more goes its own way

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}


@dataclass
class Fusion:
    """A graph's fused calls, ready to run.

    Attributes
    ----------
    guards : list of Guard
    switches : tuple of bool
        Of gradients and autocast, when it was traced.
    fused : dict of str to str
        Layers by name, and what each took over.
    kept : dict of str to str
        Layers that could not take over what follows them, and why.
    run : callable or None
        The forward over the module and its tensors; None where there is nothing to fuse.
    arguments : int
        How many tensors it takes.
    """

    guards: list[Guard]
    switches: tuple[bool, ...] = field(default_factory=switches)
    fused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    run: Callable[..., Any] | None = None
    arguments: int = 0


# ---- Installing


def fuse(module: nn.Module) -> None:
    """Fuse a module and, where it cannot be traced, the modules in it."""
    if isinstance(module, BatchNormOnCPU | FusedModule) or not _layers(module):
        return
    try:
        fusions = _both_modes(module)
    except UntraceableError as error:
        if type(module).forward is not nn.Module.forward:  # a list of modules has none
            module.__dict__[_REASON] = str(error)
        opaque = list(module.children())
    else:
        module.__dict__.pop(_REASON, None)
        looked_into = [guard.module for fusion in fusions for guard in fusion.guards]
        opaque = [m for m in module.modules() if not any(m is known for known in looked_into)]
        if any(fusion.fused for fusion in fusions):
            base: Any = type(module)
            module.__class__ = _fused_class(base)
            module.__dict__[_TRACES] = fusions
        else:
            for path, why in {k: w for fusion in fusions for k, w in fusion.kept.items()}.items():
                module.get_submodule(path).__dict__[_REASON] = why
    for inner in opaque:
        fuse(inner)


def unfuse(module: nn.Module) -> None:
    """Give one module its own forward back."""
    module.__dict__.pop(_REASON, None)
    if isinstance(module, FusedModule):
        module.__dict__.pop(_TRACES, None)
        base: Any = module._bnfast_base
        module.__class__ = base


def fusions_of(module: nn.Module) -> list[Fusion]:
    """Return what was fused in a module, in training and in evaluation."""
    if not isinstance(module, FusedModule):
        return []
    if not module.__dict__.get(_TRACES):  # a copy's
        module.__dict__[_TRACES] = _both_modes(module)
    found: list[Fusion] = module.__dict__[_TRACES]
    return found


def reason_of(module: nn.Module) -> str | None:
    """Return why a module's forward was left as it is, None if it was not."""
    reason: str | None = module.__dict__.get(_REASON)
    return reason


def _layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, BatchNormOnCPU)]


def _both_modes(module: nn.Module) -> list[Fusion]:
    """Trace a module's forward in training and in evaluation."""
    if "forward" in vars(module):
        raise UntraceableError("its forward was replaced on the instance")
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        raise UntraceableError(f"it is a {type(module).__name__}")
    kind: Any = type(module)
    if (kind.__reduce_ex__, kind.__reduce__) not in (_REDUCE, _OURS):
        raise UntraceableError("its class is pickled in a way of its own")
    modes = {m: m.training for m in module.modules()}
    try:
        found = []
        for training in (True, False):
            for m in modes:
                m.training = training
            found.append(_fusion(module))
        return found
    finally:
        for m, training in modes.items():
            m.training = training


# ---- Running


class FusedModule(nn.Module):
    """What a module becomes whose batch norms took over what follows them."""

    _bnfast_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        state = {name: value for name, value in reduced[2].items() if name != _TRACES}
        return _remake, (self._bnfast_base,), state, *reduced[3:]


def _remake(base: Any) -> nn.Module:
    kind: Any = _fused_class(base)
    return kind.__new__(kind)


_REDUCE = (object.__reduce_ex__, object.__reduce__)
_OURS = (FusedModule.__reduce_ex__, object.__reduce__)


@functools.cache
def _fused_class(base: Any) -> Any:
    """Return the class that runs fused where it can, else as `base` does."""

    @functools.wraps(base.forward)
    def forward(self: FusedModule, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and not options and _are_tensors(args):
            run = _find_run(self, len(args))
            if run is not None:
                return run(self, *args)
        return base.forward(self, *args, **options)

    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(base, name) for name in names}
    namespace |= {"forward": forward, "_bnfast_base": base}
    return type(base.__name__, (FusedModule, base), namespace)


def _are_tensors(args: tuple[Any, ...]) -> bool:
    return all(isinstance(a, Tensor) for a in args) and not is_transformed()


def _find_run(module: FusedModule, arguments: int) -> Callable[..., Any] | None:
    if any(getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS):
        return None
    fusions: list[Fusion] = module.__dict__.setdefault(_TRACES, [])
    now = switches()
    for i, fusion in enumerate(fusions):
        if fusion.switches == now and all(guard.holds() for guard in fusion.guards):
            fusions.insert(0, fusions.pop(i))  # the next call will most likely be like this one
            return fusion.run if fusion.arguments == arguments else None
    if len(fusions) == _MOST_TRACES:
        return None
    try:
        fusion = _fusion(module)
    except UntraceableError:
        everything = [Guard.of(module, path, True) for path, _ in module.named_modules()]
        fusion = Fusion(everything)
    fusions.append(fusion)
    return fusion.run if fusion.arguments == arguments else None


# ---- Rewriting


def _fusion(root: nn.Module) -> Fusion:
    graph, guards = trace(root)
    rewriter = _Rewriter(root, graph)
    rewriter.rewrite()
    guards += [Guard.of(root, path, False) for path in rewriter.relied_on]
    graph.lint()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    run = type(fx.GraphModule(root, graph)).forward if rewriter.fused else None
    return Fusion(guards, switches(), rewriter.fused, rewriter.kept, run, len(placeholders))


class _Rewriter:
    """Merges each batch norm's call with the addition and the activation that follow it."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.fused: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.norm = ""  # the layer that is being looked at
        self.relied_on: list[str] = []  # modules whose calls are merged into another

    def rewrite(self) -> None:
        for node in list(self.graph.nodes):
            if type(self.module(node)) is nn.Identity and not has_hooks(self.module(node)):
                self.relied_on.append(node.target)
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        for node in list(self.graph.nodes):
            if isinstance(self.module(node), BatchNormOnCPU) and len(node.all_input_nodes) == 1:
                self.merge(node)

    def module(self, node: Any) -> Any:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.root.get_submodule(str(node.target)) if is_call else None

    def merge(self, norm: fx.Node) -> None:
        """Merge what follows a batch norm into its call, or note why not."""
        self.norm = str(norm.target)
        merged, residual, activation = [norm], None, None
        add = self.follower(norm, self.is_add)
        if add is not None and (residual := self.other_term(add, norm)) is not None:
            merged.append(add)
        relu = self.follower(merged[-1], self.activation)
        if relu is not None:
            activation = self.activation(relu)
            merged.append(relu)
        if len(merged) > 1 and self.may_move(norm, merged):
            self.replace(norm, merged, residual, activation)

    def follower(self, node: fx.Node, kind: Callable[[fx.Node], Any]) -> fx.Node | None:
        """Return the one operation of a kind that takes node's value, if no other takes it."""
        users = list(node.users)
        found = [user for user in users if kind(user)]
        if not found:
            return None
        if len(users) > 1:
            self.keep("its result is used elsewhere, too")
        elif has_hooks(self.module(node) or _NO_MODULE) or has_hooks(
            self.module(found[0]) or _NO_MODULE
        ):
            self.keep("there are hooks on it or on what follows")
        else:
            return found[0]
        return None

    def keep(self, why: str) -> None:
        self.kept[self.norm] = why

    def is_add(self, node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method") and node.target in _ADDS

    def other_term(self, add: fx.Node, norm: fx.Node) -> fx.Node | None:
        """Return what an addition adds to the batch norm's result."""
        terms = [a for a in (*add.args, *add.kwargs.values()) if isinstance(a, fx.Node)]
        others = [term for term in terms if term is not norm]
        is_plain = len(add.args) == 2 and all(
            name == "alpha" and value == 1 for name, value in add.kwargs.items()
        )
        if len(others) != 1 or not is_plain:
            self.keep("what is added to it is not one tensor, once")
        elif add.target in _ADDS_IN_PLACE and add.args[0] is not norm and len(others[0].users) > 1:
            self.keep("it is added to a tensor in place that is used elsewhere")
        else:
            return others[0]
        return None

    def activation(self, node: fx.Node) -> Activation:
        """Return the activation that a node applies to its only tensor, None if it is none."""
        module = self.module(node)
        if type(module) is nn.ReLU:
            return "relu"
        if type(module) is nn.ReLU6:
            return "relu6"
        if type(module) is nn.LeakyReLU:
            return _leaky(module.negative_slope)
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in _RELUS:
            return "relu"
        if node.target is F.relu6:
            return "relu6"
        if node.target in _LEAKY_RELUS:
            given = (*node.args[1:2], node.kwargs.get("negative_slope", 0.01))
            return _leaky(given[0])
        return None

    def may_move(self, norm: fx.Node, merged: list[fx.Node]) -> bool:
        """Whether the batch norm may run as late as the last of what it takes over."""
        between, node = [], norm.next
        while node is not merged[-1]:
            if node not in merged:
                between.append(node)
            node = node.next
        if any(self.may_write(node) for node in between):
            self.keep("something may be changed in place before what follows it")
        elif any(self.looks_at(node, self.module(norm)) for node in between):
            self.keep("its statistics are used, or moved again, before what follows it")
        else:
            return True
        return False

    def looks_at(self, node: fx.Node, layer: nn.Module) -> bool:
        """Whether an operation depends on what a layer's earlier calls made of its statistics."""
        if self.module(node) is layer:
            return True
        pending, seen = [node], {node}
        while pending:
            node = pending.pop()
            if node.op == "get_attr":
                owner, _, _ = str(node.target).rpartition(".")
                if self.root.get_submodule(owner) is layer:
                    return True
            pending += [n for n in node.all_input_nodes if n not in seen]
            seen.update(pending)
        return False

    def may_write(self, node: fx.Node) -> bool:
        """Whether an operation may change a tensor that it did not make."""
        module = self.module(node)
        if module is not None:
            is_known = type(module).__module__.startswith("torch.nn.")
            is_ours = isinstance(module, BatchNormOnCPU)
            return getattr(module, "inplace", False) or not (is_known or is_ours)
        name = getattr(node.target, "__name__", str(node.target))
        in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem")
        return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs

    def replace(
        self,
        norm: fx.Node,
        merged: list[fx.Node],
        residual: fx.Node | None,
        activation: Activation,
    ) -> None:
        last = merged[-1]
        options: dict[str, Any] = {"residual": residual, "activation": activation}
        given = {name: value for name, value in options.items() if value is not None}
        with self.graph.inserting_before(last):
            call = self.graph.call_module(str(norm.target), norm.args, given)
        last.replace_all_uses_with(call)
        for node in reversed(merged):
            self.graph.erase_node(node)
        self.relied_on += [str(node.target) for node in merged if node.op == "call_module"]
        parts = (["addition"] if residual is not None else []) + [
            str(part) for part in ([activation] if activation else [])
        ]
        self.fused[str(norm.target)] = " and ".join(parts)


_NO_MODULE = nn.Identity()


def _leaky(slope: Any) -> Activation:
    return ("leaky_relu", float(slope)) if isinstance(slope, float) and 0 < slope <= 1 else None
