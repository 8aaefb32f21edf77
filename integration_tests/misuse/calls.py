"""Acts on a handle: calls, reads, writes, growth, globals, output, and calls with wrong arguments."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import memslot_plugin as memslot

from .guests import PAGE
from .player import PLAYING, Player
from .world import Tenant, Wrong


def fill(player: Player) -> None:
    tenant = player.any_of()
    if tenant is None:
        return
    at, words = player.range_of()
    word = tenant.word
    if player.choice.random() < 0.2:

        def call() -> Any:
            return tenant.instance.call("fill_and_trap", at, words, word)

        if player.use(tenant, "fill_and_trap", call, memslot.GuestTrap) is not None:
            raise Wrong("a trap did not come")
        if not tenant.over:
            player.write_of(tenant, at, words)
        return
    if (
        player.use(tenant, "fill", lambda: tenant.instance.call("fill", at, words, word))
        is not None
    ):
        player.write_of(tenant, at, words)


def get(player: Player) -> None:
    tenant = player.any_of()
    if tenant is not None:
        at, _ = player.range_of()
        found = player.use(tenant, "get", lambda: tenant.instance.call("get", at))
        if found is not None:
            player.check(tenant, "get", at, struct.pack("<i", found[0]))


def keep(player: Player) -> None:
    """Keep a function, a memory or the runtime's own objects of a handle."""
    if not player.own:
        return
    tenant = player.choice.choice(player.own)
    draw = player.choice.random()
    if draw < 0.4:
        made = player.use(tenant, "function", lambda: tenant.instance.function("fill"))
        if made is not None:
            tenant.functions.append((tenant.epoch, made[0]))
    elif draw < 0.7:
        tenant.memories.append(tenant.instance.memory)
    elif draw < 0.8 and not tenant.shared and not (player.confined and player.world.threads > 1):
        # Not with threads on wasmer: it ends the process if another thread drops its objects.
        made = player.use(tenant, "native", lambda: exposed(player.world.name, tenant.instance))
        if made is not None:
            tenant.natives.append((tenant.epoch, made[0]))


def call_kept(player: Player) -> None:
    kept = [each for each in (*player.own, *player.world.ended) if each.functions]
    if not kept:
        return
    tenant = player.choice.choice(kept)
    epoch, function = player.choice.choice(tenant.functions)
    at, words = player.range_of()
    word = tenant.word
    may = (memslot.UsedAfterClose,) if epoch != tenant.epoch else ()
    if player.use(tenant, "a kept function", lambda: function(at, words, word), *may) is not None:
        player.write_of(tenant, at, words)


def read(player: Player) -> None:
    tenant = player.any_of()
    if tenant is not None:
        memory = player.choice.choice([tenant.instance, *tenant.memories])
        if memory is tenant.instance:
            memory = memory.memory
        at, words = player.range_of()
        found = player.use(tenant, "read", lambda: memory.read(at, 4 * words))
        if found is not None:
            player.check(tenant, "read", at, found[0])


def write(player: Player) -> None:
    tenant = player.any_of()
    if tenant is not None:
        at, words = player.range_of()
        data = struct.pack("<I", tenant.word) * words
        memory = player.choice.choice([tenant.instance.memory, *tenant.memories])
        if player.use(tenant, "write", lambda: memory.write(at, data)) is not None:
            player.write_of(tenant, at, words)


def use_native(player: Player) -> None:
    """Read and write past memslot, after the end too: wasmer keeps that memory for ever."""
    kept = [each for each in (*player.own, *player.world.ended) if each.natives and not each.shared]
    if not kept:
        return
    tenant = player.choice.choice(kept)
    epoch, native = player.choice.choice(tenant.natives)
    at, words = player.range_of()
    current = epoch == tenant.epoch and not tenant.over
    try:
        found = native(at, struct.pack("<I", tenant.word) * words)
    except Exception as error:
        if current:
            raise Wrong(f"the runtime's own memory: {error}") from error
        return
    if current:
        player.check(tenant, "the runtime's own memory", at, found)
        player.write_of(tenant, at, words)


def grow(player: Player) -> None:
    tenant = player.any_of()
    if tenant is None:
        return
    pages = player.choice.choice((0, 1, 1, 2, 9))
    if player.choice.random() < 0.5:
        grown = player.use(tenant, "grow", lambda: tenant.instance.call("grow", pages))
    else:
        grown = player.use(
            tenant, "grow", lambda: tenant.instance.memory.grow(pages), memslot.GrowthRefused
        )
    if grown is not None and grown[0] >= 0 and tenant.content is not None:
        tenant.content.extend(bytes(pages * PAGE))


def use_global(player: Player) -> None:
    tenant = player.any_of()
    if tenant is None:
        return
    draw = player.choice.random()
    if draw < 0.4:
        found = player.use(tenant, "bump", lambda: tenant.instance.call("bump"))
        if tenant.count is None:
            return
        if found is not None:
            tenant.count += 1
    elif draw < 0.7:
        found = player.use(tenant, "global_value", lambda: tenant.instance.global_value("count"))
    else:
        value = player.choice.randrange(1000)
        if player.use(tenant, "set_global", lambda: tenant.instance.set_global("count", value)):
            tenant.count = None if tenant.shared else value
        return
    if found is not None and tenant.count is not None and found[0] != tenant.count:
        raise Wrong(f"the global is {found[0]} and not {tenant.count}")


def ask(player: Player) -> None:
    """Call the function that only this kind of guest has."""
    tenant = player.any_of()
    if tenant is None:
        return
    kind, instance = tenant.origin.kind, tenant.instance
    if kind == "asks":
        PLAYING.player = player
        tenant.running += 1
        try:
            answer = player.use(tenant, "ask", lambda: instance.call("ask"))
        finally:
            tenant.running -= 1
        if answer is not None and answer[0] != 1:
            raise Wrong(f"ask answered {answer[0]}")
    elif kind == "drops":
        once(player, tenant)
    elif (
        kind == "prints" and not player.forked
    ):  # a child lacks the threads that write the output on wasmtime
        at, _ = player.range_of()
        at = max(at, 12)
        there = None if tenant.content is None else bytes(tenant.content[at : at + 4])
        done = player.use(tenant, "print", lambda: instance.call("print", at))
        if done is not None and there is not None and tenant.content is not None:
            tenant.printed += there
            tenant.content[0:12] = bytes(12)
        found = player.use(tenant, "stdout", lambda: instance.stdout)
        if found is not None:
            check_output(player, tenant, found[0])


def once(player: Player, tenant: Tenant) -> None:
    """Use and drop a segment: a second use traps until a reset."""
    may = (memslot.GuestTrap,) if tenant.used_once or tenant.shared else ()
    before = tenant.used_once
    done = player.use(tenant, "once", lambda: tenant.instance.call("once"), *may)
    if done is not None:
        if before and not tenant.shared:
            raise Wrong("a dropped segment was there again")
        tenant.used_once = True
        if tenant.content is not None:
            tenant.content[0:4] = bytes(4)


def check_output(player: Player, tenant: Tenant, printed: bytes) -> None:
    if tenant.shared:
        return  # another thread may write to the start of the output
    foreign = set(memoryview(printed).cast("I")) - tenant.words
    if foreign or (tenant.content is not None and printed != tenant.printed):
        raise Wrong(f"stdout is {printed!r:.60} and not {tenant.printed!r:.60}")


def mistake(player: Player) -> None:
    """Call with arguments that no call takes."""
    tenant = player.any_of()
    if tenant is None:
        return
    instance, wrong = (
        tenant.instance,
        player.choice.choice((None, "x", [], 2**70, tenant.instance)),
    )
    action: Callable[[], Any] = player.choice.choice(
        (
            lambda: instance.call("get", wrong),
            lambda: instance.call("get"),
            lambda: instance.call("none"),
            lambda: instance.set_global("count", wrong),
            lambda: instance.memory.read(-4, 4),
            lambda: instance.memory.read(5 * PAGE, 4),
            lambda: instance.memory.write(5 * PAGE - 2, b"1234"),
            lambda: instance.memory.read(wrong, 4),  # type: ignore[arg-type]
        )
    )
    if player.use(tenant, "a mistake", action, memslot.MemslotError) is not None:
        raise Wrong("a mistake was not refused")


def statistics(player: Player) -> None:
    pools = player.host.statistics().pools
    if sum(pool.failed_resets for pool in pools):
        raise Wrong("a reset failed")


def exposed(name: str, instance: memslot.Instance) -> Callable[[int, bytes], bytes]:
    """Return a function that reads and then writes a range through the runtime's own objects."""
    native = instance.native
    if name == "wasmer":
        buffer = memoryview(native.exports.memory.buffer)

        def by_buffer(at: int, data: bytes) -> bytes:
            found = bytes(buffer[at : at + len(data)])
            native.exports.memory.uint8_view(at)[0 : len(data)] = data
            return found

        return by_buffer
    store = native.store
    memory = native.exports(store)["memory"]

    def by_store(at: int, data: bytes) -> bytes:
        found = bytes(memory.read(store, at, at + len(data)))
        memory.write(store, data, at)
        return found

    return by_store
