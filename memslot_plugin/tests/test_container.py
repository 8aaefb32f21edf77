"""Containers: read as written, refused by name if damaged, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import struct
import tempfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import align_up
from memslot_plugin.errors import (
    ArgumentError,
    InvalidContainer,
    MemoryTooLarge,
    SystemCallError,
)
from memslot_plugin.files import container
from memslot_plugin.files.container import MOST_METADATA, About, Container, Contents, Stored
from memslot_plugin.tests.profiles import FACTOR, LONG, examples
from memslot_plugin.tests.saved import (
    ABOUT,
    memfd,
    read_bytes,
    with_metadata,
    with_right_digest,
)

KEY = b"k" * 32
pytestmark = pytest.mark.usefixtures("no_leaks")


def contents(**changes: Any) -> Contents:
    values: dict[str, Any] = {
        "about": msgspec.convert({**ABOUT, "name": "tüy"}, About),
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


# Reading


def test_header_of_a_written_file_is_as_documented(written: Path) -> None:
    data = written.read_bytes()
    assert data[:8] == b"\x93memslot"
    *numbers, metadata_size = struct.unpack_from("<IIQQQQ", data, 8)
    assert numbers == [1, 0, P, len(data), len(data) - 3 * P]
    assert data == with_right_digest(data)
    assert json.loads(data[80 : 80 + metadata_size])["about"]["name"] == "tüy"
    assert data[80 + metadata_size :].startswith(b"\0asm")


@hypothesis_settings(max_examples=examples(15))
@given(
    module=st.binary(max_size=3 * P),
    code=st.dictionaries(st.text("aü\0€", max_size=9), st.binary(max_size=P), max_size=3),
    pages=st.lists(st.integers(1, 4), max_size=5),
    keep=st.booleans(),
    key=st.sampled_from([None, KEY]),
)
def test_contents_of_any_shape_are_read_as_written(
    module: bytes, code: dict[str, bytes], pages: list[int], keep: bool, key: bytes | None
) -> None:
    images: dict[int, list[Stored]] = {0: [], 3: [], 4: [Stored(P, P, 2, 7 * P)]}
    data = bytearray()
    for number, count in enumerate(pages):
        images[0].append(Stored(number * 10 * P, count * P, 0, len(data)))
        data += bytes([number + 1]) * count * P
    wanted = contents(module=module, code=code, images=images, pieces=[memoryview(data)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "toy")
        size = container.write(path, wanted, key=key)
        found = read(path, keep=keep, key=key)
        written = path.read_bytes()
    assert (found.about, found.module, found.code) == (wanted.about, module, code)
    assert found.images == {index: tuple(each) for index, each in images.items()}
    assert found.byte_size == size == len(written)
    assert written[12] == bool(key)
    assert found.extents_at % P == 0
    assert written[found.extents_at :] == data
    assert found.extents == (data if keep else None)


# Refusals


def test_file_of_each_wrong_kind_is_refused_with_its_own_sentence(
    written: Path, tmp_path: Path
) -> None:
    good = written.read_bytes()
    for data, said in (
        (b"", "is no saved guest"),
        (b"MZ", "is no saved guest: it does not begin as one"),
        (b"\0asm\1\0\0\0", "is a module and no saved guest; prepare it"),
        (good[:5], "is cut off: it ends within its first 80 bytes"),
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
            read_bytes(data)
        assert said in str(raised.value)
        assert isinstance(raised.value, ValueError)
    with pytest.raises(InvalidContainer, match="is no file"):
        read(tmp_path)


def test_file_with_a_key_is_read_with_that_key_alone(tmp_path: Path) -> None:
    plain, keyed = tmp_path / "plain", tmp_path / "keyed"
    container.write(plain, contents())
    container.write(keyed, contents(), key=KEY)
    with pytest.raises(InvalidContainer, match="was saved with a key"):
        read(keyed)
    with pytest.raises(InvalidContainer, match="saved without a key, so that anybody may have"):
        read(plain, key=KEY)
    with pytest.raises(InvalidContainer, match="or was saved with another key"):
        read(keyed, key=b"x" * 32)
    # Without the key, nothing can be changed, nor the flag that there is one.
    data = keyed.read_bytes()
    for forged, said in (
        (data[:-1] + b"\1", "digest is wrong"),
        (data[:12] + b"\0" + data[13:], "saved without a key"),
    ):
        with pytest.raises(InvalidContainer, match=said):
            read_bytes(with_right_digest(forged), key=KEY)


@pytest.mark.scales
def test_file_with_any_byte_or_length_changed_is_refused() -> None:
    """Change a sample of the bytes in T0, each byte in T1, each bit in T2."""
    rng = random.Random(3)
    piece = {"images": {0: [Stored(0, P, 0, 0)]}, "pieces": [memoryview(b"a" * P)]}
    with memfd() as fd:
        size = container.write_to(fd, contents(code={"one runtime": b"c" * 50}, **piece))
        good = os.pread(fd, size, 0)
        places = range(size) if FACTOR > 1 else [*range(130), *rng.sample(range(size), 250)]
        for at in places:
            for bit in range(8) if LONG else [rng.randrange(8)]:
                os.pwrite(fd, bytes([good[at] ^ 1 << bit]), at)
                with pytest.raises(InvalidContainer):
                    container.read(fd, "it", keep=True)
            os.pwrite(fd, good[at : at + 1], at)
        assert container.read(fd, "it").about == contents().about
        for length in sorted(places, reverse=True):
            os.ftruncate(fd, length)
            with pytest.raises(InvalidContainer):
                container.read(fd, "it")


NO_OBJECTS = [b"[" * 100_000, b"1" * 10_000, b'{"about":', b"\xff", b"null", b"[]", b'"x"']


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": P}, "its module and code do not fit its head"),
        ({"code": [["k", 1 << 61]]}, "its module and code do not fit its head"),
        ({"images": [[0, [[0, P, 0, P]]]]}, f"an extent at {P}, {P} bytes, ends behind the file"),
        ({"images": [[0, [[0, 1 << 60, 0, 0]]]]}, "an extent at 0, .* bytes, ends behind the file"),
        (
            {"images": [[0, [[0, P, 0, 0]]], [1, [[0, P, 0, 0]]]]},
            "two extents share the bytes at 0",
        ),
        ({"images": [[0, [[0, P, 7, 0], [P, P, 7, 0]]]]}, "two extents share .* of file 7"),
        ({"images": []}, f"{P} bytes at its end belong to no memory"),
        ({"images": [[0, [[1, P, 0, 0]]]]}, "an extent of memory 0 is at 1"),
        ({"images": [[0, [[0, 0, 0, 0]]]]}, "an extent of memory 0 is at 0, 0 bytes"),
        ({"images": [[0, [[P, P, 0, 0], [0, P, 0, 0]]]]}, "an extent of memory 0 is at 0"),
        ({"images": [[0, [[0, P, 0, 7]]]]}, "an extent of memory 0 is at 0"),
        ({"about": []}, r"its metadata is wrong: Expected `object`, got `array` - at `\$.about`"),
        ({"module": -1}, r"its metadata is wrong: Expected `int` >= 0 - at `\$.module`"),
        ({"code": [["k", 1 << 62]]}, "its metadata is wrong: Expected `int` <= "),
        *((text, "its metadata is wrong: ") for text in NO_OBJECTS),
    ],
)
def test_metadata_that_cannot_be_true_is_refused_although_the_digest_is_right(
    change: dict[str, Any] | bytes, said: str
) -> None:
    good = {"about": ABOUT, "module": 0, "code": [], "images": [[0, [[0, P, 0, 0]]]]}
    assert read_bytes(with_metadata(json.dumps(good).encode(), extents=bytes(P))).about.name == "x"
    text = change if isinstance(change, bytes) else json.dumps({**good, **change}).encode()
    with pytest.raises(InvalidContainer, match=f"makes no sense: {said}"):
        read_bytes(with_metadata(text, extents=bytes(P)))


def test_metadata_of_other_releases_is_read() -> None:
    """Earlier releases escaped other characters than ASCII. Later ones may add unknown fields."""
    about = {**ABOUT, "name": "tüy \0", "later": [[{}]]}
    text = json.dumps({"more": 1, "about": about, "module": 0, "code": [["ü", 0]], "images": []})
    found = read_bytes(with_metadata(text.encode()))
    assert (found.about.name, found.code) == ("tüy \0", {"ü": b""})


def test_metadata_over_the_limit_is_refused_before_it_is_decoded() -> None:
    error, peak = measured(with_metadata(b" " * (MOST_METADATA + 1)), 0)
    assert "1048577 bytes of metadata, and 1048576 are allowed" in str(error)
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "item", ['["",0],', "[0,[]],", '"",', "[0,[[0,1,0,4611686018427387903]]],", "[0,["]
)
def test_hostile_metadata_when_read_takes_at_most_16_times_its_bytes(item: str) -> None:
    for place in ("code", "images"):
        values = {"about": ABOUT, "module": 0, "code": [], "images": []}
        text = json.dumps(values).replace(f'"{place}": []', f'"{place}": [{item * 20_000}0]')
        assert len(text) > 50_000
        data = with_metadata(text.encode())
        error, peak = measured(data, len(data))
        assert "its metadata is wrong" in str(error)
        assert peak < 16 * len(data)


def measured(data: bytes, byte_size: int, **options: Any) -> tuple[Any, int]:
    """Read these bytes and then holes; return the error and the peak of memory in bytes."""
    tracemalloc.start()
    try:
        with memfd(data) as fd:
            os.ftruncate(fd, max(len(data), byte_size))
            with pytest.raises(memslot.MemslotError) as raised:
                container.read(fd, "it", **options)
        return raised.value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("claimed", [3 << 30, 1 << 46])
def test_file_of_holes_is_refused_by_the_bytes_that_are_there(
    written: Path, keep: bool, head: bool, claimed: int
) -> None:
    data = written.read_bytes()
    data = data[:24] + struct.pack("<QQ", claimed, claimed if head else 2 * P) + data[40:]
    error, peak = measured(data, claimed, keep=keep)
    assert isinstance(error, InvalidContainer)
    assert f"claims {claimed} bytes, and {align_up(len(data))} of them are there" in str(error)
    assert peak < 1 << 20


def test_image_over_the_limit_is_refused_before_its_bytes_are_read(written: Path) -> None:
    assert read(written, image_limit=7 * P).extents is None
    data = written.read_bytes()
    error, _ = measured(data, len(data), image_limit=7 * P - 1)
    assert isinstance(error, MemoryTooLarge)
    assert f"the image of memory 0 spans {7 * P} bytes and the limit is {7 * P - 1}" in str(error)
    # The digest is wrong too, and is not computed.
    data = written.read_bytes()[:-1] + b"x"
    assert isinstance(measured(data, len(data), image_limit=P)[0], MemoryTooLarge)


@pytest.mark.parametrize(("hole", "refused"), [(0, False), (2, False), (20, True)])
def test_file_with_holes_in_less_than_half_of_it_is_read(
    written: Path, hole: int, refused: bool
) -> None:
    image = {"images": {0: [Stored(0, 20 * P, 0, 0)]}}
    container.write(written, contents(**image, pieces=[memoryview(bytes(20 * P))]))
    data = written.read_bytes()
    with memfd(data[: len(data) - hole * P]) as fd:
        os.ftruncate(fd, len(data))
        with pytest.raises(InvalidContainer, match="holes") if refused else nullcontext():
            container.read(fd, "it")


def test_file_that_becomes_shorter_while_it_is_read_is_refused(
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


@pytest.mark.parametrize("linked", [False, True])
def test_file_that_exists_is_replaced_at_once_and_is_read_only(written: Path, linked: bool) -> None:
    path = written
    if linked:
        path = written.with_name("link")
        path.symlink_to(written.name)
    old = os.open(written, os.O_RDONLY)
    container.write(path, contents(module=b"another"))
    assert path.is_symlink() == linked
    assert read(written).module == b"another"
    assert container.read(old, "the old one").module == contents().module
    os.close(old)
    assert not written.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    assert names(written.parent) == sorted({written.name, path.name})


def test_path_at_which_no_file_can_be_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, expected, said in (
        ("pipe", ArgumentError, "pipe is there and is no file"),
        ("folder", ArgumentError, "folder is there and is no file"),
        ("missing/guest", SystemCallError, r"writing .*missing/guest .*: No such file"),
    ):
        with pytest.raises(expected, match=said):
            container.write(tmp_path / name, contents())
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize(
    ("call", "skip", "failure"),
    [
        ("open", 0, OSError(errno.EIO, "bad")),
        ("write", 0, OSError(errno.ENOSPC, "full")),
        ("write", 2, KeyboardInterrupt()),
        ("fsync", 0, OSError(errno.ENOSPC, "full")),
        ("close", 0, OSError(errno.EIO, "bad")),
        ("rename", 0, OSError(errno.EIO, "bad")),
        ("rename", 0, MemoryError()),
    ],
)
def test_call_that_fails_leaves_the_old_file_and_nothing_else(
    written: Path, monkeypatch: pytest.MonkeyPatch, call: str, skip: int, failure: BaseException
) -> None:
    before = written.read_bytes()
    owner: Any = Path if call == "rename" else os
    real, left = getattr(owner, call), [skip]

    def failing(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] != -1:
            return real(*arguments, **options)
        if call == "close":
            real(*arguments)
        raise failure

    monkeypatch.setattr(owner, call, failing)
    expected = SystemCallError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as raised:
        container.write(written, contents(module=b"new"))
    monkeypatch.undo()
    if isinstance(failure, OSError):
        assert str(written) in str(raised.value)
        assert raised.value.errno == failure.errno  # type: ignore[attr-defined]
    assert written.read_bytes() == before
    assert names(written.parent) == [written.name]


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL])
def test_folder_that_cannot_be_synchronised_is_an_error_unless_the_file_system_never_does(
    written: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    real = os.fsync

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, "not here")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SystemCallError) if error == errno.EIO else nullcontext():
        container.write(written, contents(module=b"new"))
    assert read(written).module == b"new"
    assert names(written.parent) == [written.name]


def test_write_that_takes_less_than_it_was_given_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:777]))
    container.write(tmp_path / "guest", contents())
    monkeypatch.undo()
    assert read(tmp_path / "guest", keep=True).module == contents().module
