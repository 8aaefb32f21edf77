"""What other processes do with a guest that was shared: importable by them, as multiprocessing demands."""

from __future__ import annotations

import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memslot_plugin as memslot
from memslot_plugin import SharedGuest
from memslot_plugin.smaps import mappings

from . import cells, toy
from .cells import Cell


def facts(instance: memslot.Instance) -> dict[str, Any]:
    """The inodes that an instance's memory maps, and the kernel's account of those mappings, in KiB."""
    base, size = instance._live().memories[0].base, instance.memory.byte_size
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
    """Everything that a worker does with a guest: call, write, reset, read."""
    with guest.instantiate() as instance:
        before = instance.memory.read(0, instance.memory.byte_size)
        answers = [instance.call("load", 7)]
        instance.call("store", 7, 1)
        instance.reset()
        answers.append(instance.call("load", 7))
        assert instance.memory.read(0, instance.memory.byte_size) == before
        found = facts(instance)
        instance.memory.write(9, b"mine alone")
        instance.reset()
    with guest.lease() as instance:
        answers.append(instance.call("load", 7))
    loaded = None if guest.loaded is None else asdict(guest.loaded)
    return {"answers": answers, "sum": sum(before), "loaded": loaded, **found}


def attach_and_use(cell: Cell, shared: SharedGuest, connection: Any) -> None:
    """In a worker: on a host of its own."""
    with cell.serving(slots=2, image_limit="64MiB") as host:
        guest = host.attach(shared, trust_code=True)
        shared.close()
        connection.send(use(guest))
        connection.recv()
        cells.check(host)
        guest.close()
    connection.send("closed")


def attach_from_queue(cell: Cell, queue: Any, connection: Any) -> None:
    """In a worker that was there before the guest was."""
    attach_and_use(cell, queue.get(), connection)


def receive_and_use(cell: Cell, path: str, connection: Any) -> None:
    """In a worker that knows the path of a socket and nothing else."""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(path)
        shared = SharedGuest.receive(other)
    attach_and_use(cell, shared, connection)


TEXT = f"""(module (memory (export "memory") 40 60) (data (i32.const 16) "from the module") {toy.CODE})"""
