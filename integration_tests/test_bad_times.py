"""Calls too many at once, too late or twice: a clear error, no leak, and the host goes on serving."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import memslot_plugin as memslot

from . import toy
from .cells import Cell
from .expect import raises


def each_raises(uses: Iterable[Callable[[], object]], said: str) -> None:
    """Fail unless each use raises UsedAfterClose."""
    for use in uses:
        with raises(memslot.UsedAfterClose, said, ValueError):
            use()


def test_lease_of_an_exhausted_pool_raises_at_once_or_at_the_timeout(host: memslot.Host) -> None:
    guest = host.prepare(toy.A)
    with guest.instantiate(), guest.instantiate() as held:
        said = "all 2 slots of the pool are in use; release instances, raise the setting slots"
        for _ in range(3):
            with raises(memslot.PoolExhausted, said, MemoryError) as caught:
                guest.instantiate()
            assert (caught.value.limit, caught.value.in_use) == (2, 2)
            assert not isinstance(caught.value, memslot.PoolTimeout)
        said = "all 2 slots of the pool stayed in use for 0.05 s"
        with raises(memslot.PoolTimeout, said, TimeoutError) as late:
            guest.instantiate(wait_timeout=0.05)
        assert (late.value.limit, late.value.in_use) == (2, 2)
        assert held.call("load", 16) == ord("t")
    (pool,) = host.statistics().pools
    assert (pool.exhausted, pool.in_use) == (4, 0)


def test_timeout_that_is_no_number_of_seconds_is_refused(host: memslot.Host) -> None:
    with host.prepare(toy.A) as guest:
        for wait in (guest.instantiate, guest.lease):
            for wrong in (-1, "soon", float("nan")):
                said = f"wait_timeout = {wrong!r} is not allowed: it is seconds, at least 0"
                with raises(memslot.SettingError, said, ValueError):
                    wait(wait_timeout=wrong)
        with guest.lease(wait_timeout=0):
            pass


def test_host_with_live_instances_closes_by_force_and_is_not_used_again(plain_cell: Cell) -> None:
    with plain_cell.open(slots=2) as host:
        guest = host.prepare(toy.A)
        instance = guest.instantiate()
        said = (
            f"the {host.name} host has 1 live instances; close them first, or use close.force=True."
        )
        with raises(memslot.InUse, said, RuntimeError):
            host.close()
        for each in (instance, guest.instantiate()):
            assert each.call("load", 16) == ord("t")
        host.close(force=True)
        host.close()
        uses = (lambda: host.prepare(toy.A), host.statistics, instance.reset, guest.instantiate)
        each_raises(uses, "was closed")
        instance.close()
        guest.close()
    with plain_cell.open(slots=2) as host:
        guest = host.prepare(toy.A)
        instances = [guest.instantiate() for _ in range(2)]
    assert all(instance.closed for instance in instances)
    assert guest.closed


def test_instance_that_was_closed_is_not_used_again(host: memslot.Host) -> None:
    guest = host.prepare(toy.A, name="toy")
    instance = guest.instantiate()
    function, memory = instance.function("load"), instance.memory
    instance.close()
    instance.close()  # does nothing
    assert instance.closed
    uses = (
        lambda: instance.call("load", 16),
        lambda: instance.function("load"),
        lambda: instance.exports,
        lambda: instance.native,
        lambda: instance.memory.byte_size,
        lambda: memory.read(0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.grow(1),
        instance.reset,
    )
    each_raises(
        uses,
        "the instance of toy was closed, or its lease has ended; lease or instantiate the guest again",
    )
    if host.name != "fake":
        each_raises([lambda: function(16)], ".+")


def test_guest_that_was_closed_makes_no_instance_and_resets_none(host: memslot.Host) -> None:
    guest = host.prepare(toy.A, name="toy")
    image, (request,) = guest.images[0], guest.requests
    with guest.instantiate() as instance:
        instance.call("fill", 0, 8, 7)
        guest.close()
        guest.close()
        each_raises([instance.reset], "cannot be reset; prepare it again")
        assert instance.memory.read(0, 8) == bytes([7]) * 8
        assert instance.call("different", 0, 8, 7) == 0
    each_raises([guest.instantiate], "the guest toy was closed; prepare it again")
    create = host.plugins.armed.create_memory
    each_raises([lambda: create(request)], "the image of toy was closed; prepare the guest again")
    assert image.closed


def test_host_that_does_not_exist_is_refused_with_the_reason() -> None:
    said = "setting host: expected one of auto, wasmtime, wasmer, fake.*, got 'wasmtim'"
    with raises(memslot.SettingError, said, ValueError):
        memslot.open_host("wasmtim")
    for name, reason in memslot.available_hosts().items():
        if reason is not None:
            with raises(memslot.HostUnavailable, f"{name} cannot be imported", ImportError):
                memslot.open_host(name)
