"""Function bodies at random: statements around values.  What loops or recurses burns fuel, and traps without."""

from __future__ import annotations

from collections.abc import Callable

from . import emit
from .emit import NUMBERS, REFERENCES, constant, operation
from .opcodes import STORES
from .values import Values


def count_up(index: int, kind: str) -> bytes:
    """Code that adds an odd number to a global."""
    add = operation({"i32": 0x6A, "i64": 0x7C}[kind])
    return operation(0x23, index) + constant(kind, 0x10001) + add + operation(0x24, index)


class Body(Values):
    """One function body; every statement leaves the stack as it was."""

    def write(self) -> bytes:
        """The body as the code section holds it."""
        self.burn()
        for first in (self.accumulate, self.change_table, self.store):  # before anything traps
            if self.rng.random() < 0.35:
                first()
        for _ in range(self.rng.randint(0, 6)):
            self.statement()
        for kind in self.results:
            self.expression(kind)
        if self.world.features.tail_calls and self.rng.random() < 0.1:
            self.tail_call()
        own = self.locals[len(self.parameters) :]
        declared = emit.vector(b"\x01" + emit.CODES[kind] for kind in own)
        content = declared + bytes(self.code) + emit.END
        return emit.unsigned(len(content)) + content

    def burn(self) -> None:
        """Trap if there is no fuel, and take one of it."""
        fuel = self.world.fuel
        if fuel is not None:
            self.put(0x23, fuel)
            self.put(0x45)
            self.code += b"\x04\x40\x00\x0b"  # if unreachable end
            self.put(0x23, fuel)
            self.constant("i32", 1)
            self.put(0x6B)
            self.put(0x24, fuel)

    def store(self) -> None:
        memory = self.world.some_memory()
        if memory is None or (not self.world.memories[memory].minimum and self.rng.random() < 0.8):
            return
        kind = self.rng.choice((*NUMBERS, "i32", "i64", "v128"))
        code, length = self.rng.choice(STORES[kind])
        offset = self.address(memory, length)
        self.expression(kind)
        self.code += operation(code) + self.memory_argument(memory, offset, length)

    def range(self, memory: int, length: int) -> None:
        """Where a bulk operation begins, as a whole address."""
        shape = self.world.memories[memory]
        offset = self.address(memory, length)
        self.constant(shape.address, offset)
        self.put({"i32": 0x6A, "i64": 0x7C}[shape.address])

    def length(self) -> int:
        return self.rng.choice((0, 1, 3, 16, 64, 300, 4096, 5000, 9000))

    def bulk(self) -> None:
        rng, world = self.rng, self.world
        memory = world.some_memory()
        if memory is None:
            return
        shape, length = world.memories[memory], self.length()
        pick = rng.random()
        if pick < 0.35:
            self.range(memory, length)
            self.expression("i32")
            self.constant(shape.address, length)
            self.put(0xFC000B, memory)
        elif pick < 0.7:
            other = world.some_memory()
            self.range(memory, length)
            self.range(other, length)
            both = "i64" if world.memories[other].address == shape.address == "i64" else "i32"
            self.constant(both, length)
            self.put(0xFC000A, memory, other)
        elif world.irreversible and world.data:
            segment = rng.randrange(len(world.data))
            if pick < 0.93:
                held = world.data[segment].length
                start = rng.choice((0, 0, held // 2, held, held + (rng.random() < 0.1)))
                length = rng.choice((0, max(held - start, 0), max(held - start, 0)))
                length += rng.random() < 0.05
                self.range(memory, length)
                self.constant("i32", start)
                self.constant("i32", length)
                self.put(0xFC0008, segment, memory)
            else:
                self.put(0xFC0009, segment)

    def change_table(self) -> None:
        rng, world = self.rng, self.world
        if not world.tables or not world.irreversible:
            return
        table = rng.choice(world.tables)
        pick = rng.random()
        few = rng.choice((0, 1, 1, 2))
        if pick < 0.35:
            self.table_index(table)
            self.expression(table.kind)
            self.put(0x26, table.index)
        elif pick < 0.5:
            self.table_index(table)
            self.expression(table.kind)
            self.constant(table.address, few)
            self.put(0xFC0011, table.index)
        elif pick < 0.7:
            others = [each for each in world.tables if each.kind == table.kind]
            other = rng.choice(others)
            self.table_index(table)
            self.table_index(other)
            both = "i64" if table.address == other.address == "i64" else "i32"
            self.constant(both, few)
            self.put(0xFC000E, table.index, other.index)
        else:
            segments = [each for each in world.elements if each.kind == table.kind]
            if not segments:
                return
            segment = rng.choice(segments)
            if pick < 0.9:
                self.table_index(table)
                self.constant("i32", rng.choice((0, 0, 1, segment.length)))
                self.constant("i32", min(few, segment.length) if rng.random() < 0.9 else few + 1)
                self.put(0xFC000C, segment.index, table.index)
            else:
                self.put(0xFC000D, segment.index)

    def tail_call(self) -> None:
        """In the place of the results, which lie there: one more call that gives the same."""
        world = self.world
        found = [
            index
            for index, signature in enumerate(world.functions)
            if world.signatures[signature][1] == self.results
            and (world.fuel is not None or index > self.index or index < world.imported_functions)
        ]
        if not found:
            return
        for _ in self.results:
            self.code += b"\x1a"
        chosen = self.rng.choice(found)
        for kind in world.signatures[world.functions[chosen]][0]:
            self.leaf(kind)
        self.put(0x12, chosen)

    def statement(self) -> None:
        self.budget -= 1
        if self.budget <= 0:
            return
        pick = self.rng.random()
        many: tuple[tuple[float, Callable[[], object]], ...] = (
            (0.26, self.store),
            (0.36, self.assign),
            (0.45, self.assign_global),
            (0.48, self.accumulate),
            (0.62, self.bulk),
            (0.74, self.change_table),
            (0.82, self.block),
            (0.88, self.loop),
            (0.94, self.call_and_drop),
            (0.97, self.leave),
            (0.985, self.guarded_trap),
            (1.0, self.several_ways),
        )
        next(action for limit, action in many if pick < limit)()

    def assign(self) -> None:
        kind = self.rng.choice((*NUMBERS, "v128", *REFERENCES))
        self.expression(kind)
        self.put(0x21, self.local(kind))

    def assign_global(self) -> None:
        found = [g for g in self.world.globals if g.mutable and g.index != self.world.fuel]
        if found:
            chosen = self.rng.choice(found)
            self.expression(chosen.kind)
            self.put(0x24, chosen.index)

    def accumulate(self) -> None:
        """Change a global so that it tells how often this ran."""
        found = [g for g in self.world.globals if g.mutable and g.kind in ("i32", "i64")]
        found = [g for g in found if g.index != self.world.fuel]
        if found:
            chosen = self.rng.choice(found)
            self.code += count_up(chosen.index, chosen.kind)

    def inside(self) -> None:
        self.depth += 1
        for _ in range(self.rng.randint(1, 3)):
            self.statement()
        self.depth -= 1

    def block(self) -> None:
        pick = self.rng.random()
        if pick < 0.5:
            self.condition()
            self.code += b"\x04\x40"
            self.inside()
            if self.rng.random() < 0.5:
                self.code += b"\x05"
                self.inside()
        elif pick < 0.65 and self.world.features.exceptions and self.world.tags:
            self.code += b"\x02\x40\x1f\x40\x01\x02\x00"  # block, try_table with catch_all
            self.depth += 1
            self.inside()
            self.condition()
            self.code += b"\x04\x40" + operation(0x08, 0) + b"\x0b"
            self.depth -= 1
            self.code += b"\x0b"
        else:
            self.code += b"\x02\x40"
            self.inside()
            self.condition()
            self.put(0x0D, 0)
            self.inside()
        self.code += b"\x0b"

    def loop(self) -> None:
        if self.world.fuel is None:
            return
        counter = self.new_local("i32")
        self.constant("i32", self.rng.randint(1, 20))
        self.put(0x21, counter)
        self.code += b"\x03\x40"
        self.burn()
        self.inside()
        self.put(0x20, counter)
        self.constant("i32", 1)
        self.put(0x6B)
        self.put(0x22, counter)
        # A statement may have changed it, too: fuel ends the loop then.
        self.put(0x0D, 0)
        self.code += b"\x0b"

    def call_and_drop(self) -> None:
        results = list(self.rng.choice(self.world.signatures)[1])
        if self.call(results):
            self.code += b"\x1a" * len(results)

    def leave(self) -> None:
        """A way out, that is taken if a condition says so."""
        self.condition()
        if self.depth and self.rng.random() < 0.7:
            self.put(0x0D, self.rng.randrange(self.depth))
            return
        self.code += b"\x04\x40"
        for kind in self.results:
            self.leaf(kind)
        self.code += b"\x0f\x0b"

    def guarded_trap(self) -> None:
        self.condition()
        self.constant("i32", 3)
        self.put(0x71)
        self.put(0x45)
        self.code += b"\x04\x40\x00\x0b"

    def several_ways(self) -> None:
        self.code += b"\x02\x40\x02\x40"
        self.condition()
        self.code += b"\x0e\x02\x00\x01\x00\x0b"  # br_table 0 1 0, and the inner end
        self.inside()
        self.code += b"\x0b"
