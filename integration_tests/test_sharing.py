"""Guests in several processes: by fork, spawn, forkserver, queues and sockets, without a copy of the image."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_sharer, resource_tracker
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import Image, SharedGuest

from . import cells, sharing, toy
from .cells import Cell

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

DATA = os.urandom(4 << 20)[: 30 * toy.PAGE]


@contextmanager
def shared_from(cell: Cell) -> Iterator[tuple[memslot.Guest, dict[str, Any]]]:
    """A layered guest on a host of this process, with what its workers must find."""
    with cell.serving(slots=4, image_limit="64MiB") as host:
        with host.prepare(toy.assemble(sharing.TEXT), name="toy").instantiate() as instance:
            instance.memory.write(0, DATA)
            first = instance.snapshot()
        with first.instantiate() as instance:
            instance.call("store", 7, 77)
            guest = instance.snapshot()
        first.close()
        expected = sharing.use(guest)
        yield guest, expected
        guest.close()


def as_expected(found: dict[str, Any], expected: dict[str, Any], cell: Cell) -> None:
    assert found["answers"] == [77, 77, 77]
    assert found["sum"] == expected["sum"]
    assert found["loaded"]["shares_file"] == (cell.backend == "memfd")
    assert (found["loaded"]["compiled_because"] is None) == (cell.host != "fake")
    if cell.backend == "memfd":
        assert found["inodes"] == expected["inodes"]
        assert len(found["inodes"]) == 2, "the parent's file, and what the snapshot of it stores"
        assert found["Private_Dirty"] <= 16, "KiB: the page that was written and put back"
        # Each page is mapped by two processes at least: in slots, and where resets look.
        assert found["Pss"] < 0.6 * found["Rss"]


WAYS = ["fork", "spawn", "forkserver"]


def compiles_here(cell: Cell) -> bool:
    """Whether a forked child can compile: wasmer's compiler has threads, which stay behind."""
    return cell.host != "wasmer"


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    """multiprocessing keeps these processes for later, which is no leak of a test that starts them."""
    multiprocessing.set_forkserver_preload(["memslot_plugin", "integration_tests.sharing"])
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_attaches_a_guest_that_is_its_argument(plain_cell: Cell, way: str) -> None:
    if way == "fork" and not compiles_here(plain_cell):
        pytest.skip("impossible: wasmer's compiler has threads, which stay behind in a fork")
    context = multiprocessing.get_context(way)
    with shared_from(plain_cell) as (guest, expected):
        ours, theirs = context.Pipe()
        with guest.share() as shared:
            worker = context.Process(
                target=sharing.attach_and_use, args=(plain_cell, shared, theirs), daemon=True
            )
            worker.start()
        as_expected(answer(ours, worker), expected, plain_cell)
        with guest.instantiate() as instance:
            instance.call("store", 7, 5)
            assert instance.call("load", 7) == 5
        ours.send("end")
        assert ours.recv() == "closed"
        worker.join(30)
        assert worker.exitcode == 0
        assert sharing.use(guest)["answers"] == [77, 77, 77]
        ours.close(), theirs.close()
        worker.close()


def answer(connection: Any, worker: Any) -> Any:
    """What a worker says; an error where it says nothing."""
    assert connection.poll(60), f"the worker is silent; exit code {worker.exitcode}"
    return connection.recv()


@pytest.mark.parametrize("backend", cells.backends())
def test_a_guest_goes_through_a_queue_to_a_worker_that_runs(backend: str) -> None:
    cell = Cell("fake", backend)
    context = multiprocessing.get_context("spawn")
    with shared_from(cell) as (guest, expected):
        ours, theirs = context.Pipe()
        queue = context.SimpleQueue()
        worker = context.Process(
            target=sharing.attach_from_queue, args=(cell, queue, theirs), daemon=True
        )
        worker.start()
        with guest.share() as shared:
            queue.put(shared)
            as_expected(answer(ours, worker), expected, cell)
        ours.send("end")
        worker.join(30)
        assert worker.exitcode == 0
        ours.close(), theirs.close(), queue.close()
        worker.close()
        resource_sharer.stop()


@pytest.mark.parametrize("backend", cells.backends())
def test_a_guest_goes_through_a_socket(backend: str, tmp_path: Path) -> None:
    cell = Cell("fake", backend)
    context = multiprocessing.get_context("spawn")
    path = os.path.relpath(tmp_path / "socket")
    with shared_from(cell) as (guest, expected), socket.socket(socket.AF_UNIX) as server:
        server.settimeout(60)
        server.bind(path)
        server.listen()
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=sharing.receive_and_use, args=(cell, path, theirs), daemon=True
        )
        worker.start()
        connection, _ = server.accept()
        with connection, guest.share() as shared:
            shared.send(connection)
        as_expected(answer(ours, worker), expected, cell)
        ours.send("end")
        worker.join(30)
        assert worker.exitcode == 0
        ours.close(), theirs.close()
        worker.close()


def test_hosts_of_one_process_share_a_guest(plain_cell: Cell) -> None:
    """As threads on wasmer do, each of which has a host of its own."""
    with shared_from(plain_cell) as (guest, expected):
        shared = guest.share()
        guest.close()
        found: list[Any] = []

        def serve() -> None:
            with plain_cell.serving(slots=2, image_limit="64MiB") as host:
                attached = host.attach(shared, trust_code=True, name="another")
                assert attached.name == "another"
                found.append(sharing.use(attached))
                attached.close()

        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 2
        for each in found:
            as_expected(each, expected, plain_cell)
        shared.close()


# What a fork inherits


def in_child(work: Callable[[], None]) -> None:
    """Run it in a forked child, which has to come to a good end within a minute."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it was ends the child, and is shown
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"


def test_a_forked_child_uses_what_it_inherits(plain_cell: Cell) -> None:
    """A live host, its guests and instances: each process has its own pages from then on."""
    with shared_from(plain_cell) as (guest, expected), guest.instantiate() as instance:
        instance.call("store", 9, 99)

        def work() -> None:
            found = sharing.use(guest)
            assert (found["answers"], found["sum"]) == ([77, 77, 77], expected["sum"])
            assert found["inodes"] == expected["inodes"]
            assert instance.call("load", 9) == 99
            instance.call("store", 9, 1)
            instance.reset()
            assert instance.call("load", 9) == DATA[9]
            cells.check(guest.host)
            instance.close()
            guest.host.close(force=True)

        for _ in range(2):
            in_child(work)
        assert instance.call("load", 9) == 99
        instance.reset()
        assert sharing.use(guest)["answers"] == [77, 77, 77]


def test_a_forked_child_attaches_what_its_parent_shared(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _), guest.share() as shared:

        def work() -> None:
            if not compiles_here(plain_cell):
                with pytest.raises(memslot.Unsupported, match="threads that stayed behind"):
                    guest.host.attach(shared, trust_code=True)
                return
            with guest.host.attach(shared, trust_code=True) as attached:
                assert attached.images.keys() == guest.images.keys()
                assert sharing.use(attached)["answers"] == [77, 77, 77]
            with guest.host.attach(shared) as attached:  # compiled again
                assert sharing.use(attached)["answers"] == [77, 77, 77]
            with guest.instantiate() as instance:
                instance.snapshot().close()

        in_child(work)


def test_a_forked_child_saves_and_shares(plain_cell: Cell, tmp_path: Path) -> None:
    with shared_from(plain_cell) as (guest, _):
        in_child(lambda: guest.share().close())
        in_child(lambda: guest.save(tmp_path / "guest") and None)
        with guest.host.load(tmp_path / "guest") as loaded:
            assert sharing.use(loaded)["answers"] == [77, 77, 77]


# What is refused, and what is left


def test_a_shared_guest_outlives_its_guest_and_can_be_closed_twice(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _):
        shared = guest.share()
        count = len(shared.fds)
        assert count == (3 if plain_cell.backend == "memfd" else 1)
        assert all(not os.get_inheritable(fd) for fd in shared.fds)
        assert repr(shared) == f"<SharedGuest toy: {count} descriptors>"
        guest.close()
        with pytest.raises(memslot.UsedAfterClose):
            guest.share()
        with guest.host.attach(shared) as attached, attached.instantiate() as instance:
            assert instance.call("load", 7) == 77
        shared.close()
        shared.close()
        for call in (shared.send, guest.host.attach, pickle.dumps):
            with pytest.raises(memslot.UsedAfterClose):
                call(shared) if call is not shared.send else shared.send(None)  # type: ignore[arg-type]


def test_a_shared_guest_that_is_dropped_closes_its_descriptors(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _):
        fds = guest.share().fds
        gc.collect()
        for fd in fds:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (b"", 0),
        (b"memslot\x01", 1),
        (b"memslot\x01\2\0\0\0", 1),
        (b"memslot\x01\1\0\0\0", 0),
        (b"other\0\0\0\1\0\0\0", 1),
    ],
)
def test_what_is_no_shared_guest_is_refused_and_closed(message: bytes, count: int) -> None:
    one, other = socket.socketpair()
    with one, other, open(os.devnull, "rb") as file:  # noqa: PTH123
        if message:
            socket.send_fds(one, [message], [file.fileno()] * count)
        one.close()
        with pytest.raises(memslot.InvalidContainer, match="is no shared guest"):
            SharedGuest.receive(other)


def test_a_message_may_come_in_pieces(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _), guest.share() as shared:
        one, other = socket.socketpair()
        message = b"memslot\x01" + len(shared.fds).to_bytes(4, "little")
        received: list[SharedGuest] = []
        reader = threading.Thread(target=lambda: received.append(SharedGuest.receive(other)))
        with one, other:
            reader.start()
            socket.send_fds(one, [message[:3]], shared.fds)
            one.sendall(message[3:])
            reader.join()
        with received[0], guest.host.attach(received[0], trust_code=True) as attached:
            assert sharing.use(attached)["answers"] == [77, 77, 77]


class HangsUp(socket.socket):
    """Its other end has gone as soon as everything was received."""

    def sendmsg(self, *arguments: Any) -> int:
        sent = super().sendmsg(*arguments)
        self.received = SharedGuest.receive(self.other)
        self.other.close()
        return sent


def test_who_has_received_everything_may_hang_up() -> None:
    with Cell("fake", cells.backends()[0]).open() as host:
        guest = host.prepare(toy.A)
        one, other = socket.socketpair()
        with HangsUp(fileno=one.detach()) as ours, guest.share() as shared:
            ours.other = other
            shared.send(ours)
            ours.received.close()


def test_a_connection_that_is_gone_is_an_error(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _), guest.share() as shared:
        one, other = socket.socketpair()
        other.close()
        with one, pytest.raises(memslot.SystemCallError, match="sending the guest toy"):
            shared.send(one)


@pytest.mark.parametrize(
    "what", ["nothing", "a pipe", "an empty file", "too short", "no container"]
)
def test_descriptors_of_somebody_who_means_harm_are_refused(plain_cell: Cell, what: str) -> None:
    if plain_cell.backend == "anonymous" and what != "no container":
        pytest.skip("impossible: the plugin anonymous passes a single descriptor")
    with shared_from(plain_cell) as (guest, _), guest.share() as shared:
        head, *files = (os.dup(fd) for fd in shared.fds)
        spare = []
        if what == "nothing":
            os.close(files.pop())
        elif what == "a pipe":
            os.close(files[0])
            files[0], writer = os.pipe()
            spare.append(writer)
        elif what == "no container":
            os.close(head)
            head = os.memfd_create("no container")
        else:
            os.close(files[1])
            files[1] = os.memfd_create("other")
            os.ftruncate(files[1], 0 if what == "an empty file" else 4096)
        guests = guest.host.statistics().guests
        with SharedGuest("evil", [head, *files]) as evil, pytest.raises(memslot.InvalidContainer):
            guest.host.attach(evil)
        for fd in spare:
            os.close(fd)
        assert guest.host.statistics().guests == guests


def test_an_image_that_may_be_changed_is_copied(plain_cell: Cell) -> None:
    if plain_cell.backend == "anonymous":
        pytest.skip("impossible: the plugin anonymous copies every image")
    with shared_from(plain_cell) as (guest, _), guest.share() as shared:
        head, *files = (os.dup(fd) for fd in shared.fds)
        size = os.fstat(files[0]).st_size
        copy = os.memfd_create("unsealed")
        os.write(copy, os.pread(files[0], size, 0))
        os.close(files[0])
        files[0] = copy
        with SharedGuest("unsealed", [head, *files]) as unsealed:
            attached = guest.host.attach(unsealed, trust_code=True)
            assert attached.loaded is not None
            assert not attached.loaded.shares_file
            assert "others than its owner may write" in (attached.loaded.copied_because or "")
            os.pwrite(copy, b"\xff" * size, 0)
            os.ftruncate(copy, 0)
        assert sharing.use(attached)["answers"] == [77, 77, 77]
        attached.close()


def test_what_is_shared_is_sealed(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _), guest.share() as shared:
        for fd in shared.fds:
            with pytest.raises(OSError, match="Operation not permitted"):
                os.write(fd, b"x")
            with pytest.raises(OSError, match="Operation not permitted"):
                os.ftruncate(fd, 1)


def test_a_process_without_room_for_descriptors_gets_an_error(plain_cell: Cell) -> None:
    with shared_from(plain_cell) as (guest, _):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        holes = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 1, hard))
            with pytest.raises(memslot.SystemCallError, match=r"RLIMIT_NOFILE|ulimit -n"):
                guest.share()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in holes:
                os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208
        guest.share().close()


def test_images_are_the_same_objects_in_no_two_hosts(plain_cell: Cell) -> None:
    with (
        shared_from(plain_cell) as (guest, _),
        guest.share() as shared,
        guest.host.attach(shared) as attached,
    ):
        image, theirs = attached.images[0], guest.images[0]
        assert isinstance(image, Image)
        assert isinstance(theirs, Image)
        assert image is not theirs
        if plain_cell.backend == "memfd":
            assert [each.inode for each in image.backings] == [
                each.inode for each in theirs.backings
            ]
