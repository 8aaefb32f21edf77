"""`__all__` is the promise: it is what is there and documented, and importing it imports no runtime."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import importlib.resources
import inspect
import typing
from typing import Any

import pytest

import memslot_hooks
import memslot_plugin
from memslot_hooks import types as travelling

PACKAGES = (memslot_plugin, memslot_hooks)
PUBLIC = [(f"{each.__name__}.{n}", getattr(each, n)) for each in PACKAGES for n in each.__all__]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_package_holds_what_all_promises_and_says_that_it_is_typed(package: Any) -> None:
    # `probe` is a function and hides the module of that name.
    there = [n for n, v in vars(package).items() if n[0] != "_" and not inspect.ismodule(v)]
    assert sorted(package.__all__) == sorted(there)
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_every_type_that_travels_through_hooks_is_public_and_its_annotations_resolve() -> None:
    for name, value in vars(travelling).items():
        if inspect.isclass(value) and value.__module__ == travelling.__name__:
            assert name in memslot_hooks.__all__
            typing.get_type_hints(value)


def test_every_public_name_is_documented() -> None:
    missing = []
    for name, value in PUBLIC:
        if isinstance(value, (str, tuple)):
            continue  # documented where it is defined: a constant has no docstring at run time
        documentation = inspect.getdoc(value) or ""
        # A generated docstring is the signature again and documents nothing.
        if not documentation or documentation.startswith(f"{name.rpartition('.')[2]}("):
            missing.append(name)
        missing += [f"{name}.{m}" for m, what in methods(value) if not inspect.getdoc(what)]
    assert missing == []


def methods(cls: object) -> list[tuple[str, Any]]:
    """Methods and properties that a class itself defines; fields are documented by the class."""
    if not inspect.isclass(cls) or issubclass(cls, (enum.Enum, tuple)):
        return []
    properties = (property, classmethod, staticmethod)
    return [
        (name, value)
        for name, value in vars(cls).items()
        if name[0] != "_" and (inspect.isfunction(value) or isinstance(value, properties))
    ]


def test_every_public_record_is_frozen() -> None:
    records = [(n, v) for n, v in PUBLIC if inspect.isclass(v) and dataclasses.is_dataclass(v)]
    assert len(records) > 10
    assert [n for n, v in records if not v.__dataclass_params__.frozen] == []  # type: ignore[attr-defined]


def test_version_is_that_of_the_distribution() -> None:
    assert memslot_plugin.__version__ == importlib.metadata.version("memslot")


def test_hooks_are_importable_with_pluggy_alone_and_the_package_without_a_runtime(
    child: Any,
) -> None:
    child("""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "pluggy", "memslot_hooks"}:
            raise ImportError(f"{name} is neither pluggy nor of the standard library")

sys.meta_path.insert(0, Refuse())
import memslot_hooks, memslot_hooks.docs
sys.meta_path.pop(0)
import memslot_plugin
assert not {"wasmtime", "wasmer", "rich", "click"} & set(sys.modules), sorted(sys.modules)
""")
