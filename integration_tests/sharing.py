"""Actions of other processes on a guest, importable as multiprocessing needs."""

from __future__ import annotations

import socket
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memslot_plugin as memslot
from memslot_plugin import SharedGuest
from memslot_plugin._core.proc import mappings
from memslot_plugin.tests import hosts

from . import cells, toy
from .cells import Cell

TEXT = f"""(module (memory (export "memory") 40 60) (data (i32.const 16) "from the module") {toy.CODE})"""


def facts(instance: memslot.Instance) -> dict[str, Any]:
    """Return the inodes that an instance's memory maps, and the kernel's account of them, in KiB."""
    base, size = instance.enter().memories[0].base, instance.memory.byte_size
    found: dict[str, Any] = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            inside = base <= int(word.split("-")[0], 16) < base + size and rest[3] != "0"
        elif inside and word[:-1] in found:
            found[word[:-1]] += int(rest[0])
    inodes = {each.inode for each in mappings(base, base + size)} - {0}
    return {**found, "inodes": sorted(inodes)}


def use(guest: memslot.Guest) -> dict[str, Any]:
    """Call, write, reset and read, as a worker does, and return the findings."""
    with guest.instantiate() as instance:
        before = instance.memory.read(0, instance.memory.byte_size)
        answers = [instance.call("load", 7)]
        instance.call("store", 7, 1)
        instance.reset()
        answers.append(instance.call("load", 7))
        assert instance.memory.read(0, instance.memory.byte_size) == before
        found = facts(instance)
    with guest.lease() as instance:
        answers.append(instance.call("load", 7))
    loaded = None if guest.loaded is None else asdict(guest.loaded)
    return {"answers": answers, "checksum": zlib.crc32(before), "loaded": loaded, **found}


def work(
    cell: Cell, connection: Any, shared: SharedGuest, more: tuple[Any, str, Path] | None
) -> None:
    """Use the guest of an argument on a host of this worker; then guests from a queue, a socket and a file."""
    with cell.serving(slots=2, image_limit="64MiB") as host:

        def attached(found: SharedGuest) -> memslot.Guest:
            with found:
                return host.attach(found, trust_code=True)

        def tell(guest: memslot.Guest) -> None:
            connection.send(use(guest))
            connection.recv()
            cells.check(host)
            guest.close()

        tell(attached(shared))
        if more is not None:
            queue, path, file = more
            tell(attached(queue.get()))
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(path)
                found = SharedGuest.receive(other)
            tell(attached(found))
            tell(host.load(file, trust_code=True))
    connection.send("closed")


def run_or_exit(host: str, function: str) -> object:
    """Return what a worker of a pool of processes gets from a guest that may trap or end itself."""
    with memslot.open_host(host, slots=2) as opened:
        if function == "exit":
            with opened.prepare(hosts.WASI).instantiate() as instance:
                instance.call("exit", 7)
        with opened.prepare(hosts.ECHO).instantiate() as instance:
            return instance.call(function)
