"""Settings: keyword arguments over environment variables (`MEMSLOT_*`) over a TOML table over
defaults.

    Settings(slots=16, reserved="1GiB")
    MEMSLOT_SLOTS=16 MEMSLOT_PLUGINS=memfd,mine python service.py
    Settings.from_file("service.toml")  # its table [memslot], or [tool.memslot]

Sizes are bytes, as a number or as text with a unit: "64KiB", "64 MiB", "1GiB" (powers of 1024) or
"64kB", "64MB" (powers of 1000).  Every wrong value raises SettingError with one sentence that names
the setting, the value and what is allowed, and so does a variable of that prefix that is no setting.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from memslot_plugin.errors import SettingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
}
_NOT_OURS = ("profile", "wheel", "gate", "service_", "port")
"""Variables that begin so are for the tests of memslot, or Kubernetes sets them for a service of that name."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_number(value: object) -> object:
    """What it is given, unless that is a boolean, which Python takes for a number and nobody means
    as one.
    """
    if isinstance(value, bool):
        raise ValueError("it is a number, neither true nor false")  # noqa: TRY004 - pydantic's contract
    return value


def parse_size(value: object) -> object:
    """A size like "64MiB" as a number of bytes; what is not text passes through to be validated as
    a number.
    """
    if not isinstance(value, str):
        return parse_number(value)
    match = _SIZE.fullmatch(value)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            'a size is a number of bytes, or a number with a unit such as "64KiB", "64MiB" or "1GiB"'
        )
    size = Fraction(match[1]) * unit
    if size.denominator != 1:
        raise ValueError("a size is a whole number of bytes")
    return size.numerator


def _sized(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Parse and validate a size, so that an error shows the text as it was written."""
    size = parse_size(value)
    try:
        return validate(size)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None


def parse_names(value: object) -> object:
    """Names separated by commas, as environment variables hold them, or a list of names."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("it is names, separated by commas or as a list of text")


def parse_name(value: object) -> object:
    """One name."""
    if not isinstance(value, str):
        raise ValueError("it is a name, which is text")  # noqa: TRY004 - pydantic's contract
    return value


SIZE = WrapValidator(_sized)
NUMBER = BeforeValidator(parse_number)
Limit = Annotated[int, Field(ge=0, le=2**63 - 1), SIZE]
Name = Annotated[str, BeforeValidator(parse_name)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_names)]


class Settings(BaseSettings):
    """Everything that can be set, frozen once it is made; see the module for where values come
    from.
    """

    model_config = SettingsConfigDict(
        env_prefix="MEMSLOT_",
        extra="forbid",
        frozen=True,
        validate_default=True,
        hide_input_in_errors=False,
    )

    host: Name = Field(
        "auto", description="the runtime: auto, wasmtime, wasmer, or one that a plugin registers"
    )
    plugins: Names | None = Field(
        None, description="load only these plugins (names, comma-separated); none set: all"
    )
    blocked: Names = Field(
        (), description="plugins that are never loaded nor asked (names, comma-separated)"
    )
    slots: Annotated[int, NUMBER] = Field(
        128,
        ge=1,
        le=1_000_000,
        description="linear memories that can live at once, the runtime's own included",
    )
    allocation: Literal["pooling", "on-demand"] = Field(
        "pooling", description="slots of one reservation, or a reservation for each memory"
    )
    strategy: Literal["affinity", "next-available", "random"] = Field(
        "affinity", description="which unused slot is handed out"
    )
    max_unused_warm_slots: Annotated[int, NUMBER] = Field(
        100,
        ge=0,
        description="affinity prefers a never-used slot while fewer unused slots than this were used before",
    )
    reserved: Annotated[int, Field(ge=64 * KIB, le=1024 * GIB), SIZE] = Field(
        4 * GIB, description="address space of a slot"
    )
    guard: Annotated[int, Field(ge=0, le=16 * GIB), SIZE] = Field(
        32 * MIB, description="address space after a slot that always faults"
    )
    memory_limit: Limit | None = Field(
        None,
        description="how far a linear memory may grow; none set: its own maximum, within reserved",
    )
    memories_per_instance: Annotated[int, NUMBER] = Field(
        8, ge=0, le=1_000_000, description="linear memories that a guest may define"
    )
    table_limit: Annotated[int, NUMBER] = Field(
        1_000_000, ge=0, le=2**32 - 1, description="elements that a table may have"
    )
    tables_per_instance: Annotated[int, NUMBER] = Field(
        16, ge=0, le=1_000_000, description="tables that a guest may define"
    )
    heap_limit: Limit | None = Field(
        None,
        description="how far the heap of a garbage collector may grow; none set: as a linear memory (wasmtime)",
    )
    image_limit: Limit = Field(
        GIB, description="a larger image is not built; the runtime initialises that memory"
    )
    growth: Literal["mprotect", "ftruncate"] = Field(
        "mprotect",
        description="how growing makes bytes accessible; ftruncate needs bounds_checks = code",
    )
    bounds_checks: Literal["guard", "code"] = Field(
        "guard",
        description="whether compiled code relies on guard pages or compares each address (wasmtime)",
    )
    memfd: Literal["auto", "on", "off"] = Field("auto", description="sealed memfd images")
    reset: Literal["auto", "madvise", "pagemap", "copy"] = Field(
        "auto", description="how memory is made pristine"
    )
    keep_resident: Limit = Field(
        16 * MIB,
        description="private bytes of a slot, and of a heap, that may stay after a reset, beside a copied image",
    )
    audit: Annotated[float, NUMBER] = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of resets after which every byte is compared",
    )
    ready_instances: Annotated[int, NUMBER] = Field(
        16,
        ge=0,
        le=1_000_000,
        description="instances of a guest that stay ready for its next lease, each in a slot",
    )
    wait_timeout: Annotated[float, NUMBER] = Field(
        0.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="seconds to wait for a slot when all are in use",
    )

    def __init__(self, **values: Any) -> None:
        _require_known(os.environ)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingError(_sentences(error)) from None

    @classmethod
    def from_file(cls, path: str | Path, **values: Any) -> Settings:
        """Settings of the TOML table [memslot] (or [tool.memslot]) in `path`; `values` and the
        environment come first.
        """
        table = _read_table(Path(path))
        unknown = sorted(set(table) - set(cls.model_fields))
        if unknown:
            raise SettingError(
                f"{path}: unknown setting {unknown[0]}; allowed: {', '.join(cls.model_fields)}"
            )
        from_environment = cls(**values)
        named = {
            name: table[name] for name in table if name not in from_environment.model_fields_set
        }
        return cls(**{**named, **values})

    @property
    def largest_memory(self) -> int:
        """The most bytes that a linear memory may have: `memory_limit`, or what a slot holds."""
        return self.reserved if self.memory_limit is None else min(self.memory_limit, self.reserved)

    @property
    def largest_native_memory(self) -> int:
        """The same of a memory that the runtime makes itself: `memory_limit`, or as much as a slot holds."""
        return self.reserved if self.memory_limit is None else self.memory_limit

    @property
    def largest_heap(self) -> int:
        """The most bytes that the heap of a garbage collector may have."""
        return self.largest_memory if self.heap_limit is None else self.heap_limit

    def replace(self, **values: Any) -> Settings:
        """These settings with `values` changed, validated again."""
        return type(self)(**{**self.model_dump(), **values})


def _require_known(environment: Iterable[str]) -> None:
    """Raise SettingError for a variable of ours that sets nothing."""
    for variable in environment:
        prefix, name = variable[:8].upper(), variable[8:].lower()
        if prefix != "MEMSLOT_" or name in Settings.model_fields or name.startswith(_NOT_OURS):
            continue
        (nearest,) = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0)
        raise SettingError(
            f"the environment variable {variable} is no setting; the nearest is MEMSLOT_{nearest.upper()}"
        )


def _read_table(path: Path) -> Mapping[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"the settings file {path} is not TOML: {error}") from None
    tool = document.get("tool")
    table = document.get("memslot", tool.get("memslot") if isinstance(tool, dict) else None)
    if not isinstance(table, dict):
        raise SettingError(f"the settings file {path} has no table [memslot] or [tool.memslot]")
    return table


def _sentences(error: ValidationError) -> str:
    """One clear sentence per wrong value: setting, value, what is allowed."""
    sentences = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        if problem["type"] == "extra_forbidden":
            sentences.append(f"unknown setting {name}; allowed: {', '.join(Settings.model_fields)}")
            continue
        allowed = problem["msg"].removeprefix("Value error, ")
        allowed = allowed[:1].lower() + allowed[1:]
        sentences.append(f"setting {name} = {problem['input']!r} is not allowed: {allowed}")
    return "; ".join(sentences)
