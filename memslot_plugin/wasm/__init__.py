"""Core WebAssembly modules as bytes: their declarations, and the module with changed sections.

Nothing here maps memory, knows a runtime or walks code.
"""

from __future__ import annotations

from memslot_plugin.wasm.binary import NotUnderstood
from memslot_plugin.wasm.expressions import encode_constant
from memslot_plugin.wasm.functions import FunctionType, exported_functions
from memslot_plugin.wasm.module import (
    DataSegment,
    ExternKind,
    Global,
    Import,
    ImportName,
    Memory,
    Module,
    SectionId,
    Table,
)
from memslot_plugin.wasm.offsets import Offsets
from memslot_plugin.wasm.parse import parse
from memslot_plugin.wasm.rewrite import free_name, rewrite, state_exports
from memslot_plugin.wasm.types import WASM_PAGE, MemoryType, TableType

__all__ = [
    "WASM_PAGE",
    "DataSegment",
    "ExternKind",
    "FunctionType",
    "Global",
    "Import",
    "ImportName",
    "Memory",
    "MemoryType",
    "Module",
    "NotUnderstood",
    "Offsets",
    "SectionId",
    "Table",
    "TableType",
    "encode_constant",
    "exported_functions",
    "free_name",
    "parse",
    "rewrite",
    "state_exports",
]
