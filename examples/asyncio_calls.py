"""Untrusted calls from asyncio: each runs in a thread with a deadline, and leaves nothing for the next one.

    python examples/asyncio_calls.py

A task that awaits can be cancelled, a thread cannot.  So a call leases its instance in its thread, and keeps both until
the guest has returned or its deadline has interrupted it.  A cancelled task goes on at once.

This needs wasmtime.  wasmer cannot interrupt a guest, and confines its objects to the thread that opened the host:
there, make an executor with one thread, open the host on it, and call only guests that you trust to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import memslot_plugin as memslot

GUEST = """
(module
  (memory (export "memory") 1)
  (func (export "sum") (param $n i32) (result i32)                ;; 1 + 2 + ... + n, kept in memory
    (loop $next
      (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (local.get $n)))
      (br_if $next (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    (i32.load (i32.const 0)))
  (func (export "spin") (loop $again (br $again))))
"""

SLOTS = 4
DEADLINE, TICKS = 0.5, 10
"""Seconds for a call, and ticks of the clock in that time."""


class Calls:
    """Calls of one guest: one at a time per thread; further calls wait."""

    def __init__(self, guest: memslot.Guest, threads: ThreadPoolExecutor) -> None:
        self._guest, self._threads = guest, threads

    async def call(self, name: str, *arguments: int) -> int:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._call, name, *arguments)

    def _call(self, name: str, *arguments: int) -> int:
        with self._guest.lease() as instance:  # the deadline begins
            return int(instance.call(name, *arguments))


@contextlib.contextmanager
def ticking(increment_epoch: Callable[[], None]) -> Iterator[None]:
    """Let the epoch of wasmtime's engine move on while the block runs, also when the event loop is busy."""
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(DEADLINE / TICKS):
            increment_epoch()

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        yield
    finally:
        stop.set()
        clock.join()


async def use(calls: Calls) -> None:
    print("sums:", *await asyncio.gather(*(calls.call("sum", n) for n in range(1, 11))))

    try:
        await calls.call("spin")
    except memslot.GuestTrap as trap:
        print("deadline:", str(trap).rpartition(": ")[2])

    began = time.monotonic()
    try:
        await asyncio.wait_for(calls.call("spin"), timeout=DEADLINE / 10)
    except asyncio.TimeoutError:
        print("gave up before the deadline:", time.monotonic() - began < DEADLINE)

    print("and then:", await calls.call("sum", 100))


def main() -> None:
    with (
        memslot.open_host(
            "wasmtime",
            slots=SLOTS,
            configure=lambda config: setattr(config, "epoch_interruption", True),
            configure_store=lambda store: store.set_epoch_deadline(TICKS + 1),
        ) as host,
        ticking(host.increment_epoch),
    ):
        guest = host.prepare(GUEST, name="untrusted")
        with ThreadPoolExecutor(
            SLOTS
        ) as threads:  # at its end it waits for the call that was given up
            asyncio.run(use(Calls(guest, threads)))
        statistics = host.statistics()
        print("leased at the end:", statistics.live_instances - statistics.ready_instances)


if __name__ == "__main__":
    main()
