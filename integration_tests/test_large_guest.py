"""CRuby, a guest of 70 MiB: prepared, captured after booting, saved, loaded, and leased.

Its 30 MB of code compile for a minute on wasmtime and for several minutes on wasmer.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import memslot_plugin as memslot

from . import npm, ruby
from .cells import Cell, check

pytestmark = pytest.mark.long

MIB = 1 << 20
KEY = b"only this test knows"
LOADED = """require "json"; require "set"; require "digest"; $asked = 0; "loaded" """
ASK = """$asked += 1; JSON.generate((1..5).map { |x| {x => x ** 2} }) + " " + $asked.to_s"""
ANSWER = '[{"1":1},{"2":4},{"3":9},{"4":16},{"5":25}] 1'
LEASES = 20


@pytest.fixture(scope="module")
def module(pytestconfig: pytest.Config) -> bytes:
    return npm.RUBY.fetch(pytestconfig.cache.mkdir("guests"))


@pytest.mark.parametrize("name", ["wasmtime", "wasmer"])
def test_large_guest_saved_after_booting_is_loaded_and_reset_in_place(
    name: str, module: bytes, tmp_path: Path
) -> None:
    cell = Cell(name, "memfd")
    if cell.missing:
        pytest.skip(cell.missing)
    imports, wasi = ruby.imports(module), memslot.Wasi(program="ruby", stdout="discard")
    path = tmp_path / "ruby.memslot"

    def init(instance: memslot.Instance) -> None:
        ruby.boot(instance)
        assert ruby.evaluate(instance, "RUBY_VERSION").startswith("3.4.")
        assert ruby.evaluate(instance, LOADED) == "loaded"

    with cell.open(image_limit="128MiB", audit=0) as host:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", memslot.RepeatedRandomness)
            guest = host.prepare(module, imports=imports, wasi=wasi, init=init, name="ruby")
        (memory,) = guest.report.memories
        assert memory.minimum_bytes > 69 * MIB
        assert guest.report.verdict.in_place
        guest.save(path, key=KEY)
        with guest.instantiate() as instance:
            assert ruby.evaluate(instance, ASK) == ANSWER

    with cell.open(image_limit="128MiB", audit=0) as host:
        guest = host.load(path, imports=imports, wasi=wasi, key=KEY)
        assert guest.compiled.reused
        for _ in range(LEASES):
            with guest.lease() as instance:
                assert ruby.evaluate(instance, ASK) == ANSWER
        counted = host.statistics()
        assert (counted.resets_in_place, counted.resets_by_instantiation) == (LEASES, 0)
        check(host)
