"""The hand-written stub of the compiled core has exactly the names of the core."""

import ast
import inspect
from pathlib import Path

import pytest

from bnfast import _core

STUB = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def own_callables():
    return {
        name
        for name, value in vars(_core).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == "bnfast._core"
    }


def test_every_function_and_class_has_a_stub():
    assert own_callables() == set(FUNCTIONS) | set(CLASSES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_of_a_function_are_those_of_its_stub(name):
    real = list(inspect.signature(getattr(_core, name)).parameters)
    assert real == [argument.arg for argument in FUNCTIONS[name].args.args]


@pytest.mark.parametrize("name", CLASSES)
def test_attributes_of_a_class_are_those_of_its_stub(name):
    stubbed = {
        node.target.id if isinstance(node, ast.AnnAssign) else node.name
        for node in CLASSES[name].body
    }
    real = {
        attribute
        for attribute in vars(getattr(_core, name))
        if attribute in {"__init__", "__call__"} or not attribute.startswith("_")
    }
    assert real == stubbed


@pytest.mark.parametrize("name", CLASSES)
def test_read_only_attributes_are_properties_in_stub(name):
    """Otherwise mypy would let a caller set it."""
    stubbed = {
        node.name
        for node in CLASSES[name].body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
    }
    real = {
        attribute
        for attribute, value in vars(getattr(_core, name)).items()
        if not attribute.startswith("_") and inspect.isdatadescriptor(value)
    }
    assert real == stubbed
