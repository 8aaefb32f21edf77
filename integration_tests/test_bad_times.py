"""Too many at once, too late, twice, or on another thread: a clear error, no leak, and the host goes on serving."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell
from .expect import raises
from .toy import PAGE


def test_a_pool_that_is_exhausted(host: memslot.Host) -> None:
    heard = []

    class Listener:
        @hookimpl
        def memslot_pool_exhausted(self, request: Any, limit: int, in_use: int) -> None:
            heard.append((request.tenant, limit, in_use))

    host.plugins.register(Listener())
    guest = host.prepare(toy.A)
    held = [guest.instantiate(), guest.instantiate()]
    for _ in range(3):
        with raises(
            memslot.PoolExhausted,
            "all 2 slots of the pool are in use; release instances, raise the setting slots",
            MemoryError,
        ) as caught:
            guest.instantiate(tenant="eve")
        assert (caught.value.limit, caught.value.in_use) == (2, 2)
        assert not isinstance(caught.value, memslot.PoolTimeout)
    assert heard == [("eve", 2, 2)] * 3
    for instance in held:
        assert instance.call("load", 16) == ord("t")
        instance.close()
    (pool,) = host.statistics().pools
    assert (pool.exhausted, pool.in_use) == (3, 0)


def test_waiting_for_a_slot_ends_at_the_timeout(host: memslot.Host) -> None:
    guest = host.prepare(toy.A)
    with guest.instantiate(), guest.instantiate():
        started = time.monotonic()
        with raises(
            memslot.PoolTimeout, "all 2 slots of the pool stayed in use for 0.2 s", TimeoutError
        ) as caught:
            guest.instantiate(wait_timeout=0.2)
        assert 0.2 <= time.monotonic() - started < 60
        assert (caught.value.limit, caught.value.in_use) == (2, 2)


def test_a_timeout_that_is_none(host: memslot.Host) -> None:
    guest = host.prepare(toy.A)
    for wrong in (-1, "1", float("nan")):
        with raises(
            memslot.SettingError,
            f"wait_timeout = {wrong!r} is not allowed: it is seconds, at least 0",
            ValueError,
        ):
            guest.instantiate(wait_timeout=wrong)


def test_waiting_for_a_slot_that_comes_back(plain_cell: Cell) -> None:
    if plain_cell.host == "wasmer":
        pytest.skip(
            "impossible: wasmer's objects live on one thread, so nobody else can give a slot back meanwhile"
        )
    with plain_cell.serving(slots=1, wait_timeout=30) as host:
        guest = host.prepare(toy.A)
        instance = guest.instantiate()
        instance.call("fill", 0, 2 * PAGE, 0xEE)
        timer = threading.Timer(0.1, instance.close)
        timer.start()
        with guest.instantiate() as waited:
            assert waited.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
        timer.join()


def test_a_host_with_live_instances_does_not_close(plain_cell: Cell) -> None:
    with plain_cell.open(slots=2) as host:
        guest = host.prepare(toy.A)
        instance = guest.instantiate()
        with raises(
            memslot.InUse,
            f"the {host.name} host has 1 live instances; close them first, or use close.force=True.",
            RuntimeError,
        ):
            host.close()
        assert instance.call("load", 16) == ord("t")
        with guest.instantiate() as other:
            assert other.call("load", 16) == ord("t")
        host.close(force=True)
        assert instance.closed
        host.close()
        for use in (
            lambda: instance.call("load", 16),
            lambda: instance.memory.read(0, 1),
            lambda: instance.exports,
            lambda: instance.native,
            instance.reset,
            guest.instantiate,
            lambda: host.prepare(toy.A),
            host.statistics,
        ):
            with raises(memslot.UsedAfterClose, "was closed", ValueError):
                use()
        instance.close()
        guest.close()


def test_leaving_the_block_ends_everything(plain_cell: Cell) -> None:
    with plain_cell.open(slots=2) as host:
        guest = host.prepare(toy.A)
        instances = [guest.instantiate() for _ in range(2)]
    assert all(instance.closed for instance in instances)
    assert guest.closed


def test_an_instance_that_was_closed(host: memslot.Host) -> None:
    guest = host.prepare(toy.A, name="toy")
    instance = guest.instantiate()
    function, memory = instance.function("load"), instance.memory
    instance.close()
    instance.close()  # a no-op
    assert instance.closed
    for use in (
        lambda: instance.call("load", 16),
        lambda: instance.function("load"),
        lambda: instance.memory.byte_size,
        lambda: memory.read(0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.grow(1),
        instance.reset,
    ):
        with raises(
            memslot.UsedAfterClose,
            "the instance of toy was closed; instantiate the guest again",
            ValueError,
        ):
            use()
    if host.name != "fake":
        # The slot may be somebody else's by now.
        with guest.instantiate() as next_tenant:
            with raises(memslot.UsedAfterClose, ".+", ValueError):
                function(16)
            assert next_tenant.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)


def test_a_guest_that_was_closed(host: memslot.Host) -> None:
    guest = host.prepare(toy.A, name="toy")
    guest.close()
    guest.close()
    with raises(memslot.UsedAfterClose, "the guest toy was closed; prepare it again", ValueError):
        guest.instantiate()


def test_a_memory_released_twice(host: memslot.Host) -> None:
    """As a host or a plugin with a mistake in it would."""
    guest = host.prepare(toy.A)
    (request,) = guest.requests
    armed = host.plugins.armed
    memory = armed.create_memory(request)
    slot = memory.slot
    armed.release_memory(memory)
    for again in (
        armed.release_memory,
        armed.reset_memory,
        lambda each: armed.grow_memory(each, 3 * PAGE),
    ):
        with raises(memslot.UsedAfterClose, "was released before", ValueError):
            again(memory)
    with raises(
        memslot.SlotError,
        "this slot is not leased from this pool: it was released before",
        RuntimeError,
    ):
        cells.pool(host).release(slot)
    cells.check(host, in_use=0)
    with guest.instantiate(), guest.instantiate():
        cells.check(host, in_use=2)


def test_an_image_of_a_closed_guest(host: memslot.Host) -> None:
    guest = host.prepare(toy.A, name="toy")
    image, (request,) = guest.images[0], guest.requests
    guest.close()
    with raises(
        memslot.UsedAfterClose, "the image of toy was closed; prepare the guest again", ValueError
    ):
        host.plugins.armed.create_memory(request)
    assert image.closed


def test_another_thread(plain_cell: Cell) -> None:
    """wasmer confines its objects to their thread, the others serve all."""
    with plain_cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        instance = guest.instantiate()
        caught: list[BaseException] = []

        def elsewhere() -> None:
            for use in (
                lambda: instance.call("load", 16),
                lambda: instance.memory.read(0, 1),
                instance.reset,
                lambda: guest.instantiate().close(),
                lambda: host.prepare(toy.B).close(),
                instance.close,
            ):
                try:
                    use()
                except BaseException as error:  # noqa: BLE001 - wasmer's own is no Exception
                    caught.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        if host.name == "wasmer":
            assert [type(error) for error in caught] == [memslot.WrongThread] * 6
            assert all("open one host per thread" in str(error) for error in caught)
            assert instance.call("load", 16) == ord("t")
            instance.close()
        else:
            assert not caught
            assert instance.closed


def test_hosts_that_do_not_exist() -> None:
    with raises(
        memslot.SettingError,
        "setting host = 'wasmtim' is not allowed: it is one of auto, wasmtime, wasmer, fake",
        ValueError,
    ):
        memslot.open_host("wasmtim")
    for name, reason in memslot.available_hosts().items():
        if reason is not None:
            with raises(memslot.HostUnavailable, f"{name} cannot be imported", ImportError):
                memslot.open_host(name)
