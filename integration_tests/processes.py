"""What runs in processes of its own: children of a fork, workers of multiprocessing, interpreters that end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .toy import PAGE

PATIENCE = 100
"""Seconds after which a child that hangs is ended, with every thread's stack on its standard error."""


def in_child(action: Callable[[], None]) -> str:
    """Fork, run it there, and return what it raised: "" for nothing."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on a fork of a process with threads is warned of; it is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        said = "it ended in an unforeseen way"
        try:
            # Not dump_traceback_later, whose thread stayed behind in the parent.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
            signal.alarm(PATIENCE)
            action()
            said = ""
        except BaseException:  # noqa: BLE001 - whatever it is, the parent is told
            said = traceback.format_exc()
        finally:
            os.write(writer, said.encode()[-4000:])
            os._exit(bool(said))
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if status and not said:
        return f"the child ended with status {status}"
    return said


def serve(
    host: memslot.Host,
    guest: memslot.Guest,
    times: int = 3,
    mark: int = 0x5A,
    *,
    alone: bool = True,
) -> None:
    """Requests that look for a stranger's bytes and leave their own; `alone` where no other thread serves too."""
    for _ in range(times):
        with guest.lease(wait_timeout=30) as leased, guest.instantiate(wait_timeout=30) as instance:
            for each in (leased, instance):
                assert each.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
                each.call("fill", 0, 2 * PAGE, mark)
                assert each.call("different", 0, 2 * PAGE, mark) == 0
            instance.call("grow", 2)
            instance.reset()
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
    if alone:
        cells.check(host)


# -- multiprocessing

INHERITED: list[Any] = []
"""A host and its guest, for workers that are forked."""


def work(task: tuple[Cell, int]) -> int:
    """A worker's task: on a host of its own, and on the parent's where it has inherited it."""
    cell, mark = task
    with cell.open(slots=3) as host:
        if cell.host == "wasmer" and INHERITED:
            try:
                host.prepare(toy.A)
            except memslot.Unsupported:
                pass
            else:
                raise AssertionError("wasmer compiled in a forked child")
        else:
            serve(host, host.prepare(toy.A), mark=mark)
    if INHERITED:
        serve(*INHERITED, mark=mark)
    return mark


def multiprocess(method: str, cell: Cell) -> None:
    """Four tasks for two workers, while this process serves as well."""
    context = multiprocessing.get_context(method)
    with cell.open(slots=3) as host:
        guest = host.prepare(toy.A)
        serve(host, guest)
        if method == "fork":
            INHERITED[:] = [host, guest]
        with guest.instantiate() as held, context.Pool(2) as pool:
            held.call("fill", 0, PAGE, 0x77)
            marks = [1, 2, 3, 4]
            done = pool.map_async(work, [(cell, mark) for mark in marks])
            for _ in range(3):
                serve(host, guest, 1)
            assert done.get(PATIENCE) == marks
            assert held.call("different", 0, PAGE, 0x77) == 0
            pool.close()
            pool.join()


# -- interpreters that end

GUEST = toy.assemble(
    toy.TEXT_OF_A.replace(
        "(module",
        """(module (import "env" "wait" (func $wait))
        (func (export "wait") (call $wait)) (func (export "spin") (loop $again (br $again)))""",
        1,
    )
)


def end_with_live_instances(host: memslot.Host, guest: memslot.Guest) -> list[Any]:
    instances = [guest.instantiate(), guest.instantiate()]
    instances[0].call("fill", 0, PAGE, 1)
    return [host, guest, instances, instances[0].fork(1), instances[0].snapshot()]


def end_with_a_lease(host: memslot.Host, guest: memslot.Guest) -> list[Any]:
    def hold() -> Any:
        with guest.lease() as instance:
            instance.call("fill", 0, PAGE, 1)
            yield instance

    held = hold()
    return [next(held), held]


def end_with_cycles(host: memslot.Host, guest: memslot.Guest) -> list[Any]:
    found: list[Any] = [guest.instantiate(), host]
    found.append(found)
    return []


def end_with_natives(host: memslot.Host, guest: memslot.Guest) -> list[Any]:
    instance = guest.instantiate()
    return [instance.native, instance.function("load"), instance.memory, instance]


def end_with_threads(host: memslot.Host, guest: memslot.Guest) -> list[Any]:
    """Daemons inside of the guest: one that waits in a host function, and one that spins where that lets others run."""
    import threading
    import time

    instances: list[memslot.Instance] = []

    def call(name: str) -> None:
        instances.append(guest.instantiate())
        instances[-1].call(name)

    names = ["wait", "spin"] if host.name == "wasmtime" else ["wait"] * (not host.thread_confined)
    for name in names:
        started = len(instances)
        threading.Thread(target=call, args=(name,), daemon=True).start()
        while len(instances) == started:
            time.sleep(0.01)
    time.sleep(0.2)  # it has its instance, and is inside of it soon
    return [host]


def end_in_atexit(host: memslot.Host, guest: memslot.Guest) -> list[Any]:
    import atexit

    instance = guest.instantiate()
    atexit.register(host.close, force=True)
    atexit.register(instance.reset)
    atexit.register(serve, host, guest, 1)  # the last to be registered goes first
    return [instance]


ENDINGS = {
    each.__name__.removeprefix("end_"): each
    for each in (
        end_with_live_instances,
        end_with_a_lease,
        end_with_cycles,
        end_with_natives,
        end_in_atexit,
    )
}

KEPT: list[Any] = []


def end(name: str, cell: Cell) -> None:
    import threading

    forever = threading.Event()
    host = cell.open(slots=16)
    if cell.host == "fake":
        host.functions["wait"] = lambda live: forever.wait()  # type: ignore[attr-defined]
    guest = host.prepare(GUEST, imports={"env": {"wait": forever.wait}})
    endings = dict(ENDINGS, threads=end_with_threads)
    chosen = ENDINGS.values() if name == "everything" else [endings[name]]
    KEPT.extend(ending(host, guest) for ending in chosen)


if __name__ == "__main__":
    what, how, *coordinates = sys.argv[1:]
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    {"multiprocess": multiprocess, "end": end}[what](how, Cell(*coordinates))
