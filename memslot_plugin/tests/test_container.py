"""Containers: what is written comes back, anything else is refused by name, and a failed writing leaves no trace."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memslot_plugin import container
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.container import Container, Contents, Stored
from memslot_plugin.errors import ArgumentError, InvalidContainer, SystemCallError
from memslot_plugin.tests.profiles import EXPENSIVE, examples

KEY = b"k" * 32

pytestmark = pytest.mark.usefixtures("no_leaks")


def contents(**changes: Any) -> Contents:
    values: dict[str, Any] = {
        "about": {"name": "toy", "numbers": [1, None, 2**100], "text": "ü"},
        "source_sha256": hashlib.sha256(b"source").digest(),
        "module": b"\0asm\1\0\0\0 and more",
        "code": {"one runtime": b"c" * 5000, "another": b""},
        "images": {
            0: [Stored(0, P, 0, 0), Stored(5 * P, 2 * P, 0, P)],
            3: [],
            4: [Stored(P, P, 2, 7 * P)],
        },
        "pieces": [memoryview(b"a" * P), memoryview(b"b" * 2 * P)],
    }
    return Contents(**{**values, **changes})


def read(path: Path, **options: Any) -> Container:
    fd = os.open(path, os.O_RDONLY)
    try:
        return container.read(fd, path.name, **options)
    finally:
        os.close(fd)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "toy.memslot"
    assert container.write(path, contents()) == path.stat().st_size
    return path


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        path = tmp_path / "damaged"
        path.write_bytes(data)
        return path

    return make


def with_right_digest(data: bytes) -> bytes:
    """What somebody writes who means harm: the digest of whatever it is."""
    plain = data[:80] + bytes(32) + data[112:]
    return data[:80] + hashlib.sha256(plain).digest() + data[112:]


def with_metadata(metadata: bytes, extents: bytes = b"") -> bytes:
    used = 112 + len(metadata)
    head = -(-used // P) * P
    start = struct.pack(
        "<8sIIQQQQ32s", b"\x93memslot", 1, 0, P, head + len(extents), head, len(metadata), b""
    )
    return with_right_digest(start + bytes(32) + metadata + bytes(head - used) + extents)


# What is written comes back


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("key", [None, KEY])
def test_everything_comes_back(tmp_path: Path, keep: bool, key: bytes | None) -> None:
    path, given_ = tmp_path / "toy", contents()
    size = container.write(path, given_, key=key)
    found = read(path, keep=keep, key=key)
    assert found.about == given_.about
    assert (found.module, found.code) == (given_.module, given_.code)
    assert found.source_sha256 == given_.source_sha256
    assert found.images == {index: tuple(each) for index, each in given_.images.items()}
    assert (found.byte_size, found.keyed) == (size, key is not None)
    assert found.extents_at % P == 0
    data = path.read_bytes()
    assert data[found.extents_at :] == b"a" * P + b"b" * 2 * P
    assert found.extents == (data[found.extents_at :] if keep else None)


def test_the_header_is_what_the_documentation_says(written: Path) -> None:
    data = written.read_bytes()
    assert data[:8] == b"\x93memslot"
    numbers = struct.unpack_from("<IIQQQQ", data, 8)
    metadata_size = numbers[5]
    assert numbers[:5] == (1, 0, P, len(data), 3 * P if len(data) == 6 * P else numbers[4])
    assert data[48:80] == hashlib.sha256(b"source").digest()
    assert data[80:112] == hashlib.sha256(data[:80] + bytes(32) + data[112:]).digest()
    metadata = json.loads(data[112 : 112 + metadata_size])
    assert metadata["about"]["name"] == "toy"
    assert data[112 + metadata_size :].startswith(b"\0asm")


def test_a_container_in_an_unnamed_file_is_one_too(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        size = container.write_to(file.fileno(), contents())
        assert os.fstat(file.fileno()).st_size == size
        assert container.read(file.fileno(), "it").about == contents().about


@hypothesis_settings(max_examples=examples(15))
@given(
    module=st.binary(max_size=3 * P),
    code=st.dictionaries(st.text(max_size=9), st.binary(max_size=P), max_size=3),
    pages=st.lists(st.integers(1, 4), max_size=5),
)
def test_any_contents_come_back(module: bytes, code: dict[str, bytes], pages: list[int]) -> None:
    at, stored, pieces = 0, [], []
    for number, count in enumerate(pages):
        stored.append(Stored(number * 10 * P, count * P, 0, at))
        pieces.append(memoryview(bytes([number + 1]) * count * P))
        at += count * P
    fd = os.memfd_create("it")
    try:
        container.write_to(
            fd, contents(module=module, code=code, images={0: stored}, pieces=pieces)
        )
        found = container.read(fd, "it", keep=True)
    finally:
        os.close(fd)
    assert (found.module, found.code) == (module, code)
    assert found.extents is not None
    for each, piece in zip(found.images[0], pieces, strict=True):
        assert found.extents[each.file_offset : each.file_offset + each.length] == piece


# What is refused


def test_each_kind_of_wrong_file_has_its_own_sentence(
    written: Path, damaged: Callable[[bytes], Path], tmp_path: Path
) -> None:
    good = written.read_bytes()
    for data, said in (
        (b"", "is no saved guest"),
        (b"MZ", "is no saved guest: it does not begin as one"),
        (b"\0asm\1\0\0\0", "is a module and no saved guest; prepare it"),
        (good[:5], "is cut off: it ends within its first 112 bytes"),
        (good[:-1], f"is cut off: it has {len(good) - 1} bytes instead of {len(good)}"),
        (good + b"x", f"has something behind its end: it has {len(good) + 1} bytes"),
        (
            good[:8] + b"\7" + good[9:],
            "has version 7 of the format, and this memslot reads version 1",
        ),
        (good[:17] + b"\x40" + good[18:], f"a page has 16384 bytes, and here it has {P}"),
        (good[:12] + b"\2" + good[13:], "has a digest of the unknown kind 2"),
        (good[:32] + b"\1" + good[33:], "is damaged: its head has"),
        (good[:50] + b"\1" + good[51:], "its digest is wrong, so it is damaged"),
        (good[:-1] + b"\1", "its digest is wrong, so it is damaged"),
    ):
        with pytest.raises(InvalidContainer) as raised:
            read(damaged(data))
        assert said in str(raised.value), (said, str(raised.value))
        assert isinstance(raised.value, ValueError)
    with pytest.raises(InvalidContainer, match="is no file"):
        read(tmp_path)


def test_a_key_is_needed_where_there_is_one_and_proves_who_wrote(tmp_path: Path) -> None:
    plain, keyed = tmp_path / "plain", tmp_path / "keyed"
    container.write(plain, contents())
    container.write(keyed, contents(), key=KEY)
    with pytest.raises(InvalidContainer, match="was saved with a key"):
        read(keyed)
    with pytest.raises(InvalidContainer, match="saved without a key, so that anybody may have"):
        read(plain, key=KEY)
    with pytest.raises(InvalidContainer, match="or was saved with another key"):
        read(keyed, key=b"x" * 32)
    # Somebody without the key can neither change it nor say that it has none.
    data = bytearray(keyed.read_bytes())
    data[-1] ^= 1
    keyed.chmod(0o644)
    keyed.write_bytes(with_right_digest(bytes(data)))
    with pytest.raises(InvalidContainer, match="digest is wrong"):
        read(keyed, key=KEY)
    data[12] = 0
    keyed.write_bytes(with_right_digest(bytes(data)))
    with pytest.raises(InvalidContainer, match="saved without a key"):
        read(keyed, key=KEY)


def test_no_byte_can_be_another_one(written: Path) -> None:
    rng, good = random.Random(3), written.read_bytes()
    fd = os.memfd_create("it")
    try:
        os.write(fd, good)
        places = (
            range(len(good)) if EXPENSIVE else [*range(300), *rng.sample(range(len(good)), 500)]
        )
        for at in places:
            for bit in range(8) if EXPENSIVE else [rng.randrange(8)]:
                os.pwrite(fd, bytes([good[at] ^ 1 << bit]), at)
                with pytest.raises(InvalidContainer):
                    container.read(fd, "it", keep=True)
                os.pwrite(fd, good[at : at + 1], at)
        assert container.read(fd, "it").about == contents().about
    finally:
        os.close(fd)


def test_no_length_is_the_right_one_but_its_own(written: Path) -> None:
    rng, good = random.Random(4), written.read_bytes()
    fd = os.memfd_create("it")
    lengths = range(len(good)) if EXPENSIVE else [*range(130), *rng.sample(range(len(good)), 200)]
    try:
        os.write(fd, good)
        for length in sorted(lengths, reverse=True):
            os.ftruncate(fd, length)
            with pytest.raises(InvalidContainer):
                container.read(fd, "it")
    finally:
        os.close(fd)


def _mangled(rng: random.Random, value: Any) -> Any:
    """The value with one thing in it changed to something that nobody expects there."""
    odd: list[Any] = [None, -1, 2**70, 1.5, "x", [], {}, True, 7, P, 1 << 61, [[[]]], {"a": 1}]
    if rng.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(odd)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {each: value[each] for each in value if each != key}
        return {**value, key: _mangled(rng, value[key])}
    place = rng.randrange(len(value))
    return [_mangled(rng, each) if place == number else each for number, each in enumerate(value)]


@hypothesis_settings(max_examples=examples(200))
@given(seed=st.integers(0, 2**32))
def test_metadata_of_somebody_who_means_harm_is_read_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    good = {
        "about": {"name": "x"},
        "module": 9,
        "code": [["k", 3]],
        "images": [[0, [[0, P, 0, 0], [2 * P, P, 1, P]]]],
    }
    for _ in range(rng.randrange(1, 4)):
        good = _mangled(rng, good)
    text = json.dumps(good).encode()
    if rng.random() < 0.2:
        text = text[: rng.randrange(len(text) + 1)] + rng.randbytes(rng.randrange(4))
    fd = os.memfd_create("it")
    try:
        os.write(fd, with_metadata(text, bytes(3 * P)))
        try:
            found = container.read(fd, "it", keep=True)
        except InvalidContainer:
            return
        assert found.extents is not None
        for image in found.images.values():
            for each in image:
                assert each.file or each.file_offset + each.length <= len(found.extents)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"1" * 10_000, b'{"about":', b"\xff", b"null", b"[]", b'"x"']
)
def test_metadata_that_is_no_object_is_refused(text: bytes, damaged: Any) -> None:
    with pytest.raises(InvalidContainer, match="makes no sense: its metadata is not what belongs"):
        read(damaged(with_metadata(text)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": P}, "its module and code do not fit its head"),
        ({"code": [["k", 1 << 61]]}, "its module and code do not fit its head"),
        ({"images": [[0, [[0, P, 0, P]]]]}, "ends behind the file"),
        ({"images": [[0, [[0, 1 << 60, 0, 0]]]]}, "ends behind the file"),
        ({"images": [[0, [[1, P, 0, 0]]]]}, "an extent of memory 0 is at 1"),
        ({"images": [[0, [[0, 0, 0, 0]]]]}, "an extent of memory 0 is at 0, 0 bytes"),
        ({"images": [[0, [[P, P, 0, 0], [0, P, 0, 0]]]]}, "an extent of memory 0 is at 0"),
        ({"images": [[0, [[0, P, 0, 7]]]]}, "an extent of memory 0"),
        ({"about": []}, "what is written about it is no object"),
    ],
)
def test_what_cannot_be_is_refused_although_the_digest_is_right(
    change: dict[str, Any], said: str, damaged: Any
) -> None:
    good = {"about": {}, "module": 0, "code": [], "images": []}
    assert read(damaged(with_metadata(json.dumps(good).encode(), bytes(P)))).about == {}
    with pytest.raises(InvalidContainer, match=said):
        read(damaged(with_metadata(json.dumps({**good, **change}).encode(), bytes(P))))


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def shortening(fd: int, buffers: Any, offset: int) -> int:
        written.chmod(0o644)
        os.truncate(written, 200)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", shortening)
    with pytest.raises(InvalidContainer, match="it became shorter while it was read"):
        read(written)


# Writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_is_there_is_replaced_at_once_and_nobody_may_write_to_it(written: Path) -> None:
    old = os.open(written, os.O_RDONLY)
    before = os.fstat(old).st_ino
    container.write(written, contents(module=b"another"))
    assert read(written).module == b"another"
    assert container.read(old, "the old one").module == contents().module
    os.close(old)
    assert written.stat().st_ino != before
    assert not written.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    assert names(written.parent) == [written.name]


def test_what_a_link_points_to_is_replaced(written: Path) -> None:
    link = written.with_name("link")
    link.symlink_to(written.name)
    container.write(link, contents(module=b"another"))
    assert link.is_symlink()
    assert read(written).module == b"another"


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ArgumentError, match=f"{name} is there and is no file"):
            container.write(tmp_path / name, contents())
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize(
    ("call", "skip"),
    [("open", 0), ("write", 0), ("write", 2), ("fsync", 0), ("close", 0), ("rename", 0)],
)
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), KeyboardInterrupt(), MemoryError()],
    ids=lambda failure: str(getattr(failure, "errno", type(failure).__name__)),
)
def test_whatever_fails_the_old_file_stays_and_nothing_else_does(
    written: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: BaseException, skip: int
) -> None:
    before = written.read_bytes()
    owner: Any = Path if call == "rename" else os
    real, left = getattr(owner, call), [skip]

    def failing(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            left[0] -= 1
            if call == "close":
                real(*arguments)
            raise failure
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(owner, call, failing)
    expected = SystemCallError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as raised:
        container.write(written, contents(module=b"new"))
    monkeypatch.undo()
    if isinstance(raised.value, SystemCallError):
        assert str(written) in str(raised.value)
        assert raised.value.errno == failure.errno  # type: ignore[attr-defined]
        if failure.errno == errno.ENOSPC:  # type: ignore[attr-defined]
            assert "bytes left" in str(raised.value)
    assert written.read_bytes() == before
    assert names(written.parent) == [written.name]


def test_a_folder_that_cannot_be_synchronised_is_an_error_and_the_file_is_whole(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "bad")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SystemCallError):
        container.write(written, contents(module=b"new"))
    assert read(written).module == b"new"
    assert names(written.parent) == [written.name]


def test_a_file_system_that_synchronises_no_folders_is_none_the_worse(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not here")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    container.write(written, contents(module=b"new"))
    assert read(written).module == b"new"


def test_a_folder_that_is_missing_is_an_error_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "guest"
    with pytest.raises(
        SystemCallError, match=r"writing .*missing/guest .*: No such file"
    ) as raised:
        container.write(path, contents())
    assert raised.value.errno == errno.ENOENT


def test_a_limit_on_the_size_of_files_is_met_like_a_full_disk(child: Any, tmp_path: Path) -> None:
    child(
        f"""
import os, resource
from pathlib import Path
from memslot_plugin import container
from memslot_plugin.errors import SystemCallError
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
path = Path({str(tmp_path / "guest")!r})
try:
    container.write(path, container.Contents({{}}, bytes(32), b"m" * 9000, {{}}, {{}}, []))
except SystemCallError as error:
    assert "File too large" in str(error), error
else:
    raise AssertionError("written")
assert os.listdir(path.parent) == []
"""
    )


def test_writes_that_take_less_than_they_are_given_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:777]))
    container.write(tmp_path / "guest", contents())
    monkeypatch.undo()
    assert read(tmp_path / "guest", keep=True).module == contents().module


@pytest.fixture(autouse=True)
def _sensible_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)
