# The compiled module of watched.c.
from collections.abc import Callable, Mapping
from typing import Any

from memslot_hooks.types import ResetResult

class Watched:
    state: Any
    watcher: Any
    address: int
    def reset(self, strategy: Callable[[Any], ResetResult], /) -> ResetResult: ...

def read(cell: int, generation: int, address: int, length: int, /) -> bytes | int: ...
def install(
    reset: int,
    copy: int,
    dirty: object,
    clean: object,
    unknown: object,
    results: Mapping[int, ResetResult],
    /,
) -> None: ...
