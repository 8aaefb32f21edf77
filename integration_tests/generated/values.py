"""Values at random: code that leaves one value of a type on the stack, from everything that a module has.

A value is the same on every run: an operation that may make a NaN is followed by code that makes it the one NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import emit
from . import opcodes as codes
from .emit import NUMBERS, REFERENCES, constant, operation

if TYPE_CHECKING:
    from .world import World


class Values:
    """A function body being written, as far as values go."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.rng = world.rng
        self.index = index
        self.parameters, self.results = world.signatures[world.functions[index]]
        self.locals = list(self.parameters)
        self.code = bytearray()
        self.budget = self.rng.choice((6, 20, 50, 90))
        self.depth = 0  # of blocks without results around here, the body itself not counted
        for kind in (*NUMBERS, *NUMBERS, "v128", *REFERENCES):
            if self.rng.random() < 0.5:
                self.locals.append(kind)

    def put(self, code: int, *immediates: int) -> None:
        self.code += operation(code, *immediates)

    def constant(self, kind: str, bits: int = 0) -> None:
        self.code += constant(kind, bits)

    def local(self, kind: str) -> int:
        """A local of this type, added if there is none."""
        found = [place for place, each in enumerate(self.locals) if each == kind]
        if found:
            return self.rng.choice(found)
        return self.new_local(kind)

    def new_local(self, kind: str) -> int:
        self.locals.append(kind)
        return len(self.locals) - 1

    def expression(self, kind: str) -> None:
        self.budget -= 1
        if self.budget <= 0 or self.rng.random() < 0.22:
            self.leaf(kind)
            return
        if kind in REFERENCES:
            self.reference(kind)
        elif kind == "v128":
            self.vector()
        elif kind in ("i32", "i64"):
            self.integer(kind)
        else:
            self.float(kind)

    def leaf(self, kind: str) -> None:
        globals_ = [
            g.index for g in self.world.globals if g.kind == kind and g.index != self.world.fuel
        ]
        pick = self.rng.random()
        if globals_ and pick < 0.35:
            self.put(0x23, self.rng.choice(globals_))
        elif kind in self.locals and pick < 0.75:
            self.put(0x20, self.local(kind))
        elif kind == "funcref" and self.world.referable and pick < 0.95:
            self.put(0xD2, self.rng.choice(self.world.referable))
        elif kind in REFERENCES:
            self.constant(kind)
        else:
            self.constant(kind, codes.some_bits(self.rng, kind))

    def reference(self, kind: str) -> None:
        tables = self.world.inhabited(kind)
        if tables and self.rng.random() < 0.6:
            table = self.rng.choice(tables)
            self.table_index(table)
            self.put(0x25, table.index)
        else:
            self.choice(kind)

    def choice(self, kind: str) -> None:
        """Anything that works for every type: a call, a block, a select, a local that is set."""
        pick = self.rng.random()
        if pick < 0.3 and self.call([kind]):
            return
        if pick < 0.5:  # if
            self.condition()
            self.code += b"\x04" + emit.CODES[kind]
            self.expression(kind)
            self.code += b"\x05"
            self.expression(kind)
            self.code += b"\x0b"
        elif pick < 0.75:
            self.expression(kind)
            self.expression(kind)
            self.condition()
            self.code += b"\x1b" if kind in NUMBERS else b"\x1c\x01" + emit.CODES[kind]
        elif pick < 0.85:  # block, left early
            self.code += b"\x02" + emit.CODES[kind]
            self.expression(kind)
            self.condition()
            self.put(0x0D, 0)
            self.code += b"\x1a"
            self.expression(kind)
            self.code += b"\x0b"
        else:
            self.expression(kind)
            self.put(0x22, self.local(kind))

    def condition(self) -> None:
        self.expression("i32")

    def operands(self, *kinds: str) -> None:
        for kind in kinds:
            self.expression(kind)

    def integer(self, kind: str) -> None:
        rng = self.rng
        pick = rng.random()
        if pick < 0.25:
            self.operands(kind, kind)
            self.put(rng.choice(codes.SAFE_BINARY[kind]))
        elif pick < 0.32:
            self.expression(kind)
            self.put(rng.choice(codes.INTEGER_UNARY[kind]))
        elif pick < 0.38:
            self.operands(kind, kind)
            if rng.random() < 0.8:  # an odd divisor is not zero
                self.constant(kind, 1)
                self.put({"i32": 0x72, "i64": 0x84}[kind])
            self.put(rng.choice(codes.DIVISIONS[kind]))
        elif pick < 0.58:
            self.load(kind)
        elif pick < 0.66:
            code, source = rng.choice(
                codes.SATURATIONS[kind] if rng.random() < 0.85 else codes.TRUNCATIONS[kind]
            )
            self.expression(source)
            self.put(code)
        elif pick < 0.70:
            code, source = codes.BITS_OF_FLOATS[kind]
            self.expression(source)
            self.put(code)
        elif pick < 0.85:
            self.state(kind)
        else:
            self.choice(kind)

    def state(self, kind: str) -> None:
        """Sizes, growth, and what only one of the two integer types can be made of."""
        rng, world = self.rng, self.world
        pick = rng.random()
        memories = [m for m in world.memories if m.address == kind]
        tables = [t for t in world.tables if t.address == kind]
        if memories and pick < 0.3:
            memory = rng.choice(memories)
            if world.grows and rng.random() < 0.5:
                few = (0, 1, 1, 1, 2, 3, 2**16 - 1) if memory.maximum is not None else (0, 1)
                self.constant(kind, rng.choice((*few, 2 ** int(kind[1:]) - 1)))
                self.put(0x40, memory.index)
            else:
                self.put(0x3F, memory.index)
        elif tables and pick < 0.45:
            table = rng.choice(tables)
            if world.irreversible and rng.random() < 0.6:
                self.expression(table.kind)
                self.constant(kind, rng.choice((0, 1, 2, 5, 2 ** int(kind[1:]) - 1)))
                self.put(0xFC000F, table.index)
            else:
                self.put(0xFC0010, table.index)
        elif kind == "i64":
            if pick < 0.7:
                self.expression("i32")
                self.put(rng.choice((0xAC, 0xAD)))
            else:
                self.expression("v128")
                self.code += operation(0xFD001D) + bytes([rng.randint(0, 1)])
        elif pick < 0.6:
            compared = rng.choice(NUMBERS)
            self.operands(compared, compared)
            self.put(rng.choice(codes.COMPARISONS[compared]))
        elif pick < 0.7:
            self.expression(rng.choice(REFERENCES))
            self.put(0xD1)
        elif pick < 0.8:
            self.expression("v128")
            self.put(rng.choice(codes.VECTOR_TESTS))
        elif pick < 0.9:
            self.expression("i64")
            self.put(rng.choice((0xA7, 0x50)))
        else:
            self.expression("i32")
            self.put(0x45)

    def float(self, kind: str) -> None:
        rng = self.rng
        pick = rng.random()
        if pick < 0.2:
            self.operands(kind, kind)
            self.put(rng.choice(codes.FLOAT_BINARY[kind]))
            self.one_nan(kind)
        elif pick < 0.3:
            self.expression(kind)
            self.put(rng.choice(codes.FLOAT_UNARY[kind]))
            self.one_nan(kind)
        elif pick < 0.4:
            self.expression(kind)
            self.put(rng.choice(codes.FLOAT_SIGNS[kind]))
        elif pick < 0.45:
            self.operands(kind, kind)
            self.put(codes.COPYSIGN[kind])
        elif pick < 0.65:
            self.load(kind)
        elif pick < 0.8:
            code, source = rng.choice(codes.CONVERSIONS[kind])
            self.expression(source)
            self.put(code)
            self.one_nan(kind)
        elif pick < 0.88:
            code, source = codes.BITS_OF_FLOATS[kind]
            self.expression(source)
            self.put(code)
        else:
            self.choice(kind)

    def one_nan(self, kind: str) -> None:
        """Whatever NaN lies on the stack becomes the one that is written down here."""
        held = self.new_local(kind)
        self.put(0x22, held)
        self.constant(kind, codes.CANONICAL[kind])
        self.put(0x20, held)
        self.put(0x20, held)
        self.put({"f32": 0x5B, "f64": 0x61}[kind])
        self.put(0x1B)

    def vector(self) -> None:
        rng = self.rng
        pick = rng.random()
        if pick < 0.25:
            self.operands("v128", "v128")
            self.put(rng.choice(codes.VECTOR_BINARY))
        elif pick < 0.35:
            self.expression("v128")
            self.put(rng.choice(codes.VECTOR_UNARY))
        elif pick < 0.5:
            code, source = rng.choice(codes.SPLATS)
            self.expression(source)
            self.put(code)
        elif pick < 0.6:
            self.operands("v128", "v128")
            self.code += operation(0xFD000D) + bytes(rng.randint(0, 31) for _ in range(16))
        elif pick < 0.7:
            self.operands("v128", "i64")
            self.code += operation(0xFD001E) + bytes([rng.randint(0, 1)])
        elif pick < 0.85:
            self.load("v128")
        else:
            self.choice("v128")

    def address(self, memory: int, length: int) -> int:
        """An address on the stack, and the offset for the instruction; mostly both together are inside."""
        rng, shape = self.rng, self.world.memories[memory]
        size = shape.minimum * codes.PAGE
        wanted = rng.choice(
            (
                *(0, 8, 16, 4096 - length, 4096, 4095, size // 2, size - length, size - length),
                *(
                    rng.randrange(size + 1),
                    codes.PAGE - length,
                    codes.PAGE - length + 1,
                    codes.PAGE,
                ),
            )
        )
        if rng.random() < 0.06:
            wanted = rng.choice(
                (
                    size,
                    size - length + 1,
                    size + codes.PAGE,
                    2**31,
                    2**32 - 1,
                    2**32 - max(length, 1),
                )
            )
        elif rng.random() < 0.93:
            wanted = min(wanted, size - length)
        wanted = max(wanted, 0)
        if rng.random() < 0.2:  # somewhere in a power of two of bytes from there
            offset = wanted & ~0xFFF
            self.expression(shape.address)
            self.constant(shape.address, rng.choice((7, 0xFF, 0xFFF, 0xFFFF) if size else (7,)))
            self.put({"i32": 0x71, "i64": 0x83}[shape.address])
            return offset
        offset = rng.choice((0, 0, 1, wanted, wanted // 2, min(wanted, 4096)))
        offset = min(offset, wanted)
        bits = int(shape.address[1:])
        self.constant(shape.address, (wanted - offset) % 2**bits)
        return offset

    def memory_argument(self, memory: int, offset: int, length: int) -> bytes:
        alignment = self.rng.randint(0, length.bit_length() - 1)
        if memory or (self.world.features.multi_memory and self.rng.random() < 0.1):
            return emit.unsigned(alignment | 0x40) + emit.unsigned(memory) + emit.unsigned(offset)
        return emit.unsigned(alignment) + emit.unsigned(offset)

    def load(self, kind: str) -> None:
        """Rarely from a memory that has no bytes before it grows, where nothing can be found but a trap."""
        memory = self.world.some_memory()
        if memory is None or (not self.world.memories[memory].minimum and self.rng.random() < 0.8):
            self.leaf(kind)
            return
        code, length = self.rng.choice(codes.LOADS[kind])
        offset = self.address(memory, length)
        self.code += operation(code) + self.memory_argument(memory, offset, length)

    def table_index(self, table: object) -> None:
        rng, size = self.rng, table.minimum
        place = rng.choice((0, size - 1, size // 2, rng.randrange(size + 1)))
        if rng.random() < 0.06:
            place = rng.choice((size, size + 1, 2**32 - 1))
        elif rng.random() < 0.9:
            place = min(place, size - 1)
        self.constant(table.address, max(place, 0))

    def call(self, results: list[str]) -> bool:
        """A call that gives these results; False, and no code, where nothing does."""
        world, rng = self.world, self.rng
        tables = world.inhabited("funcref")
        if tables and world.fuel is not None and rng.random() < 0.3:
            kinds = [n for n, (_, found) in enumerate(world.signatures) if list(found) == results]
            if kinds:
                kind, table = rng.choice(kinds), rng.choice(tables)
                self.operands(*world.signatures[kind][0])
                self.table_index(table)
                self.put(0x11, kind, table.index)
                return True
        found = [
            index
            for index, signature in enumerate(world.functions)
            if list(world.signatures[signature][1]) == results
            and (world.fuel is not None or index > self.index or index < world.imported_functions)
        ]
        if not found:
            return False
        chosen = rng.choice(found)
        self.operands(*world.signatures[world.functions[chosen]][0])
        self.put(0x10, chosen)
        return True
