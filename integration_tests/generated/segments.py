"""Segments of every shape: active, passive, declared, empty, overlapping, at the last byte, and out of bounds."""

from __future__ import annotations

from .declarations import Declarations
from .emit import CODES, END, code, constant, sized, unsigned, vector
from .opcodes import ADD, MULTIPLY, PAGE, SUBTRACT
from .world import Elements


class Segments(Declarations):
    """Segments that fill the memories and tables of a module."""

    def _offset(self, kind: str, size: int, length: int, unit: int) -> bytes:
        """Return a constant expression."""
        rng, world = self.rng, self.world
        last = size - length
        inside = rng.randrange(max(last, 1) + 1)
        place = rng.choice((0, 1, last, last, last - 1, last // 2, inside, 7 * unit // 8))
        if self.sound:
            place = min(place, last)
        elif rng.random() < 0.5:
            place = rng.choice((last + 1, size, size + 1, 2**31, 2**32 - 1))
        place = max(place, 0)
        if rng.random() < 0.25:  # a global has the value, perhaps one that is unknown beforehand
            found = world.constants(kind)
            if self.sound:
                found = [g for g in found if g.imported or g.initial in range(last + 1)]
            if found:
                return code((0x23, rng.choice(found).index), END)
        if "extended_const" in world.features and rng.random() < 0.25:
            part = rng.randrange(place + 1)
            sum_ = code(constant(kind, part), constant(kind, place - part), ADD[kind])
            if rng.random() < 0.5:
                one, nothing = constant(kind, 1), constant(kind, 0)
                sum_ += code(one, MULTIPLY[kind], nothing, SUBTRACT[kind])
            return sum_ + END
        return constant(kind, place) + END

    def _data_segments(self) -> list[bytes]:
        return [self._data_segment() for _ in range(self.rng.choice((0, 1, 2, 3, 6)))]

    def _data_segment(self) -> bytes:
        rng, world = self.rng, self.world
        length = rng.choice((0, 1, 5, 16, 100, 4096, 5000, rng.randrange(300)))
        repeated = bytes([rng.choice((0, rng.randrange(256)))]) * length
        content = repeated if rng.random() < 0.4 else rng.randbytes(length)
        if not world.memories or rng.random() < 0.25:
            world.data.append(length)
            return b"\x01" + sized(content)
        memory = rng.choice(world.memories)
        size = memory.minimum * PAGE
        if self.sound:
            content = content[:size]
        offset = self._offset(memory.address, size, len(content), PAGE)
        spelt = memory.index or rng.random() < 0.2
        head = b"\x02" + unsigned(memory.index) if spelt else b"\x00"
        world.data.append(len(content))
        return head + offset + sized(content)

    def _element_segments(self) -> list[bytes]:
        return [self._element_segment(n) for n in range(self.rng.choice((0, 1, 1, 2, 4)))]

    def _element_segment(self, index: int) -> bytes:
        rng, world = self.rng, self.world
        mode = rng.choice(("active", "active", "passive", "declared"))
        if mode == "active" and not world.tables:
            mode = "passive"
        table = rng.choice(world.tables) if mode == "active" else None
        length, offset = rng.choice((0, 1, 2, 3, 5)), b""
        if table is None:
            kind = rng.choice(("funcref", "funcref", self._externref()))
            spelt = False
        else:
            kind = table.kind
            length = min(length, table.minimum) if self.sound else length
            offset = self._offset(table.address, table.minimum, length, 1)
            plain = table.index == 0 and kind == "funcref" and table.address == "i32"
            spelt = not plain or rng.random() < 0.3
        world.elements.append(Elements(index, kind, length))
        functions = [rng.randrange(len(world.functions)) for _ in range(length)]
        expressions = kind == "externref" or rng.random() < 0.4
        flags = {"active": 0, "passive": 1, "declared": 3}[mode] | 4 * expressions | 2 * spelt
        head = unsigned(flags) + (unsigned(table.index) if table and spelt else b"") + offset
        if spelt or mode != "active":
            head += CODES[kind] if expressions else b"\x00"
        if expressions:
            return head + vector(*(self._element(kind, function) for function in functions))
        world.referable += functions
        return head + vector(*map(unsigned, functions))

    def _element(self, kind: str, function: int) -> bytes:
        """Return a reference to a function, null, or the value of an immutable global."""
        pick = self.rng.random()
        found = [g for g in self.world.constants(kind) if kind == "funcref" and not g.imported]
        if found and pick < 0.2:
            return code((0x23, self.rng.choice(found).index), END)
        if kind == "externref" or pick < 0.35:
            return constant(kind) + END
        self.world.referable.append(function)
        return code((0xD2, function), END)
