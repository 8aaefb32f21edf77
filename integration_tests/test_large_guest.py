"""A guest of 70 MiB, CRuby: prepared, captured after it has booted, saved, loaded, and leased as a small one is.

Compiling its 30 MB takes long, so this runs once per runtime, beside the measurements; on wasmer, which takes minutes,
in the expensive profile alone.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import memslot_plugin as memslot
from memslot_plugin import analysis, wasm
from memslot_plugin.tests.profiles import EXPENSIVE

from . import npm, ruby
from .cells import Cell, backends, check

pytestmark = pytest.mark.timing

CELLS = [Cell(host, "memfd") for host in ("wasmtime", "wasmer")[: 1 + EXPENSIVE]]
MIB = 1 << 20
KEY = b"only this test knows"
LOADED = """require "json"; require "set"; require "digest"; $asked = 0; "loaded" """
ASK = """$asked += 1; JSON.generate((1..5).map { |x| {x => x ** 2} }) + " " + $asked.to_s"""
ANSWER = '[{"1":1},{"2":4},{"3":9},{"4":16},{"5":25}] 1'


@pytest.fixture(scope="module")
def module(pytestconfig: pytest.Config) -> bytes:
    return npm.RUBY.fetch(pytestconfig.cache.mkdir("guests"))


def taken(action: Callable[[], object]) -> float:
    """Microseconds on this thread's processor."""
    began = time.thread_time()
    action()
    return (time.thread_time() - began) * 1e6


def test_thirty_megabytes_are_analysed_in_half_a_second(
    module: bytes, note: Callable[[str, object], None]
) -> None:
    assert len(module) > 30_000_000
    seconds = min(taken(lambda: analysis.analyse(wasm.parse(module))) for _ in range(3)) / 1e6
    report = analysis.analyse(wasm.parse(module))
    assert report.not_understood is None
    note("seconds", round(seconds, 3))
    print(f"{len(module)} bytes, {report.instructions} instructions: {seconds:.3f} s")
    assert seconds < 0.5


@pytest.mark.parametrize("runtime", CELLS, ids=lambda cell: cell.host)
def test_it_is_saved_loaded_and_leased_in_microseconds(
    runtime: Cell, module: bytes, tmp_path: Path, note: Callable[[str, object], None]
) -> None:
    if runtime.missing:
        pytest.skip(runtime.missing)
    assert runtime.backend in backends()
    imports, wasi = ruby.imports(module), memslot.Wasi(program="ruby", stdout="discard")
    path = tmp_path / "ruby.memslot"

    booting = []

    def init(instance: memslot.Instance) -> None:
        began = time.thread_time()
        ruby.boot(instance)
        assert ruby.evaluate(instance, "RUBY_VERSION").startswith("3.4.")
        assert ruby.evaluate(instance, LOADED) == "loaded"
        booting.append((time.thread_time() - began) * 1e6)

    with runtime.open(image_limit="128MiB", audit=0) as host:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", memslot.RepeatedRandomness)
            guest = host.prepare(module, imports=imports, wasi=wasi, init=init, name="ruby")
        (memory,) = guest.report.memories
        assert memory.minimum_bytes > 69 * MIB
        assert guest.report.verdict.in_place
        guest.save(path, key=KEY)
        with guest.instantiate() as instance:
            assert ruby.evaluate(instance, ASK) == ANSWER

    with runtime.open(image_limit="128MiB", audit=0) as host:
        began = time.perf_counter()
        guest = host.load(path, imports=imports, wasi=wasi, key=KEY)
        loading = time.perf_counter() - began
        assert guest.reused_code
        entering, leaving = [], []
        for _ in range(200):
            lease = guest.lease()
            entering.append(taken(lease.__enter__))
            assert lease._instance is not None
            assert ruby.evaluate(lease._instance, ASK) == ANSWER
            leaving.append(taken(lease.__exit__))
        with ExitStack() as leases:
            new = []
            for _ in range(host.settings.slots):
                lease = guest.lease()
                new.append(taken(lease.__enter__))
                leases.push(lease.__exit__)
        counted = host.statistics()
        assert (counted.resets_in_place, counted.resets_by_instantiation) == (204, 0)
        check(host)

    first, *later = entering
    median = statistics.median(later)
    both = statistics.median(map(sum, zip(later, leaving[1:], strict=True)))
    times = booting[0] / statistics.median(new[1:])
    print(
        f"{runtime.host}: file {path.stat().st_size >> 20} MiB, loaded in {loading:.2f} s; first lease"
        f" {first:.0f} us, later {median:.1f} us, with the reset at the end {both:.1f} us; of a slot"
        f" that nobody used {statistics.median(new[1:]):.0f} us, {times:.0f} times faster than booting"
    )
    note("lease, microseconds", round(median, 1))
    note("lease and reset, microseconds", round(both, 1))
    note("of an unused slot, times faster than booting", round(times))
    assert median < 200
    assert statistics.quantiles(map(sum, zip(later, leaving[1:], strict=True)))[0] < 200
    # wasmer takes half a millisecond by itself for its 18,000 functions, wasmtime a tenth.
    assert min(new[1:]) < 1000
    assert times > 500
