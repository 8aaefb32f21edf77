"""Files of guests with any contents and right digests: each is refused or loaded, and leaves nothing."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.files.container import Stored
from memslot_plugin.memory.image import MAX_EXTENTS
from memslot_plugin.tests.profiles import examples
from memslot_plugin.tests.saved import (
    ABOUT,
    EMPTIED,
    MODULE,
    ORIGIN,
    STARTS,
    content,
    opened,
    read_bytes,
    with_metadata,
    with_right_digest,
    write,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def host() -> Iterator[memslot.FakeHost]:
    with opened() as host:
        yield host


WRONG: list[dict[str, Any]] = [{"name": 7}, {"snapshot": 1}, {"reseed": []}, {"origin": 7}]
WRONG += [{"origin": {}}, *({"origin": {**ORIGIN, name: [[]]}} for name in ORIGIN)]
WRONG = [{}, *({**ABOUT, **each} for each in WRONG)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": {1: [Stored(0, P, 0, 0)]}}, "contents for memory 1, which is not the module's"),
        ({"module": MODULE}, "contents for memory 0, and data of its own in the module"),
        ({"images": {0: [Stored(48 * P, P, 0, 0)]}}, "end at byte .*, and it starts with 196608"),
        (
            {"images": {0: [Stored(0, P, 1, 0)]}, "pieces": []},
            "in file 1, which did not come with it",
        ),
        (
            {
                "images": {0: [Stored(2 * n * P, P, 0, n * P) for n in range(MAX_EXTENTS + 1)]},
                "pieces": [memoryview(bytes((MAX_EXTENTS + 1) * P))],
            },
            f"has {MAX_EXTENTS + 1} extents for memory 0",
        ),
        ({"module": STARTS}, "claims to be a snapshot, and its module has a start function"),
        *(({"about": about}, "makes no sense") for about in WRONG),
    ],
)
def test_contents_that_fit_no_module_are_refused_although_the_digest_is_right(
    host: memslot.FakeHost, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with host.load(write(tmp_path / "good")) as good:
        assert content(good)[:P] == b"x" * P
        with pytest.raises(memslot.InvalidContainer, match=said):
            host.load(write(tmp_path / "bad", **change))
        assert host.statistics().guests == 1


def test_contents_for_a_module_that_no_slot_serves_are_refused(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    shared = EMPTIED.replace(b"\x01\x01\x03\x09", b"\x01\x03\x03\x09")
    with pytest.raises(memslot.Unsupported, match=r"Memory 0 is shared"):
        host.load(write(tmp_path / "bad", module=shared))
    with pytest.raises(memslot.InvalidModule):
        host.load(write(tmp_path / "bad", module=b"no module"))


def test_verdict_of_a_loaded_guest_is_judged_anew(host: memslot.FakeHost, tmp_path: Path) -> None:
    # (module (table 1 funcref) (memory 3 9) (func (table.set (i32.const 0) (ref.null func))))
    module = (
        b"\0asm\1\0\0\0\x01\x04\x01\x60\x00\x00\x03\x02\x01\x00\x04\x04\x01\x70\x00\x01\x05\x04\x01\x01\x03\x09"
        b"\x0a\x0a\x01\x08\x00\x41\x00\xd0\x70\x26\x00\x0b"
    )
    guest = host.load(write(tmp_path / "guest", module=module))
    assert not guest.report.verdict.in_place
    assert not guest.in_place


def mangled(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one part changed to an unexpected one."""
    odd: list[Any] = [None, -1, 2**70, 1.5, "x", [], {}, True, 7, P, 1 << 61, [[[]]], {"a": 1}]
    if rng.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(odd)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {each: value[each] for each in value if each != key}
        return {**value, key: mangled(rng, value[key])}
    place = rng.randrange(len(value))
    return [mangled(rng, each) if place == number else each for number, each in enumerate(value)]


def hostile(rng: random.Random) -> bytes:
    """Return a file with a right digest and any contents."""
    images = [[0, [[0, P, 0, 0], [2 * P, P, 0, P], [5 * P, P, rng.randrange(2), 2 * P]]]]
    good: Any = {"about": ABOUT, "module": len(EMPTIED), "code": [["k", 3]], "images": images}
    changes = rng.randrange(4)
    for _ in range(changes):
        good = mangled(rng, good)
    text = json.dumps(good).encode()
    data = bytearray(with_metadata(text, EMPTIED + b"abc", bytes(3 * P)))
    for _ in range(rng.randrange(4 - changes)):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return with_right_digest(bytes(data))


@hypothesis_settings(max_examples=examples(50))
@given(seed=st.integers(0, 2**32))
def test_hostile_file_is_loaded_or_refused_and_leaves_nothing(seed: int) -> None:
    rng = random.Random(seed)
    data = hostile(rng)
    with suppress(memslot.InvalidContainer):
        found = read_bytes(data, keep=True)
        assert found.extents is not None
        for each in (each for image in found.images.values() for each in image):
            assert each.file or each.file_offset + each.length <= len(found.extents)
    with (
        tempfile.NamedTemporaryFile(buffering=0) as file,
        opened(rng.choice(["memfd", "anonymous"])) as host,
    ):
        file.write(data)
        try:
            guest = host.load(file.name, share_file=rng.choice(["on", "off", "auto"]))
        except memslot.MemslotError:
            assert host.statistics().guests == 0
        else:
            content(guest)
