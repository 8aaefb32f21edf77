"""Guests in several processes: by fork, spawn, forkserver, queues, sockets and files, without a copy of the image."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, reduction, resource_sharer, resource_tracker
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import SharedGuest
from memslot_plugin.files.share import MOST_FILES

from . import sharing, toy
from .cells import REAL_HOSTS, Cell
from .children import hosts
from .exhausted import limited
from .processes import in_child

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

DATA = bytes(range(256)) * (30 * toy.PAGE // 256)
MAGIC = b"memslot\x01"
MEMFD = Cell("fake", "memfd")


@contextmanager
def shared_from(cell: Cell) -> Iterator[tuple[memslot.Guest, dict[str, Any]]]:
    """Return a layered guest on a host of this process, and the findings that its workers must have."""
    with cell.serving(slots=4, image_limit="64MiB") as host:
        with host.prepare(toy.assemble(sharing.TEXT), name="toy").instantiate() as instance:
            instance.memory.write(0, DATA)
            first = instance.snapshot()
        with first.instantiate() as instance:
            instance.call("store", 7, 77)
            guest = instance.snapshot()
        first.close()
        yield guest, sharing.use(guest)
        guest.close()


def as_expected(found: dict[str, Any], expected: dict[str, Any], cell: Cell) -> None:
    assert found["answers"] == [77, 77, 77]
    assert found["checksum"] == expected["checksum"]
    assert found["loaded"]["shares_file"] == (cell.backend == "memfd")
    assert (found["loaded"]["compiled_because"] is None) == (cell.host != "fake")
    assert found["inodes"] == expected["inodes"]
    if cell.backend == "memfd":
        # The files of the parent and of its snapshot, or the only file of a saved guest.
        assert len(found["inodes"]) == (1 if expected["loaded"] else 2)
        assert found["Private_Dirty"] <= 16, "KiB: the page that was written and put back"
        # At least two processes map each page: in slots, and for resets.
        assert found["Pss"] < 0.6 * found["Rss"]


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    """Start the processes that multiprocessing keeps: they are no leak of a test."""
    multiprocessing.set_forkserver_preload(["memslot_plugin", "integration_tests.sharing"])
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()


@pytest.mark.parametrize(
    ("way", "worker_cell"),
    [
        ("fork", Cell("wasmtime", "memfd")),
        ("spawn", MEMFD),
        ("forkserver", Cell("wasmtime", "anonymous")),
        pytest.param("spawn", Cell("wasmer", "memfd"), marks=pytest.mark.gate),
        pytest.param("spawn", Cell("wasmtime", "anonymous"), marks=pytest.mark.gate),
        pytest.param("fork", Cell("fake", "anonymous"), marks=pytest.mark.gate),
    ],
    ids=str,
)
def test_worker_given_a_guest_by_any_way_uses_it(
    way: str, worker_cell: Cell, tmp_path: Path
) -> None:
    """The ways are the argument of a process and, for a new interpreter, a queue, a socket and a file too."""
    if worker_cell.missing:
        pytest.skip(worker_cell.missing)
    context = multiprocessing.get_context(way)
    path, file = os.path.relpath(tmp_path / "socket"), tmp_path / "guest"
    ours, theirs = context.Pipe()
    queue = context.SimpleQueue()

    def meet(expected: dict[str, Any]) -> None:
        assert ours.poll(60), f"the worker is silent; exit code {worker.exitcode}"
        as_expected(ours.recv(), expected, worker_cell)
        ours.send("go on")

    with shared_from(worker_cell) as (guest, expected), socket.socket(socket.AF_UNIX) as server:
        server.settimeout(60)
        server.bind(path)
        server.listen()
        guest.save(file)
        with guest.share() as shared:
            more = (queue, path, file) if way == "spawn" else None
            arguments = (worker_cell, theirs, shared, more)
            worker = context.Process(target=sharing.work, args=arguments, daemon=True)
            worker.start()
        try:
            meet(expected)
            if more:
                with guest.share() as shared:
                    queue.put(shared)
                    meet(expected)
                connection, _ = server.accept()
                with connection, guest.share() as shared:
                    shared.send(connection)
                meet(expected)
                with guest.host.load(file) as loaded:
                    meet(sharing.use(loaded))
            assert ours.poll(60)
            assert ours.recv() == "closed"
            worker.join(30)
            assert worker.exitcode == 0
        finally:
            worker.kill()  # a forked worker would keep the forkserver alive
            worker.join()
        assert sharing.use(guest)["answers"] == [77, 77, 77]
    for each in (ours, theirs, queue, worker):
        each.close()
    resource_sharer.stop()


def test_guest_shared_by_hosts_of_one_process_works_on_each(plain_cell: Cell) -> None:
    """Threads on wasmer share guests in this way: each has a host of its own."""

    def serve(shared: SharedGuest) -> dict[str, Any]:
        with plain_cell.serving(slots=2, image_limit="64MiB") as host:
            attached = host.attach(shared, trust_code=True, name="another")
            assert attached.name == "another"
            found = sharing.use(attached)
            attached.close()
            return found

    with shared_from(plain_cell) as (guest, expected), guest.share() as shared:
        guest.close()
        with ThreadPoolExecutor(2) as threads:
            for found in threads.map(serve, (shared, shared)):
                as_expected(found, expected, plain_cell)


def test_forked_child_uses_attaches_saves_and_shares_guests(
    plain_cell: Cell, tmp_path: Path
) -> None:
    """From the fork on each process has its own pages of a live host, its guests and instances."""
    with (
        shared_from(plain_cell) as (guest, expected),
        guest.instantiate() as instance,
        guest.share() as shared,
    ):
        instance.call("store", 9, 99)

        def child() -> None:
            assert sharing.use(guest)["inodes"] == expected["inodes"]
            assert instance.call("load", 9) == 99
            instance.call("store", 9, 1)
            guest.share().close()
            guest.save(tmp_path / "guest")
            for trusted in (True, False):
                if plain_cell.host == "wasmer":
                    with pytest.raises(memslot.Unsupported, match="threads that stayed behind"):
                        guest.host.attach(shared, trust_code=trusted)
                else:
                    with guest.host.attach(shared, trust_code=trusted) as attached:
                        assert sharing.use(attached)["answers"] == [77, 77, 77]
            instance.reset()
            assert instance.call("load", 9) == DATA[9]
            guest.host.close(force=True)

        assert in_child(child) == ""
        assert instance.call("load", 9) == 99
        with guest.host.load(tmp_path / "guest") as loaded:
            assert sharing.use(loaded)["checksum"] == expected["checksum"]


# Refusals


def test_shared_guest_outlives_its_guest_is_sealed_and_can_be_closed_twice(
    plain_cell: Cell,
) -> None:
    with shared_from(plain_cell) as (guest, _):
        dropped = guest.share().fds
        gc.collect()
        for fd in dropped:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)
        shared = guest.share()
        count = 3 if plain_cell.backend == "memfd" else 1
        assert repr(shared) == f"<SharedGuest toy: {count} descriptors>"
        for fd in shared.fds:
            assert not os.get_inheritable(fd)
            with pytest.raises(OSError, match="Operation not permitted"):
                os.write(fd, b"x")
        guest.close()
        with pytest.raises(memslot.UsedAfterClose):
            guest.share()
        with guest.host.attach(shared) as attached, attached.instantiate() as instance:
            assert instance.call("load", 7) == 77
        for _ in range(2):
            shared.close()
        for use in (lambda _: shared.send(None), guest.host.attach, pickle.dumps):  # type: ignore[arg-type]
            with pytest.raises(memslot.UsedAfterClose):
                use(shared)


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (b"", 0),
        (MAGIC, 1),
        (MAGIC + b"\2\0\0\0", 1),
        (MAGIC + b"\1\0\0\0", 0),
        (b"another\0\1\0\0\0", 1),
        (
            MAGIC + MOST_FILES.to_bytes(4, "little"),
            MOST_FILES + 1,
        ),  # the kernel cuts a descriptor off
    ],
)
def test_message_that_is_no_shared_guest_is_refused(message: bytes, count: int) -> None:
    one, other = socket.socketpair()
    with one, other, open(os.devnull, "rb") as file:  # noqa: PTH123
        if message:
            socket.send_fds(one, [message], [file.fileno()] * count)
        one.close()
        with pytest.raises(memslot.InvalidContainer, match="is no shared guest"):
            SharedGuest.receive(other)


def test_peer_that_sends_too_many_descriptors_in_all_is_refused() -> None:
    one, other = socket.socketpair()
    with one, other, open(os.devnull, "rb") as file:  # noqa: PTH123
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a number is enough
        for byte in MAGIC + (4 * MOST_FILES).to_bytes(4, "little"):
            socket.send_fds(one, [bytes([byte])], [file.fileno()] * MOST_FILES)
        with pytest.raises(memslot.InvalidContainer, match=f"1 bytes and {MOST_FILES} descriptors"):
            SharedGuest.receive(other)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_message_that_comes_in_pieces_is_received_whole() -> None:
    with shared_from(MEMFD) as (guest, _), guest.share() as shared:
        one, other = socket.socketpair()
        message = MAGIC + len(shared.fds).to_bytes(4, "little")
        with one, other, ThreadPoolExecutor(1) as thread:
            received = thread.submit(SharedGuest.receive, other)
            socket.send_fds(one, [message[:3]], shared.fds)
            one.sendall(message[3:])
        with received.result() as found, guest.host.attach(found) as attached:
            assert sharing.use(attached)["answers"] == [77, 77, 77]


@pytest.mark.parametrize("way", ["socket", "pickle"])
def test_received_descriptors_are_not_inheritable(way: str) -> None:
    with MEMFD.open() as host, host.prepare(toy.A).share() as shared:
        if way == "socket":
            one, other = socket.socketpair()
            with one, other:
                shared.send(one)
                received = SharedGuest.receive(other)
        else:
            received = pickle.loads(reduction.ForkingPickler.dumps(shared))
            resource_sharer.stop()
        with received:
            assert [os.get_inheritable(fd) for fd in received.fds] == [False] * len(shared.fds)


def test_receiver_that_hangs_up_early_fails_the_sender_and_later_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = socket.socketpair()
    real = socket.send_fds

    def send_and_be_hung_up_on(*arguments: Any) -> int:
        sent = real(*arguments)
        SharedGuest.receive(other).close()
        other.close()
        return sent

    with MEMFD.open() as host, host.prepare(toy.A, name="toy").share() as shared, one:
        monkeypatch.setattr(socket, "send_fds", send_and_be_hung_up_on)
        shared.send(one)
        monkeypatch.undo()
        with pytest.raises(memslot.SystemCallError, match="sending the guest toy"):
            shared.send(one)


def replaced(shared: SharedGuest, place: int, fd: int | None) -> SharedGuest:
    """Return a shared guest that takes over another descriptor at this place, or lacks one if None."""
    fds = [os.dup(each) for each in shared.fds]
    os.close(fds[place])
    fds[place : place + 1] = [] if fd is None else [fd]
    return SharedGuest("evil", fds)


def test_shared_guest_with_hostile_descriptors_is_refused() -> None:
    with shared_from(MEMFD) as (guest, _), guest.share() as shared:
        reader, writer = os.pipe()
        short = os.memfd_create("too short")
        os.ftruncate(short, 4096)
        claiming, size = os.memfd_create("holes"), os.fstat(shared.fds[1]).st_size
        os.ftruncate(claiming, size)
        for place, fd in (
            (2, None),
            (1, reader),
            (1, claiming),
            (1, os.dup(shared.fds[2])),
            (2, os.memfd_create("an empty file")),
            (2, short),
            (0, os.memfd_create("no container")),
        ):
            with replaced(shared, place, fd) as evil, pytest.raises(memslot.InvalidContainer):
                guest.host.attach(evil)
            assert guest.host.statistics().guests == 1, (place, fd)
        os.close(writer)


def test_image_in_a_file_that_may_be_changed_is_copied() -> None:
    with shared_from(MEMFD) as (guest, _), guest.share() as shared:
        size = os.fstat(shared.fds[1]).st_size
        copy = os.memfd_create("unsealed")
        os.write(copy, os.pread(shared.fds[1], size, 0))
        with replaced(shared, 1, copy) as unsealed:
            attached = guest.host.attach(unsealed)
            os.pwrite(copy, b"\xff" * size, 0)
            os.ftruncate(copy, 0)
        assert attached.loaded is not None
        assert not attached.loaded.shares_file
        assert "others than its owner may write" in (attached.loaded.copied_because or "")
        assert sharing.use(attached)["answers"] == [77, 77, 77]
        attached.close()


def test_process_without_room_for_descriptors_gets_an_error() -> None:
    with shared_from(MEMFD) as (guest, _):
        # The limit is at the lowest free number: no descriptor is left.
        with open(os.devnull, "rb") as last:  # noqa: PTH123
            limit = limited(resource.RLIMIT_NOFILE, last.fileno() + 1)
            with limit, pytest.raises(memslot.SystemCallError, match=r"RLIMIT_NOFILE|ulimit -n"):
                guest.share()
        guest.share().close()


@pytest.mark.parametrize("host", hosts(REAL_HOSTS))
def test_trap_or_exit_leaves_a_pool_of_processes_usable(host: str) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(memslot.GuestTrap, match="unreachable"):
            pool.submit(sharing.run_or_exit, host, "trap").result(60)
        with pytest.raises(memslot.GuestExit) as exited:
            pool.submit(sharing.run_or_exit, host, "exit").result(60)
        assert exited.value.code == 7
        assert pool.submit(sharing.run_or_exit, host, "next").result(60) == 6
