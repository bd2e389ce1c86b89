"""Follow one forward with `torch.fx` along every path through it.

The forward runs on a copy. Its inputs are proxies without values, and the modules it calls are not
entered. Each time it asks something that depends on an input (a condition, the type of an
argument), it is followed once for each answer. Some forwards cannot be shown by graphs and are not
followed: those that keep what they computed, change what they keep, make numbers from inputs, or
compare objects by identity.
"""

from __future__ import annotations

import copy
import dis
import gc
import inspect
import operator
import sys
import warnings
import weakref
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .reach import kept_aside

_Module = TypeVar("_Module", bound=nn.Module)
_MOST_PATHS = 64
_MOST_QUESTIONS = 64
# The types that an argument may claim, for a forward that asks.
_KINDS: tuple[type, ...] = (Tensor, list, tuple, dict)


def is_sequence(module: nn.Module) -> bool:
    """Whether a module behaves like `torch.nn.Sequential`."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
        and is_called_plainly(module)
    )


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and its hooks, and nothing else."""
    plain = type(module).__call__ is nn.Module.__call__ or isinstance(module, fx.GraphModule)
    return plain and "forward" not in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see the inputs or outputs of a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind) for kind in kinds)


# ---- A forward, followed


def graphs_of(module: nn.Module) -> list[fx.Graph] | str:
    """Return the graphs of a module's forward, one for each path, or why there are none.

    A path that ends in an exception raised by the forward itself has no result and needs no graph.
    """
    if not is_called_plainly(module):
        return "it was replaced"
    if _compares_identity(module):
        return "it compares objects by identity"
    graphs: list[fx.Graph] = []
    answers: list[int] = []
    for _ in range(_MOST_PATHS):
        tracer = _Tracer(answers)
        try:
            graphs.append(tracer.followed(module))
        except Exception as error:  # noqa: BLE001, the user's code may raise anything
            if not _is_raised_by_user(error):
                return _in_words(error)
        if tracer.refused:  # and the forward caught the error and went on
            return tracer.refused
        answers = _next_path(answers, tracer.sizes)
        if not answers:
            return graphs
    return f"it has more than {_MOST_PATHS} ways through it"


def _compares_identity(module: nn.Module) -> bool:
    """Whether a forward uses `is` with anything but None: a proxy is never another object."""
    row = list(dis.get_instructions(inspect.unwrap(type(module).forward)))
    asked = [before for before, ask in pairwise(row) if ask.opname == "IS_OP"]
    return any(before.opname != "LOAD_CONST" or before.argval is not None for before in asked)


def _next_path(answers: list[int], sizes: list[int]) -> list[int]:
    """Return the next answers, changing the last ones first; an empty list after all of them."""
    while answers and answers[-1] == sizes[len(answers) - 1] - 1:
        answers.pop()
    return [*answers[:-1], answers[-1] + 1] if answers else []


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _is_raised_by_user(error: Exception) -> bool:
    """Whether an exception comes from a ``raise`` or ``assert`` in code that is not PyTorch's."""
    at = error.__traceback__
    if at is None or isinstance(error, fx.proxy.TraceError):
        return False
    while at.tb_next is not None:
        at = at.tb_next
    code = at.tb_frame.f_code.co_code[at.tb_lasti]
    return dis.opname[code] == "RAISE_VARARGS" and not _is_torch(at.tb_frame)


def _is_torch(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


class _Tracer(fx.Tracer):
    """Follows one path through a forward: the given answers, then new ones, which it appends."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers, self.sizes = answers, list[int]()
        self.refused = ""
        self.kinds: dict[fx.Node, type] = {}
        self.options: dict[fx.Node, bool] = {}
        self.made: list[weakref.ref[fx.Proxy]] = []

    def followed(self, module: nn.Module) -> fx.Graph:
        module = _without_values(module)
        known = {
            name: None
            for name, parameter in inspect.signature(
                inspect.unwrap(type(module).forward)
            ).parameters.items()
            if name != "self" and _may_be_none(module, parameter) and self.answer(2)
        }
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            before = _state_of(module)
            graph = self.trace(module, known or None)
        if self._keeps_outputs():
            self.refused = self.refused or "it keeps what it computed"
        elif _state_of(module) != before:
            self.refused = self.refused or "it changes what it keeps"
        for node in graph.nodes:
            if node.op == "get_attr" and "constant" in node.target:
                value = getattr(module, node.target, None)
                node.meta["of values"] = isinstance(value, Tensor) and value.is_meta
        return graph

    def _keeps_outputs(self) -> bool:
        """Whether an output of a module is still referenced somewhere."""

        def kept() -> bool:
            return any(made() is not None for made in self.made)

        if kept():
            gc.collect()  # it may be garbage in a reference cycle
        return kept()

    def answer(self, size: int) -> int:
        """Return one of `size` answers to the next question."""
        asked = len(self.sizes)
        if asked == _MOST_QUESTIONS:
            raise fx.proxy.TraceError(f"it asks more than {asked} questions about its inputs")
        self.sizes.append(size)
        if asked == len(self.answers):
            self.answers.append(0)
        return self.answers[asked]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_sequence(m) or has_hooks(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        known = m in (self.submodule_paths or ()) or is_sequence(m)
        if known or [*m.children(), *m.parameters(), *m.buffers(), *kept_aside(m)]:
            return super().call_module(m, forward, args, kwargs)
        return self.create_proxy("call_function", _made_there, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Proxy(node, self)
        if node.op == "call_module":
            self.made.append(weakref.ref(made))
        return made

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.op != "placeholder" or not obj.node.args:
            return bool(self.answer(2))
        if obj.node not in self.options:  # an option with a default keeps its answer
            self.options[obj.node] = bool(self.answer(2))
        return self.options[obj.node]

    def iter(self, obj: fx.Proxy) -> Any:
        self.refused = "it iterates over what only an input decides"
        return super().iter(obj)


def _may_be_none(module: nn.Module, parameter: inspect.Parameter) -> bool:
    """Whether an argument is None by default, or is compared with None."""
    if parameter.default is not parameter.empty or parameter.kind in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    ):
        return parameter.default is None
    row = list(dis.get_instructions(inspect.unwrap(type(module).forward)))
    for a, b, c in zip(row, row[1:], row[2:], strict=False):
        asks = "_NONE" in b.opname or (b.argval is None and c.opname == "IS_OP")
        if a.argval == parameter.name and asks:
            return True
    return False


def _state_of(module: nn.Module) -> dict[Any, Any]:
    """Return all attributes of all submodules, by identity."""
    spaces = ("_parameters", "_buffers", "_modules")
    found: dict[Any, Any] = {}
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for name, value in vars(part).items():
            inner = value.items() if name in spaces else [("", value)]
            for key, held in inner:
                if "constant" not in f"{name}{key}":  # added by fx itself
                    found[id(part), name, key] = id(held)
    return found


def _made_there(*args: Any, **options: Any) -> None:
    """Stand in a graph for a module that the forward creates, such as a loss."""


class _Proxy(fx.Proxy):
    """A value that is not known. When asked for its type, it gives each possible type in turn."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        if _is_torch(frame) and frame.f_code.co_name != "is_tensor":
            return _Proxy
        kinds = self.tracer.kinds
        if self.node not in kinds:
            kinds[self.node] = _KINDS[self.tracer.answer(len(_KINDS))]
        return kinds[self.node]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def _refuse(self, *_: Any) -> Any:
        self.tracer.refused = "it makes a number of what only an input decides"
        raise fx.proxy.TraceError(self.tracer.refused)

    __int__ = __float__ = __index__ = __complex__ = _refuse

    def __len__(self) -> int:
        self.tracer.refused = "it asks for the length of an input"
        return super().__len__()


def _without_values(module: nn.Module) -> nn.Module:
    """Return a copy to follow, so that side effects of a forward stay in the copy.

    The tensors of submodules have no values in it, so that making a number from them fails.
    """
    memo: dict[int, Any] = {}
    for called in module.modules():
        if called is not module:
            for tensor in (*called._parameters.values(), *called._buffers.values()):
                if tensor is not None:
                    memo[id(tensor)] = _without_memory(tensor)
    return copied(module, memo)


def copied(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """Return a deep copy, also of modules that hold tensors computed with gradients."""
    memo = {} if memo is None else memo
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    with torch.no_grad():  # else copies in scripted modules would not be leaves
        return copy.deepcopy(module, memo)


def _without_memory(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
