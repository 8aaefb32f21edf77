# The compiled module of region.c.
from typing import Any

class Region:
    state: Any
    strategy: Any
    base: int
    accessible: int
    initial: int
    @property
    def address(self) -> int: ...
    @property
    def fast_resets(self) -> int: ...
    def reset(self, strategy: Any, /) -> Any: ...
    def reset_in_lease(self, strategy: Any, /) -> None: ...

class InstanceReset:
    def __init__(
        self, cell: int, saved: int, count: int, resets: tuple[Any, ...], keep: object, /
    ) -> None: ...
    def run(self, generation: int, next_generation: int, key: int, /) -> int: ...

def read(cell: int, generation: int, address: int, length: int, /) -> bytes | int: ...
def install(
    reset_fast: int,
    copy: int,
    acquire: int,
    release: int,
    restore: int,
    dirty: object,
    clean: object,
    result_type: type,
    /,
) -> None: ...
