"""Generated modules, natively and under memslot: each life that memslot can give them ends as the native one does.

usage: python -m integration_tests.differential HOST [--count N] [--seed N] [--cell NAME]

prints what was compared, and for each difference the seed, the module in hexadecimal and what differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import memslot_plugin as memslot
from memslot_plugin.settings import MIB

from . import cells, native
from .cells import Cell
from .generated import FEATURES, Features, Generated, Import, generate
from .native import Call, Outcome

if TYPE_CHECKING:
    from typing_extensions import Self

FOREIGN = 20
"""One module in so many is made for another runtime, so that this one may refuse it."""


@dataclass
class Tally:
    """What a run compared: differences are sentences with the seed and the module in them."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def features_for(host: str, seed: int) -> Features:
    """What the host's runtime knows, and for a few modules what it may not know."""
    known = FEATURES[host]
    if seed % FOREIGN:
        return known
    return dataclasses.replace(FEATURES["wasmtime"], bound_tables=known.bound_tables)


def settings_of(cell: Cell) -> dict[str, Any]:
    """What the comparison changes: room for three memories of two instances, and for every snapshot."""
    return {"slots": 8, "image_limit": 256 * MIB}


def compare(host: memslot.Host, module: Generated, tally: Tally) -> None:
    """Run one module in every way there is, and note what differs from the runtime alone."""
    imports = imports_of(module.imports)
    everything = story(module)
    runtime = native.runtime(host.name)
    alone = plain(runtime.run(module.binary, imports, everything))
    runtime.close()
    tally.counts["modules"] += 1
    tally.counts[f"natively {alone[0][0]}"] += 1
    tally.counts["traps"] += sum(outcome[0] == "trap" for outcome in alone[1:])
    tally.counts["values"] += sum(outcome[0] == "value" for outcome in alone)
    for life, expected, found in lives(host, module, imports, alone, tally):
        tally.counts["lives"] += 1
        tally.counts[life] += 1
        if plain(found) != expected:
            tally.differences.append(f"{module}\n{life}: {difference(expected, plain(found))}")
            return
    try:
        cells.check(host, in_use=0)
    except AssertionError as error:
        tally.differences.append(f"{module}\nthe pool: {error}")


def story(module: Generated) -> list[Call]:
    """Everything that is asked of an instance: the state at first, where a snapshot may be taken, and at the end."""
    at, probes = module.snapshot_at, module.probes
    return [*probes, *module.calls[:at], *probes, *module.calls[at:], *probes]


Life = tuple[str, list[Outcome], list[Outcome]]


def lives(
    host: memslot.Host,
    module: Generated,
    imports: native.Imports | None,
    alone: list[Outcome],
    tally: Tally,
) -> Iterator[Life]:
    """The name of a life, what the runtime alone did, and what happened in it."""
    runtime = native.runtime(host.name)
    everything = story(module)
    try:
        guest = host.prepare(module.binary)
    except memslot.InvalidModule:
        yield "refused", alone, [("refused",)]
        return
    with guest:
        objects = any(each.what != "function" for each in module.imports)
        tally.counts["guests that are reset in place"] += guest.in_place
        tally.counts["guests left to the runtime"] += guest.plan.native is not None
        for life in ("first instance", "instance in the slot it left"):
            with Bound(host, guest, imports, objects) as bound:
                yield life, alone, life_of(bound, everything, runtime)
        if objects or alone[0] != ("started",):
            return
        given = {} if imports is None else {"imports": imports(native.runtime(host.name, host))}
        with guest.instantiate(**given) as instance:
            yield "before a reset", alone, outcomes(instance, everything, runtime)
            instance.reset()
            for call in module.calls[: module.snapshot_at]:
                outcome_of(instance, call, runtime)
            instance.reset()
            yield "after two resets", alone, outcomes(instance, everything, runtime)
        yield from lives_of_snapshots(guest, given, module, alone, tally)


def lives_of_snapshots(
    guest: memslot.Guest,
    given: dict[str, Any],
    module: Generated,
    alone: list[Outcome],
    tally: Tally,
) -> Iterator[Life]:
    """A snapshot in the middle: both the instance and its copies go on as the runtime alone did."""
    runtime = native.runtime(guest.host.name)
    at = module.snapshot_at
    rest = [*module.probes, *module.calls[at:], *module.probes]
    expected = [alone[0], *alone[1 + len(module.probes) + at :]]
    with guest.instantiate(**given) as instance:
        for call in module.calls[:at]:
            outcome_of(instance, call, runtime)
        try:
            copied = instance.snapshot()
        except memslot.SnapshotRefused:
            tally.counts["snapshots refused"] += 1
            return
        yield "after a snapshot", expected, outcomes(instance, rest, runtime)
    with copied, copied.instantiate() as instance:
        yield "instance of a snapshot", expected, outcomes(instance, rest, runtime)
        instance.reset()
        yield "instance of a snapshot after a reset", expected, outcomes(instance, rest, runtime)


class Bound:
    """One instance with imports of its own, which end with it; None where it does not start."""

    def __init__(
        self,
        host: memslot.Host,
        guest: memslot.Guest,
        imports: native.Imports | None,
        objects: bool,
    ) -> None:
        self.guest = guest
        self.made = native.runtime(host.name, host)
        if objects and host.name == "wasmtime" and guest.plan.native is not None:
            self.made = native.Wasmtime(host.native_engine)
        self.binding = {} if imports is None else {"imports": imports(self.made)}
        if objects:
            self.binding.update(self.made.bound())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.binding.clear()
        self.made.close()


def life_of(bound: Bound, calls: Sequence[Call], runtime: Any) -> list[Outcome]:
    try:
        instance = bound.guest.instantiate(**bound.binding)
    except memslot.GuestTrap as error:
        return [runtime.reason(error.native)]
    except memslot.LinkError:
        return [("failed to start",)]
    with instance:
        return outcomes(instance, calls, runtime)


def outcomes(instance: memslot.Instance, calls: Iterable[Call], runtime: Any) -> list[Outcome]:
    """What the calls gave, and then every exported memory."""
    found: list[Outcome] = [("started",), *(outcome_of(instance, call, runtime) for call in calls)]
    at = {
        name: memory.index for memory in instance.guest.plan.memories for name in memory.exported_as
    }
    for name, kind in instance.exports.items():
        if kind == "memory":
            memory = instance.memories[at[name]]
            found.append(("memory", name, memory.read(0, memory.byte_size)))
    return found


def outcome_of(instance: memslot.Instance, call: Call, runtime: Any) -> Outcome:
    name, *arguments = call
    try:
        return "value", instance.call(name, *arguments)
    except memslot.GuestTrap as error:
        return runtime.reason(error.native)


def plain(found: Iterable[Outcome]) -> list[Outcome]:
    """Outcomes that can be compared by ==: any NaN is the same, zero has a sign, memories are their hash."""
    return [tuple(map(_plain, outcome)) for outcome in found]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value.hex()
    if isinstance(value, bytes):
        return len(value), hashlib.sha256(value).hexdigest()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def difference(expected: Sequence[Outcome], found: Sequence[Outcome]) -> str:
    for place, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"outcome {place} is {other} and natively {one}"
    return f"there are {len(found)} outcomes and natively {len(expected)}"


# Imports


def imports_of(wanted: Sequence[Import]) -> native.Imports | None:
    """What a generated module imports, made of a runtime's own objects and of Python functions."""
    if not wanted:
        return None

    def make(natives: Any) -> Mapping[str, Mapping[str, Any]]:
        return {"env": {each.name: _made(each, natives) for each in wanted}}

    return make


def _made(each: Import, natives: Any) -> Any:
    if each.what == "function":
        return _host_function(each.detail)
    if each.what == "i32":
        return natives.i32(*each.detail)
    if each.what == "memory":
        minimum, maximum = each.detail
        return natives.memory(minimum, maximum, b"of the embedder" if minimum else b"")
    return natives.table(*each.detail)


def _host_function(results: Sequence[str]) -> Callable[..., Any]:
    """A function that gives something which depends on what it is given."""
    kind = results[0] if results else None

    def called(*arguments: Any) -> Any:
        number = sum(hash(argument) % 1009 for argument in arguments if argument == argument)  # noqa: PLR0124 - no NaN
        if kind is None:
            return None
        return number if kind.startswith("i") else number / 8

    return called


# Many of them


def run(cell: Cell, seeds: Iterable[int], tally: Tally | None = None) -> Tally:
    """The modules of these seeds on one host in one cell; stops after a few differences."""
    tally = Tally() if tally is None else tally
    with cell.open(**settings_of(cell)) as host:
        for seed in seeds:
            compare(host, generate(seed, features_for(cell.host, seed)), tally)
            if len(tally.differences) > 4:
                break
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", choices=cells.REAL_HOSTS)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", help="one cell instead of all in turn")
    options = parser.parse_args()
    chosen = [
        cell
        for cell in cells.POSSIBLE_CELLS
        if cell.host == options.host and options.cell in (None, str(cell))
    ]
    start, tally = time.monotonic(), Tally()
    each = 50  # modules per host that is opened
    for first in range(options.seed, options.seed + options.count, each):
        seeds = range(first, min(first + each, options.seed + options.count))
        cell = chosen[first // each % len(chosen)]
        print(f"\r{cell}: seeds {seeds.start} to {seeds.stop - 1}   ", end="", flush=True)
        run(cell, seeds, tally)
    print(f"\n{len(chosen)} cells, {time.monotonic() - start:.0f} s: {tally}")
    for each_difference in tally.differences:
        print(each_difference)
    print(f"{len(tally.differences)} differences")
    return bool(tally.differences)


if __name__ == "__main__":
    raise SystemExit(main())
