"""Test a plugin of your own without a runtime: `FakeHost` leases, grows and resets memories like every host.

A guest of the fake host is a real module with its data and limits. Its functions are Python: each gets the live
instance, which reads, writes and grows the memory, and traps outside of it.

    python -m pytest examples/test_your_plugin.py
"""

from __future__ import annotations

from collections import Counter

import pytest

import memslot_plugin as memslot
from memslot_hooks import LinearMemory, ResetResult, hookimpl

PAGE = 65536

MODULE = bytes.fromhex(
    "0061736d 01000000"  # \0asm, version 1
    "05 04 01 01 01 04"  # one memory of 1 to 4 pages
    "0b 0b 01 00 41 08 0b 05 68656c6c6f"  # at 8: "hello"
)


class Meter:
    """The plugin under test: counts the dirty bytes of each tenant, and limits memories to two pages."""

    def __init__(self) -> None:
        self.dirty: Counter[str] = Counter()

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        return False if byte_size > 2 * PAGE else None

    @hookimpl
    def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
        self.dirty[memory.request.tenant or ""] += result.dirty_bytes or 0


def shout(live, times):
    """Write to the memory when the guest is called."""
    live.write(0, 8, b"HELLO" * times)
    return len(live.read(0, 8, 5 * times))


@pytest.fixture
def meter():
    return Meter()


@pytest.fixture
def guest(meter):
    # The strategy `copy` compares each page: it counts the dirty bytes on any kernel.
    settings = memslot.Settings(slots=2, reset="copy")
    with memslot.FakeHost(settings, plugins=[meter], functions={"shout": shout}) as host:
        yield host.prepare(MODULE)


def test_plugin_counts_the_bytes_that_each_tenant_wrote(guest, meter) -> None:
    page = memslot.probe().page_size
    for tenant, times in (("ann", 1), ("bob", 5000), ("ann", 2)):
        with guest.instantiate(tenant=tenant) as instance:
            assert instance.memory.read(8, 5) == b"hello"
            assert instance.call("shout", times) == 5 * times
    assert meter.dirty["ann"] == 2 * page
    assert meter.dirty["bob"] == -(-(8 + 25000) // page) * page


def test_plugin_refuses_growth_beyond_its_limit(guest) -> None:
    with guest.instantiate(tenant="ann") as instance:
        assert instance.memory.grow(1) == 1
        with pytest.raises(memslot.GrowthRefused):
            instance.memory.grow(1)
        assert instance.memory.byte_size == 2 * PAGE


def test_trap_of_one_tenant_changes_nothing_for_the_next(guest) -> None:
    with guest.instantiate(tenant="eve") as instance, pytest.raises(memslot.GuestTrap):
        instance.call("shout", PAGE)  # beyond the memory's end
    with guest.instantiate(tenant="ann") as instance:
        assert instance.memory.read(0, 16) == b"\0" * 8 + b"hello\0\0\0"
