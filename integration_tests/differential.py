"""Generated modules, natively and under memslot: each life under memslot ends as the native one.

usage: python -m integration_tests.differential HOST [--count N] [--seed N] [--cell NAME]

Prints the counts, and for each difference the seed, the module in hexadecimal and the sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import memslot_plugin as memslot
from memslot_plugin.settings import MIB

from . import cells, native
from .cells import Cell
from .generated import FEATURES, Features, Import, generate
from .native import Call, Outcome, Runtime

FOREIGN = 20
"""One module in this many is made for another runtime, so that this one may refuse it."""

SETTINGS = {"slots": 8, "image_limit": 256 * MIB}
"""Room for three memories of two instances, and for every snapshot."""


class Compared(Protocol):
    """A module and the calls of an instance, before and after a snapshot."""

    binary: bytes
    imports: Sequence[Import]
    calls: Sequence[Call]
    probes: Sequence[Call]
    snapshot_at: int


@dataclass(frozen=True)
class Given:
    """A module from another source, as the comparison takes it."""

    binary: bytes
    imports: Sequence[Import] = ()
    calls: Sequence[Call] = ()
    probes: Sequence[Call] = ()
    snapshot_at: int = 0


@dataclass
class Tally:
    """Counts of a run, and its differences as sentences with the module in them."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def features_for(host: str, seed: int) -> Features:
    """Return the features of the host's runtime, and for a few modules unknown ones too."""
    known = FEATURES[host]
    return known if seed % FOREIGN else FEATURES["wasmtime"] - ({"bound_tables"} - known)


def compare(host: memslot.Host, module: Compared, tally: Tally) -> None:
    """Run one module in each way, and record the differences from the runtime alone."""
    runtime = native.runtime(host.name)
    alone = plain(runtime.run(module.binary, imports_of(module), story(module)))
    runtime.close()
    kinds = Counter(outcome[0] for outcome in alone)
    tally.counts.update(modules=1, traps=kinds["trap"], values=kinds["value"])
    tally.counts[f"natively {alone[0][0]}"] += 1
    for life, expected, found in lives(host, module, alone, tally):
        tally.counts.update(("lives", life))
        if plain(found) != expected:
            tally.differences.append(f"{module}\n{life}: {difference(expected, plain(found))}")
            return
    try:
        cells.check(host, in_use=0)
    except AssertionError as error:
        tally.differences.append(f"{module}\nthe pool: {error}")


def story(module: Compared) -> list[Call]:
    """Return the calls of a life, with probes at the start, at the snapshot and at the end."""
    at, probes = module.snapshot_at, module.probes
    return [*probes, *module.calls[:at], *probes, *module.calls[at:], *probes]


Life = tuple[str, list[Outcome], list[Outcome]]


def lives(
    host: memslot.Host, module: Compared, alone: list[Outcome], tally: Tally
) -> Iterator[Life]:
    """Yield the name of each life, the native outcomes, and its own."""
    runtime, everything = native.runtime(host.name), story(module)
    objects = any(each.what != "function" for each in module.imports)
    try:
        guest = host.prepare(module.binary)
    except memslot.InvalidModule:
        yield "refused", alone, [("refused",)]
        return
    if guest.plan.structure is None:
        alone = [outcome for outcome in alone if outcome[0] != "memory"]
    with guest:
        tally.counts["guests that are reset in place"] += guest.in_place
        tally.counts["guests left to the runtime"] += guest.plan.native is not None
        for life in ("first instance", "instance in the slot it left"):
            with imports_for(guest, module, objects=objects) as given:
                try:
                    with guest.instantiate(**given) as instance:
                        found = outcomes(instance, everything, runtime)
                except memslot.GuestTrap as error:
                    found = [runtime.reason(error.native)]
                except memslot.LinkError:
                    found = [("failed to start",)]
                yield life, alone, found
        if objects or alone[0] != ("started",):
            return
        with imports_for(guest, module, objects=False) as given:
            with guest.instantiate(**given) as instance:
                yield "before a reset", alone, outcomes(instance, everything, runtime)
                instance.reset()
                outcomes(instance, module.calls[: module.snapshot_at], runtime)
                instance.reset()
                yield "after two resets", alone, outcomes(instance, everything, runtime)
            yield from lives_of_snapshots(guest, given, module, alone, tally)


def lives_of_snapshots(
    guest: memslot.Guest, given: Any, module: Compared, alone: list[Outcome], tally: Tally
) -> Iterator[Life]:
    """Yield lives with a snapshot in the middle, of the instance and of its copies."""
    runtime, at = native.runtime(guest.host.name), module.snapshot_at
    rest = [*module.probes, *module.calls[at:], *module.probes]
    expected = [alone[0], *alone[1 + len(module.probes) + at :]]
    with guest.instantiate(**given) as instance:
        outcomes(instance, module.calls[:at], runtime)
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


def outcomes(instance: memslot.Instance, calls: Iterable[Call], runtime: Runtime) -> list[Outcome]:
    """Return the results of the calls, each exported memory, and the kinds of all exports."""
    found: list[Outcome] = [("started",)]
    for function, *arguments in calls:
        try:
            found.append(("value", instance.call(function, *arguments)))
        except memslot.GuestTrap as error:
            found.append(runtime.reason(error.native))
    memories = instance.guest.plan.memories
    at = {name: memory.index for memory in memories for name in memory.exported_as}
    for name, kind in instance.exports.items():
        if kind == "memory" and name in at:
            memory = instance.memories[at[name]]
            found.append(("memory", name, memory.read(0, memory.byte_size)))
    return [*found, ("exports", dict(instance.exports))]


def plain(found: Iterable[Outcome]) -> list[Outcome]:
    """Return outcomes that compare by ==: NaNs are equal, zero has a sign, a memory is its hash."""
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


def imports_of(module: Compared) -> native.Imports | None:
    """Make the imports of a module: objects of the runtime and Python functions."""

    def make(natives: Runtime) -> dict[str, dict[str, Any]]:
        made: dict[str, dict[str, Any]] = {}
        for each in module.imports:
            made.setdefault(each.namespace, {})[each.name] = _made(each, natives)
        return made

    return make if module.imports else None


@contextlib.contextmanager
def imports_for(
    guest: memslot.Guest, module: Compared, *, objects: bool
) -> Iterator[dict[str, Any]]:
    """Return arguments of `instantiate`: imports that end with the instance."""
    host = guest.host
    made = native.runtime(host.name, host)
    if objects and host.name == "wasmtime" and guest.plan.native is not None:
        made = native.Wasmtime(host.native_engine)
    imports = imports_of(module)
    given = {} if imports is None else {"imports": imports(made)}
    if objects:
        given.update(made.bound())
    try:
        yield given
    finally:
        given.clear()
        made.close()


def _made(each: Import, natives: Any) -> Any:
    if each.what == "function":
        return _host_function(each.detail)
    content = (b"of the embedder",) if each.what == "memory" and each.detail[0] else ()
    return getattr(natives, each.what)(*each.detail, *content)


def _host_function(results: Sequence[str]) -> Callable[..., Any]:
    """Return a function whose result depends on its arguments."""
    kind = results[0] if results else None

    def called(*arguments: Any) -> Any:
        number = sum(hash(argument) % 1009 for argument in arguments if argument == argument)  # noqa: PLR0124 - no NaN
        if kind is None:
            return None
        return number if kind.startswith("i") else number / 8

    return called


# Many of them


def run(cell: Cell, seeds: Iterable[int], tally: Tally) -> Tally:
    """Compare the modules of these seeds on one host in one cell; stop after a few differences."""
    with cell.open(**SETTINGS) as host:
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
    print(*tally.differences, f"{len(tally.differences)} differences", sep="\n")
    return bool(tally.differences)


if __name__ == "__main__":
    raise SystemExit(main())
