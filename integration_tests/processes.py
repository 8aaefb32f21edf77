"""Threads, children of a fork, workers of multiprocessing, and interpreters that end while everything is in use.

usage: python -m integration_tests.processes METHOD ENDING HOST BACKEND

Serves with workers that multiprocessing starts by METHOD, and ends by ENDING.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .toy import PAGE

PATIENCE = 100
"""Seconds after which a hanging child ends, with the stack of each thread on standard error."""


def in_child(action: Callable[[], object], fork: Callable[[], int] = os.fork) -> str:
    """Run an action in a forked child, and return its exception as text, or ""."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on, a fork of a process with threads warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = fork()
    if child == 0:
        said = "it ended in an unforeseen way"
        try:
            # Not dump_traceback_later, whose thread stays in the parent.
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
    return said or (f"the child ended with status {status}" if status else "")


def serve(
    host: memslot.Host,
    guest: memslot.Guest,
    times: int = 3,
    mark: int = 0x5A,
    *,
    alone: bool = True,
) -> None:
    """Serve requests that look for foreign bytes and leave their own. `alone` is true if no other thread serves."""
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


@contextmanager
def beside(*actions: Callable[[], object]) -> Iterator[None]:
    """Run each action on a thread of its own during the block, and raise the exception of any."""
    wrong: list[BaseException] = []

    def run_it(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised below
            wrong.append(error)

    threads = [threading.Thread(target=run_it, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
    if wrong:
        raise wrong[0]


INHERITED: list[Any] = []
"""Host and guest for forked workers."""


def work(task: tuple[Cell, int]) -> int:
    """Serve in a worker, on a host of its own and on an inherited one."""
    cell, mark = task
    with cell.open(slots=3) as host:
        if not (cell.host == "wasmer" and INHERITED):  # wasmer compiles nothing in a forked child
            serve(host, host.prepare(toy.A), mark=mark)
    if INHERITED:
        serve(*INHERITED, mark=mark)
    return mark


def multiprocess(method: str, cell: Cell) -> None:
    """Give four tasks to two workers, while this process serves too."""
    context = multiprocessing.get_context(method)
    with cell.open(slots=3) as host:
        guest = host.prepare(toy.A)
        serve(host, guest)
        INHERITED[:] = [host, guest] if method == "fork" else []
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


WAITS = """(module (import "env" "wait" (func $wait))
  (func (export "wait") (call $wait)) (func (export "spin") (loop $again (br $again)))"""
GUEST = toy.assemble(toy.TEXT_OF_A.replace("(module", WAITS, 1))

KEPT: list[Any] = []
"""Objects that are alive when the interpreter ends."""


def end_everything(host: memslot.Host, guest: memslot.Guest) -> None:
    """End with live instances, a fork, a snapshot, a lease, a cycle, native objects, and callbacks of atexit."""
    instances = [guest.instantiate() for _ in range(5)]
    instances[0].call("fill", 0, PAGE, 1)

    def hold() -> Any:
        with guest.lease() as instance:
            instance.call("fill", 0, PAGE, 1)
            yield instance

    held = hold()
    KEPT.extend((host, guest, instances, instances[0].fork(1), instances[0].snapshot()))
    KEPT.extend((next(held), held, instances[1].native, instances[1].function("load")))
    cycle: list[Any] = [guest.instantiate(), host]
    cycle.append(cycle)
    atexit.register(host.close, force=True)
    atexit.register(instances[2].reset)
    atexit.register(serve, host, guest, 1)  # the last registered callback runs first


def end_threads(host: memslot.Host, guest: memslot.Guest) -> None:
    """End with daemon threads in a guest: one waits in a host function, one spins if that releases the GIL."""
    instances: list[memslot.Instance] = []

    def call(name: str) -> None:
        instances.append(guest.instantiate())
        instances[-1].call(name)

    names = (
        ["wait", "spin"]
        if host.name == "wasmtime"
        else ["wait"] * (not host.runtime.thread_confined)
    )
    for name in names:
        started = len(instances)
        threading.Thread(target=call, args=(name,), daemon=True).start()
        while len(instances) == started:
            time.sleep(0.01)
    time.sleep(0.2)  # the thread has its instance, and enters it soon
    KEPT.append(host)


if __name__ == "__main__":
    method, ending, *coordinates = sys.argv[1:]
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    cell = Cell(*coordinates)
    multiprocess(method, cell)
    forever = threading.Event()
    host = cell.open(slots=16)
    if cell.host == "fake":
        host.functions["wait"] = lambda live: forever.wait()  # type: ignore[attr-defined]
    guest = host.prepare(GUEST, imports={"env": {"wait": forever.wait}})
    {"everything": end_everything, "threads": end_threads}[ending](host, guest)
