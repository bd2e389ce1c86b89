"""Which modules a forward that cannot be followed may get at, read from its code.

To call a module inside another one, code must name the attribute it is in, or take a container
apart, or look modules up by computed names. Whatever does none of these for one of the steps that
lead to a module cannot touch it.
"""

from __future__ import annotations

import dis
import inspect
import sys
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MOST_FUNCTIONS = 2000
_TAKES_APART = {
    "BINARY_SLICE",
    "BINARY_SUBSCR",
    "CALL_FUNCTION_EX",
    "DICT_UPDATE",
    "FOR_ITER",
    "GET_ITER",
    "LIST_EXTEND",
    "SET_UPDATE",
    "UNPACK_EX",
    "UNPACK_SEQUENCE",
}
_TAKERS = {"iter", "next", "map", "filter", "zip", "reduce", "list", "tuple", "reversed", "values"}
_LOOKS_UP = {
    "__dict__",
    "__getattr__",
    "_modules",
    "apply",
    "attrgetter",
    "children",
    "eval",
    "exec",
    "get_submodule",
    "getattr",
    "methodcaller",
    "modules",
    "named_children",
    "named_modules",
    "vars",
}


def reached_from(module: nn.Module) -> list[nn.Module]:
    """Return the modules that a module's forward may get at, itself among them."""
    code = _Code(module)
    found = {id(module): module}
    row = [module]
    while row:
        holder = row.pop()
        steps = [m for name, m in holder._modules.items() if code.may_step(holder, name)]
        for inner in (*steps, *kept_aside(holder)):
            if inner is not None and id(inner) not in found:
                found[id(inner)] = inner
                row.append(inner)
    return list(found.values())


def kept_aside(module: nn.Module) -> Iterator[nn.Module]:
    """Find the modules that a module's attributes hold beside the tree of modules."""
    known = {"_modules", "_parameters", "_buffers"}
    row = [(value, 0) for name, value in vars(module).items() if name not in known]
    while row:
        value, depth = row.pop()
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, MethodType):
            row.append((value.__self__, depth))
        elif depth < 4 and isinstance(value, dict):
            row += [(inner, depth + 1) for inner in (*value.keys(), *value.values())]
        elif depth < 4 and isinstance(value, (list, tuple, set, frozenset)):
            row += [(inner, depth + 1) for inner in value]
        elif depth < 4 and not isinstance(value, type) and hasattr(value, "func"):
            row.append(((value.func, getattr(value, "args", ())), depth + 1))  # a partial


class _Code:
    """What the code of a forward, and of all that it may call, says."""

    def __init__(self, module: nn.Module) -> None:
        self._names: set[str] = set()
        self._takes_apart = self._looks_up = False
        self._classes = {type(m) for m in module.modules()}
        self._functions: dict[int, FunctionType] = {}
        if "forward" in vars(module) or hasattr(module, "_c"):  # replaced, or scripted
            self._looks_up = True
        self._own = set(type(module).__mro__) - {nn.Module, object}
        for kind in self._own:  # PyTorch's too, which use what their own children have
            self._add(vars(kind).get("forward"), own=True)
        while (before := len(self._functions)) and not self._looks_up:
            for function in list(self._functions.values()):
                self._follow(function)
            if len(self._functions) == before:
                break
            self._looks_up |= len(self._functions) > _MOST_FUNCTIONS

    def may_step(self, holder: nn.Module, name: str) -> bool:
        """Whether the code may get from a module to a child of this name."""
        is_container = hasattr(type(holder), "__iter__") or hasattr(type(holder), "__getitem__")
        return self._looks_up or name in self._names or (is_container and self._takes_apart)

    def _add(self, value: Any, own: bool = False) -> None:
        """Take in a function that may be called; one of PyTorch's or Python's only if own."""
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)
        if isinstance(value, FunctionType) and (own or not _is_known(value.__module__)):
            self._functions.setdefault(id(value), value)
            self._add(getattr(value, "__wrapped__", None))

    def _follow(self, function: FunctionType) -> None:
        names: set[str] = set()
        for code in _codes(function.__code__):
            names.update(code.co_names)
            self._takes_apart |= _takes_apart(code)
        self._names |= names
        self._takes_apart |= bool(names & _TAKERS)
        self._looks_up |= bool(names & _LOOKS_UP)
        spaces: list[Any] = [function.__globals__.get(name) for name in names]
        spaces += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        for value in spaces:
            self._add(value)
            if isinstance(value, type) and not _is_known(value.__module__):
                self._add_all(vars(value).values())
            elif isinstance(value, ModuleType) and not _is_known(value.__name__):
                self._add_all(getattr(value, name, None) for name in names)
        for kind in self._classes:
            methods = (inspect.getattr_static(kind, name, None) for name in names - {"forward"})
            self._add_all(methods, own=kind in self._own)

    def _add_all(self, values: Iterable[Any], own: bool = False) -> None:
        for value in list(values):
            self._add(value, own)


def _is_known(module_name: str | None) -> bool:
    root = (module_name or "").partition(".")[0]
    return root in ("torch", "numpy") or root in sys.stdlib_module_names - {"__main__"}


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Walk through the code of a function and of those defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _takes_apart(code: CodeType) -> bool:
    return any(
        instruction.opname in _TAKES_APART or instruction.argrepr == "[]"
        for instruction in dis.get_instructions(code)
    )
