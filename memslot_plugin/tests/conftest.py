"""Fixtures of the unit tests: counted system calls, leak checks, slots, images and pools."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memslot_plugin import BytesImage, Image, MemfdImage, Pool, Slot, _core, probe
from memslot_plugin._core import PAGE_SIZE, ffi, lib
from memslot_plugin.memory.reset import choose, madvise
from memslot_plugin.tests import hosts, profiles
from memslot_plugin.tests.leaks import Footprint
from memslot_plugin.tests.slots import EVERY_RESET, RESERVED, counted, sparse

profiles.load()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Return hexadecimal digits for bytes, the keys of a dictionary, and the items of a tuple of numbers."""
    if isinstance(val, bytes):
        return val.hex()[:32] or "no bytes"
    if isinstance(val, dict):
        return ",".join(map(str, val)) or "nothing"
    if isinstance(val, tuple) and all(isinstance(each, (int, str)) for each in val):
        return ",".join(map(str, val)) or "nothing"
    return None  # pytest's own


@pytest.fixture(scope="session", autouse=True)
def _probed() -> None:
    """Probe before any test: the process keeps the probe's descriptor, which would count as a leak."""
    probe()
    gc.collect()
    gc.freeze()  # imported modules stay: later collections visit objects of tests only


@pytest.fixture
def resources() -> Callable[[], Footprint]:
    """Return a function that measures the kernel's objects of this process."""
    return Footprint.now


@pytest.fixture(scope="module")
def wasi_runtime(_probed: None) -> None:
    """Start wasmtime's threads for WASI before the test: they would count as a leak."""
    hosts.start_wasi()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail unless the test gives back every descriptor, image mapping and reservation."""
    before = Footprint.now()
    yield
    assert Footprint.now().lost_since(before) == []


@pytest.fixture
def calls() -> Any:
    """Return `counted`, for `with calls() as made:`."""
    return counted


@pytest.fixture
def inject() -> Iterator[Callable[..., None]]:
    """Return `_core.inject`, and disarm it when the test ends."""
    yield _core.inject
    for call in _core.CALLS:
        _core.inject(call, error=0)


@pytest.fixture
def child() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python source in a child, which has to end well and without a warning."""

    def run(source: str, *prefix: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-W", "error", "-c", source]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, **options
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(params=[MemfdImage, BytesImage], ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def make_image(kind: Any) -> Iterator[Callable[..., Image]]:
    """Return a function that makes an image of (page, bytes) runs."""
    made: list[Image] = []

    def make(*runs: tuple[int, bytes], pages: int = 64) -> Image:
        content = sparse(pages * PAGE_SIZE, *((page * PAGE_SIZE, data) for page, data in runs))
        made.append(kind(f"image {len(made)}", content))
        return made[-1]

    yield make
    for image in made:
        image.close()


@pytest.fixture(params=EVERY_RESET)
def reset(request: pytest.FixtureRequest) -> Any:
    return choose(request.param, 8 * PAGE_SIZE)


@pytest.fixture
def reservation() -> Iterator[int]:
    """Reserve three ranges of RESERVED bytes, as a pool does, and return the address of the middle one."""
    base = ffi.new("uintptr_t *")
    _core.check(lib.ms_reserve(3 * RESERVED, base), "reserving")
    yield base[0] + RESERVED
    _core.check(lib.ms_unmap(base[0], 3 * RESERVED), "unmapping")


@pytest.fixture
def slot(reservation: int) -> Iterator[Slot]:
    """A slot inside a larger reservation."""
    made = Slot(reservation, RESERVED)
    yield made
    made.destroy()


@pytest.fixture
def make_pool() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(slots: int = 4, **changes: Any) -> Pool:
        options: dict[str, Any] = {"reserved": 2 * RESERVED, "guard": PAGE_SIZE, "reset": madvise}
        made.append(Pool(slots=slots, **{**options, **changes}))
        return made[-1]

    yield make
    for pool in made:
        pool.check()
        pool.close()


@pytest.fixture
def image(kind: Any) -> Iterator[Image]:
    with kind("guest", b"x" * 2 * PAGE_SIZE) as made:
        yield made
