"""Modules with something wrong in them: what the runtime refuses we refuse, what it accepts starts as it does there."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import mutations
from memslot_plugin.tests.profiles import EXPENSIVE, examples

from . import cells, differential, native, toy
from .cells import Cell
from .generated import FEATURES, generate
from .modules import MODULES

START = 8
"""The number of the section that names a start function."""


def compare(host: memslot.Host, module: bytes) -> str:
    """What became of the module; fails if that differs from what the runtime alone makes of it."""
    runtime = native.runtime(host.name)
    declared = runtime.declared(module)
    if declared is None:
        with pytest.raises(memslot.InvalidModule):
            host.prepare(module)
        return "refused"
    imports: dict[str, dict[str, Any]] = {}
    for (namespace, name), results in declared.functions.items():
        imports.setdefault(namespace, {})[name] = stub(results)
    with host.prepare(module, imports=imports) as guest:
        if any(number == START for number, _ in mutations.sections(module)):
            return "accepted"  # what starts may never end
        alone = runtime.run(module, lambda _: imports, ())
        runtime.close()
        try:
            instance = guest.instantiate()
        except memslot.GuestTrap as error:
            found = [runtime.reason(error.native)]
        except memslot.LinkError:
            found = [("failed to start",)]
        else:
            with instance:
                assert dict(instance.exports) == declared.exports
                found = outcomes(instance, runtime)
                if guest.plan.structure is None:  # its memories are the runtime's business alone
                    alone = [outcome for outcome in alone if outcome[0] != "memory"]
        assert differential.plain(found) == differential.plain(alone)
    return str(alone[0][0])


def outcomes(instance: memslot.Instance, runtime: Any) -> list[native.Outcome]:
    """That it started, and its memories, as far as we know of any."""
    if instance.guest.plan.structure is None:
        return [("started",)]
    return differential.outcomes(instance, (), runtime)


def stub(results: int) -> Callable[..., Any]:
    return lambda *_: None if not results else 0 if results == 1 else (0,) * results


def small_modules(host: str) -> list[bytes]:
    """The toy guest, modules of every shape, and generated ones."""
    shapes = [module.binary for module in MODULES.values()]
    return [toy.A, toy.WIDE, *shapes, *(generate(n, FEATURES[host]).binary for n in range(40))]


def test_small_modules_with_something_wrong(
    real_cell: Cell, note: Callable[[str, object], None]
) -> None:
    originals, found = small_modules(real_cell.host), Counter[str]()
    with real_cell.serving(slots=8) as host:
        for seed in range(examples(800)):
            rng = random.Random(seed)
            module = mutations.mutated(rng, rng.choice(originals))
            try:
                found[compare(host, module)] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {module.hex()}") from error
            if seed % 50 == 0:
                cells.check(host, in_use=0)
        assert_still_right(host)
    note("outcomes", str(found))
    assert found["started"] > 20
    assert found["refused"] > 100


def test_quickjs_with_something_wrong(
    real_cell: Cell, quickjs: bytes, note: Callable[[str, object], None]
) -> None:
    found = Counter[str]()
    with real_cell.serving() as host:
        for seed in range(300 if EXPENSIVE else 5):
            module = changed_a_little(random.Random(seed), quickjs)
            try:
                found[compare(host, module)] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed}") from error
        assert_still_right(host)
    note("outcomes", str(found))
    assert len(found) > 1


def changed_a_little(rng: random.Random, module: bytes) -> bytes:
    """A large module that a runtime often accepts: half of the changes are in its data and names."""
    if rng.random() < 0.5:
        return mutations.mutated(rng, module)
    at = rng.randrange(len(module) * 9 // 10, len(module))
    return module[:at] + bytes([rng.randrange(256)]) + module[at + 1 :]


def assert_still_right(host: memslot.Host) -> None:
    with host.prepare(toy.A) as guest, guest.instantiate() as instance:
        assert instance.memory.read(0, 2 * toy.PAGE) == toy.pristine(toy.A)
