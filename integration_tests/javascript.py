"""A real guest: QuickJS compiled for WASI, taken from the wheel of the Python package quickjs-rs.

The package runs it on wasmtime. These tests use its module alone, through memslot or a runtime.
"""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from pathlib import Path

import memslot_plugin as memslot

from .fetch import fetched, kept

REQUIREMENT = (
    "quickjs-rs==0.2.6"
    " --hash=sha256:3591faae7eef58f41e01f50071795679f2b53042e40a64f3784546a6bde35339\n"
)
MODULE = "quickjs_rs/_guest.wasm"
# The package needs Python 3.11; its module does not.
OPTIONS = "--quiet --no-deps --no-cache-dir --only-binary=:all: --ignore-requires-python"

IMPORTS = {
    "env": {
        "host_interrupt": lambda: 0,
        "host_call": lambda *_: -1,
        "host_module_normalize": lambda *_: 0,
        "host_module_load": lambda *_: 0,
    }
}
"""Imports without host functions and modules: a call of one fails inside the guest."""


def fetch(folder: Path) -> bytes:
    """Return the module. A failed download is an error."""
    return kept(folder / "quickjs-0.2.6.wasm", _download)


def _download(work: Path) -> bytes:
    (work / "quickjs.txt").write_text(REQUIREMENT)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    fetched("QuickJS", [*command, *OPTIONS.split(), "--requirement", "quickjs.txt"], work)
    (wheel,) = work.glob("quickjs_rs-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(MODULE)


class Pooled:
    """A machine that is an instance of memslot."""

    def __init__(self, instance: memslot.Instance) -> None:
        self.call = instance.call
        self.read = instance.memory.read
        self.write = instance.memory.write


WRAPPED = """(() => {
  try { return "value " + String((0, eval)(%s)); } catch (error) { return "threw " + String(error); }
})()"""


def evaluate(machine: Pooled, source: str) -> str:
    """Return the value of a script as text. Raise ValueError with the exception of the script."""
    code = (WRAPPED % json.dumps(source)).encode()
    at = machine.call("qjs_alloc", len(code))
    machine.write(at, code)
    out = machine.call("qjs_alloc", 4)
    status = machine.call("eval_code", at, len(code), out)
    assert status == 0, f"eval_code: status {status}"
    (handle,) = struct.unpack("<i", machine.read(out, 4))
    machine.call("qjs_free", at, len(code))
    machine.call("qjs_free", out, 4)
    status = machine.call("get_string", handle)
    assert status == 0, f"get_string: status {status}"
    length = machine.call("qjs_last_len")
    kind, _, text = machine.read(machine.call("qjs_last_ptr"), length).decode().partition(" ")
    machine.call("qjs_result_free")
    machine.call("free_value", handle)
    if kind == "threw":
        raise ValueError(text)
    return text
