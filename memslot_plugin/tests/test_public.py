"""The public names: listed, documented, frozen and importable alone; each error has its builtin."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import enum
import errno
import importlib.metadata
import importlib.resources
import inspect
import types
import typing
from typing import Any

import pytest

import memslot_hooks
import memslot_plugin
from memslot_hooks import types as travelling
from memslot_plugin import errors
from memslot_plugin.errors import MemslotError
from memslot_plugin.tests.journeys import travels

PACKAGES = (memslot_plugin, memslot_hooks)
PUBLIC = [(f"{each.__name__}.{n}", getattr(each, n)) for each in PACKAGES for n in each.__all__]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_package_has_each_name_of_all_its_types_and_version(package: Any) -> None:
    # `probe` is a function and hides the module of that name.
    there = [n for n, v in vars(package).items() if n[0] != "_" and not inspect.ismodule(v)]
    assert sorted(package.__all__) == sorted(there)
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
    assert importlib.metadata.version("memslot") == memslot_plugin.__version__


def test_stub_imports_each_public_name_from_where_it_is_found() -> None:
    stub = importlib.resources.files(memslot_plugin).joinpath("__init__.pyi").read_text()
    found = {
        alias.asname: node.module
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = memslot_plugin._HOMES.items()  # type: ignore[attr-defined]
    assert found == {name: f"memslot_plugin.{module}" for name, module in homes}


def test_package_imports_nothing_before_a_name_is_used(child: Any) -> None:
    child("""
import sys
import memslot_plugin
assert not [name for name in sys.modules if name.startswith("memslot_plugin.")], sys.modules
assert set(memslot_plugin.__all__) < set(dir(memslot_plugin))
from memslot_plugin import SettingError
assert "memslot_plugin.hosts" not in sys.modules
assert not hasattr(memslot_plugin, "nonsense")
from memslot_plugin import *
assert Pool is memslot_plugin.Pool
""")


def test_every_type_that_travels_through_hooks_is_public_and_its_annotations_resolve() -> None:
    for name, value in vars(travelling).items():
        if inspect.isclass(value) and value.__module__ == travelling.__name__:
            assert name in memslot_hooks.__all__
            typing.get_type_hints(value)


def test_every_public_name_is_documented() -> None:
    methods = (types.FunctionType, property, classmethod, staticmethod)
    missing = []
    for name, value in PUBLIC:
        if isinstance(value, (str, tuple)):
            continue  # a constant has no docstring at run time: it is documented at its definition
        # A generated docstring repeats the signature and documents nothing.
        if (inspect.getdoc(value) or "(").startswith((f"{name.rpartition('.')[2]}(", "(")):
            missing.append(name)
        if inspect.isclass(value) and not issubclass(value, (enum.Enum, tuple)):
            own = {n: v for n, v in vars(value).items() if n[0] != "_" and isinstance(v, methods)}
            missing += [f"{name}.{each}" for each, v in own.items() if not inspect.getdoc(v)]
    assert missing == []


def test_every_public_record_is_frozen() -> None:
    records = [(n, v) for n, v in PUBLIC if inspect.isclass(v) and dataclasses.is_dataclass(v)]
    assert len(records) > 10
    assert [n for n, v in records if not v.__dataclass_params__.frozen] == []  # type: ignore[attr-defined]


def test_hooks_need_pluggy_alone_and_the_package_no_runtime(child: Any) -> None:
    child("""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "pluggy", "memslot_hooks"}:
            raise ImportError(f"{name} is neither pluggy nor of the standard library")

sys.meta_path.insert(0, Refuse())
import memslot_hooks
sys.meta_path.pop(0)
from memslot_plugin import *
assert not {"wasmtime", "wasmer", "rich", "click"} & set(sys.modules), sorted(sys.modules)
""")


# The tree of errors: one base, a builtin under each leaf, attributes that travel between processes

LEAVES: list[type[MemslotError]] = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, MemslotError) and value is not MemslotError
]


def test_error_has_one_parent_in_the_tree_and_a_builtin_and_is_public() -> None:
    for leaf in LEAVES:
        parent, builtin = leaf.__bases__
        assert issubclass(parent, MemslotError), leaf
        assert builtin in vars(builtins).values(), leaf
        assert getattr(memslot_plugin, leaf.__name__) is leaf


NATIVE = RuntimeError("native")
ATTRIBUTES: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "GuestTrap": (("unreachable", NATIVE), {"native": NATIVE}),
    "GuestExit": ((7,), {"code": 7}),
    "SystemCallError": ((errno.ENOMEM, "mapping"), {"errno": errno.ENOMEM, "strerror": "mapping"}),
    "PoolExhausted": (("none left",), {"limit": 4, "in_use": 3}),
    "PoolTimeout": (("none left",), {"limit": 4, "in_use": 3}),
}
"""Arguments and attributes of each error. The attributes of the pool's errors are keywords."""


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_error_in_another_process_keeps_its_attributes(leaf: type[MemslotError]) -> None:
    """An exception that cannot be unpickled breaks its pool of processes."""
    arguments, attributes = ATTRIBUTES.get(leaf.__name__, (("what happened",), {}))
    error = leaf(*arguments, **attributes if "limit" in attributes else {})
    error.added_by_the_embedder = [1]  # type: ignore[attr-defined]
    assert [getattr(error, name) for name in attributes] == list(attributes.values())
    travels(error)
    assert "exit status 7" in str(errors.GuestExit(7))
