"""`__all__` is the promise: it is what is there, each name is documented and typed."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import types
import typing
from typing import Any

import pytest

import memslot_hooks
import memslot_plugin

PACKAGES = [memslot_plugin, memslot_hooks]
NAMES = [(package, name) for package in PACKAGES for name in package.__all__]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_is_what_is_there(package: types.ModuleType) -> None:
    promised = package.__all__
    assert sorted(promised) == sorted(set(promised))
    there = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    # `probe` is a function and hides the module of that name.
    assert there == set(promised)


@pytest.mark.parametrize(
    ("package", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_public_name_is_documented(package: types.ModuleType, name: str) -> None:
    value = getattr(package, name)
    if isinstance(value, (str, tuple)):
        return  # documented where it is defined: a constant has no docstring at run time
    assert inspect.getdoc(value), name
    # A generated docstring is the signature again and documents nothing.
    assert not (inspect.getdoc(value) or "").startswith(f"{name}(")
    if inspect.isclass(value):
        for member, what in public_members(value):
            assert inspect.getdoc(what), f"{name}.{member} has no docstring"


def public_members(cls: type) -> list[tuple[str, Any]]:
    """Methods and properties that the class itself defines; fields are documented by the class."""
    return [
        (name, value)
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod)))
        and not issubclass(cls, (enum.Enum, tuple))
    ]


@pytest.mark.parametrize(
    ("package", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_public_name_is_typed(package: types.ModuleType, name: str) -> None:
    value = getattr(package, name)
    callables = [(name, value)] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        callables = [(n, v) for n, v in vars(value).items() if inspect.isfunction(v)]
        callables = [(n, v) for n, v in callables if not n.startswith("_") or n == "__init__"]
        if dataclasses.is_dataclass(value) or issubclass(value, enum.Enum):
            callables = [(n, v) for n, v in callables if n != "__init__"]
    for where, function in callables:
        if function.__module__.split(".")[0] != package.__name__:
            continue  # inherited from a library
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name != "self":
                assert parameter.annotation is not inspect.Parameter.empty, (where, parameter)
        assert "return" in function.__annotations__, where


def test_statistics_and_reports_are_frozen() -> None:
    records = [
        value
        for package, name in NAMES
        if dataclasses.is_dataclass(value := getattr(package, name)) and inspect.isclass(value)
    ]
    assert len(records) > 10
    for record in records:
        assert record.__dataclass_params__.frozen, record  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_package_says_that_it_is_typed(package: types.ModuleType) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_the_version_is_that_of_the_distribution() -> None:
    assert memslot_plugin.__version__ == importlib.metadata.version("memslot")


def test_every_module_says_its_subject() -> None:
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ".tests" in module.name or module.name.endswith((".__main__", "._lib")):
                continue
            try:
                loaded = importlib.import_module(module.name)
            except ImportError as error:  # of a runtime or an extra that is not installed here
                if (error.name or "").startswith(("memslot", "_cffi")):
                    raise
                continue
            assert loaded.__doc__, module.name


def test_importing_the_package_imports_no_runtime(child: Any) -> None:
    child(
        """
import sys
import memslot_plugin, memslot_hooks
assert not {"wasmtime", "wasmer", "rich", "click"} & set(sys.modules), sorted(sys.modules)
"""
    )


def test_the_hooks_are_importable_with_pluggy_alone(child: Any) -> None:
    child(
        """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("memslot_plugin", "cffi", "pydantic", "click", "rich", "_cffi_backend"):
            raise ImportError("not allowed: " + name)
sys.meta_path.insert(0, Refuse())
import memslot_hooks
"""
    )


def test_annotations_of_the_hook_types_can_be_resolved() -> None:
    for name in memslot_hooks.__all__:
        value = getattr(memslot_hooks, name)
        if inspect.isclass(value) and value.__module__ == "memslot_hooks.types":
            typing.get_type_hints(value)
