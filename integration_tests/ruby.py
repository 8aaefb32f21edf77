"""A large real guest: CRuby with its standard library, compiled for WASI, from a package of npm.

It is a reactor whose imports beyond WASI connect it to JavaScript.  Here nobody is there to be
connected to, and the two handles that they keep of a Ruby object are its address.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

import memslot_plugin as memslot
from memslot_plugin import wasm

INIT = "ruby-init: func(args: list<string>) -> ()"
EVAL = "rb-eval-string-protect: func(str: string) -> tuple<handle<rb-abi-value>, s32>"
TEXT = "rstring-ptr: func(value: handle<rb-abi-value>) -> string"
ARGUMENTS = (b"ruby.wasm\0", b"-EUTF-8\0", b"-e_=0\0")
"""What CRuby is started with: a program that does nothing, so that it goes on to be asked."""


def imports(module: bytes) -> dict[str, dict[str, Callable[..., Any]]]:
    """What the module imports besides WASI: JavaScript, which refuses, and its handles of Ruby objects."""
    names = [each.name for each in wasm.parse(module).imports]
    return {
        "canonical_abi": {
            "resource_new_rb-abi-value": lambda address: address,
            "resource_get_rb-abi-value": lambda handle: handle,
            "resource_drop_js-abi-value": lambda handle: None,
        },
        "rb-js-abi-host": {
            each.name: _refusing(each.name) for each in names if each.module == "rb-js-abi-host"
        },
    }


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(f"there is no JavaScript here, and {name} was called")

    return refuse


def boot(instance: memslot.Instance) -> None:
    """What the package's own host does first."""
    instance.call("_initialize")
    vector = instance.call("cabi_realloc", 0, 0, 4, 8 * len(ARGUMENTS))
    for place, argument in enumerate(ARGUMENTS):
        pair = struct.pack("<ii", _put(instance, argument), len(argument))
        instance.memory.write(vector + 8 * place, pair)
    instance.call(INIT, vector, len(ARGUMENTS))


def evaluate(instance: memslot.Instance, source: str) -> str:
    """The value of an expression that is a string; raises ValueError if Ruby raised."""
    encoded = source.encode()
    at = instance.call(EVAL, _put(instance, encoded), len(encoded))
    handle, state = struct.unpack("<ii", instance.memory.read(at, 8))
    if state:
        raise ValueError(f"Ruby left {source!r} with state {state}")
    at = instance.call(TEXT, handle)
    address, length = struct.unpack("<ii", instance.memory.read(at, 8))
    return instance.memory.read(address, length).decode()


def _put(instance: memslot.Instance, data: bytes) -> int:
    at: int = instance.call("cabi_realloc", 0, 0, 1, len(data))
    instance.memory.write(at, data)
    return at
