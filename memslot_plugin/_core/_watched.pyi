# The compiled module of watched.c.
from collections.abc import Callable, Mapping
from typing import Any

from memslot_hooks.types import ResetResult

class Watched:
    state: Any
    watcher: Any
    address: int
    def reset(self, strategy: Callable[[Any], ResetResult], /) -> ResetResult: ...

def install(
    address: int,
    dirty: object,
    clean: object,
    unknown: object,
    results: Mapping[int, ResetResult],
    /,
) -> None: ...
