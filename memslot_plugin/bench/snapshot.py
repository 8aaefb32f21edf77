"""Family `snapshot`: real guests leased as a snapshot left them, against booting them for each request.

QuickJS comes from the installed Python package quickjs-rs, or from a folder of the caller, which may also hold a
JavaScript library.  A guest that is not found is named and left out.
"""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from memslot_plugin.bench.baseline import chosen
from memslot_plugin.bench.results import Grid, Limit, Row, pivot, spread
from memslot_plugin.bench.runner import Bench, timed
from memslot_plugin.errors import RepeatedRandomness
from memslot_plugin.hosts import Instance, Wasi, open_host

NAME = "snapshot"

FILES = {"QuickJS": "quickjs*.wasm", "lodash": "lodash*.js"}
"""Names of the files in the caller's folder; the first that matches is taken."""

SECONDS = 2.0
"""Duration of each measurement."""

BLOCK = 300
"""Requests to the snapshot before booting has its turn: booting empties caches, which the first requests fill again."""

BOOTS, LOADS = 30, 2
"""Boots before the snapshot has its turn, without and with a library to load."""


class Script(NamedTuple):
    """A request to QuickJS: the source to load a library before, the expression to evaluate, and its value."""

    load: bytes
    request: bytes
    answer: str


SCRIPTS = {
    "QuickJS": Script(b"", b"String(6*7)", "42"),
    "lodash": Script(
        # Without the loaders that the library looks for, and with a value that is text.
        b"(function (module, exports, define) {%s}).call(globalThis); ''",
        b"_.sortBy([{n: 3}, {n: 1}, {n: 2}], 'n').map(each => each.n).join()",
        "1,2,3",
    ),
}

LIMITS = [
    Limit(
        "{guest} from a snapshot on {host}: faster than booting",
        {"guest": guest, "host": host},
        least,
    )
    for guest, *limits in (("QuickJS", 10, 15), ("lodash", 100, 200))
    for host, least in zip(("wasmtime", "wasmer"), limits, strict=True)
]


def found_files(folder: Path | None) -> dict[str, Path]:
    """Return the guests that are here; QuickJS also from the package quickjs-rs, which is not imported."""
    paths = {}
    package = importlib.util.find_spec("quickjs_rs")
    if package is not None and package.submodule_search_locations:
        module = Path(package.submodule_search_locations[0], "_guest.wasm")
        if module.exists():
            paths["QuickJS"] = module
    if folder is not None:
        for name, pattern in FILES.items():
            for path in sorted(folder.glob(pattern))[:1]:
                paths[name] = path
    return paths


def measure(bench: Bench) -> Iterator[Row | str]:
    """Measure every guest that is here, on every host that is here."""
    paths = found_files(bench.guests)
    for name, pattern in FILES.items():
        if name not in paths:
            yield f"{name}, because --guests names no folder with {pattern}"
    hosts, absent = chosen(bench.host)
    yield from absent
    for host in hosts:
        for name, script in SCRIPTS.items():
            if name in paths and "QuickJS" in paths:
                bench.say(f"snapshot: {name} on {host}")
                library = paths[name].read_bytes() if script.load else b""
                yield javascript(bench, host, name, paths["QuickJS"].read_bytes(), library)


_OK = 0

_IMPORTS: dict[str, dict[str, Callable[..., int]]] = {
    "env": {
        "host_interrupt": lambda: 0,
        "host_call": lambda *_: -1,
        "host_module_normalize": lambda *_: 0,
        "host_module_load": lambda *_: 0,
    }
}
"""Functions of the embedder for QuickJS, which offers no functions and no modules."""


class _Prompt:
    """QuickJS with room for a script in its memory, evaluated with the fewest possible calls."""

    def __init__(self, instance: Instance, room: int) -> None:
        self.instance = instance
        self._at: int = instance.call("qjs_alloc", 8 + room)

    def ask(self, script: bytes) -> str:
        """Return the value of a script as text."""
        call, read, at = self.instance.call, self.instance.memory.read, self._at
        self.instance.memory.write(at + 8, script)
        status = call("eval_code", at + 8, len(script), at)
        status = status or call("get_string", struct.unpack("<i", read(at, 4))[0])
        if status != _OK:
            raise ValueError(f"QuickJS answered status {status} to {script[:80]!r}")
        return read(call("qjs_last_ptr"), call("qjs_last_len")).decode()


def javascript(bench: Bench, host: str, name: str, quickjs: bytes, library: bytes) -> Row:
    """Ask a snapshot taken after loading, against booting, loading and asking."""
    script = SCRIPTS[name]
    load = script.load and script.load % library
    room = max(len(load), len(script.request))

    def ask(prompt: _Prompt) -> None:
        answer = prompt.ask(script.request)
        if answer != script.answer:
            raise ValueError(f"{name} answered {answer!r} instead of {script.answer!r}")

    def boot(instance: Instance) -> _Prompt:
        prompt = _Prompt(instance, room)
        if load:
            prompt.ask(load)
        ask(prompt)
        return prompt

    with open_host(host, slots=3) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", RepeatedRandomness)
        prompts: list[_Prompt] = []
        booting = opened.prepare(quickjs, imports=_IMPORTS, wasi=Wasi())
        ready = opened.prepare(
            quickjs,
            imports=_IMPORTS,
            wasi=Wasi(),
            init=lambda instance: prompts.append(boot(instance)),
        )

        def booted() -> None:
            with booting.instantiate() as instance:
                boot(instance)

        with ready.instantiate() as instance:
            (prompt,) = prompts
            prompt.instance = instance

            def asked() -> None:
                ask(prompt)
                instance.reset()

            subjects = {
                "snapshot": timed(asked, BLOCK),
                "booting": timed(booted, LOADS if load else BOOTS),
            }
            samples = bench.rounds(subjects, SECONDS)
    labels = {"guest": name, "host": host}
    return Row.compare(labels, samples["snapshot"], "booting", samples["booting"], gain=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show one line per guest, one column per host."""
    if rows:
        title = "A real guest from a snapshot: times faster than booting it"
        yield pivot(title, rows, ("guest",), "host", shown=spread)
