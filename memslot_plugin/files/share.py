"""Sharing a guest with another process: descriptors, and what carries them there.

    fork                        nothing to do: guests are inherited with their host
    multiprocessing             a SharedGuest is an argument of Process, or goes through a queue or pipe
    any Unix socket             SharedGuest.send(socket) here, SharedGuest.receive(socket) there

The first descriptor is a container (see container.py) without extents, the others are the files in
which the extents lie: the images' own, so that both processes map the same pages.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import InvalidContainer, UsedAfterClose

if TYPE_CHECKING:
    from typing_extensions import Self

_MESSAGE = struct.Struct("<8sI")
_MAGIC = b"memslot\x01"
MOST_FILES = 64
"""The most descriptors that a peer may send: more than an image can have."""


class SharedGuest:
    """A guest that another process can attach; made by `Guest.share`, used by `Host.attach`.

    It can be pickled wherever multiprocessing can pass a descriptor on.  It has descriptors of its
    own, apart from those of the guest, until it is closed or dropped; attaching does not change it.
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
        """Send the descriptors through a connected Unix socket; raises SystemCallError, UsedAfterClose."""
        message = _MESSAGE.pack(_MAGIC, len(self.fds))
        try:
            sent = socket.send_fds(connection, [message], self.fds)
            # A receiver that has the whole message may hang up, and then even sending nothing fails.
            if sent < len(message):
                connection.sendall(message[sent:])
        except OSError as error:
            raise system_call_error(error.errno or 0, f"sending the guest {self.name}") from None

    @classmethod
    def receive(cls, connection: socket.socket) -> Self:
        """Return the guest that the other end of a Unix socket sends.

        Attach it without `trust_code` unless you know who sends.  Raises SystemCallError, and
        InvalidContainer for anything else than a shared guest.
        """
        message = b""
        shared = cls("received", ())
        try:
            while len(message) < _MESSAGE.size:
                # The kernel closes what does not fit, and says so (MSG_CTRUNC).
                part, fds, flags, _ = socket.recv_fds(
                    connection, _MESSAGE.size - len(message), MOST_FILES - len(shared._fds)
                )
                shared._fds += fds
                if not part or flags & socket.MSG_CTRUNC:
                    break
                message += part
        except OSError as error:
            shared.close()
            raise system_call_error(error.errno or 0, "receiving a guest") from None
        count = len(shared._fds)
        if len(message) < _MESSAGE.size or _MESSAGE.unpack(message) != (_MAGIC, count) or not count:
            shared.close()
            raise InvalidContainer(
                f"what came through the socket is no shared guest: {len(message)} bytes and {count}"
                f" descriptors (at most {MOST_FILES} are taken, and RLIMIT_NOFILE may leave room for fewer)"
            )
        for fd in shared._fds:
            os.set_inheritable(fd, False)
        return shared

    def close(self) -> None:
        """Close the descriptors; attached guests go on.  Closing twice does nothing."""
        while self._fds:
            with suppress(IndexError):  # two threads may close at once
                os.close(self._fds.pop())

    def __reduce__(self) -> tuple[Callable[..., SharedGuest], tuple[Any, ...]]:
        """Return the descriptors as multiprocessing passes them on."""
        from multiprocessing.reduction import DupFd  # noqa: PLC0415 - a third of wasmtime's own import

        return SharedGuest._arrive, (self.name, [DupFd(fd) for fd in self.fds])

    @classmethod
    def _arrive(cls, name: str, passed: Sequence[Any]) -> SharedGuest:
        """Return the guest in the other process; if a descriptor does not arrive, the others are closed."""
        shared = cls(name, ())
        for each in passed:
            shared._fds.append(each.detach())
            os.set_inheritable(shared._fds[-1], False)
        return shared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fds"):  # a constructor that raised has none
            self.close()

    def __repr__(self) -> str:
        return f"<SharedGuest {self.name}: {len(self._fds)} descriptors>"
