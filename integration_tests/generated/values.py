"""Random values: code that leaves one value of a type on the stack, from any item of a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import opcodes
from .emit import CODES, END, NUMBERS, REFERENCES, Part, code, constant, unsigned
from .opcodes import ADD, AND, PAGE
from .world import Memory, Table, World

Ways = Sequence[tuple[int, Callable[..., object]]]
"""Methods that can write the next piece of code, with weights."""


class Values:
    """The values of a function body that is being written."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.rng = world.rng
        self.index = index
        self.parameters, self.results = world.signatures[world.functions[index]]
        self.locals = list(self.parameters)
        self.code = bytearray()
        self.budget = self.rng.choice((6, 20, 50, 90))
        kinds = (*NUMBERS, *NUMBERS, "v128", *REFERENCES)
        self.locals += [kind for kind in kinds if self.rng.random() < 0.5]

    def put(self, *parts: Part) -> None:
        self.code += code(*parts)

    def one_of(self, ways: Ways, *arguments: Any) -> None:
        (way,) = self.rng.choices([each for _, each in ways], [weight for weight, _ in ways])
        way(self, *arguments)

    def local(self, kind: str) -> int:
        """Return a local of this type, added if there is none."""
        found = [place for place, each in enumerate(self.locals) if each == kind]
        return self.rng.choice(found) if found else self.new_local(kind)

    def new_local(self, kind: str) -> int:
        self.locals.append(kind)
        return len(self.locals) - 1

    def expressions(self, *kinds: str) -> None:
        for kind in kinds:
            self.budget -= 1
            if self.budget <= 0 or self.rng.random() < 0.22:
                self.leaf(kind)
            else:
                self.one_of(WAYS[kind], kind)

    def leaf(self, kind: str) -> None:
        found = [g for g in self.world.globals if g.kind == kind and g.index != self.world.fuel]
        pick = self.rng.random()
        if found and pick < 0.35:
            self.put((0x23, self.rng.choice(found).index))
        elif kind in self.locals and pick < 0.75:
            self.put((0x20, self.local(kind)))
        elif kind == "funcref" and self.world.referable and pick < 0.95:
            self.put((0xD2, self.rng.choice(self.world.referable)))
        else:
            bits = 0 if kind in REFERENCES else opcodes.some_bits(self.rng, kind)
            self.put(constant(kind, bits))

    # For every type

    def call_for(self, kind: str) -> None:
        if not self.call((kind,)):
            self.leaf(kind)

    def branch(self, kind: str) -> None:
        self.expressions("i32")
        self.put(b"\x04" + CODES[kind])
        self.expressions(kind)
        self.put(0x05)
        self.expressions(kind)
        self.put(END)

    def select(self, kind: str) -> None:
        self.expressions(kind, kind, "i32")
        self.put(b"\x1b" if kind in NUMBERS else b"\x1c\x01" + CODES[kind])

    # For some

    def operate(self, kind: str) -> None:
        operands, codes = self.rng.choice(opcodes.SAFE[kind])
        self.expressions(*operands)
        self.put(self.rng.choice(codes))

    def size(self, kind: str) -> None:
        """Write the size of a memory or a table with addresses of this type, or the result of its growth."""
        rng, world = self.rng, self.world
        found = [each for each in (*world.memories, *world.tables) if each.address == kind]
        if not found:
            self.operate(kind)
            return
        chosen, most = rng.choice(found), 2 ** int(kind[1:]) - 1
        if isinstance(chosen, Table):
            if world.irreversible and rng.random() < 0.6:
                self.expressions(chosen.kind)
                self.put(constant(kind, rng.choice((0, 1, 2, 5, most))), (0xFC000F, chosen.index))
            else:
                self.put((0xFC0010, chosen.index))
        elif world.grows and rng.random() < 0.5:
            few = (0, 1) if chosen.maximum is None else (0, 1, 1, 1, 2, 3, 2**16 - 1)
            self.put(constant(kind, rng.choice((*few, most))), (0x40, chosen.index))
        else:
            self.put((0x3F, chosen.index))

    def load(self, kind: str) -> None:
        memory = self.world.some_memory()
        if memory is None:
            self.leaf(kind)
        else:
            chosen, length = self.rng.choice(opcodes.LOADS[kind])
            offset = self.address(memory, length)
            self.put(chosen, self.memory_argument(memory, offset, length))

    def address(self, memory: Memory, length: int) -> int:
        """Write an address, and return the offset for the instruction; their sum is mostly inside."""
        rng, kind, size = self.rng, memory.address, memory.minimum * PAGE
        last = size - length
        places = (0, 8, 16, 4096 - length, 4095, 4096, PAGE - length, PAGE - length + 1, PAGE)
        wanted = rng.choice((*places, size // 2, last, last, rng.randrange(size + 1)))
        if rng.random() < 0.06:
            far = (2**31, 2**32 - 1, 2**32 - max(length, 1))
            wanted = rng.choice((size, last + 1, size + PAGE, *far))
        elif rng.random() < 0.93:
            wanted = min(wanted, last)
        wanted = max(wanted, 0)
        if rng.random() < 0.2:  # somewhere in a power of two of bytes from there
            self.expressions(kind)
            within = rng.choice((7, 0xFF, 0xFFF, 0xFFFF)) if size else 7
            self.put(constant(kind, within), AND[kind])
            return wanted & ~0xFFF
        offset = min(wanted, rng.choice((0, 0, 1, wanted, wanted // 2, 4096)))
        self.put(constant(kind, wanted - offset))
        return offset

    def memory_argument(self, memory: Memory, offset: int, length: int) -> bytes:
        flags, index = self.rng.randint(0, length.bit_length() - 1), b""
        multiple = "multi_memory" in self.world.features
        if memory.index or (multiple and self.rng.random() < 0.1):
            flags, index = flags | 0x40, unsigned(memory.index)
        return unsigned(flags) + index + unsigned(offset)

    def range(self, memory: Memory, length: int) -> None:
        """Write the start of a bulk operation, as a whole address."""
        offset = self.address(memory, length)
        self.put(constant(memory.address, offset), ADD[memory.address])

    def table_get(self, kind: str) -> None:
        if tables := self.world.inhabited(kind):
            table = self.rng.choice(tables)
            self.table_index(table)
            self.put((0x25, table.index))
        else:
            self.leaf(kind)

    def table_index(self, table: Table) -> None:
        rng, size = self.rng, table.minimum
        place = rng.choice((0, size - 1, size // 2, rng.randrange(size + 1)))
        if rng.random() < 0.06:
            place = rng.choice((size, size + 1, 2**32 - 1))
        elif rng.random() < 0.9:
            place = min(place, size - 1)
        self.put(constant(table.address, max(place, 0)))

    def call(self, results: tuple[str, ...]) -> bool:
        """Write a call with these results; return False, without code, if no function has them."""
        world, rng = self.world, self.rng
        tables = world.inhabited("funcref")
        kinds = [n for n, (_, found) in enumerate(world.signatures) if found == results]
        if kinds and tables and world.fuel is not None and rng.random() < 0.3:
            kind, table = rng.choice(kinds), rng.choice(tables)
            self.expressions(*world.signatures[kind][0])
            self.table_index(table)
            self.put((0x11, kind, table.index))
            return True
        found = self.callees(results)
        if not found:
            return False
        chosen = rng.choice(found)
        self.expressions(*world.signatures[world.functions[chosen]][0])
        self.put((0x10, chosen))
        return True

    def callees(self, results: tuple[str, ...]) -> list[int]:
        """Return functions with these results; without fuel none that could call this one."""
        world = self.world
        return [
            index
            for index, signature in enumerate(world.functions)
            if world.signatures[signature][1] == results
            and (world.fuel is not None or index > self.index or index < world.imported_functions)
        ]


_ANY: Ways = ((4, Values.call_for), (3, Values.branch), (4, Values.select))
_NUMBER: Ways = ((60, Values.operate), (20, Values.load), *_ANY)
WAYS = {
    **dict.fromkeys(("i32", "i64"), (*_NUMBER, (6, Values.size))),
    **dict.fromkeys(("f32", "f64", "v128"), _NUMBER),
    **dict.fromkeys(REFERENCES, ((20, Values.table_get), *_ANY)),
}
"""Makers of a value, by type."""
