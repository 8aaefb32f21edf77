"""WASI that a hostile guest calls: folders that it may only read, and waits that a deadline ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import Folder, Host, Instance, Wasi
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import in_use

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
    """A guest that exports what it imports from WASI: the bytes in its memory are the test's to write."""
    imports, functions = [], []
    for name, signature in _SIGNATURES.items():
        kinds = ["i64" if kind == "I" else "i32" for kind in signature]
        type_ = f"(param {' '.join(kinds)}) (result i32)"
        imports.append(f'(import "wasi_snapshot_preview1" "{name}" (func ${name} {type_}))')
        given = " ".join(f"(local.get {place})" for place in range(len(kinds)))
        functions.append(f'(func (export "{name}") {type_} (call ${name} {given}))')
    return f'(module {" ".join(imports)} (memory (export "memory") {memory}) {" ".join(functions)})'


_PATH, _OTHER, _VECTOR, _RESULT = 1024, 1200, 512, 2048
_READ, _WRITE = 1 << 1, 1 << 6
_CREATE, _TRUNCATE = 1, 8


@pytest.fixture(scope="module", autouse=True)
def _wasi_runtime(_probed: None) -> None:
    hosts.start_wasi()


@pytest.fixture(params=hosts.RUNTIMES)
def host(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Host]:
    with hosts.serving(request.param, slots=4) as opened:
        yield opened


class Calls:
    """A guest's calls of WASI on paths in its first folder."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.folder = 3 if instance.guest.host.name == "wasmtime" else 4

    def path(self, text: str, at: int = _PATH) -> tuple[int, int]:
        self.instance.memory.write(at, text.encode())
        return at, len(text.encode())

    def open(self, path: str, *, flags: int = 0, rights: int = _READ, follow: int = 1) -> int:
        """The errno of path_open; `descriptor` is then what it gave."""
        place = self.path(path)
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
        """The errno of every way to change the folder, or the file that was opened in it."""
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
    """All that a guest could change, but the times of access."""
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
    if host.name == "wasmer":
        with pytest.raises(memslot.Unsupported, match="which wasmer cannot keep apart"):
            guest.instantiate()
        assert in_use(host) == 0
        return
    with guest.instantiate() as instance:
        calls = Calls(instance)
        assert calls.open("note", flags=_CREATE, rights=_WRITE) != 0
        calls.folder = 4
        assert calls.open("note", flags=_CREATE, rights=_WRITE) == 0
        assert calls.open("../read/note", flags=_CREATE, rights=_WRITE) != 0
    assert not list((tmp_path / "read").iterdir())
