"""One client's connection: bytes in, messages out, and an end to those who send nonsense or do not read."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .loop import READ, WRITE
from .wire import (
    CONNECTIONS_MAX,
    DESCRIPTORS_MAX,
    OUTPUT_BYTES_MAX,
    SOCKET_NAME,
    BadMessage,
    Lines,
    Message,
    decode,
    encode,
)

_SOCKET_BYTES = 8 << 20  # more than a socket's buffer ever holds (net.core.wmem_max is 208 KiB by default)
_RECEIVE_BYTES = 1 << 16  # what one client may ask before timers and others have their turn


class Owner(Protocol):
    """What a connection needs of the server."""

    def watch(self, connection: Connection, mask: int) -> None:
        """Wait for its socket."""

    def cut(self, connection: Connection, why: str) -> None:
        """Close it."""

    def handle(self, connection: Connection, message: Message) -> None:
        """Answer one request."""


def listen(state_dir: Path) -> socket.socket:
    """The socket, in `state_dir`, however long its path is: an address holds 108 bytes only, so by descriptor."""
    folder = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME, dir_fd=folder)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        sock.bind(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
        os.chmod(SOCKET_NAME, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
    sock.listen(CONNECTIONS_MAX)
    return sock


class Connection:
    """One client.

    Attributes:
        on_close: called once when the connection is over.
    """

    def __init__(self, server: Owner, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._lines = Lines()
        self._out = bytearray()
        self._watched = READ  # the owner begins with that
        self._descriptors: list[int] = []
        self.on_close: Callable[[], None] = lambda: None
        self.greeted = False
        self.subscribed = False
        self.open = True
        self.closing = False

    def on_ready(self, mask: int) -> None:
        """Read what came, send what waits."""
        if mask & WRITE:
            self.flush()
        if self.open and mask & ~WRITE:
            self._receive()

    def send(self, message: Message) -> None:
        """Queue a message. A client that does not read is cut: after reconnecting it is told everything again."""
        if not self.open:
            return
        self._out += encode(message)
        if len(self._out) > OUTPUT_BYTES_MAX:
            self._server.cut(self, "it does not read")
            return
        self.flush()

    def flush(self) -> None:
        """Send what fits."""
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._server.cut(self, "")
            return
        if self.closing and not self._out:
            self._server.cut(self, "")
        else:
            mask = READ | WRITE if self._out else READ
            if mask != self._watched:
                self._watched = mask
                self._server.watch(self, mask)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket."""
        self.open = False
        self._sock.close()
        for fd in self.take_descriptors():
            os.close(fd)
        on_close, self.on_close = self.on_close, lambda: None
        on_close()

    def take_descriptors(self) -> list[int]:
        """Those that have come with messages and were not taken yet: the caller's to close."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def hear_out(self) -> None:
        """Take in all that this client has sent so far, at most what a socket holds."""
        for _ in range(_SOCKET_BYTES // _RECEIVE_BYTES):
            if not self.open or not self._receive():
                return

    def _receive(self) -> bool:
        """Take in some; False when there was nothing."""
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, _RECEIVE_BYTES, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC)
            self._descriptors += fds
        except BlockingIOError:
            return False
        except OSError:
            data, flags = b"", 0
        if len(self._descriptors) > DESCRIPTORS_MAX or flags & socket.MSG_CTRUNC:
            self._server.cut(self, "it sends more descriptors than any request takes")
            return False
        if not data:
            self._server.cut(self, "")
            return False
        try:
            for line in self._lines.feed(data):
                self._server.handle(self, decode(line))
                if not self.open:
                    return False
        except BadMessage as error:
            self.send({"id": 0, "error": "bad-message", "message": str(error)})
            self._server.cut(self, str(error))
        return True
