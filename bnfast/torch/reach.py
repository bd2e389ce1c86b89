"""Find the modules that a forward may use, from its code, if it cannot be followed.

To call a module inside another one, code must name its attribute, take a container apart, or look
modules up by computed names. Code that does none of these for one step of the path to a module
cannot use that module.
"""

from __future__ import annotations

import dis
import inspect
import logging
import sys
from functools import partial
from operator import attrgetter, methodcaller
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_UNREAD = (3, 15)  # the first Python version whose bytecode has not been checked here
_MOST_FUNCTIONS = 2000
_DEEPEST = 5  # levels of attributes that are searched for modules
_TAKES_APART = {
    "BINARY_SLICE",
    "BINARY_SUBSCR",
    "CALL_FUNCTION_EX",
    "DICT_UPDATE",
    "GET_ITER",
    "LIST_EXTEND",
    "SET_UPDATE",
    "UNPACK_EX",
    "UNPACK_SEQUENCE",
}
_TAKERS = {"iter", "next", "map", "filter", "zip", "reduce", "list", "tuple", "reversed", "values"}
# The first instruction that holds a call's number of arguments.
_CALL = next(name for name in ("PRECALL", "CALL", "CALL_FUNCTION") if name in dis.opmap)
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
    "methodcaller",
    "modules",
    "named_children",
    "named_modules",
    "vars",
}


_COMPUTED = (attrgetter, methodcaller, partial)  # callables whose code does not show what they use


def reached_by_hooks(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside a module that its hooks may use."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [h for kind in kinds for h in vars(module).get(kind, {}).values()]
    if not hooks:
        return []
    return [m for m in reached_from(module, hooks) if m is not module]


def reached_from(module: nn.Module, functions: Any = None) -> list[nn.Module]:
    """Return the modules that a module's forward may use, itself included."""
    if sys.version_info >= _UNREAD:
        return list(module.modules())
    code = _Code(module, functions)
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
    """Find the modules in a module's attributes, outside the tree of modules."""
    known = {"_modules", "_parameters", "_buffers"}
    row = [(value, 0) for name, value in vars(module).items() if name not in known]
    seen: set[int] = set()
    while row:
        value, depth = row.pop()
        if isinstance(value, nn.Module):
            yield value
        elif depth < _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            row += [(inner, depth + 1) for inner in _held_by(value)]


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    plain = isinstance(value, (type, FunctionType, ModuleType, Tensor))
    return () if plain else getattr(value, "__dict__", {}).values()


class _Code:
    """What the code of a forward, and of everything it may call, can use."""

    def __init__(self, module: nn.Module, functions: Any = None) -> None:
        self._names: set[str] = set()
        self._takes_apart = self._looks_up = False
        self._classes = {type(m) for m in module.modules()}
        self._functions: dict[int, FunctionType] = {}
        if "forward" in vars(module):  # forward was replaced
            self._looks_up = True
        self._own = set(type(module).__mro__) - {nn.Module, object}
        if functions is None:
            functions = [vars(kind).get("forward") for kind in self._own]  # also PyTorch's
        for function in functions:
            self._add(function, own=True)
            if isinstance(function, partial):
                self._looks_up = True
        for kind in set().union(*(kind.__mro__ for kind in self._classes)):
            # Methods that are called without their name: operators, item access, `__getattr__`.
            self._add_all(
                value
                for name, value in vars(kind).items()
                if name[:2] == name[-2:] == "__" and name not in ("__init__", "__repr__")
            )
        for part in module.modules():  # functions stored in attributes
            for value in vars(part).values():
                self._add(value)
                self._looks_up |= isinstance(value, _COMPUTED)
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
        """Add a function that may be called; one from PyTorch or Python only if `own`."""
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)
        if any(value is known for known in vars(nn.Module).values()):
            return
        if isinstance(value, FunctionType) and (own or not _is_known(value.__module__)):
            self._functions.setdefault(id(value), value)
            self._add(getattr(value, "__wrapped__", None))

    def _follow(self, function: FunctionType) -> None:
        names: set[str] = set()
        for code in _codes(function.__code__):
            names.update(_names(code, function.__globals__))
            self._takes_apart |= _takes_apart(code)
            if "getattr" in code.co_names:
                written_out = _attributes_got(code, function.__globals__)
                self._looks_up |= written_out is None
                names.update(written_out or ())
        self._names |= names
        self._takes_apart |= bool(names & _TAKERS)
        self._looks_up |= bool(names & _LOOKS_UP)
        globals_ = set().union(*(code.co_names for code in _codes(function.__code__)))
        spaces: list[Any] = [function.__globals__.get(name) for name in globals_]
        spaces += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        for value in spaces:
            self._add(value)
            self._looks_up |= isinstance(value, _COMPUTED)
            if isinstance(value, type):
                self._add_all(_methods(value))
            elif isinstance(value, ModuleType) and not _is_known(value.__name__):
                self._add_all(getattr(value, name, None) for name in globals_)
        for kind in self._classes:
            # A child's forward is called as a whole, and existing modules are not made again.
            called = names - {"forward", "__init__"}
            methods = (inspect.getattr_static(kind, name, None) for name in called)
            self._add_all(methods, own=kind in self._own)

    def _add_all(self, values: Iterable[Any], own: bool = False) -> None:
        for value in list(values):
            self._add(value, own)


def _methods(kind: type) -> Iterable[Any]:
    """Return the methods by which an object of a class may use modules that it is given."""
    return () if issubclass(kind, nn.Module) or _is_known(kind.__module__) else vars(kind).values()


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
    """Yield the code of a function and of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType, space: dict[str, Any]) -> set[str]:
    """Return the names that code uses, except attributes of Python modules and loggers."""
    names: set[str] = set()
    apart = False
    for instruction in dis.get_instructions(code):
        name, operation = instruction.argval, instruction.opname
        if operation == "LOAD_GLOBAL":
            apart = isinstance(space.get(name), (ModuleType, logging.Logger))
        elif not apart and isinstance(name, str) and name in code.co_names:
            names.add(name)
        elif operation not in ("LOAD_ATTR", "LOAD_METHOD", "CACHE"):
            apart = False
        if operation == "LOAD_GLOBAL" and not apart:
            names.add(name)
    return names


def _takes_apart(code: CodeType) -> bool:
    """Whether code iterates over anything or indexes it, except a range and a shape."""
    row = list(dis.get_instructions(code))
    counts = {
        end + 1
        for start, instruction in enumerate(row)
        if instruction.argval == "range" and (end := _call(row, start)[1])
    }
    for i, instruction in enumerate(row):
        if instruction.opname in _TAKES_APART or instruction.argrepr == "[]":
            of_shape = row[i - 2].argval == "shape" and row[i - 1].opname == "LOAD_CONST"
            if not (of_shape or i in counts):
                return True
    return False


def _attributes_got(code: CodeType, space: dict[str, Any]) -> set[str] | None:
    """Return the constant names in calls of getattr; None if a name is computed."""
    names: set[str] = set()
    row = list(dis.get_instructions(code))
    for start, instruction in enumerate(row):
        if instruction.argval == "getattr" and instruction.opname.startswith("LOAD_"):
            first = row[start + 1]
            if first.opname == "LOAD_GLOBAL" and isinstance(space.get(first.argval), ModuleType):
                continue
            arguments, _ = _call(row, start)
            if len(arguments) < 2 or not isinstance(arguments[1], str):
                return None
            names.add(arguments[1])
    return names


def _call(row: list[dis.Instruction], start: int) -> tuple[list[Any], int]:
    """Find the arguments and the place of the call whose function is loaded at `start`.

    An argument is None if it is not a constant. If the call cannot be read, there are no arguments
    and the place is 0.
    """
    stack: list[Any] = []
    for i, instruction in enumerate(row[start + 1 :], start + 1):
        name = instruction.opname
        if name == _CALL and len(stack) == instruction.arg:
            return stack, i + (name == "PRECALL")
        if name in ("CACHE", "PUSH_NULL", "EXTENDED_ARG", "NOP"):
            continue
        if "JUMP" in name or "RETURN" in name:
            break
        effect = dis.stack_effect(instruction.opcode, instruction.arg)
        if name == "LOAD_CONST" and effect == 1:
            stack.append(instruction.argval)
            continue
        if effect < 0 and -effect >= len(stack):
            break
        stack = stack[: len(stack) + effect] if effect < 0 else stack + [None] * effect
        if stack:
            stack[-1] = None
    return [], 0
