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

def read(cell: int, generation: int, address: int, length: int, /) -> bytes | int: ...
def install(
    reset_fast: int, copy: int, dirty: object, clean: object, result_type: type, /
) -> None: ...
