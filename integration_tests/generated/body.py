"""Random function bodies: statements around values. Loops and recursions burn fuel, and trap without it."""

from __future__ import annotations

from . import emit
from .emit import END, NUMBERS, REFERENCES, code, constant
from .opcodes import ADD, STORES, SUBTRACT
from .values import Values, Ways
from .world import Global


def count_up(each: Global) -> bytes:
    """Return code that adds an odd number to a global."""
    get, put = (0x23, each.index), (0x24, each.index)
    return code(get, constant(each.kind, 0x10001), ADD[each.kind], put)


class Body(Values):
    """A function body. Each statement leaves the stack as it was."""

    def write(self) -> bytes:
        """Return the body as the code section has it."""
        self.burn()
        for first in (self.accumulate, self.change_table, self.store):  # before any trap
            if self.rng.random() < 0.5:
                first()
        for _ in range(self.rng.randint(0, 6)):
            self.statement()
        self.expressions(*self.results)
        if "tail_calls" in self.world.features and self.rng.random() < 0.1:
            self.tail_call()
        own = self.locals[len(self.parameters) :]
        declared = emit.vector(*(b"\x01" + emit.CODES[kind] for kind in own))
        return emit.sized(declared + bytes(self.code) + END)

    def burn(self) -> None:
        """Trap without fuel, and burn one unit."""
        fuel = self.world.fuel
        if fuel is not None:
            trap = b"\x04\x40\x00\x0b"  # if unreachable end
            self.put((0x23, fuel), 0x45, trap)
            self.put((0x23, fuel), constant("i32", 1), SUBTRACT["i32"], (0x24, fuel))

    def tail_call(self) -> None:
        """Replace the results on the stack by a call with results of these types."""
        found = self.callees(self.results)
        if found:
            chosen = self.rng.choice(found)
            self.put(b"\x1a" * len(self.results))
            for kind in self.world.signatures[self.world.functions[chosen]][0]:
                self.leaf(kind)
            self.put((0x12, chosen))

    def statement(self) -> None:
        self.budget -= 1
        if self.budget > 0:
            self.one_of(STATEMENTS)

    # Statements that change the state

    def store(self) -> None:
        memory = self.world.some_memory()
        if memory is not None:
            kind = self.rng.choice((*NUMBERS, "i32", "i64", "v128"))
            chosen, length = self.rng.choice(STORES[kind])
            offset = self.address(memory, length)
            self.expressions(kind)
            self.put(chosen, self.memory_argument(memory, offset, length))

    def length(self) -> int:
        return self.rng.choice((0, 1, 3, 16, 64, 300, 4096, 5000, 9000))

    def fill(self) -> None:
        memory, length = self.world.some_memory(), self.length()
        if memory is not None:
            self.range(memory, length)
            self.expressions("i32")
            self.put(constant(memory.address, length), (0xFC000B, memory.index))

    def copy(self) -> None:
        one, other = self.world.some_memory(), self.world.some_memory()
        if one is not None and other is not None:
            length = self.length()
            self.range(one, length)
            self.range(other, length)
            both = min(one.address, other.address)
            self.put(constant(both, length), (0xFC000A, one.index, other.index))

    def init(self) -> None:
        """Copy a part of a data segment, mostly of one that is long enough."""
        rng, world = self.rng, self.world
        memory = world.some_memory()
        if memory is not None and world.irreversible and world.data:
            segment = rng.randrange(len(world.data))
            held = world.data[segment]
            start = rng.choice((0, 0, held // 2, held, held + (rng.random() < 0.1)))
            length = rng.choice((0, max(held - start, 0), max(held - start, 0)))
            length += rng.random() < 0.05
            self.range(memory, length)
            numbers = constant("i32", start) + constant("i32", length)
            self.put(numbers, (0xFC0008, segment, memory.index))

    def drop_data(self) -> None:
        if self.world.irreversible and self.world.data:
            self.put((0xFC0009, self.rng.randrange(len(self.world.data))))

    def change_table(self) -> None:
        rng, world = self.rng, self.world
        if not world.tables or not world.irreversible:
            return
        table = rng.choice(world.tables)
        few = rng.choice((0, 1, 1, 2))
        others = [each for each in world.tables if each.kind == table.kind]
        segments = [each for each in world.elements if each.kind == table.kind]
        what = rng.choice(
            ("set", "set", "fill", "copy", *(("init", "init", "drop") * bool(segments)))
        )
        if what == "drop":
            self.put((0xFC000D, rng.choice(segments).index))
            return
        self.table_index(table)
        if what == "set":
            self.expressions(table.kind)
            self.put((0x26, table.index))
        elif what == "fill":
            self.expressions(table.kind)
            self.put(constant(table.address, few), (0xFC0011, table.index))
        elif what == "copy":
            other = rng.choice(others)
            self.table_index(other)
            both = min(table.address, other.address)
            self.put(constant(both, few), (0xFC000E, table.index, other.index))
        else:
            segment = rng.choice(segments)
            length = min(few, segment.length) if rng.random() < 0.9 else few + 1
            start = constant("i32", rng.choice((0, 0, 1, segment.length)))
            self.put(start, constant("i32", length), (0xFC000C, segment.index, table.index))

    def assign(self) -> None:
        kind = self.rng.choice((*NUMBERS, "v128", *REFERENCES))
        self.expressions(kind)
        self.put((0x21, self.local(kind)))

    def assign_global(self) -> None:
        if found := self.world.assignable():
            chosen = self.rng.choice(found)
            self.expressions(chosen.kind)
            self.put((0x24, chosen.index))

    def accumulate(self) -> None:
        """Change a global by a number that counts the runs."""
        if found := self.world.counters():
            self.put(count_up(self.rng.choice(found)))

    def call_and_drop(self) -> None:
        results = self.rng.choice(self.world.signatures)[1]
        if self.call(results):
            self.put(b"\x1a" * len(results))

    # Control flow

    def inside(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self.statement()

    def branch_on_condition(self) -> None:
        self.expressions("i32")
        self.put(b"\x04\x40")
        self.inside()
        if self.rng.random() < 0.5:
            self.put(0x05)
            self.inside()
        self.put(END)

    def catch(self) -> None:
        if "exceptions" in self.world.features and self.world.tags:
            self.put(b"\x02\x40\x1f\x40\x01\x02\x00")  # block, try_table with catch_all
            self.inside()
            self.expressions("i32")
            self.put(b"\x04\x40", (0x08, 0), END)  # if throw end
            self.put(END, END)

    def loop(self) -> None:
        if self.world.fuel is not None:
            counter = self.new_local("i32")
            self.put(constant("i32", self.rng.randint(1, 20)), (0x21, counter), b"\x03\x40")
            self.burn()
            self.inside()
            # A statement may change the counter too: fuel then ends the loop.
            self.put((0x20, counter), constant("i32", 1), SUBTRACT["i32"], (0x22, counter))
            self.put((0x0D, 0), END)

    def guarded_trap(self) -> None:
        self.expressions("i32")
        self.put(constant("i32", 3), 0x71, 0x45, b"\x04\x40\x00\x0b")


STATEMENTS: Ways = (
    *((26, Body.store), (10, Body.assign), (9, Body.assign_global), (8, Body.accumulate)),
    *((5, Body.fill), (5, Body.copy), (3, Body.init), (1, Body.drop_data), (12, Body.change_table)),
    *((6, Body.branch_on_condition), (3, Body.catch), (6, Body.loop), (6, Body.call_and_drop)),
    (2, Body.guarded_trap),
)
