"""What a runtime holds for one instance, as the rest of the host sees it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from memslot_plugin.errors import ArgumentError, LinkError, shown
from memslot_plugin.hosts.wasi import Wasi

if TYPE_CHECKING:
    from memslot_hooks.types import LinearMemory

Imports = Mapping[str, Mapping[str, Any]]
"""Module name -> import name -> a Python callable, or an object of the runtime's own."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What an instance is connected to: imports, WASI, and a store of the embedder's own where the
    runtime has such.
    """

    imports: Imports
    wasi: Wasi | None = None
    store: Any = None

    def __post_init__(self) -> None:
        modules = self.imports
        if not isinstance(modules, Mapping):
            raise LinkError(
                f"imports are a mapping of modules to their imports, and not {shown(modules)}"
            )
        for module, given in modules.items():
            if not isinstance(given, Mapping):
                raise LinkError(
                    f"the imports of the module {module!r} are a mapping of names to objects, and not {shown(given)}"
                )
        if self.wasi is not None and not isinstance(self.wasi, Wasi):
            raise ArgumentError(f"wasi is a memslot.Wasi, and not {shown(self.wasi)}")


class Live(abc.ABC):
    """What a runtime holds for one instance: from `Host._start` to `dispose`.

    `memories` are the leased memories in the order of the guest's requests.
    """

    memories: tuple[LinearMemory, ...]
    running: int = 0
    """How many calls into it are on the stack now; an instance that runs cannot end."""
    given_away: bool = False
    """Whether the embedder was handed the runtime's own objects, and so may have changed anything."""
    ended: bool = False
    """Whether the host has ended it, and all of its memories are back."""

    @abc.abstractmethod
    def function(self, name: str) -> Callable[..., Any]:
        """The exported function, to be called with Python numbers; raises ExportNotFound, and WrongThread where
        the host is confined to its thread.
        """

    @abc.abstractmethod
    def exports(self) -> Mapping[str, str]:
        """Every export's kind ("func", "memory", "global", "table", "tag") by name."""

    @abc.abstractmethod
    def global_value(self, name: str) -> Any:
        """The value of an exported global; raises ExportNotFound."""

    @abc.abstractmethod
    def set_global(self, name: str, value: Any) -> None:
        """Set an exported mutable global; raises ExportNotFound, ArgumentError."""

    @abc.abstractmethod
    def locate(self, index: int) -> tuple[int, int]:
        """Address and accessible bytes of memory `index`; raises ExportNotFound if it cannot be
        reached.
        """

    @abc.abstractmethod
    def grow(self, index: int, pages: int) -> int:
        """Grow memory `index` as memory.grow does; raises GrowthRefused."""

    @abc.abstractmethod
    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        """What the guest wrote to a captured stream so far."""

    def can_restore(self) -> bool:
        """Whether nothing but memories, saved globals and what `restore` knows can have changed since
        the instance began.  Asked only of guests whose code and host allow a reset in place.
        """
        for memory in self.memories:
            if memory.byte_size != memory.request.minimum:
                return False
        return not self.given_away

    def hold(self) -> None:  # noqa: B027 - where nothing runs, nobody has to be kept out
        """Keep every call out until `restore` or `let_go`; raises InUse while one runs."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Give every saved global its initial value, renew what the instance has of WASI, and let go."""

    def wake(self) -> None:  # noqa: B027 - most have nothing that runs out
        """A lease begins, and the instance may have waited for long: renew what runs out."""

    def let_go(self) -> None:  # noqa: B027 - as above
        """Let calls in again without having restored anything."""

    @abc.abstractmethod
    def saved_values(self) -> dict[int, int | None]:
        """The bits that the plan's saved globals hold now, by index, as `wasm.encode_constant` takes
        them; raises SnapshotRefused for one that cannot be told.
        """

    def descriptors_changed(self) -> str | None:
        """The sentence that says why the guest may have WASI descriptors that a new instance has not,
        or None.
        """
        return None

    @abc.abstractmethod
    def dispose(self) -> bool:
        """Let go of everything the runtime holds; True if the memories may be released now, False
        if it still uses them.  Once more, after it was cut short or not, does what is left to do.
        """

    @property
    @abc.abstractmethod
    def native(self) -> Any:
        """The runtime's own instance."""
