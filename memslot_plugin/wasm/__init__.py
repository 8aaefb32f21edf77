"""Core WebAssembly modules as bytes: what they declare, and the same module rewritten.

Pure bytes: no memory is mapped, no runtime is known, and no code is walked.
"""

from __future__ import annotations

from memslot_plugin.wasm.binary import NotUnderstood
from memslot_plugin.wasm.constants import constant_bits, encode_constant
from memslot_plugin.wasm.expressions import Expression
from memslot_plugin.wasm.functions import FunctionType, exported_functions
from memslot_plugin.wasm.module import (
    DataSegment,
    Export,
    ExternKind,
    Global,
    Import,
    ImportName,
    Memory,
    Module,
    Section,
    SectionId,
    Table,
)
from memslot_plugin.wasm.offsets import Offsets
from memslot_plugin.wasm.parse import parse
from memslot_plugin.wasm.rewrite import rewrite, state_exports
from memslot_plugin.wasm.types import WASM_PAGE, GlobalType, MemoryType, TableType, ValueType

__all__ = [
    "WASM_PAGE",
    "DataSegment",
    "Export",
    "Expression",
    "ExternKind",
    "FunctionType",
    "Global",
    "GlobalType",
    "Import",
    "ImportName",
    "Memory",
    "MemoryType",
    "Module",
    "NotUnderstood",
    "Offsets",
    "Section",
    "SectionId",
    "Table",
    "TableType",
    "ValueType",
    "constant_bits",
    "encode_constant",
    "exported_functions",
    "parse",
    "rewrite",
    "state_exports",
]
