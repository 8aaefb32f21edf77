"""Hostile calls of WASI: folders that are read-only, and waits that a deadline ends."""

from __future__ import annotations

import importlib
import os
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import Folder, Host, Instance, Wasi
from memslot_plugin.tests import hosts
from memslot_plugin.tests.runtimes import missing
from memslot_plugin.tests.slots import Fork, every_fork, in_child

wasmtime: Any = importlib.import_module("wasmtime") if missing("wasmtime") is None else None

_SIGNATURES = {
    "fd_allocate": "iII",
    "fd_filestat_set_size": "iI",
    "fd_filestat_set_times": "iIIi",
    "fd_pwrite": "iiiIi",
    "fd_read": "iiii",
    "fd_renumber": "ii",
    "fd_write": "iiii",
    "path_create_directory": "iii",
    "path_filestat_get": "iiiii",
    "path_filestat_set_times": "iiiiIIi",
    "path_link": "iiiiiii",
    "path_open": "iiiiiIIii",
    "path_remove_directory": "iii",
    "path_rename": "iiiiii",
    "path_symlink": "iiiii",
    "path_unlink_file": "iii",
}


def _text(*, memory: str = "1") -> str:
    """Return a guest that exports its imports from WASI. The test writes the arguments into its memory."""
    imports, functions = [], []
    for name, signature in _SIGNATURES.items():
        kinds = ["i64" if kind == "I" else "i32" for kind in signature]
        type_ = f"(param {' '.join(kinds)}) (result i32)"
        imports.append(f'(import "wasi_snapshot_preview1" "{name}" (func ${name} {type_}))')
        given = " ".join(f"(local.get {place})" for place in range(len(kinds)))
        functions.append(f'(func (export "{name}") {type_} (call ${name} {given}))')
    return f'(module {" ".join(imports)} (memory (export "memory") {memory}) {" ".join(functions)})'


_PATH, _OTHER, _VECTOR, _RESULT = 1024, 1200, 512, 12288
_READ, _WRITE = 1 << 1, 1 << 6
_CREATE, _TRUNCATE = 1, 8


pytestmark = pytest.mark.usefixtures("wasi_runtime")


@pytest.fixture(params=hosts.RUNTIMES)
def host(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Host]:
    with hosts.serving(request.param, slots=4) as opened:
        yield opened


class Calls:
    """Calls of WASI by a guest on paths in its first folder."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.folder = 3 if instance.guest.host.name == "wasmtime" else 4

    def path(self, text: str, at: int = _PATH) -> tuple[int, int]:
        self.instance.memory.write(at, text.encode())
        return at, len(text.encode())

    def open(
        self, path: str, *, flags: int = 0, rights: int = _READ, follow: int = 1, at: int = _PATH
    ) -> int:
        """Return the errno of path_open, and store the descriptor in `descriptor`."""
        place = self.path(path, at)
        return int(
            self.instance.call(
                "path_open", self.folder, follow, *place, flags, rights, rights, 0, _RESULT
            )
        )

    @property
    def descriptor(self) -> int:
        return int.from_bytes(self.instance.memory.read(_RESULT, 4), "little")

    def vector(self, content: bytes) -> tuple[int, int]:
        self.instance.memory.write(4096, content)
        vector = (4096).to_bytes(4, "little") + len(content).to_bytes(4, "little")
        self.instance.memory.write(_VECTOR, vector)
        return _VECTOR, 1

    def changes(self, descriptor: int) -> dict[str, int]:
        """Return the errno of each way to change the folder, or a file that was opened in it."""
        call, folder = self.instance.call, self.folder
        note, other = self.path("note"), self.path("other", _OTHER)
        empty = self.path("empty", _OTHER + 64)
        return {
            "write": call("fd_write", descriptor, *self.vector(b"spoilt"), _RESULT + 64),
            "pwrite": call("fd_pwrite", descriptor, *self.vector(b"spoilt"), 0, _RESULT + 64),
            "allocate": call("fd_allocate", descriptor, 0, 4096),
            "size": call("fd_filestat_set_size", descriptor, 1),
            "times": call("fd_filestat_set_times", descriptor, 1, 1, 5),
            "make folder": call("path_create_directory", folder, *other),
            "times of a path": call("path_filestat_set_times", folder, 0, *note, 1, 1, 5),
            "link": call("path_link", folder, 0, *note, folder, *other),
            "symlink": call("path_symlink", *note, folder, *other),
            "rename": call("path_rename", folder, *note, folder, *other),
            "unlink": call("path_unlink_file", folder, *note),
            "remove folder": call("path_remove_directory", folder, *empty),
        }


def _filled(folder: Path) -> str:
    (folder / "note").write_text("as it was")
    (folder / "empty").mkdir()
    return str(folder)


def _state(folder: Path) -> dict[str, Any]:
    """Return the state that a guest could change, without the times of access."""
    state: dict[str, Any] = {"": folder.stat().st_mtime_ns}
    for each in sorted(folder.rglob("*")):
        found = each.lstat()
        content = each.read_bytes() if each.is_file() else b""
        state[each.name] = found.st_mode, found.st_nlink, found.st_mtime_ns, content
    return state


def test_folder_is_read_only_unless_it_is_given_writable(host: Host, tmp_path: Path) -> None:
    given = _filled(tmp_path)
    before = _state(tmp_path)
    guest = host.prepare(_text(), wasi=Wasi(preopened={"/data": given}))
    with guest.instantiate() as instance:
        calls = Calls(instance)
        for flags in (0, _CREATE, _TRUNCATE, _CREATE | _TRUNCATE):
            for rights in (_READ, _READ | _WRITE, _WRITE):
                for path in ("note", "other"):
                    refused = calls.open(path, flags=flags, rights=rights)
                    assert bool(refused) == ((flags, rights, path) != (0, _READ, "note"))
        assert calls.open("note", rights=(1 << 30) - 1 - _WRITE) == 0
        file = calls.descriptor
        for descriptor in (file, calls.folder, 1):
            errors = calls.changes(descriptor)
            del errors["write"], errors["pwrite"]
            assert all(errors.values()), errors
        for name in ("write", "pwrite"):
            assert calls.changes(file)[name] != 0
        if instance.call("fd_renumber", file, 1) == 0:
            assert calls.changes(1)["write"] != 0
            file = 1
        assert instance.call("fd_read", file, *calls.vector(bytes(9)), _RESULT) == 0
        assert instance.memory.read(4096, 9) == b"as it was"
    assert _state(tmp_path) == before
    with guest.instantiate(
        wasi=Wasi(preopened={"/data": Folder(given, writable=True)})
    ) as instance:
        calls = Calls(instance)
        assert calls.open("note", rights=_READ | _WRITE | (1 << 22) | (1 << 8)) == 0
        errors = calls.changes(calls.descriptor)
        assert errors["write"] == errors["make folder"] == errors["unlink"] == 0, errors
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other"]


def test_folders_of_both_kinds_are_kept_apart_or_refused(host: Host, tmp_path: Path) -> None:
    for name in ("read", "write"):
        (tmp_path / name).mkdir()
    folders: dict[str, str | Folder] = {
        "/read": str(tmp_path / "read"),
        "/write": Folder(tmp_path / "write", writable=True),
    }
    guest = host.prepare(_text(), wasi=Wasi(preopened=folders))
    with guest.instantiate() as instance:
        calls = Calls(instance)
        assert calls.open("note", flags=_CREATE, rights=_WRITE) != 0
        calls.folder += 1
        assert calls.open("note", flags=_CREATE, rights=_WRITE) == 0
        assert instance.call("fd_write", calls.descriptor, *calls.vector(b"ours"), _RESULT) == 0
        assert calls.open("../read/note", flags=_CREATE, rights=_WRITE) != 0
    assert not list((tmp_path / "read").iterdir())
    assert (tmp_path / "write" / "note").read_text() == "ours"


def test_path_never_leads_out_of_its_folder(host: Host, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("not for guests")
    inside = tmp_path / "inside"
    (inside / "below").mkdir(parents=True)
    for name, target in (("file", tmp_path / "outside"), ("folder", tmp_path), ("up", Path(".."))):
        (inside / name).symlink_to(target)
    (inside / "below" / "note").write_text("for guests")
    guest = host.prepare(_text(), wasi=Wasi(preopened={"/data": Folder(inside, writable=True)}))
    ways = [
        "../outside",
        "file",
        "folder/outside",
        "up/outside",
        "folder/new",
        "below/../../outside",
        "below/../file",
    ]
    with guest.instantiate() as instance:
        calls = Calls(instance)
        assert calls.open("below/../below/./note") == 0
        assert calls.open("below", flags=2, rights=(1 << 29) - 1 - _WRITE) == 0
        below = calls.descriptor
        upwards = [f"../{way}" for way in ways]
        for folder, path in [
            *((each, way) for each in (calls.folder, calls.folder - 1, 0) for way in ways),
            *((below, way) for way in upwards),
            *((each, str(tmp_path / "outside")) for each in (calls.folder, below)),
        ]:
            calls.folder = folder
            for flags, rights in ((0, _READ), (0, _WRITE), (_CREATE, _READ | _WRITE)):
                for follow in (0, 1):
                    assert calls.open(path, flags=flags, rights=rights, follow=follow) != 0, path
            place = calls.path(path)
            assert instance.call("path_filestat_get", folder, 1, *place, 4096) != 0, path
            within = calls.path(f"{path}/x")
            assert instance.call("path_create_directory", folder, *within) != 0, path
        calls.folder = below
        assert calls.open("note") == 0
    assert (tmp_path / "outside").read_text() == "not for guests"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["inside", "outside"]


def test_renamed_folder_hides_no_link(host: Host, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("not for guests")
    inside = tmp_path / "inside"
    (inside / "below").mkdir(parents=True)
    (inside / "below" / "link").symlink_to(tmp_path / "outside")
    (inside / "note").write_text("")
    guest = host.prepare(_text(), wasi=Wasi(preopened={"/data": Folder(inside, writable=True)}))
    with guest.instantiate() as instance:
        calls = Calls(instance)
        top, rename = calls.folder, partial(instance.call, "path_rename")
        for old in ("below", "note/../below", "below/note/.."):
            assert calls.open("below", flags=2, rights=(1 << 29) - 1 - _WRITE) == 0
            rename(top, *calls.path(old), top, *calls.path("above", _OTHER))
            calls.folder = calls.descriptor
            assert calls.open("link") != 0
            calls.folder = top
            rename(top, *calls.path("above"), top, *calls.path("below", _OTHER))


def _poll_text(memory: str = '(memory (export "memory") 1)') -> str:
    signature = "(param i32 i32 i32 i32) (result i32)"
    now = "(param i32 i64 i32) (result i32)"
    return f"""(module (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll {signature}))
      (import "wasi_snapshot_preview1" "clock_time_get" (func $now {now}))
      {memory}
      (func (export "poll") {signature}
        (call $poll (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
      (func (export "now") {now} (call $now (local.get 0) (local.get 1) (local.get 2))))"""


_POLL = _poll_text()
_MILLISECOND = 1_000_000
_HOUR = 3_600_000 * _MILLISECOND


def _subscription(
    name: int = 7, tag: int = 0, of: int = 1, timeout: int = 0, *, absolute: bool = False
) -> bytes:
    return struct.pack("<QB7xI4xQQH6x", name, tag, of, timeout, 0, absolute)


def _poll(instance: Instance, *subscriptions: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """Return the errno of poll_oneoff, and the name, errno and tag of each event."""
    instance.memory.write(64, b"".join(subscriptions))
    errno = instance.call("poll", 64, 1024, len(subscriptions), 4096)
    events = int.from_bytes(instance.memory.read(4096, 4), "little")
    return errno, list(struct.iter_unpack("<QHB21x", instance.memory.read(1024, 32 * events)))


def test_poll_of_any_subscriptions_answers_as_the_runtime_does(host: Host) -> None:
    """Each poll ends at once or after milliseconds. wasmtime's own answers are the right ones."""
    with host.prepare(_POLL, wasi=Wasi()).instantiate() as instance:
        soon, later = 3 * _MILLISECOND, _HOUR
        one, other = _subscription(7, timeout=soon), _subscription(8, timeout=later)
        if host.name == "wasmer":
            with pytest.raises(memslot.Unsupported, match="not implemented for clocks"):
                _poll(instance, one)
            return
        assert _poll(instance, one) == (0, [(7, 0, 0)])
        assert _poll(instance, other, one) == (0, [(7, 0, 0)])
        assert _poll(instance, one, one) == (0, [(7, 0, 0), (7, 0, 0)])
        assert instance.memory.read(64, 48) == one
        for clock in (0, 1):
            assert instance.call("now", clock, 0, 512) == 0
            now = int.from_bytes(instance.memory.read(512, 8), "little")
            past = _subscription(9, of=clock, timeout=1, absolute=True)
            future = _subscription(9, of=clock, timeout=now + soon, absolute=True)
            assert _poll(instance, past) == (0, [(9, 0, 0)])
            assert _poll(instance, future, other) == (0, [(9, 0, 0)])
            assert instance.memory.read(64, 48) == future
        assert _poll(instance, other, _subscription(5, tag=2, of=1)) == (0, [(5, 0, 2)])
        assert _poll(instance, _subscription(5, tag=1, of=0), other) == (0, [(5, 0, 1)])
        for wrong in (_subscription(tag=3), _subscription(of=2, timeout=later)):
            assert _poll(instance, wrong)[0] == _poll(instance, other, wrong)[0] == 28
        assert _poll(instance)[0] == 28
        assert _poll(instance, _subscription(tag=1, of=9), other)[0] == 8
        instance.memory.write(64, one)
        for bad in (
            (65, 1024, 1, 4096),
            (64, 1025, 1, 4096),
            (64, 65528, 1, 4096),
            (65504, 8, 1, 0),
        ):
            with pytest.raises(memslot.GuestTrap, match=r"not aligned|out of bounds"):
                instance.call("poll", *bad)


@pytest.fixture
def ticking(no_leaks: None) -> Iterator[Host]:
    """Open a host whose guests have a deadline of a few milliseconds."""

    def configure(config: Any) -> None:
        config.epoch_interruption = config.shared_memory = True

    with memslot.open_host(
        "wasmtime",
        slots=4,
        configure=configure,
        configure_store=lambda store: store.set_epoch_deadline(2),
    ) as opened:
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(0.01):
                opened.increment_epoch()

        thread = threading.Thread(target=tick)
        thread.start()
        try:
            yield opened
        finally:
            stop.set()
            thread.join()


_MEMORIES = {
    "leased": '(memory (export "memory") 1)',
    "of-64-bit": '(memory (export "memory") i64 1)',
    "of-the-runtime": '(memory (export "memory") 1) (memory 1 2 shared)',
    "shared": '(memory (export "memory") 1 2 shared)',
}


@pytest.mark.skipif(missing("wasmtime") is not None, reason="wasmtime is missing")
@pytest.mark.parametrize("memory", _MEMORIES)
def test_deadline_ends_a_guest_that_waits(ticking: Host, memory: str) -> None:
    guest = ticking.prepare(_poll_text(_MEMORIES[memory]))
    with guest.instantiate() as instance:
        for _ in range(2):
            for kind in (_subscription(timeout=_HOUR), _subscription(of=0, timeout=2**64 - 1)):
                with pytest.raises(memslot.GuestTrap, match="interrupt"):
                    _poll(instance, kind, kind)
                instance.reset()
    with guest.lease() as instance, pytest.raises(memslot.GuestTrap, match="interrupt"):
        _poll(instance, _subscription(timeout=_HOUR))


@pytest.mark.skipif(missing("wasmtime") is not None, reason="wasmtime is missing")
def test_deadline_ends_a_guest_that_waits_in_a_store_of_the_embedder(ticking: Any) -> None:
    store = wasmtime.Store(ticking.engine)
    guest = ticking.prepare(_POLL)
    for _ in range(2):
        store.set_epoch_deadline(2)
        instance = guest.instantiate(store=store)
        with pytest.raises(memslot.GuestTrap, match="interrupt"):
            _poll(instance, _subscription(timeout=_HOUR))
        instance.close()
    store.close()


@pytest.mark.skipif(missing("wasmtime") is not None, reason="wasmtime is missing")
def test_guest_that_waits_burns_no_fuel() -> None:
    left: list[int] = []
    with memslot.open_host(
        "wasmtime",
        slots=2,
        configure=lambda config: setattr(config, "consume_fuel", True),
        configure_store=lambda store: store.set_fuel(100_000),
    ) as host:
        for timeout in (0, 30 * _MILLISECOND):
            with host.prepare(_POLL).instantiate() as instance:
                assert _poll(instance, _subscription(timeout=timeout))[0] == 0
                left.append(instance.native.store.get_fuel())
    assert left[0] == left[1]


def test_path_that_is_no_file_and_no_folder_is_not_opened(host: Host, tmp_path: Path) -> None:
    _filled(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "to-note").symlink_to("note")
    guest = host.prepare(_text(), wasi=Wasi(preopened={"/data": tmp_path}))
    with guest.instantiate() as instance:
        calls = Calls(instance)
        around = bytes(range(256)) * 33
        for place in (0, 8, 63, 64, 100, 4160, 65536 - 9):
            instance.memory.write(0, around)
            assert calls.open("fifo", at=place) == 58
            kept = bytearray(around)
            kept[place : place + 4] = b"fifo"[: max(0, len(kept) - place)]
            assert instance.memory.read(0, len(around)) == bytes(kept)
        assert calls.open("to-fifo") == (58 if host.name == "wasmtime" else 32)
        assert calls.open("./" * 3000 + "fifo", at=0) == 37
        assert calls.open("note") == calls.open("empty", flags=2) == 0
        assert calls.open("nothing") == 44
        calls.open("to-note")


@every_fork
def test_wasi_call_after_a_fork_answers_or_refuses_instead_of_waiting_for_ever(
    host: Host, fork: Fork, tmp_path: Path
) -> None:
    captured = host.prepare(_text(), wasi=Wasi(stdout="capture"))
    reader = host.prepare(_text(), wasi=Wasi(preopened={"/": _filled(tmp_path)}))

    def write() -> None:
        with captured.lease() as instance:
            assert not instance.call("fd_write", 1, *Calls(instance).vector(b"said"), _RESULT)
            assert instance.stdout == b"said"

    def read() -> None:
        with reader.instantiate() as instance:
            assert Calls(instance).open("note") == 0

    def check() -> None:
        with captured.instantiate(wasi=Wasi()) as instance:
            assert not instance.call("fd_write", 1, *Calls(instance).vector(b"dropped"), _RESULT)
        for use in write, write, read:  # the first lease gets the instance that waited
            if host.name == "wasmer":
                use()
                continue
            with pytest.raises(memslot.Unsupported, match="fork before that"):
                use()

    write()
    read()
    in_child(check, fork)
    captured.close()
