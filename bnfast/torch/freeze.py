"""Prepare a model for inference: fold its batch norms into the layers beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn

from . import folding
from .compare import check_same_outputs
from .compiled import backend
from .convert import OURS, _check_model, revert
from .flow import Flow
from .following import copied
from .reach import kept_aside
from .renorm import PLAIN

_Model = TypeVar("_Model", bound=nn.Module)
_REPORT = "_bnfast_frozen"  # plain dicts, which unpickle without bnfast


@dataclass(frozen=True)
class FrozenReport:
    """What `freeze` did to a model.

    Attributes
    ----------
    folded : dict of str to str
        Names of the batch norms that were folded, and of the layers that do their work now.
    left : dict of str to str
        Names of the batch norms that remain, and why.
    """

    folded: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} batch norms folded, {len(self.left)} left"]
        lines += [f"{name}: folded into {layer}" for name, layer in self.folded.items()]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def frozen_report(model: nn.Module) -> FrozenReport | None:
    """Return what `freeze` did to a model; None for a model that it did not return."""
    kept = vars(model).get(_REPORT)
    return None if kept is None else FrozenReport(dict(kept["folded"]), dict(kept["left"]))


def freeze(model: _Model, *, example: Any = None) -> _Model:
    """Return a copy of a model for inference, its batch norms folded into the layers beside them.

    In evaluation a batch norm is an affine map per channel. The convolution, transposed convolution
    or linear layer before it can do that map; so can the layer after it, where that is exact. The
    copy is in evaluation mode and its parameters need no gradients. Its modules, forwards, hooks
    and attributes are those of the model, so it accepts the same inputs. A folded batch norm is
    replaced by a `torch.nn.Identity`, or by a `Flatten` after a linear layer (see Notes). The copy
    can be pickled, exported (`torch.export`) and loaded where bnfast is not installed. If some
    batch norms remain, calls of the copy go through `backend`, which makes each one operation with
    its addition and activation. A copy or a pickle of the copy does not use the backend.

    Parameters
    ----------
    model : torch.nn.Module
        In any mode. It is not changed.
    example : Tensor, tuple, list or dict, optional
        Inputs for the model: a tensor is its only argument, a tuple or list its arguments, a dict
        its arguments by name. The outputs of model and copy are then compared.

    Returns
    -------
    torch.nn.Module
        Equal to the model in evaluation, to rounding. `report` shows what was folded, and why
        other batch norms were not.

    Raises
    ------
    TypeError
        If `model` is not a `torch.nn.Module`, or is scripted.
    ValueError
        If `model` has lazy layers that have not seen their first input.
    RuntimeError
        If outputs for `example` differ by more than rounding (the square root of their type's
        epsilon, relative to the largest), naming the largest difference.

    Notes
    -----
    A batch norm is folded only if every forward that could call it, or the layer beside it, was
    followed for every input, and always calls the two together. `torch.fx` follows forwards on
    copies, once for every answer to a question about inputs. Forwards are never replaced. No other
    thread should run a module during this time. If a forward cannot be followed, its code is read
    to find the modules that it may use. Code outside of forwards is not seen: a part of the copy
    that is called alone may lack a batch norm that was folded into another part, and changing a
    global or an attribute later may make a forward behave differently. A forward is assumed not to
    depend on whether gradients are recorded.

    A `BatchNorm1d` beside a linear layer takes inputs with two axes, or with three, where it works
    on another axis than the linear layer. It is folded for two axes. Three axes are possible only
    if both axes have the same length; `Flatten` then changes the shape. A convolution also takes
    one input without a batch axis. Its batch norm refuses such an input or, in one dimension, takes
    it for a batch. The copy is for batches.

    Examples
    --------
    >>> import torch, bnfast.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> frozen = bnfast.torch.freeze(model, example=torch.randn(2, 3))
    >>> frozen[1]
    Flatten(start_dim=1, end_dim=-1)
    """
    _check_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted; expected a torch.nn.Module as it is before torch.jit")
    if type(model).__name__ == "OptimizedModule":  # from torch.compile, which wraps the model
        model = model._orig_mod
    _check_not_lazy(model)
    frozen, report = _folded(model)
    setattr(frozen, _REPORT, {"folded": report.folded, "left": report.left})
    if example is not None:
        check_same_outputs(copied(model).eval(), frozen, example)
    if report.left:
        _compile_rest(frozen)
    return frozen


def _check_not_lazy(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model has the uninitialized {name}; expected one that has run once")


def _compile_rest(frozen: nn.Module) -> None:
    """Route calls of a model through our backend, as `torch.nn.Module.compile` does.

    Copies and pickles do not have it. Dynamo skips frames of PyTorch's own modules, such as
    `Sequential`, unless code outside PyTorch calls them.
    """

    def plain(*args: Any, **options: Any) -> Any:
        return frozen._call_impl(*args, **options)

    # Dynamo counts captures per code object, so each model gets its own.
    plain.__code__ = plain.__code__.replace(co_name=type(frozen).__name__)
    compiled = torch.compile(plain, backend=backend)

    def call(*args: Any, **options: Any) -> Any:
        traced = torch.jit.is_tracing()  # tracing refuses compiled functions
        return (plain if traced else compiled)(*args, **options)

    frozen._compiled_call_impl = call


# ---- Which batch norm goes where


class _Place(NamedTuple):
    """Where a module is in the tree."""

    path: str
    module: nn.Module
    holder: nn.Module | None
    name: str


def _folded(model: _Model) -> tuple[_Model, FrozenReport]:
    """Return a copy with every possible batch norm folded, and the report."""
    kept: dict[str, str] = {}
    while True:
        frozen = copied(model).eval().requires_grad_(False)
        report, noticed = _fold_all(frozen, kept)
        if not noticed:
            return frozen, report
        kept |= noticed


def _fold_all(model: nn.Module, kept: dict[str, str]) -> tuple[FrozenReport, dict[str, str]]:
    """Fold in place; return the report and the batch norms that a forward cannot do without."""
    places = _places(model)
    norms = [place for place in places.values() if folding.is_batch_norm(place.module)]
    report = FrozenReport({}, {})
    if not norms:
        return report, {}
    pairs = _Pairs(model, places)
    for place in norms:
        layer, why = (None, kept[place.path]) if place.path in kept else pairs.fold(place)
        if layer is None:
            report.left[place.path] = why
            pairs.make_plain(place.module)
        else:
            report.folded[place.path] = layer.path
    return report, pairs.noticed()


def _places(model: nn.Module) -> dict[int, _Place]:
    root = _Place("(model)", model, None, "")
    found = {id(model): root}
    for holder_path, holder in model.named_modules():
        for name, module in holder.named_children():
            path = f"{holder_path}.{name}" if holder_path else name
            found.setdefault(id(module), _Place(path, module, holder, name))
    return found


class _Pairs:
    """Batch norms and the layers beside them, in all forwards of a model."""

    def __init__(self, model: nn.Module, places: dict[int, _Place]) -> None:
        self._flow = Flow(model, folding.is_batch_norm)
        self._places = places
        self._made: dict[str, nn.Module] = {}
        modules = [m for _, m in model.named_modules(remove_duplicate=False)]
        self._uses = Counter(map(id, modules))
        self._aside = {id(kept) for m in places.values() for kept in kept_aside(m.module)}
        owned = {id(m): m for m in modules}.values()
        self._owners = Counter(id(p) for m in owned for p in m._parameters.values())

    def fold(self, place: _Place) -> tuple[_Place | None, str]:
        """Fold a batch norm if possible; return the layer that takes it, or why there is none."""
        norm = place.module
        why = folding.why_no_affine(norm) or self._why_unknown(norm)
        if why is not None:
            return None, why
        calls = self._flow.calls.get(id(norm), [])
        if not calls:
            return None, "no forward of the model calls it"
        if not all(map(_is_simple, calls)):
            return None, "it is called with more than its input"
        layer, before = self._only({_module(node.args[0]) for node in calls}), ""
        if layer is not None:
            before = self._why_not_after(layer, norm) or ""
            before = before or folding.fold_after(layer, norm) or ""
            if not before:
                return self._replaced(place, layer), ""
        layer = self._only({_module(user) for node in calls for user in node.users})
        if layer is not None:
            after = self._why_not_before(layer, norm) or folding.fold_before(layer, norm)
            if after is None:
                return self._replaced(place, layer), ""
            return None, f"{before}; {after}" if before else after
        return None, before or "there is no single linear layer or convolution right beside it"

    def _only(self, modules: set[nn.Module | None]) -> nn.Module | None:
        """Return the module if there is only one and a batch norm can fold into it, else None."""
        one = modules.pop() if len(modules) == 1 else None
        return one if one is not None and folding.is_linear(one) else None

    def _why_unknown(self, module: nn.Module) -> str | None:
        """Return why a module may be used in unknown ways; None if all its uses are known."""
        place = self._places[id(module)]
        if place.holder is None:
            return "it is the model itself, with nothing beside it"
        if self._uses[id(module)] > 1:
            return f"{place.path} is in the model at more than one place"
        if id(module) in self._aside:
            return f"{place.path} is also kept in an attribute of some module"
        if id(module) in self._flow.read:
            return f"a forward uses the tensors of {place.path}, or numbers made of them"
        if any(self._owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return f"{place.path} shares a parameter with another module"
        return self._flow.lost.get(id(module))

    def _why_not_after(self, layer: nn.Module, norm: nn.Module) -> str | None:
        """Return why a batch norm does not fold into the layer before it in all calls."""
        if why := self._why_unknown(layer):
            return why
        for node in self._flow.calls[id(layer)]:
            if not all(_module(user) is norm for user in node.users) or not node.users:
                return f"the output of {self._places[id(layer)].path} goes elsewhere, too"
        return folding.why_not_after(layer, norm)

    def _why_not_before(self, layer: nn.Module, norm: nn.Module) -> str | None:
        """Return why a batch norm does not fold into the layer after it in all calls."""
        if why := self._why_unknown(layer):
            return why
        path = self._places[id(layer)].path
        for node in self._flow.calls[id(layer)]:
            if not _is_simple(node) or _module(node.args[0]) is not norm:
                return f"{path} is called with other inputs, too"
            if _next_operation(node.args[0]) is not node:
                return f"its input may change before {path} takes it"
        return folding.why_not_before(layer, norm)

    def _replaced(self, place: _Place, layer: nn.Module) -> _Place:
        """Replace a batch norm by its other operations, or by none."""
        made = folding.successor(place.module, layer)
        assert place.holder is not None
        place.holder._modules[place.name] = self._made[place.path] = made
        return self._places[id(layer)]

    def noticed(self) -> dict[str, str]:
        """Return the folded batch norms whose replacement changes what a forward does, and why."""
        put_in = {id(part) for made in self._made.values() for part in made.modules()}
        found: dict[str, str] = {}
        for name, module in self._flow.changed(put_in) if put_in else ():
            inner = set(map(id, module.modules()))
            why = f"the forward of {name} depends on what stands in its place"
            found |= {path: why for path, made in self._made.items() if id(made) in inner}
        return found

    def make_plain(self, norm: nn.Module) -> None:
        """Make a layer of bnfast's a layer of PyTorch's again, if it only ever gets its input."""
        calls = self._flow.calls.get(id(norm), [])
        known = id(norm) not in self._flow.lost and all(map(_is_simple, calls))
        if type(norm) in OURS.values() and known:
            revert(norm)
        elif type(norm) in PLAIN and known:
            norm.__class__ = PLAIN[type(norm)]


def _module(node: Any) -> nn.Module | None:
    """Return the module that a node calls; None if it calls none."""
    return node.meta.get("module") if isinstance(node, fx.Node) else None


def _is_simple(node: fx.Node) -> bool:
    """Whether a call has one argument, the output of another node."""
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _next_operation(node: Any) -> fx.Node:
    after = node.next
    while after.op in ("placeholder", "get_attr"):
        after = after.next
    found: fx.Node = after
    return found
