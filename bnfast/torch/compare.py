"""Check that two models give the same outputs, up to rounding."""

from __future__ import annotations

import copy
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def check_same_outputs(model: nn.Module, other: nn.Module, example: Any) -> None:
    """Raise RuntimeError if two models do not give the same outputs for an example.

    Rounding may cost half the digits of the coarsest type used. A larger difference is an error,
    not rounding: in networks that work, rounding does not grow with depth.
    """
    wanted, found = (leaves(_call(m, example)) for m in (model, other))
    if wanted.keys() != found.keys():
        raise RuntimeError(
            f"for the example the frozen model's output has {sorted(found)}; expected that of the "
            f"model, {sorted(wanted)}"
        )
    if not wanted:
        raise ValueError("example gives an output without a tensor; expected one to compare")
    coarsest = max((_epsilon(p.dtype) for p in model.parameters()), default=0.0)
    for path, want in wanted.items():
        _check_same(path, want, found[path], coarsest)


def leaves(output: Any) -> dict[str, Tensor]:
    """Return the tensors in an output, keyed by their path."""
    flat, _ = pytree.tree_flatten_with_path(output)
    found: dict[str, Tensor] = {}
    for path, leaf in flat:
        name = "output" + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            found[name] = leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            inner = leaves(dict(vars(leaf)))
            found |= {name + rest.removeprefix("output"): t for rest, t in inner.items()}
    return found


def _call(model: nn.Module, example: Any) -> Any:
    example = copy.deepcopy(example)  # a forward may change it
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(example, dict):
            return model(**example)
        return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _epsilon(dtype: torch.dtype) -> float:
    floats = dtype.is_floating_point or dtype.is_complex
    return float(torch.finfo(dtype).eps) if floats else 0.0


def _check_same(path: str, want: Tensor, found: Tensor, coarsest: float) -> None:
    if want.shape != found.shape or want.dtype is not found.dtype:
        raise RuntimeError(
            f"for the example the frozen model's {path} is {tuple(found.shape)} of {found.dtype}; "
            f"expected {tuple(want.shape)} of {want.dtype}, as the model's"
        )
    wide = torch.complex128 if want.dtype.is_complex else torch.float64
    a, b = (t.detach().to("cpu").to(wide) for t in (want, found))
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0, (a - b).abs()).max().item() if a.numel() else 0.0
    apart = inf if isnan(apart) else apart
    finite = a.abs()[a.isfinite()]
    largest = finite.max().item() if finite.numel() else 0.0
    epsilon = _epsilon(want.dtype)
    allowed = largest * max(epsilon, coarsest) ** 0.5 if epsilon else 0.0
    if apart > allowed:
        raise RuntimeError(
            f"for the example the frozen model's {path} differs from the model's by up to "
            f"{apart:.3g}; expected at most {allowed:.3g}, where the largest value is {largest:.3g}"
        )
