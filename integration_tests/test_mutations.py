"""Modules with something wrong in them: what the runtime refuses we refuse, what it accepts starts as it does there."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import mutations
from memslot_plugin.tests.profiles import examples

from . import cells, differential, expect, native, toy
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
        understood = guest.plan.structure is not None
        try:
            with guest.instantiate() as instance:
                assert dict(instance.exports) == declared.exports
                found = [("started",), *alone[1:]]
                if understood:
                    found = differential.outcomes(instance, (), runtime)
        except memslot.GuestTrap as error:
            found = [runtime.reason(error.native)]
        except memslot.LinkError:
            found = [("failed to start",)]
        assert differential.plain(found) == differential.plain(alone)
    return str(alone[0][0])


def stub(results: int) -> Callable[..., Any]:
    return lambda *_: None if not results else 0 if results == 1 else (0,) * results


def compare_all(host: memslot.Host, modules: Iterable[bytes]) -> Counter[str]:
    """What became of the modules, after which the host still serves."""
    found = Counter[str]()
    for seed, module in enumerate(modules):
        try:
            found[compare(host, module)] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {module[:5000].hex()}") from error
        if seed % 50 == 0:
            cells.check(host, in_use=0)
    expect.still_serves(host)
    return found


@pytest.mark.scales
def test_small_modules_with_something_wrong_become_what_they_become_natively(
    real_cell: Cell, note: Callable[[str, object], None]
) -> None:
    originals = [toy.A, toy.WIDE, *(module.binary for module in MODULES.values())]
    originals += [generate(seed, FEATURES[real_cell.host]).binary for seed in range(40)]
    changed = (
        mutations.mutated(rng, rng.choice(originals))
        for rng in map(random.Random, range(examples(200)))
    )
    with real_cell.serving(slots=8) as host:
        found = compare_all(host, changed)
    note("outcomes", str(found))
    assert found["started"] > 5
    assert found["refused"] > 25


@pytest.mark.gate
@pytest.mark.long
def test_quickjs_with_something_wrong_becomes_what_it_becomes_natively(
    real_cell: Cell, quickjs: bytes, note: Callable[[str, object], None]
) -> None:
    changed = (changed_a_little(random.Random(seed), quickjs) for seed in range(examples(1) + 1))
    with real_cell.serving() as host:
        found = compare_all(host, changed)
    note("outcomes", str(found))
    assert len(found) > 1


def changed_a_little(rng: random.Random, module: bytes) -> bytes:
    """A large module that a runtime often accepts: half of the changes are in its data and names."""
    if rng.random() < 0.5:
        return mutations.mutated(rng, module)
    at = rng.randrange(len(module) * 9 // 10, len(module))
    return module[:at] + bytes([rng.randrange(256)]) + module[at + 1 :]
