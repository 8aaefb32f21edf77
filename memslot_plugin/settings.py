"""Settings: keyword arguments over environment variables (`MEMSLOT_*`) over a TOML table over
defaults.

    Settings(slots=16, reserved="1GiB")
    MEMSLOT_SLOTS=16 MEMSLOT_PLUGINS=memfd,mine python service.py
    Settings.from_file("service.toml")  # its table [memslot], or [tool.memslot]

Sizes are bytes, as a number or as text with a unit: "64KiB", "64 MiB", "1GiB" (powers of 1024) or
"64kB", "64MB" (powers of 1000).  A wrong value raises SettingError with one sentence that names the
setting, what is expected and what was given.  A variable with the prefix that is no setting raises it too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta
from msgspec import inspect as types

from memslot_plugin.errors import SettingError, shown

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_SIZE = re.compile(r"\s*(\d+)\s*(?:([kmgt])(i?)b|b?)\s*", re.ASCII | re.IGNORECASE)

_NOT_OURS = ("profile", "wheel", "gate", "service_", "port")
"""Variables that begin so are for the tests of memslot, or Kubernetes sets them for a service of that name."""

LARGEST = 2**63 - 1
"""The bound of settings that have no other."""

BYTES = {"unit": "bytes"}
"""The mark of settings that are sizes."""

Size = Annotated[int, Meta(extra=BYTES)]
Limit = Annotated[int, Meta(ge=0, le=LARGEST, extra=BYTES)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Names = tuple[str, ...]
Switch = Literal["auto", "on", "off"]


def about(description: str, ge: int | None = None, le: int | None = None) -> Meta:
    """Return the description and the limits of a setting as msgspec reads them."""
    return Meta(description=description, ge=ge, le=le)


def parse_size(text: str) -> int:
    """Return a size such as "64MiB" in bytes; raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size")
    number, prefix, binary = match.groups()
    unit: int = (1024 if binary else 1000) ** ("kmgt".index(prefix.lower()) + 1) if prefix else 1
    return int(number) * unit


class _Sourced(msgspec.StructMeta):
    """Read the environment and check every value in `Settings(...)`; msgspec's constructor does neither."""

    def __call__(cls, **values: Any) -> Any:  # noqa: N805 - an instance of a metaclass is a class
        return _checked({**_environment(), **values})


class Settings(msgspec.Struct, metaclass=_Sourced, frozen=True, kw_only=True):
    """Every setting, frozen once made; the module's text says where values come from."""

    host: Annotated[str, about("auto, wasmtime, wasmer, fake, or a plugin's own")] = "auto"
    plugins: Annotated[
        Names | None, about("load only these plugins; None: all that are installed")
    ] = None
    blocked: Annotated[Names, about("plugins that are never loaded nor asked")] = ()
    slots: Annotated[
        int, about("memories that can live at once, the runtime's own too", ge=1, le=1_000_000)
    ] = 128
    allocation: Annotated[
        Literal["pooling", "on-demand"],
        about("one reservation for all slots, or one for each memory"),
    ] = "pooling"
    strategy: Annotated[
        Literal["affinity", "next-available", "random"], about("which unused slot is handed out")
    ] = "affinity"
    max_unused_warm_slots: Annotated[
        int,
        about("with fewer used slots free than this, affinity takes a new one", ge=0, le=LARGEST),
    ] = 100
    reserved: Annotated[Size, about("address space of a slot", ge=64 * KIB, le=TIB)] = 4 * GIB
    guard: Annotated[
        Size, about("address space after a slot, which always faults", ge=0, le=16 * GIB)
    ] = 32 * MIB
    memory_limit: Annotated[
        Limit | None, about("most bytes of a linear memory; None: its maximum, within reserved")
    ] = None
    memories_per_instance: Annotated[Count, about("linear memories that a guest may define")] = 8
    table_limit: Annotated[int, about("most elements of a table", ge=0, le=2**32 - 1)] = 1_000_000
    tables_per_instance: Annotated[Count, about("tables that a guest may define")] = 16
    heap_limit: Annotated[
        Limit | None,
        about("most bytes of a garbage collector's heap; None: as a memory (wasmtime)"),
    ] = None
    image_limit: Annotated[
        Limit, about("the runtime initialises a memory whose image would be larger")
    ] = GIB
    growth: Annotated[
        Literal["mprotect", "ftruncate"],
        about("how memories grow; ftruncate needs bounds_checks = code"),
    ] = "mprotect"
    bounds_checks: Annotated[
        Literal["guard", "code"],
        about("compiled code relies on guard pages or checks addresses (wasmtime)"),
    ] = "guard"
    memfd: Annotated[Switch, about("sealed memfd images")] = "auto"
    reset: Annotated[
        Literal["auto", "madvise", "pagemap", "copy"], about("how memory is made pristine")
    ] = "auto"
    keep_resident: Annotated[
        Limit, about("private bytes of a slot or heap that a reset may keep, beside a copied image")
    ] = 16 * MIB
    audit: Annotated[
        float, about("share of resets after which every byte is compared", ge=0, le=1)
    ] = 0.0
    ready_instances: Annotated[
        Count, about("instances of a guest that wait for its next lease, each in a slot")
    ] = 16
    wait_timeout: Annotated[
        float, about("seconds to wait for a slot when all are in use", ge=0, le=86_400)
    ] = 0.0

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    @classmethod
    def from_file(cls, path: str | Path, **values: Any) -> Settings:
        """Return the settings of the TOML table [memslot] (or [tool.memslot]) in `path`; `values` and
        the environment come first.
        """
        return _checked({**_read_table(Path(path)), **_environment(), **values})

    @property
    def largest_memory(self) -> int:
        """The most bytes that a linear memory in a slot may have."""
        return self.reserved if self.memory_limit is None else min(self.memory_limit, self.reserved)

    @property
    def largest_native_memory(self) -> int:
        """The most bytes that a linear memory which the runtime makes itself may have."""
        return self.reserved if self.memory_limit is None else self.memory_limit

    @property
    def largest_heap(self) -> int:
        """The most bytes that the heap of a garbage collector may have."""
        return self.largest_memory if self.heap_limit is None else self.heap_limit

    def replace(self, **values: Any) -> Settings:
        """Return these settings with `values` changed, checked again."""
        return Settings(**{**msgspec.structs.asdict(self), **values})


class Field(NamedTuple):
    """A setting as checks, error messages and the documentation need it; `parse` takes a value that is text."""

    default: Any
    expected: str
    description: str
    parse: Callable[[str], Any]


@cache
def fields() -> Mapping[str, Field]:
    """Return every setting by name, in the order of the class."""
    info = types.type_info(Settings)
    assert isinstance(info, types.StructType)
    return {each.name: _field(each) for each in info.fields}


def _field(info: types.Field) -> Field:
    kind, description, is_size, optional = info.type, "", False, ""
    while isinstance(kind, (types.Metadata, types.UnionType)):
        if isinstance(kind, types.UnionType):
            kind, optional = kind.types[0], ", or None"
        else:
            description = description or (kind.extra_json_schema or {})["description"]
            is_size = kind.extra == BYTES
            kind = kind.type
    parse: Callable[[str], Any] = str
    if isinstance(kind, types.LiteralType):
        expected = f"one of {', '.join(map(str, kind.values))}"
    elif isinstance(kind, types.StrType):
        expected = "a name"
    elif isinstance(kind, types.VarTupleType):
        expected, parse = "names, separated by commas or in a list", _parse_names
    else:
        assert isinstance(kind, (types.IntType, types.FloatType))
        limits = f"from {kind.ge} to {'2^63 - 1' if kind.le == LARGEST else kind.le}"
        expected, parse = f"a number {limits}", str.strip
        if is_size:
            expected, parse = f"a size such as 64MiB, {limits} bytes", parse_size
        elif isinstance(kind, types.IntType):
            expected = f"a whole number {limits}"
    return Field(info.default, expected + optional, description, parse)


def _parse_names(text: str) -> Names:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _environment() -> dict[str, str]:
    """Return the values that environment variables give, also for settings that do not exist."""
    return {
        variable[8:].lower(): text
        for variable, text in os.environ.items()
        if variable[:8].upper() == "MEMSLOT_" and not variable[8:].lower().startswith(_NOT_OURS)
    }


def _checked(values: Mapping[str, Any]) -> Settings:
    """Return settings of these values and defaults; raises SettingError with a sentence for each wrong value."""
    right, wrong = {}, []
    for name, field in fields().items():
        if name not in values:
            continue
        value = values[name]
        try:
            right[name] = field.parse(value) if isinstance(value, str) else value
            msgspec.convert({name: right[name]}, Settings, strict=False)
        except (ValueError, msgspec.ValidationError):
            wrong.append(f"setting {name}: expected {field.expected}, got {shown(value)}")
    wrong += [
        f"unknown setting {name} (variable MEMSLOT_{name.upper()}); allowed: {', '.join(fields())}"
        for name in values
        if name not in fields()
    ]
    if wrong:
        raise SettingError("; ".join(wrong))
    return msgspec.convert(right, Settings, strict=False)


def _read_table(path: Path) -> Mapping[str, Any]:
    try:
        document = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise SettingError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"the settings file {path} is not TOML: {error}") from None
    tool = document.get("tool")
    table = document.get("memslot", tool.get("memslot") if isinstance(tool, dict) else None)
    if not isinstance(table, dict):
        raise SettingError(f"the settings file {path} has no table [memslot] or [tool.memslot]")
    return table
