"""Random valid modules by seed, with calls to make and probes of the state afterwards.

    Generated(seed, features)  ->  .binary, .calls, .probes, .imports

A probe is an exported function that changes nothing and returns a part of the state: the checksum of a memory, the
bits of a global, the size of a table and its elements. State that is not exported can be compared too.
"""

from __future__ import annotations

from typing import Any

from . import emit
from .body import Body, count_up
from .declarations import numeric
from .emit import END, code, constant, unsigned
from .opcodes import some_bits
from .probes import bits_of, checksum
from .segments import Segments
from .world import Features, Signature, Table

START, TAG, DATA_COUNT = 8, 13, 12


class Generated(Segments):
    """A module of one seed.

    `calls` and `probes` are names and arguments; `imports` are the objects that it needs.
    """

    def __init__(self, seed: int, features: Features) -> None:
        super().__init__(seed, features)
        self._callable: list[tuple[str, tuple[str, ...]]] = []
        self.binary = self._write()
        self._choose_calls()

    # The bytes

    def _write(self) -> bytes:
        rng, world = self.rng, self.world
        data, elements = self._data_segments(), self._element_segments()
        if rng.random() < 0.5:  # references to any function are valid then
            everything = range(len(world.functions))
            world.referable += everything
            elements.append(b"\x03\x00" + emit.vector(*map(unsigned, everything)))
        own = range(world.imported_functions, len(world.functions))
        bodies = [Body(world, index).write() for index in own]
        self._wrap()
        start = self._start()
        kinds = [*(world.functions[index] for index in own), *(kind for kind, _ in self._wrappers)]
        bodies += [emit.sized(body) for _, body in self._wrappers]
        memories = [
            emit.limits(m.minimum, m.maximum, wide=m.address == "i64", shared=m.shared)
            for m in world.memories
            if not m.imported
        ]
        exports = [
            emit.name(text) + bytes([kind]) + unsigned(at) for text, kind, at in self._exports
        ]
        sections = [
            (1, emit.vector(*(emit.function_type(*signature) for signature in world.signatures))),
            (2, emit.vector(*self._import_entries)),
            (3, emit.vector(*map(unsigned, kinds))),
            (4, emit.vector(*(self._table(t) for t in world.tables if not t.imported))),
            (5, emit.vector(*memories)),
            (TAG, emit.vector(*[b"\x00\x00"] * world.tags)),
            (6, emit.vector(*self._global_entries)),
            (7, emit.vector(*exports)),
            *([] if start is None else [(START, unsigned(start))]),
            (9, emit.vector(*elements)),
            *([(DATA_COUNT, unsigned(len(data)))] if data or rng.random() < 0.3 else []),
            (10, emit.vector(*bodies)),
            (11, emit.vector(*data)),
        ]
        return emit.HEADER + b"".join(self._section(*each) for each in sections)

    def _section(self, number: int, payload: bytes) -> bytes:
        """Return a section, perhaps behind a custom one. An empty vector is rarely written."""
        rng, note = self.rng, b""
        if rng.random() < 0.05:
            note = emit.custom("note", rng.randbytes(rng.randint(0, 9)))
        empty = payload == b"\x00" and number not in (START, DATA_COUNT)
        if empty and (number == TAG or rng.random() < 0.9):
            return note
        return note + emit.section(number, payload, rng.choice((0, 0, 5)))

    def _table(self, table: Table) -> bytes:
        wide = table.address == "i64"
        kind = emit.CODES[table.kind] + emit.limits(table.minimum, table.maximum, wide=wide)
        if "filled_tables" in self.world.features and self.rng.random() < 0.2:
            return b"\x40\x00" + kind + constant(table.kind) + END
        return kind

    def _start(self) -> int | None:
        """Return the index of a start function whose run can be seen, or None."""
        world = self.world
        found = [
            place
            for place, kind in enumerate(world.functions)
            if world.signatures[kind] == ((), ()) and place >= world.imported_functions
        ]
        if self.rng.random() > 0.3 or not found:
            return None
        counted = b"".join(map(count_up, world.counters()))
        called = code((0x10, self.rng.choice(found)), END)
        return self._function(((), ()), b"\x00" + counted + self._fuel(30) + called)

    # Exports to call: each function of numbers, with fuel, and the probes

    def _fuel(self, amount: int) -> bytes:
        fuel = self.world.fuel
        return b"" if fuel is None else code(constant("i32", amount), (0x24, fuel))

    def _wrap(self) -> None:
        world = self.world
        for index, kind in enumerate(world.functions):
            parameters, results = world.signatures[kind]
            if numeric((parameters, results)):
                given = ((0x20, place) for place in range(len(parameters)))
                body = self._fuel(self.rng.choice((3, 30, 100, 200))) + code(*given, (0x10, index))
                self._export(f"f{index}", (parameters, results), b"\x00" + body + END)
                self._callable.append((f"f{index}", parameters))
        for memory in world.memories:
            size = b"\x00" + code((0x3F, memory.index), END)
            self._probe(f"size{memory.index}", ((), (memory.address,)), size)
            self._probe(f"hash{memory.index}", ((), ("i64",)), checksum(memory))
        for each in world.globals:
            if each.index != world.fuel:
                self._probe(f"g{each.index}", *bits_of(each))
        for table in world.tables:
            index, one_place = table.index, ((table.address,), ("i32",))
            size = b"\x00" + code((0xFC0010, index), END)
            self._probe(f"t{index} size", ((), (table.address,)), size)
            is_null = b"\x00" + code((0x20, 0), (0x25, index), 0xD1, END)
            self._probe(f"t{index}", one_place, is_null, *range(table.minimum + 2))
            if table.kind == "funcref":
                call = self._fuel(30) + code((0x20, 0), (0x11, 1, index), END)
                self._export(f"t{index} call", one_place, b"\x00" + call)
                self._callable.append((f"t{index} call", (f"place {table.minimum}",)))

    def _function(self, signature: Signature, body: bytes) -> int:
        """Add a function, and return its index."""
        world = self.world
        if signature not in world.signatures:
            world.signatures.append(signature)
        self._wrappers.append((world.signatures.index(signature), body))
        return len(world.functions) + len(self._wrappers) - 1

    def _export(self, name: str, signature: Signature, body: bytes) -> None:
        self._exports.append((name, 0, self._function(signature, body)))

    def _probe(self, name: str, signature: Signature, body: bytes, *places: int) -> None:
        self._export(name, signature, body)
        self.probes += [(name, place) for place in places] if signature[0] else [(name,)]

    def _choose_calls(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((0, 3, 6, 12, 16)) if self._callable else 0):
            name, parameters = rng.choice(self._callable)
            self.calls.append((name, *map(self._argument, parameters)))
            if self.probes and rng.random() < 0.3:
                self.calls.append(rng.choice(self.probes))
        self.snapshot_at = rng.randint(0, len(self.calls))

    def _argument(self, kind: str) -> Any:
        if kind.startswith("place"):
            return self.rng.randrange(int(kind.split()[1]) + 2)
        if kind in ("i32", "i64"):
            return emit.signed(kind, some_bits(self.rng, kind))
        return self.rng.choice((0.0, -0.0, 1.0, -1.5, 1e30, float("inf"), 0.1, 2.0**31))

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.binary.hex()}"
