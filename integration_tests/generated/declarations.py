"""What a generated module declares: signatures, functions, memories, tables and globals, some of them imported."""

from __future__ import annotations

import random
from typing import Any

from . import emit
from .emit import END, NUMBERS, REFERENCES, constant, operation
from .opcodes import some_bits
from .world import Features, Global, Import, Memory, Signature, Table, World


class Declarations:
    """The declarations of one module, chosen when it is made."""

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
        self.calls: list[tuple[Any, ...]] = []
        self.probes: list[tuple[Any, ...]] = []
        self.bound = rng.random() < 0.12
        """Whether it imports objects of the runtime's own."""
        self.sound = rng.random() < 0.92
        """Whether its active segments are meant to be inside."""
        self._choose()

    def _choose(self) -> None:
        rng, world = self.rng, self.world
        world.signatures = [((), ()), ((), ("i32",)), (("i32",), ("i32",))]
        for _ in range(rng.randint(1, 4)):
            kinds = (*NUMBERS, *NUMBERS, "v128", *REFERENCES)
            parameters = tuple(rng.choice(kinds) for _ in range(rng.randint(0, 3)))
            world.signatures.append(
                (parameters, tuple(rng.choice(kinds) for _ in range(rng.choice((0, 1, 1, 2)))))
            )
        world.signatures = list(dict.fromkeys(world.signatures))
        for number in range(rng.choice((0, 0, 0, 1, 2))):
            self._import_function(f"f{number}")
        world.imported_functions = len(world.functions)
        world.functions += [rng.randrange(len(world.signatures)) for _ in range(rng.randint(1, 7))]
        self._choose_tables()
        self._choose_memories()
        world.tags = rng.randint(0, 2) if world.features.exceptions else 0
        self._choose_globals()

    def _import_function(self, name: str) -> None:
        world = self.world
        possible = [
            n for n, sides in enumerate(world.signatures) if numeric(sides) and len(sides[1]) <= 1
        ]
        kind = self.rng.choice(possible)
        self._import(name, "function", 0, emit.unsigned(kind), *world.signatures[kind][1])
        world.functions.append(kind)

    def _import(self, name: str, what: str, kind: int, encoded: bytes, *detail: Any) -> None:
        self.imports.append(Import(name, what, detail))
        self._import_entries.append(emit.name("env") + emit.name(name) + bytes([kind]) + encoded)

    def _choose_memories(self) -> None:
        rng, world = self.rng, self.world
        count = rng.choice(
            (0, 1, 1, 1, 1, 1, 2, 3) if world.features.multi_memory else (0, 1, 1, 1, 1)
        )
        for index in range(count):
            minimum = rng.choice((0, 1, 1, 1, 1, 2, 3))
            maximum = None if rng.random() < 0.15 else minimum + rng.choice((0, 1, 2, 5))
            address = "i32"
            if world.features.memory64 and rng.random() < 0.15:
                address = "i64"
            shared = world.features.threads and maximum is not None and rng.random() < 0.03
            imported = (
                self.bound and index == 0 and address == "i32" and not shared and rng.random() < 0.4
            )
            if imported:
                maximum = minimum + 3 if maximum is None else maximum
                self._import("memory", "memory", 2, emit.limits(minimum, maximum), minimum, maximum)
            world.memories.append(Memory(index, minimum, maximum, address, imported, shared))
            if not shared and rng.random() < 0.5:
                self._exports.append((f"memory {index}", 2, index))

    def _choose_tables(self) -> None:
        rng, world = self.rng, self.world
        for index in range(rng.choice((0, 1, 1, 1, 2, 3))):
            kind = rng.choice(("funcref", "funcref", "externref"))
            if not world.features.externref_tables:
                kind = "funcref"
            minimum = rng.choice((0, 1, 2, 3, 5, 10))
            maximum = minimum + rng.choice((0, 1, 4, 20))
            address = "i64" if world.features.table64 and rng.random() < 0.15 else "i32"
            imported = (
                self.bound and index == 0 and world.features.bound_tables and rng.random() < 0.3
            )
            imported = imported and kind == "funcref" and address == "i32"
            if imported:
                encoded = emit.CODES[kind] + emit.limits(minimum, maximum)
                self._import("table", "table", 1, encoded, minimum, maximum)
            world.tables.append(Table(index, kind, minimum, maximum, address, imported))
            if rng.random() < 0.4:
                self._exports.append((f"table {index}", 1, index))

    def _choose_globals(self) -> None:
        rng, world = self.rng, self.world
        if self.bound:
            value = rng.choice((0, 8, 1000, 65000, 65530))
            self._import("base", "i32", 3, b"\x7f\x00", value)
            world.globals.append(Global(0, "i32", mutable=False, initial=None, imported=True))
        self._global_entries: list[bytes] = []
        if rng.random() < 0.8:
            world.fuel = len(world.globals)
            self._define_global("i32", mutable=True, bits=0)
        for _ in range(rng.choice((0, 1, 2, 4, 7))):
            kind = rng.choice((*NUMBERS, *NUMBERS, "v128", *REFERENCES))
            bits = 0 if kind in REFERENCES else some_bits(rng, kind)
            self._define_global(kind, mutable=rng.random() < 0.7, bits=bits)

    def _define_global(self, kind: str, *, mutable: bool, bits: int) -> None:
        rng, world = self.rng, self.world
        index, code, known = len(world.globals), constant(kind, bits), True
        if index != world.fuel:
            before = [g for g in world.globals if g.kind == kind and not g.mutable]
            if not world.features.extended_const:
                before = [g for g in before if g.imported]
            if before and rng.random() < 0.5:
                chosen = rng.choice(before)
                code, known, bits = (
                    operation(0x23, chosen.index),
                    chosen.initial is not None,
                    chosen.initial or 0,
                )
            if kind == "funcref" and rng.random() < 0.6:
                function = rng.randrange(len(world.functions))
                code = operation(0xD2, function)
                world.referable.append(function)
            if kind in ("i32", "i64") and world.features.extended_const and rng.random() < 0.3:
                more = some_bits(rng, kind)
                code += constant(kind, more) + operation({"i32": 0x6A, "i64": 0x7C}[kind])
                bits = (bits + more) % 2 ** int(kind[1:])
        world.globals.append(Global(index, kind, mutable, bits if known else None))
        self._global_entries.append(emit.CODES[kind] + bytes([mutable]) + code + END)
        if rng.random() < 0.25 and index != world.fuel:
            self._exports.append((f"global {index}", 3, index))


def numeric(signature: Signature) -> bool:
    return all(kind in NUMBERS for side in signature for kind in side)
