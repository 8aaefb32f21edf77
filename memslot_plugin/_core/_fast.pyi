# The compiled module of region.c and function.c.
from collections.abc import Callable
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

class Export:
    def __init__(
        self,
        name: bytes,
        parameters: bytes,
        results: bytes,
        fitted: Callable[[tuple[Any, ...]], list[Any]],
        /,
    ) -> None: ...
    def bind(self, live: Any, /) -> Callable[..., Any]: ...

def read(cell: int, generation: int, address: int, length: int, /) -> bytes | int: ...
def install(*addresses_and_objects: Any) -> None: ...
