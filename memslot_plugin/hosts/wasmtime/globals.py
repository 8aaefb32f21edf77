"""The saved globals of an instance on wasmtime: their places, and the values that a reset puts back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import SnapshotRefused
from memslot_plugin.guest.plan import Plan
from memslot_plugin.hosts.wasmtime.values import KIND_NAMES, Name

_READABLE = ("(ref null func)", "(ref null extern)")
"""The types of references that wasmtime's C API can read; any other ends the process."""

_MASKS = {
    kind: (1 << bits) - 1 for kind, bits in zip(KIND_NAMES, (32, 64, 32, 64, 128), strict=False)
}


def initial_globals(plan: Plan, name: Callable[[str], Name]) -> Any:
    """Return the saved globals of a guest, with their initial values if the module has them as constants."""
    every = ffi.new("ms_wt_global[]", len(plan.saved_globals))
    for saved, each in zip(every, plan.saved_globals, strict=True):
        assert each.export_name is not None
        label = name(each.export_name)
        saved.name, saved.length = label.utf8, label.length
        saved.kind = KIND_NAMES.index(each.type) if each.type in KIND_NAMES else 0
        if each.initial is not None:
            saved.value = list(each.initial.to_bytes(16, "little"))
    return every


class SavedGlobals:
    """The saved globals of one instance."""

    __slots__ = ("array", "cell", "count")

    def __init__(self, cell: Any, initial: Any) -> None:
        self.cell = cell
        self.count = len(initial)
        self.array = ffi.new("ms_wt_global[]", self.count)
        """Structures of the C half, with the values that a reset puts back."""
        ffi.memmove(self.array, initial, ffi.sizeof(self.array))

    def write(self) -> int:
        """Give the globals their saved values; returns the outcome of the entry."""
        return int(lib.ms_wt_globals_write(self.cell, 0, self.array, self.count))

    def read(self) -> int:
        """Save the present values of the globals; returns the outcome of the entry."""
        return int(lib.ms_wt_globals_read(self.cell, 0, self.array, self.count))

    def bits(self, plan: Plan, guest_name: str) -> dict[int, int | None]:
        """Return the saved values as `wasm.encode_constant` takes them, by index; raises SnapshotRefused."""
        values: dict[int, int | None] = {}
        for each, saved in zip(plan.saved_globals, self.array, strict=True):
            bits = int.from_bytes(bytes(ffi.buffer(saved.value)), "little")
            if not each.type.startswith("(ref "):
                values[each.index] = bits & _MASKS[each.type]
            elif bits & _MASKS["i64"]:  # the identity of the reference's store; null has none
                raise SnapshotRefused(
                    f"global {each.index} of the guest {guest_name} holds a reference, {each.type}, that is not null,"
                    " and only null can be written down; take the snapshot while it is null"
                )
            else:
                values[each.index] = None
        return values


def require_readable(plan: Plan, guest_name: str) -> None:
    """Raise SnapshotRefused if wasmtime's C API cannot read a saved global."""
    for each in plan.saved_globals:
        if each.type.startswith("(ref ") and each.type not in _READABLE:
            raise SnapshotRefused(
                f"global {each.index} of the guest {guest_name} holds references, {each.type}, which cannot be read;"
                " use it without a snapshot"
            )
