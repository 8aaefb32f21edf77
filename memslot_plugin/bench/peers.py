"""Who is compared with: runtimes alone as their documentation uses them, wasmtime's own pool, and extism.

Each is a function that serves one request: a fresh instance, one call, and the instance's end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from memslot_plugin.errors import HostUnavailable
from memslot_plugin.hosts.alone import KNOWN, WasmtimeAlone
from memslot_plugin.settings import MIB

Request = Callable[[], object]

KEPT = {"its pool": 0, "its pool, keeping 1 MiB": MIB}
"""The settings of wasmtime's own pool that are tried: bytes of a memory that stay resident."""


class WasmtimePool(WasmtimeAlone):
    """wasmtime-py with its own pooling allocator, which the package has in its bindings alone."""

    def __init__(self, module: bytes, keep_resident: int) -> None:
        self._keep_resident = keep_resident
        super().__init__(module, None)

    def _make_engine(self) -> Any:
        wasmtime = importlib.import_module("wasmtime")
        bindings = importlib.import_module("wasmtime._bindings")
        pool = bindings.wasmtime_pooling_allocation_config_new()
        try:
            set_kept = bindings.wasmtime_pooling_allocation_config_linear_memory_keep_resident_set
            set_kept(pool, self._keep_resident)
            bindings.wasmtime_pooling_allocation_config_table_keep_resident_set(pool, MIB)
            config = wasmtime.Config()
            bindings.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
        finally:
            bindings.wasmtime_pooling_allocation_config_delete(pool)
        return wasmtime.Engine(config)


def peers(host: str, module: bytes, function: str) -> dict[str, Request]:
    """Everybody that a host is compared with, by name; extism stands with wasmtime, on which it is built.

    Raises HostUnavailable without the runtime.
    """
    found = {f"{host} alone": _request(KNOWN[host](module, None), function)}
    if host == "wasmtime":
        for name, kept in KEPT.items():
            found[name] = _request(WasmtimePool(module, kept), function)
        extism = _extism(module, function)
        if extism is not None:
            found["extism"] = extism
    return found


def _request(runtime: Any, function: str) -> Request:
    def request() -> None:
        instance = runtime.instantiate()
        runtime.call(instance, function, ())

    return request


def _extism(module: bytes, function: str) -> Request | None:
    try:
        extism = importlib.import_module("extism")
        compiled = importlib.import_module("extism.extism").CompiledPlugin(module)
    except ImportError:
        return None

    def request() -> None:
        extism.Plugin(compiled).call(function, b"")

    return request


def chosen(host: str | None) -> tuple[list[str], list[str]]:
    """The runtimes that are measured, `host` alone or all, and a sentence for each of them that is not here."""
    here, skipped = [], []
    for name in KNOWN:
        if host not in (None, "auto", name):
            continue
        reason = missing(name)
        if reason is None:
            here.append(name)
        else:
            skipped.append(f"{name}: {reason}")
    return here, skipped


def missing(host: str) -> str | None:
    """Why a host cannot be measured here, or None."""
    try:
        KNOWN[host](b"\0asm\1\0\0\0", None)
    except HostUnavailable as error:
        return str(error)
    return None
