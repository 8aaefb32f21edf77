"""The guest that a command line names: its bytes, the functions it exports, and the call that a request makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memslot_plugin import wasm
from memslot_plugin.bench import baseline
from memslot_plugin.cli.output import some
from memslot_plugin.errors import ArgumentError, ExportNotFound, InvalidModule, LinkError
from memslot_plugin.files import container
from memslot_plugin.files.container import Container
from memslot_plugin.files.guests import read_module, read_saved
from memslot_plugin.hosts import Guest, Host, Wasi
from memslot_plugin.hosts.wasi import MODULES, Stream
from memslot_plugin.wasm import FunctionType

EXAMPLE = "example"
"""The word that stands for the bundled guest where the command line wants a FILE."""

EXAMPLE_MODULE = Path(__file__).with_name("example.wasm")
"""The bundled guest, assembled from example.wat beside it."""

START, INITIALIZE = "_start", "_initialize"
"""WASI's names for the entry of a command, and for the export that a reactor wants called first."""

Arguments = tuple[int | float, ...]
Call = tuple[str, Arguments]


@dataclass(frozen=True, slots=True)
class Source:
    """A guest as it was named and read.

    `module` is None if the module is not understood; `functions` are the exported ones.  For a saved guest `saved` is
    the container read from `path`, and `data` the module in it.
    """

    name: str
    data: bytes
    module: wasm.Module | None
    functions: dict[str, FunctionType | None]
    saved: Container | None = None
    path: str = ""

    @property
    def is_snapshot(self) -> bool:
        """True if the guest was saved after it had begun."""
        return self.saved is not None and self.saved.about.is_snapshot

    @property
    def imports(self) -> list[wasm.Import]:
        """Imports of the module, none if it is not understood."""
        return [] if self.module is None else self.module.imports

    @property
    def uses_wasi(self) -> bool:
        """True if the guest imports anything from WASI, or is not understood."""
        return self.module is None or any(each.name.module in MODULES for each in self.imports)

    def wasi(self, arguments: Sequence[str] = (), stdout: Stream = "inherit") -> Wasi | None:
        """Return the WASI of the guest's instances, or None for a guest that uses none."""
        if not self.uses_wasi:
            return None
        return Wasi(arguments=tuple(arguments), program=self.name, stdout=stdout, stderr="inherit")


@dataclass(frozen=True, slots=True)
class Invocation:
    """The calls that one request makes, and the arguments of a WASI program."""

    function: str
    arguments: Arguments
    calls: list[Call]
    program_arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = self.program_arguments if self.function == START else map(str, self.arguments)
        return f"{self.function}({', '.join(words)})"


def read_source(file: str | None, key: bytes | None = None) -> Source:
    """Read the guest at `file`, or the bundled one for None and for "example" if no file has that name.

    Raises GuestNotFound, InvalidModule, InvalidContainer, and HostUnavailable for text without a runtime to assemble
    it.
    """
    saved, path = None, ""
    if file is None or (file == EXAMPLE and not Path(file).exists()):
        name, data = EXAMPLE, EXAMPLE_MODULE.read_bytes()
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
    return Source(name, data, module, wasm.exported_functions(module), saved, path)


def _read(path: Path) -> bytes:
    data = read_module(path)
    if path.suffix != ".wat":
        return data
    try:
        return baseline.assemble(data.decode())
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
    """Prepare the guest on this host, or load it if it is a saved one.

    Raises LinkError for an import that the command line cannot give.
    """
    for each in source.imports:
        if each.name.module not in MODULES:
            raise LinkError(
                f"{source.name} imports {each.name}, and the command line gives a guest nothing but WASI;"
                " run it from Python, with imports="
            )
    if source.saved is None:
        return host.prepare(source.data, name=source.name, wasi=wasi, reseed=reseed)
    return host.load(source.path, name=source.name, wasi=wasi, key=key, reseed=reseed)


def choose_invocation(source: Source, function: str | None, words: Sequence[str]) -> Invocation:
    """Choose the function to call: `function`, else `_start`, else the first export without parameters.

    `words` are the function's arguments, or those of a WASI program.  Raises ExportNotFound, ArgumentError.
    """
    if function is None:
        function = _default(source)
    elif source.module is not None and function not in source.functions:
        raise ExportNotFound(
            f"{source.name} exports no function {function!r}; it exports {_listed(source)}"
        )
    if function == START:
        if words and not source.uses_wasi:
            raise ArgumentError(
                f"{source.name} does not use WASI, so {START} can be given no arguments"
            )
        return Invocation(function, (), [(function, ())], tuple(words))
    arguments: Arguments = ()
    if source.module is not None or words:
        arguments = parse_arguments(function, source.functions.get(function), words)
    return Invocation(function, arguments, initialized(source, [(function, arguments)]))


def initialized(source: Source, calls: list[Call]) -> list[Call]:
    """Return the calls, after that of `_initialize` if the guest is a WASI reactor in which it is still to be made."""
    if INITIALIZE not in source.functions or source.is_snapshot or calls[:1] == [(INITIALIZE, ())]:
        return calls
    return [(INITIALIZE, ()), *calls]


def _default(source: Source) -> str:
    if START in source.functions:
        return START
    if source.module is None:
        raise ExportNotFound(
            f"the exports of {source.name} are not understood here; choose a function with --invoke"
        )
    for name, signature in source.functions.items():
        if signature is not None and not signature.parameters and not name.startswith("_"):
            return name
    raise ExportNotFound(
        f"{source.name} exports neither {START} nor a function without parameters; choose one with --invoke:"
        f" it exports {_listed(source)}"
    )


def _listed(source: Source) -> str:
    return some([f"{name}{signature or ''}" for name, signature in source.functions.items()])


def parse_arguments(name: str, signature: FunctionType | None, words: Sequence[str]) -> Arguments:
    """Read words as arguments of the function `name`; raises ArgumentError."""
    if signature is None:
        raise ArgumentError(
            f"the type of {name} is not understood here, so it cannot be called from the command line"
        )
    if len(words) != len(signature.parameters):
        raise ArgumentError(
            f"{name}{signature} takes {len(signature.parameters)} arguments and {len(words)} are given"
        )
    return tuple(
        _parse(name, place, kind, word)
        for place, (kind, word) in enumerate(zip(signature.parameters, words, strict=True), start=1)
    )


def _parse(name: str, place: int, kind: str, word: str) -> int | float:
    try:
        if kind in ("f32", "f64"):
            return float(word)
        if kind in ("i32", "i64"):
            bits = int(kind[1:])
            value = int(word, 0)
            if not -(1 << (bits - 1)) <= value < 1 << bits:
                raise ValueError
            return value - (1 << bits) if value >> (bits - 1) > 0 else value
    except ValueError:
        raise ArgumentError(
            f"argument {place} of {name} is an {kind}, which {word!r} is not"
        ) from None
    raise ArgumentError(
        f"argument {place} of {name} is of type {kind}, which the command line cannot write; call it from Python"
    )
