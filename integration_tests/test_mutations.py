"""Modules with something wrong: memslot refuses and accepts them as the runtime does, and starts them alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import mutations
from memslot_plugin.tests.profiles import examples

from . import differential, expect, native, toy
from .cells import Cell
from .differential import Given, Tally
from .generated import FEATURES, Import, generate
from .modules import MODULES

START = 8
"""The number of the section that names a start function."""


def compare_all(host: memslot.Host, modules: Iterable[bytes]) -> Tally:
    """Compare modules with their native outcome, and fail unless the host still serves."""
    tally, runtime = Tally(), native.runtime(host.name)
    for seed, module in enumerate(modules):
        compiled = runtime.compiled(module)
        imports = () if compiled is None else compiled.imports
        functions = (each for each in imports if native.kind_of(each) == "func")
        given = tuple(Import(each.name, "function", (), each.module) for each in functions)
        try:
            if compiled is not None and START in dict(mutations.sections(module)):
                host.prepare(module).close()  # a start function may never end
            else:
                differential.compare(host, Given(module, given), tally)
            assert not tally.differences
        except BaseException as error:
            raise AssertionError(
                f"seed {seed}: {module[:5000].hex()}, {tally.differences}"
            ) from error
    expect.still_serves(host)
    return tally


@pytest.mark.scales
def test_small_module_with_something_wrong_starts_or_is_refused_as_natively(
    real_cell: Cell, note: Callable[[str, object], None]
) -> None:
    originals = [toy.A, toy.WIDE, *(module.binary for module in MODULES.values())]
    originals += [generate(seed, FEATURES[real_cell.host]).binary for seed in range(40)]
    changed = (
        mutations.mutated(rng, rng.choice(originals))
        for rng in map(random.Random, range(examples(200)))
    )
    with real_cell.serving(**differential.SETTINGS) as host:
        found = compare_all(host, changed)
    note("compared", str(found))
    assert found.counts["natively started"] > 5
    assert found.counts["natively refused"] > 25


@pytest.mark.gate
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::memslot_plugin.errors.RepeatedRandomness")
def test_quickjs_with_something_wrong_starts_or_is_refused_as_natively(
    real_cell: Cell, quickjs: bytes, note: Callable[[str, object], None]
) -> None:
    changed = (changed_a_little(random.Random(seed), quickjs) for seed in range(examples(1) + 1))
    with real_cell.serving() as host:
        found = compare_all(host, changed)
    note("compared", str(found))
    assert found.counts["natively refused"] < found.counts["modules"]


def changed_a_little(rng: random.Random, module: bytes) -> bytes:
    """Change a large module, half of the time in its data and names, so that a runtime often accepts it."""
    if rng.random() < 0.5:
        return mutations.mutated(rng, module)
    at = rng.randrange(len(module) * 9 // 10, len(module))
    return module[:at] + bytes([rng.randrange(256)]) + module[at + 1 :]
