"""The guest that a command line names: its bytes, what it exports, and which of that is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memslot_plugin import wasm
from memslot_plugin.cli import example
from memslot_plugin.cli.signatures import Signature, exported_functions, parse_arguments
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    InvalidModule,
    LinkError,
)
from memslot_plugin.files import container
from memslot_plugin.files.container import Container
from memslot_plugin.hosts import Guest, Host, Wasi, alone
from memslot_plugin.hosts.saved import read_module, read_saved
from memslot_plugin.hosts.wasi import MODULES

START, INITIALIZE = "_start", "_initialize"
"""What WASI calls a command's entry, and what must be called first in a guest that has none (a reactor)."""


@dataclass(frozen=True, slots=True)
class Source:
    """A guest as it was named and read; `functions` are its exported ones.

    `saved` is what was read of a saved guest at `path`, `data` then the module in it.
    """

    name: str
    data: bytes
    module: wasm.Module | None
    functions: dict[str, Signature | None]
    saved: Container | None = None
    path: str = ""

    @property
    def is_snapshot(self) -> bool:
        """Whether it was saved after it had begun."""
        return self.saved is not None and self.saved.about.is_snapshot

    @property
    def uses_wasi(self) -> bool:
        """Whether it imports anything from WASI; assumed of a module that is not understood here."""
        return self.module is None or any(
            each.name.module in MODULES for each in self.module.imports
        )

    @property
    def memory(self) -> str | None:
        """The name under which it exports memory 0, if it does."""
        for export in () if self.module is None else self.module.exports:
            if export.kind is wasm.ExternKind.MEMORY and export.index == 0:
                return export.name
        return None


@dataclass(frozen=True, slots=True)
class Invocation:
    """What one request calls, in order, and what a WASI guest gets as its arguments."""

    function: str
    arguments: tuple[int | float, ...]
    initialize: bool
    program_arguments: tuple[str, ...]

    @property
    def calls(self) -> tuple[tuple[str, tuple[int | float, ...]], ...]:
        """The calls of a request: the function, and before it what a WASI reactor demands."""
        last = (self.function, self.arguments)
        return ((INITIALIZE, ()), last) if self.initialize else (last,)

    def __str__(self) -> str:
        words = self.program_arguments if self.function == START else map(str, self.arguments)
        return f"{self.function}({', '.join(words)})"


def read_source(file: str | None, key: bytes | None = None) -> Source:
    """The guest at `file`; without one, or where no file has that name, "example" is the bundled one.

    Raises GuestNotFound, InvalidModule, InvalidContainer, and HostUnavailable for text that nobody
    here can assemble.
    """
    saved, path = None, ""
    if file is None or (file == example.NAME and not Path(file).exists()):
        name, data = example.NAME, example.module()
    else:
        name, data = Path(file).name, _read(Path(file))
        if data.startswith(container.MAGIC):
            path = file
            saved = read_saved(path, key)
            data = saved.module
    try:
        module = wasm.parse(data)
    except wasm.NotUnderstood:
        return Source(name, data, None, {}, saved, path)
    except InvalidModule as error:
        raise InvalidModule(f"{name}: {error}") from None
    return Source(name, data, module, exported_functions(module), saved, path)


def _read(path: Path) -> bytes:
    data = read_module(path)
    if path.suffix != ".wat":
        return data
    try:
        return alone.assemble(data.decode())
    except UnicodeDecodeError:
        raise InvalidModule(f"{path} is not text in UTF-8, which a .wat file must be") from None


def prepare_source(
    source: Source,
    host: Host,
    wasi: Wasi | None,
    *,
    key: bytes | None = None,
    reseed: str | None = None,
) -> Guest:
    """The guest on this host: prepared, or loaded if it is a saved one."""
    if source.saved is None:
        return host.prepare(source.data, name=source.name, wasi=wasi, reseed=reseed)
    return host.load(source.path, name=source.name, wasi=wasi, key=key, reseed=reseed)


def require_no_foreign_imports(source: Source) -> None:
    """Raise LinkError if the guest imports what a command line cannot give."""
    foreign = [
        str(each.name)
        for each in (() if source.module is None else source.module.imports)
        if each.name.module not in MODULES
    ]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise LinkError(
            f"{source.name} imports {foreign[0]}{more}, and the command line gives a guest nothing but WASI;"
            " run it from Python, with imports="
        )


def choose_invocation(source: Source, function: str | None, words: Sequence[str]) -> Invocation:
    """What to call: `function`, else `_start`, else the first export without parameters.

    `words` are the function's arguments, or those of a WASI program.  Raises ExportNotFound, ArgumentError.
    """
    if function is None:
        function = _default(source)
    elif source.module is None:
        pass  # the runtime knows what it exports
    elif function not in source.functions:
        raise ExportNotFound(
            f"{source.name} exports no function {function!r}; it exports {_listed(source)}"
        )
    initialize = (
        INITIALIZE in source.functions
        and function not in (START, INITIALIZE)
        and not source.is_snapshot
    )
    if function == START:
        if words and not source.uses_wasi:
            raise ArgumentError(
                f"{source.name} does not use WASI, so {START} can be given no arguments"
            )
        return Invocation(function, (), initialize, tuple(words))
    if source.module is None and not words:
        return Invocation(function, (), initialize=False, program_arguments=())
    arguments = parse_arguments(function, source.functions.get(function), words)
    return Invocation(function, tuple(arguments), initialize, ())


def _default(source: Source) -> str:
    if START in source.functions:
        return START
    if source.module is None:
        raise ExportNotFound(
            f"what {source.name} exports is not understood here; choose a function with --invoke"
        )
    for name, signature in source.functions.items():
        if signature is not None and not signature.parameters and not name.startswith("_"):
            return name
    raise ExportNotFound(
        f"{source.name} exports neither {START} nor a function without parameters; choose one with --invoke:"
        f" it exports {_listed(source)}"
    )


def _listed(source: Source) -> str:
    """The functions with their types, the first ones if they are many."""
    shown = [f"{name}{signature or ''}" for name, signature in list(source.functions.items())[:20]]
    more = len(source.functions) - len(shown)
    return ("; ".join(shown) or "no function") + (f"; and {more} more" if more > 0 else "")
