"""CRuby with its standard library, compiled for WASI: a guest of 70 MiB from the npm package @ruby/3.4-wasm-wasi.

The module is a reactor whose imports beyond WASI connect it to JavaScript.  There is no JavaScript here, and the
handles that these imports keep of a Ruby object are the object's address.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

from memslot_plugin import wasm
from memslot_plugin.hosts import Instance

_INIT = "ruby-init: func(args: list<string>) -> ()"
_EVAL = "rb-eval-string-protect: func(str: string) -> tuple<handle<rb-abi-value>, s32>"
_TEXT = "rstring-ptr: func(value: handle<rb-abi-value>) -> string"
_ARGUMENTS = (b"ruby.wasm\0", b"-EUTF-8\0", b"-e_=0\0")
"""The command line of CRuby: a program that does nothing, after which CRuby evaluates more."""


def imports(module: bytes) -> dict[str, dict[str, Callable[..., Any]]]:
    """Return the imports besides WASI: handles of Ruby objects, and JavaScript, which refuses."""
    names = [each.name for each in wasm.parse(module).imports]
    return {
        "canonical_abi": {
            "resource_new_rb-abi-value": lambda address: address,
            "resource_get_rb-abi-value": lambda handle: handle,
            "resource_drop_js-abi-value": lambda _: None,
        },
        "rb-js-abi-host": {
            each.name: _refusing(each.name) for each in names if each.module == "rb-js-abi-host"
        },
    }


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(f"there is no JavaScript here, and {name} was called")

    return refuse


def boot(instance: Instance) -> None:
    """Start CRuby in a new instance, as the package's own host does."""
    instance.call("_initialize")
    vector = instance.call("cabi_realloc", 0, 0, 4, 8 * len(_ARGUMENTS))
    for place, argument in enumerate(_ARGUMENTS):
        pair = struct.pack("<ii", _put(instance, argument), len(argument))
        instance.memory.write(vector + 8 * place, pair)
    instance.call(_INIT, vector, len(_ARGUMENTS))


def evaluate(instance: Instance, source: str) -> str:
    """Return the value of an expression that is a string; raise ValueError if Ruby raised."""
    encoded = source.encode()
    at = instance.call(_EVAL, _put(instance, encoded), len(encoded))
    handle, state = struct.unpack("<ii", instance.memory.read(at, 8))
    if state:
        raise ValueError(f"Ruby left {source!r} with state {state}")
    at = instance.call(_TEXT, handle)
    address, length = struct.unpack("<ii", instance.memory.read(at, 8))
    return instance.memory.read(address, length).decode()


def _put(instance: Instance, data: bytes) -> int:
    at: int = instance.call("cabi_realloc", 0, 0, 1, len(data))
    instance.memory.write(at, data)
    return at
