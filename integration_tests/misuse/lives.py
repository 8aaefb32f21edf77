"""Acts that begin or end a life: guests, instances, leases, snapshots, forks, other hosts and processes."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress

import memslot_plugin as memslot

from .guests import COUNT, KINDS, content, text
from .player import PLAYING, Player
from .world import Origin, Tenant, Wrong


def prepare(player: Player) -> None:
    """Prepare a guest of any kind."""
    if len(player.origins) >= 5:
        close_guest(player)
        return
    kind = player.choice.choice(tuple(KINDS))
    word = next(player.world.marks) << 8 | 0x11
    wasi = memslot.Wasi(stdout="capture") if kind == "prints" else None
    imports = {"env": {"help": helper()}} if kind == "asks" else None
    guest = player.host.prepare(text(kind, word), imports=imports, wasi=wasi)
    words = frozenset((0, word))
    player.origins.append(Origin(guest, kind, words, content(word), COUNT))


def helper() -> Callable[[int], int]:
    """Return a host function that draws an act for the thread that called the guest."""

    def help_out(number: int) -> int:
        player = PLAYING.player
        if player.depth < 2:
            player.depth += 1
            try:
                player.act()
            finally:
                player.depth -= 1
        return number

    return help_out


def close_guest(player: Player) -> None:
    if player.origins and (player.confined or player.choice.random() < 0.5):
        origin = player.origin()
        if origin is not None and player.depth == 0:
            origin.closing = True
            with suppress(ValueError):  # another thread has done it
                player.origins.remove(origin)
            origin.guest.close()
            origin.closed = True


def instantiate(player: Player) -> None:
    player.make_room()
    origin = player.origin()
    if origin is None:
        if not player.forked:
            prepare(player)
        return
    instance = player.started(origin, origin.guest.instantiate)
    if instance is not None:
        player.admit(origin, instance)


def lease(player: Player) -> None:
    player.make_room()
    origin = player.origin()
    if origin is not None:
        lease = origin.guest.lease()
        instance = player.started(origin, lease.__enter__)
        if instance is not None:
            player.admit(origin, instance, lease)


def leave_one(player: Player) -> None:
    if player.own:
        player.leave(player.choice.choice(player.own))


def share(player: Player) -> None:
    """Give a handle to the other threads too."""
    if player.own and not player.confined and player.world.threads > 1:
        tenant = player.own[0]
        # A guest that prints has addresses in its memory meanwhile: another thread would take them for foreign words.
        if not tenant.running and tenant.origin.kind != "prints":
            tenant.shared, tenant.content, tenant.count = True, None, None
            player.world.shared.append(tenant)
            del player.world.shared[:-3]


def end_of_another(player: Player) -> None:
    """Close a handle that has ended or is shared."""
    tenant = player.any_of()
    if tenant is None or tenant.running or not (tenant.over or tenant.shared):
        return
    try:
        tenant.instance.close()
    except (memslot.InUse, memslot.WrongThread):
        return
    tenant.over = True


def reset(player: Player) -> None:
    tenant = player.any_of()
    if tenant is None:
        return
    if player.use(tenant, "reset", tenant.instance.reset) is None:
        # The guest was closed meanwhile, or a child lacks the threads of its compiler.
        if (player.world.threads > 1 or player.forked) and tenant.instance.closed:
            tenant.over = True
        return
    if tenant.running and not tenant.shared:  # shared: another thread may have ended the call
        raise Wrong("an instance was reset within a call of it")
    tenant.epoch += 1
    tenant.printed = b""
    if not tenant.shared:
        tenant.words.discard(tenant.word)
        tenant.word = next(player.world.marks) << 8 | 0x77
        tenant.words.add(tenant.word)
        if tenant.origin.content is not None:
            tenant.content = bytearray(tenant.origin.content)
        tenant.count = tenant.origin.count
        tenant.used_once = False
    player.whole(tenant, "an instance after its reset")


def copy(player: Player) -> None:
    """Take a snapshot, or fork."""
    tenant = player.any_of()
    if tenant is None or player.depth:
        return
    fork = player.choice.random() < 0.5
    action = (lambda: tenant.instance.fork(1)) if fork else tenant.instance.snapshot
    may = (memslot.SnapshotRefused, memslot.PoolExhausted)
    now = None if tenant.content is None else bytes(tenant.content)
    made = player.use(tenant, "fork" if fork else "snapshot", action, *may)
    if made is None:
        return
    result = made[0]
    origin = Origin(
        result[0].guest if fork else result,
        tenant.origin.kind,
        frozenset(tenant.words),
        None if tenant.shared else now,
        None if tenant.shared else tenant.count,
    )
    if fork:
        player.admit(origin, result[0])
    else:
        player.origins.append(origin)


def spare_host(player: Player) -> None:
    """Open another host with a tenant, and close or drop it. Its handles join the ended ones."""
    if player.depth:
        return
    host = player.world.open()
    guest = host.prepare(text("plain", 0x99))
    instance = guest.instantiate()
    origin = Origin(guest, "plain", frozenset((0, 0x99)), None, None)
    tenant = Tenant(instance, origin, threading.get_ident(), 0, {0, 0x99}, None, None)
    tenant.functions.append((0, instance.function("fill")))
    tenant.memories.append(instance.memory)
    if player.choice.random() < 0.7:
        host.close(force=True)
        player.ended(tenant)


def child(player: Player) -> None:
    """Fork by Python or behind its back. Both processes go on."""
    if player.depth or player.forked or player.world.threads > 1:
        return
    by_python = player.choice.random() < 0.5
    seed = player.choice.random()
    process = os.fork() if by_python else ctypes.PyDLL(None).fork()
    if process == 0:
        status = 1
        try:
            signal.alarm(15)  # a child lacks the thread of faulthandler
            player.forked, player.choice = True, random.Random(seed)
            for act in COMPILING:
                player.weights.pop(act, None)
            for _ in range(60):
                player.act()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent reports it
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    if status:
        raise Wrong(
            f"a child of {'os.fork' if by_python else 'fork(2)'} ended with status {status}"
        )


COMPILING = (prepare, copy, spare_host, child)
"""Acts that compile, for which a child lacks the threads."""
