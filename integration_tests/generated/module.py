"""Modules at random, valid and the same for the same seed, with the calls to make and what can be seen afterwards.

    Generated(seed, features)  ->  .binary, .calls, .probes, .imports

A probe is an exported function that changes nothing and tells a part of the state: the checksum of a memory, the bits
of a global, the size of a table and what its elements are.  So everything can be compared, exported or not.
"""

from __future__ import annotations

from typing import Any

from . import emit
from .body import Body, count_up
from .declarations import numeric
from .emit import END, constant, operation
from .opcodes import PAGE, some_bits
from .probes import bits_of, checksum
from .segments import Segments
from .world import Features, Signature, Table


class Generated(Segments):
    """The module of one seed.

    `calls` are names and arguments, `probes` too; `imports` is what it has to be given.
    """

    def __init__(self, seed: int, features: Features) -> None:
        super().__init__(seed, features)
        self.binary = self._write()
        self._choose_calls()

    # The bytes

    def _write(self) -> bytes:
        rng, world = self.rng, self.world
        data, elements = self._data_segments(), self._element_segments()
        if rng.random() < 0.5:  # so that every function may be referred to
            everything = range(len(world.functions))
            world.referable += everything
            elements.append(b"\x03\x00" + emit.vector(map(emit.unsigned, everything)))
        bodies = [
            Body(world, index).write()
            for index in range(world.imported_functions, len(world.functions))
        ]
        own = world.functions[world.imported_functions :]
        self._wrap()
        start = self._start()
        kinds = [emit.unsigned(kind) for kind in own] + [
            emit.unsigned(kind) for kind, _ in self._wrappers
        ]
        bodies += [emit.unsigned(len(body)) + body for _, body in self._wrappers]
        types = [emit.function_type(*signature) for signature in world.signatures]
        memories = [
            emit.limits(m.minimum, m.maximum, wide=m.address == "i64", shared=m.shared)
            for m in world.memories
            if not m.imported
        ]
        exports = [
            emit.name(text) + bytes([kind]) + emit.unsigned(at) for text, kind, at in self._exports
        ]
        counted = data or rng.random() < 0.3
        sections = [
            (1, emit.vector(types)),
            (2, emit.vector(self._import_entries)),
            (3, emit.vector(kinds)),
            (4, emit.vector(self._table(t) for t in world.tables if not t.imported)),
            (5, emit.vector(memories)),
            (13, emit.vector([b"\x00\x00"] * world.tags)),
            (6, emit.vector(self._global_entries)),
            (7, emit.vector(exports)),
            (8, b"" if start is None else emit.unsigned(start)),
            (9, emit.vector(elements)),
            (12, emit.unsigned(len(data)) if counted else b""),
            (10, emit.vector(bodies)),
            (11, emit.vector(data)),
        ]
        parts = [emit.HEADER]
        for number, payload in sections:
            if rng.random() < 0.05:
                parts.append(emit.section(0, emit.name("note") + rng.randbytes(rng.randint(0, 9))))
            if payload and (
                payload != b"\x00" or (number not in (8, 12, 13) and rng.random() < 0.1)
            ):
                parts.append(emit.section(number, payload, rng.choice((0, 0, 5))))
            elif (number == 8 and payload) or (number == 12 and counted):
                parts.append(emit.section(number, payload))
        return b"".join(parts)

    def _table(self, table: Table) -> bytes:
        kind = emit.CODES[table.kind] + emit.limits(
            table.minimum, table.maximum, wide=table.address == "i64"
        )
        if self.world.features.filled_tables and self.rng.random() < 0.2:
            return b"\x40\x00" + kind + constant(table.kind, 0) + END
        return kind

    def _start(self) -> int | None:
        """A function that starts each instance, and can be told to have run."""
        world = self.world
        found = [
            place
            for place, kind in enumerate(world.functions)
            if world.signatures[kind] == ((), ()) and place >= world.imported_functions
        ]
        if self.rng.random() > 0.3 or not found:
            return None
        body = b"\x00"
        counted = [g for g in world.globals if g.mutable and g.kind in ("i32", "i64")]
        body += b"".join(count_up(each.index, each.kind) for each in counted)
        if world.fuel is not None:
            body += constant("i32", 30) + operation(0x24, world.fuel)
        return self._function(((), ()), body + operation(0x10, self.rng.choice(found)) + END)

    # What can be called: every function of numbers, with fuel, and the probes

    def _wrap(self) -> None:
        world = self.world
        self._callable: list[tuple[str, tuple[str, ...]]] = []
        for index, kind in enumerate(world.functions):
            parameters, results = world.signatures[kind]
            if not numeric((parameters, results)):
                continue
            body = b"\x00"
            if world.fuel is not None:
                body += constant("i32", self.rng.choice((3, 30, 100, 200))) + operation(
                    0x24, world.fuel
                )
            body += b"".join(operation(0x20, place) for place in range(len(parameters)))
            self._export(f"f{index}", (parameters, results), body + operation(0x10, index) + END)
            self._callable.append((f"f{index}", parameters))
        for memory in world.memories:
            self._probe(
                f"size{memory.index}",
                ((), (memory.address,)),
                b"\x00" + operation(0x3F, memory.index) + END,
            )
            self._probe(f"hash{memory.index}", ((), ("i64",)), checksum(memory))
        for each in world.globals:
            if each.index != world.fuel:
                self._probe(f"g{each.index}", *bits_of(each))
        for table in world.tables:
            size = operation(0xFC0010, table.index)
            self._probe(f"t{table.index} size", ((), (table.address,)), b"\x00" + size + END)
            body = (
                b"\x00" + operation(0x20, 0) + operation(0x25, table.index) + operation(0xD1) + END
            )
            places = range(table.minimum + 2)
            self._probe(f"t{table.index}", ((table.address,), ("i32",)), body, *places)
            if table.kind == "funcref":
                call = b"\x00"
                if world.fuel is not None:
                    call += constant("i32", 30) + operation(0x24, world.fuel)
                call += operation(0x20, 0) + operation(0x11, 1, table.index) + END
                name = f"t{table.index} call"
                self._export(name, ((table.address,), ("i32",)), call)
                self._callable.append((name, (f"place {table.minimum}",)))

    def _function(self, signature: Signature, body: bytes) -> int:
        """One more function, by its index."""
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
        for _ in range(rng.choice((0, 3, 6, 12, 16))):
            if not self._callable:
                break
            name, parameters = rng.choice(self._callable)
            self.calls.append((name, *map(self._argument, parameters)))
            if self.probes and rng.random() < 0.3:
                self.calls.append(rng.choice(self.probes))
        self.snapshot_at = rng.randint(0, len(self.calls))

    def _argument(self, kind: str) -> Any:
        if kind.startswith("place"):
            return self.rng.randrange(int(kind.split()[1]) + 2)
        bits = some_bits(self.rng, kind) if kind in ("i32", "i64") else 0
        if kind in ("i32", "i64"):
            width = int(kind[1:])
            return bits - (bits >> (width - 1) << width)
        return self.rng.choice((0.0, -0.0, 1.0, -1.5, 1e30, float("inf"), 0.1, 2.0**31))

    # What is known without running it

    def initial_memory(self, index: int) -> bytes | None:
        """What a memory holds before any code runs; None where the module alone does not tell, or it does not start."""
        memory = self.world.memories[index]
        if memory.imported:
            return None
        content = bytearray(memory.minimum * PAGE)
        for segment in self.world.data:
            if segment.memory != index:
                continue
            if segment.place is None or segment.place + segment.length > len(content):
                return None
            content[segment.place : segment.place + segment.length] = segment.content
        return bytes(content)

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.binary.hex()}"


def generate(seed: int, features: Features) -> Generated:
    return Generated(seed, features)
