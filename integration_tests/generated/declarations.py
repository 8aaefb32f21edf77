"""Declarations of a generated module: signatures, functions, memories, tables and globals, some of them imported."""

from __future__ import annotations

import random
from typing import Any

from . import emit
from .emit import END, NUMBERS, REFERENCES, code, constant
from .opcodes import ADD, some_bits
from .world import Features, Global, Import, Memory, Signature, Table, World

SOME_KINDS = (*NUMBERS, *NUMBERS, "v128", *REFERENCES)


class Declarations:
    """Declarations of one module, drawn by the constructor."""

    def __init__(self, seed: int, features: Features) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.world = World(rng, features)
        self.world.grows = rng.random() < 0.6
        self.world.irreversible = rng.random() < 0.5
        self.imports: list[Import] = []
        self._import_entries: list[bytes] = []
        self._exports: list[tuple[str, int, int]] = []
        self._wrappers: list[tuple[int, bytes]] = []
        self._global_entries: list[bytes] = []
        self.calls: list[tuple[Any, ...]] = []
        self.probes: list[tuple[Any, ...]] = []
        self.bound = rng.random() < 0.12
        """True if the module imports objects of the runtime."""
        self.sound = rng.random() < 0.92
        """True if active segments have to lie inside."""
        self._choose_functions()
        self._choose_tables()
        self._choose_memories()
        self.world.tags = rng.randint(0, 2) if "exceptions" in features else 0
        self._choose_globals()

    def _choose_functions(self) -> None:
        rng, world = self.rng, self.world
        found: list[Signature] = [((), ()), ((), ("i32",)), (("i32",), ("i32",))]
        for _ in range(rng.randint(1, 4)):
            counts = rng.randint(0, 3), rng.choice((0, 1, 1, 2))
            parameters, results = (tuple(rng.choice(SOME_KINDS) for _ in range(n)) for n in counts)
            found.append((parameters, results))
        world.signatures = list(dict.fromkeys(found))
        possible = [n for n, s in enumerate(world.signatures) if numeric(s) and len(s[1]) <= 1]
        for number in range(rng.choice((0, 0, 0, 1, 2))):
            kind = rng.choice(possible)
            results = world.signatures[kind][1]
            self._import(f"f{number}", "function", 0, emit.unsigned(kind), *results)
            world.functions.append(kind)
        world.imported_functions = len(world.functions)
        world.functions += [rng.randrange(len(world.signatures)) for _ in range(rng.randint(1, 7))]

    def _import(self, name: str, what: str, kind: int, encoded: bytes, *detail: Any) -> None:
        self.imports.append(Import(name, what, detail))
        self._import_entries.append(emit.name("env") + emit.name(name) + bytes([kind]) + encoded)

    def _choose_memories(self) -> None:
        rng, world = self.rng, self.world
        several = "multi_memory" in world.features
        for index in range(rng.choice((0, 1, 1, 1, 1, *((1, 2, 3) * several)))):
            minimum = rng.choice((0, 1, 1, 1, 1, 2, 3))
            maximum = None if rng.random() < 0.15 else minimum + rng.choice((0, 1, 2, 5))
            wide = "memory64" in world.features and rng.random() < 0.15
            shared = "threads" in world.features and maximum is not None and rng.random() < 0.03
            possible = self.bound and index == 0 and not wide and not shared
            imported = possible and rng.random() < 0.4
            if imported:
                maximum = minimum + 3 if maximum is None else maximum
                self._import("memory", "memory", 2, emit.limits(minimum, maximum), minimum, maximum)
            address = "i64" if wide else "i32"
            world.memories.append(Memory(index, minimum, maximum, address, imported, shared))
            if not shared and rng.random() < 0.5:
                self._exports.append((f"memory {index}", 2, index))

    def _choose_tables(self) -> None:
        rng, world = self.rng, self.world
        for index in range(rng.choice((0, 1, 1, 1, 2, 3))):
            kind = rng.choice(("funcref", "funcref", self._externref()))
            minimum = rng.choice((0, 1, 2, 3, 5, 10))
            maximum = minimum + rng.choice((0, 1, 4, 20))
            wide = "table64" in world.features and rng.random() < 0.15
            possible = self.bound and index == 0 and kind == "funcref" and not wide
            imported = possible and "bound_tables" in world.features and rng.random() < 0.3
            if imported:
                encoded = emit.CODES[kind] + emit.limits(minimum, maximum)
                self._import("table", "table", 1, encoded, minimum, maximum)
            address = "i64" if wide else "i32"
            world.tables.append(Table(index, kind, minimum, maximum, address, imported))
            if rng.random() < 0.4:
                self._exports.append((f"table {index}", 1, index))

    def _externref(self) -> str:
        """Return the reference type of tables and segments besides functions."""
        return "externref" if "externref_tables" in self.world.features else "funcref"

    def _choose_globals(self) -> None:
        rng, world = self.rng, self.world
        if self.bound:
            value = rng.choice((0, 8, 1000, 65000, 65530))
            self._import("base", "i32", 3, b"\x7f\x00", value)
            world.globals.append(Global(0, "i32", mutable=False, initial=None, imported=True))
        if rng.random() < 0.8:
            world.fuel = len(world.globals)
            self._define_global("i32", mutable=True, bits=0)
        for _ in range(rng.choice((0, 1, 2, 4, 7))):
            kind = rng.choice(SOME_KINDS)
            bits = 0 if kind in REFERENCES else some_bits(rng, kind)
            self._define_global(kind, mutable=rng.random() < 0.7, bits=bits)

    def _define_global(self, kind: str, *, mutable: bool, bits: int | None) -> None:
        rng, world = self.rng, self.world
        index, initial = len(world.globals), constant(kind, bits or 0)
        if index != world.fuel:
            before = world.constants(kind)
            if before and rng.random() < 0.5:
                chosen = rng.choice(before)
                initial, bits = code((0x23, chosen.index)), chosen.initial
            if kind == "funcref" and rng.random() < 0.6:
                function = rng.randrange(len(world.functions))
                initial = code((0xD2, function))
                world.referable.append(function)
            computed = kind in ("i32", "i64") and "extended_const" in world.features
            if computed and rng.random() < 0.3:
                more = some_bits(rng, kind)
                initial += code(constant(kind, more), ADD[kind])
                bits = None if bits is None else (bits + more) % 2 ** int(kind[1:])
            if rng.random() < 0.25:
                self._exports.append((f"global {index}", 3, index))
        world.globals.append(Global(index, kind, mutable, bits))
        self._global_entries.append(emit.CODES[kind] + bytes([mutable]) + initial + END)


def numeric(signature: Signature) -> bool:
    return all(kind in NUMBERS for side in signature for kind in side)
