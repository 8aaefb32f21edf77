"""A guest on its way to another process: descriptors, and what carries them there.

    fork                        nothing to do: guests are inherited with their host
    multiprocessing             a SharedGuest is an argument of Process, or goes through a queue or pipe
    any Unix socket             SharedGuest.send(socket) here, SharedGuest.receive(socket) there

After a fork each process goes on with pages of its own: hosts, guests and live instances of the thread that
forked can be used in the child, closed there, saved and shared.  What cannot is compiling with wasmer, whose
compiler's threads stay behind (Unsupported; wasmtime then compiles without threads): prepare before the fork.
Hosts of other wasmer threads are confined to threads that the child has not.

The first descriptor is a container (see container.py) without extents, the others are the files in
which the extents lie: the images' own, so that both processes map the same pages.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import InvalidContainer, UsedAfterClose

if TYPE_CHECKING:
    from typing_extensions import Self

_MESSAGE = struct.Struct("<8sI")
_MAGIC = b"memslot\x01"
MOST_FILES = 64
"""The most descriptors that a peer may send in all: more than an image can have."""


class SharedGuest:
    """A guest that another process can attach; made by `Guest.share`, used by `Host.attach`.

    It can be pickled wherever multiprocessing can pass a descriptor on.  It holds descriptors of its
    own, apart from those of the guest, until it is closed or dropped; attaching leaves it as it is.
    """

    __slots__ = ("_fds", "name")

    def __init__(self, name: str, fds: Sequence[int]) -> None:
        """Take over these descriptors."""
        self.name = name
        self._fds = list(fds)

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors, which belong to this object; raises UsedAfterClose."""
        if not self._fds:
            raise UsedAfterClose(f"the shared guest {self.name} was closed; share the guest again")
        return tuple(self._fds)

    def send(self, connection: socket.socket) -> None:
        """Pass it through a connected Unix socket; raises SystemCallError, UsedAfterClose."""
        message = _MESSAGE.pack(_MAGIC, len(self.fds))
        try:
            sent = socket.send_fds(connection, [message], self.fds)
            if sent < len(
                message
            ):  # who has it all may have hung up, which even sending nothing would meet
                connection.sendall(message[sent:])
        except OSError as error:
            raise system_call_error(error.errno or 0, f"sending the guest {self.name}") from None

    @classmethod
    def receive(cls, connection: socket.socket) -> Self:
        """The one that the other end of a Unix socket sends; raises InvalidContainer for anything else,
        and SystemCallError.  Attach it without `trust_code` unless you know who sends.
        """
        message = b""
        fds: list[int] = []
        try:
            while len(message) < _MESSAGE.size:
                # The kernel closes what does not fit, and says so (MSG_CTRUNC).
                part, passed, flags, _ = socket.recv_fds(
                    connection, _MESSAGE.size - len(message), MOST_FILES - len(fds)
                )
                fds += passed
                if not part or flags & socket.MSG_CTRUNC:
                    break
                message += part
            made = cls("received", fds)
        except OSError as error:
            _close(fds)
            raise system_call_error(error.errno or 0, "receiving a guest") from None
        except BaseException:
            _close(fds)
            raise
        if (
            len(message) < _MESSAGE.size
            or _MESSAGE.unpack(message) != (_MAGIC, len(fds))
            or not fds
        ):
            made.close()
            raise InvalidContainer(
                f"what came through the socket is no shared guest: {len(message)} bytes and {len(fds)}"
                f" descriptors (at most {MOST_FILES} are taken, and RLIMIT_NOFILE may leave room for fewer)"
            )
        for fd in fds:
            os.set_inheritable(fd, False)
        return made

    def close(self) -> None:
        """Close its descriptors; twice is a no-op, and attached guests go on."""
        while self._fds:
            with suppress(IndexError):  # two threads may close at once
                os.close(self._fds.pop())

    def __reduce__(self) -> tuple[Callable[..., SharedGuest], tuple[Any, ...]]:
        """The descriptors as multiprocessing passes them on."""
        return _rebuilt, (self.name, [reduction.DupFd(fd) for fd in self.fds])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fds"):
            self.close()

    def __repr__(self) -> str:
        return f"<SharedGuest {self.name}: {len(self._fds)} descriptors>"


def _rebuilt(name: str, passed: Sequence[Any]) -> SharedGuest:
    """In the other process: every descriptor becomes one of ours, or none does."""
    fds: list[int] = []
    try:
        for each in passed:
            fds.append(each.detach())
            os.set_inheritable(fds[-1], False)
    except BaseException:
        _close(fds)
        raise
    return SharedGuest(name, fds)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
