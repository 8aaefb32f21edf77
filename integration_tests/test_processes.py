"""Forks, workers, interpreters that end with everything live: no deadlock, no leak, no stranger's byte."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests.profiles import EXPENSIVE

from . import cells, toy
from .cells import Cell
from .interrupts import Halts
from .processes import in_child, serve
from .toy import PAGE

ROOT = Path(__file__).parents[1]


def test_a_forked_child_uses_what_its_parent_had(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=4) as host:
        guest = host.prepare(toy.A)
        serve(host, guest)
        held, dirty = guest.instantiate(), guest.instantiate()
        held.call("fill", 0, 2 * PAGE, 0x11)
        dirty.call("grow", 3)

        def child() -> None:
            assert held.call("different", 0, 2 * PAGE, 0x11) == 0
            held.call("fill", 0, 2 * PAGE, 0x22)
            with pytest.raises(memslot.GuestTrap):
                held.call("load", 2 * PAGE)
            held.reset()
            assert held.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            dirty.reset()
            serve(host, guest)
            if host.name == "wasmer":
                for compiles in (lambda: host.prepare(toy.B), held.snapshot, held.fork):
                    with pytest.raises(memslot.Unsupported, match="prepare guests before the fork"):
                        compiles()
            else:
                with host.prepare(toy.B) as other, other.instantiate() as instance:
                    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.B)
                held.fork(1)[0].close()
                with plain_cell.open(slots=2) as own:
                    serve(own, own.prepare(toy.A))
            for each in (held, dirty):
                each.close()
            guest.close()
            host.close()

        for _ in range(2):
            assert in_child(child) == ""
        assert held.call("different", 0, 2 * PAGE, 0x11) == 0, (
            "the child's writes reached its parent"
        )
        assert dirty.call("size") == 5
        # A child of a child, and one that closes by force what its parent uses.
        assert in_child(lambda: None if in_child(child) == "" else pytest.fail("grandchild")) == ""
        assert in_child(lambda: host.close(force=True)) == ""
        held.close()
        dirty.close()
        serve(host, guest)
        guest.close()


def test_a_forked_child_uses_wasi(real_cell: Cell, quickjs: bytes) -> None:
    from . import javascript

    with real_cell.serving(slots=2, image_limit="1GiB") as host:
        guest = host.prepare(quickjs, imports=javascript.IMPORTS, wasi=memslot.Wasi())

        def child() -> None:
            for _ in range(2):
                with guest.instantiate() as instance:
                    machine = javascript.Pooled(instance)
                    assert (
                        javascript.evaluate(machine, "typeof Math.random() + 6 * 7") == "number42"
                    )

        child()
        assert in_child(child) == ""
        guest.close()


@pytest.mark.parametrize("whose", ["pool", "plugins"])
def test_a_fork_while_another_thread_has_a_lock(plain_cell: Cell, whose: str) -> None:
    """Which the child must not wait for."""
    with plain_cell.serving(slots=3) as host:
        guest = host.prepare(toy.A)
        serve(host, guest)
        holder = cells.pool(host) if whose == "pool" else host.plugins
        locked, done = threading.Event(), threading.Event()

        def hold() -> None:
            with holder._lock:
                locked.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        locked.wait()
        try:
            assert in_child(lambda: (serve(host, guest), guest.close(), host.close())) == ""
        finally:
            done.set()
            thread.join()
        serve(host, guest)
        guest.close()


@pytest.fixture
def threaded_cell(plain_cell: Cell) -> Cell:
    """A cell whose host several threads can share."""
    if plain_cell.host == "wasmer":
        pytest.skip(
            "impossible: wasmer's objects live on one thread, so no other one can be in its pool"
        )
    return plain_cell


def test_forks_while_threads_lease_and_return(threaded_cell: Cell) -> None:
    with threaded_cell.serving(slots=8) as host:
        guest, stop = host.prepare(toy.A), threading.Event()
        wrong: list[BaseException] = []

        def work(mark: int) -> None:
            try:
                while not stop.is_set():
                    serve(host, guest, 1, mark, alone=False)
            except BaseException as error:  # noqa: BLE001 - looked at below
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2)]
        for thread in threads:
            thread.start()

        def child() -> None:
            serve(host, guest)
            host.close(force=True)

        try:
            said = [in_child(child) for _ in range(10)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert [each for each in said if each] == []
        assert wrong == []
        cells.check(host)
        guest.close()


def test_a_fork_while_another_thread_is_at_any_line(threaded_cell: Cell) -> None:
    """Whatever it was in the middle of never ends in the child, which serves on and closes."""
    with threaded_cell.serving(slots=8) as host:
        guest = host.prepare(toy.A)
        places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        go_on = threading.Semaphore(0)
        wrong: list[BaseException] = []

        def halt(place: str) -> None:
            places.put(place)
            go_on.acquire()

        def use() -> None:
            serve(host, guest, 1, alone=False)
            with guest.instantiate() as instance, instance.snapshot() as snapshot:
                snapshot.instantiate().close()

        def work() -> None:
            try:
                Halts(halt, 1 if EXPENSIVE else 25, sys.version_info.minor).run(use)
            except BaseException as error:  # noqa: BLE001 - looked at below
                wrong.append(error)
            finally:
                places.put(None)

        def child() -> None:
            serve(host, guest)
            host.close(force=True)

        thread = threading.Thread(target=work)
        thread.start()
        said = {}
        while (place := places.get()) is not None:
            said[place] = in_child(child)
            go_on.release()
        thread.join()
        assert {place: each for place, each in said.items() if each} == {}
        assert wrong == []
        assert len(said) > 10
        guest.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning"]
    command += ["-m", "integration_tests.processes", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing(plain_cell: Cell, method: str) -> None:
    done = run("multiprocess", method, plain_cell.host, plain_cell.backend)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("how", ["everything", "threads"])
def test_an_interpreter_ends_in_silence(plain_cell: Cell, how: str) -> None:
    done = run("end", how, plain_cell.host, plain_cell.backend)
    assert (done.returncode, done.stderr) == (0, "")
