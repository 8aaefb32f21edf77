"""Segments of every shape: active, passive, declared, empty, overlapping, at the last byte, and out of bounds."""

from __future__ import annotations

from . import emit
from .declarations import Declarations
from .emit import END, constant, operation
from .opcodes import PAGE
from .world import Data, Elements


class Segments(Declarations):
    """What a module puts into its memories and tables."""

    def _offset(
        self, address: str, size: int, length: int, *, pages: bool = False
    ) -> tuple[bytes, int | None]:
        """A constant expression, and its value where the module tells it."""
        rng, world = self.rng, self.world
        unit = PAGE if pages else 1
        last = size - length
        places = [
            0,
            1,
            last,
            last,
            max(last - 1, 0),
            last // 2,
            rng.randrange(max(last, 1) + 1),
            7 * unit // 8,
        ]
        place = rng.choice(places)
        if self.sound:
            place = max(min(place, last), 0)
        elif rng.random() < 0.5:
            place = rng.choice((last + 1, size, size + 1, 2**31, 2**32 - 1))
        place = max(place, 0)
        if (
            rng.random() < 0.25
        ):  # a global holds it, perhaps one that is not known before instantiation
            found = [g for g in world.globals if g.kind == address and not g.mutable]
            if not world.features.extended_const:
                found = [g for g in found if g.imported]
            if self.sound:
                found = [
                    g for g in found if g.imported or (g.initial is not None and g.initial <= last)
                ]
            if found:
                chosen = rng.choice(found)
                return operation(0x23, chosen.index) + END, chosen.initial
        if world.features.extended_const and rng.random() < 0.25:
            part = rng.randrange(place + 1)
            codes = {"i32": (0x6A, 0x6B, 0x6C), "i64": (0x7C, 0x7D, 0x7E)}[address]
            code = constant(address, part) + constant(address, place - part) + operation(codes[0])
            if rng.random() < 0.5:
                code += (
                    constant(address, 1)
                    + operation(codes[2])
                    + constant(address, 0)
                    + operation(codes[1])
                )
            return code + END, place
        return constant(address, place) + END, place

    def _data_segments(self) -> list[bytes]:
        rng, world, entries = self.rng, self.world, []
        for _ in range(rng.choice((0, 1, 2, 3, 6))):
            length = rng.choice((0, 1, 5, 16, 100, 4096, 5000, rng.randrange(300)))
            content = (
                bytes([rng.randrange(256)]) * length
                if rng.random() < 0.3
                else rng.randbytes(length)
            )
            if rng.random() < 0.1:
                content = bytes(length)
            if not world.memories or rng.random() < 0.25:
                world.data.append(Data(length))
                entries.append(b"\x01" + emit.unsigned(length) + content)
                continue
            memory = world.memories[world.some_memory()]
            size = memory.minimum * PAGE
            if self.sound:
                content = content[:size]
            offset, place = self._offset(memory.address, size, len(content), pages=True)
            spelt = memory.index or rng.random() < 0.2
            head = b"\x02" + emit.unsigned(memory.index) if spelt else b"\x00"
            world.data.append(Data(len(content), memory.index, place, content))
            entries.append(head + offset + emit.unsigned(len(content)) + content)
        return entries

    def _element_segments(self) -> list[bytes]:
        rng, world, entries = self.rng, self.world, []
        for index in range(rng.choice((0, 1, 1, 2, 4))):
            mode = rng.choice(("active", "active", "passive", "declared"))
            if mode == "active" and not world.tables:
                mode = "passive"
            table = rng.choice(world.tables) if mode == "active" else None
            kind = rng.choice(("funcref", "funcref", "externref")) if table is None else table.kind
            if not world.features.externref_tables:
                kind = "funcref"
            length = rng.choice((0, 1, 2, 3, 5))
            offset = b""
            if table is not None:
                length = min(length, table.minimum) if self.sound else length
                offset, _ = self._offset(table.address, table.minimum, length)
            functions = [rng.randrange(len(world.functions)) for _ in range(length)]
            expressions = kind == "externref" or rng.random() < 0.4
            flags = {"active": 0, "passive": 1, "declared": 3}[mode] | 4 * expressions
            spelt = table is not None and (
                table.index > 0 or kind != "funcref" or rng.random() < 0.3
            )
            if table is not None and table.address == "i64":
                spelt = True
            head = emit.unsigned(flags | 2 * spelt)
            if spelt:
                head += emit.unsigned(table.index)
            head += offset
            if spelt or mode != "active":
                head += emit.CODES[kind] if expressions else b"\x00"
            if kind == "externref":
                body = emit.vector(constant(kind, 0) + END for _ in functions)
            elif expressions:
                body = emit.vector(self._element(function) for function in functions)
            else:
                world.referable += functions
                body = emit.vector(map(emit.unsigned, functions))
            entries.append(head + body)
            world.elements.append(Elements(index, kind, length))
        return entries

    def _element(self, function: int) -> bytes:
        """A reference to a function, or none, or what an immutable global holds."""
        pick = self.rng.random()
        globals_ = [g for g in self.world.globals if g.kind == "funcref" and not g.mutable]
        if globals_ and pick < 0.2 and self.world.features.extended_const:
            return operation(0x23, self.rng.choice(globals_).index) + END
        if pick < 0.35:
            return constant("funcref", 0) + END
        self.world.referable.append(function)
        return operation(0xD2, function) + END
