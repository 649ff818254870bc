"""The records on disk, written by a child process of the shim's own.

The shim itself never touches the disk: a frozen disk would stop its loop in an fsync, and with it the dead-man's
switch. So a second small process writes, in the order asked, and answers when things are durable.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .wire import Lines, Message, decode, encode
from .writing import writer_main

FINISH_LIMIT_S = 5.0
_RECEIVE_BYTES = 1 << 16
Ack = Callable[[str], None]
"""Called with an empty text when the thing is done, else with what went wrong."""


class Layout:
    """Where things are in a state directory.

    What outlives attempts may be elsewhere, in the same file system: several shims of a node share it.
    """

    def __init__(self, root: Path, *, logs: Path | None = None, kept: Path | None = None) -> None:
        self.root = root
        self.attempts = root / "attempts"
        self.services = root / "services"
        self.logs = logs or root / "logs"
        self.scratch = root / "scratch"
        self.kept = kept or root / "kept"  # scratch directories of forgotten attempts, as KEY@SECONDS
        self.trash = root / "trash"
        self.broken = root / "broken"  # made when there is something to put there

    def make(self) -> None:
        """Create what is missing; ours alone to read."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.attempts, self.services, self.logs, self.scratch, self.kept, self.trash):
            folder.mkdir(mode=0o700, exist_ok=True)


@dataclass(frozen=True)
class _Asked:
    """A request that is not done yet, and who is to be told what of it."""

    message: Message
    done: Ack
    written: Callable[[], None] | None
    noted: Ack | None


class Writer:
    """The shim's end of the writing process. Never blocks."""

    def __init__(self, layout: Layout, lock_fd: int) -> None:
        """`lock_fd`: the shim's lock, which the process holds with us. OSError: it could not be started."""
        self._layout = layout
        self._lock_fd = lock_fd
        self._waiting: dict[int, _Asked] = {}
        self._next = 1
        self._out = bytearray()
        self.pid = 0
        self.up = False
        self.start()

    def start(self) -> None:
        """Start the process (again), and ask again for all that was not answered: each thing may be done twice.

        OSError: the machine has no room for a process; what is asked meanwhile waits.
        """
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            writer_main(theirs, self._lock_fd, self._layout.root / "shim.log")
        theirs.close()
        ours.setblocking(False)
        self.sock = ours
        self.pid = pid
        self._lines = Lines()
        self._out = bytearray()
        for asked in self._waiting.values():
            self._out += encode(asked.message)
        self.up = True

    def died(self) -> None:
        """It has ended; nothing is sent until it is started again."""
        self.up = False
        self.pid = 0
        self.sock.close()

    @property
    def wants_to_write(self) -> bool:
        """True when the socket should be watched for room."""
        return self.up and bool(self._out)

    def put(self, path: Path, record: Message, ack: Ack) -> None:
        """Make `record` durable at `path`."""
        self._ask({"op": "put", "path": str(path), "record": record, "later": False}, ack)

    def put_later(self, path: Path, record: Message, written: Callable[[], None], ack: Ack) -> None:
        """Write `record` to replace what is at `path`, and make it durable soon, unless `path` is removed before.

        `written` is called, perhaps again, once it outlives all processes; `ack` when there is nothing more to do.
        """
        self._ask({"op": "put", "path": str(path), "record": record, "later": True}, ack, written)

    def put_end(
        self,
        path: Path,
        record: Message,
        logs: Sequence[str],
        log_bytes_max: int,
        noted: Ack,
        written: Callable[[], None],
        ack: Ack,
    ) -> None:
        """As `put_later`, once its logs are no longer than that.

        If one was cut, now or before, `noted` is called first with what the record's message says of it.
        """
        message = {"op": "put", "path": str(path), "record": record, "later": True}
        self._ask({**message, "logs": list(logs), "log_bytes_max": log_bytes_max}, ack, written, noted)

    def remove(self, path: Path, ack: Ack) -> None:
        """Remove a record. Not durably: after a power cut it may be there again, and be reported again."""
        self._ask({"op": "remove", "path": str(path)}, ack)

    def discard(self, path: Path, ack: Ack) -> None:
        """Remove a folder, at once if it is empty, else by moving it to the trash. Sent with what is asked next."""
        self._ask({"op": "discard", "path": str(path), "trash": str(self._layout.trash)}, ack, send=False)

    def keep(self, path: Path, to: Path, ack: Ack) -> None:
        """Move a folder to where it is kept. Sent with what is asked next."""
        self._ask({"op": "keep", "path": str(path), "to": str(to)}, ack, send=False)

    def mark(self, path: Path, ack: Ack) -> None:
        """Append to an existing log that some of it may be missing."""
        self._ask({"op": "mark", "path": str(path)}, ack)

    def log(self, text: str) -> None:
        """Write to the shim's log; dropped when the disk cannot keep up."""
        if len(self._out) < 1 << 20:
            self._out += encode({"op": "log", "text": text})
            self.flush()

    def flush(self) -> None:
        """Send what fits."""
        # Full for now, or the process is gone, which reading will tell.
        with contextlib.suppress(OSError):
            while self.up and self._out:
                del self._out[: self.sock.send(self._out)]

    def answers(self) -> list[tuple[Ack, str]] | None:
        """What was answered since; None when the process has died."""
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        done = []
        for line in self._lines.feed(data):
            message = decode(line)
            asked = self._waiting.get(message["n"])
            if asked is None:
                continue
            if message.get("remark") and asked.noted is not None:
                asked.noted(message["remark"])
            if message.get("written") and asked.written is not None:
                done.append((_told(asked.written), ""))
            else:
                del self._waiting[message["n"]]
                done.append((asked.done, message["error"]))
        return done

    def finish(self) -> None:
        """Wait until all is done and durable, but not for ever. For the shim's end: this one blocks."""
        with contextlib.suppress(OSError):
            self.sock.settimeout(FINISH_LIMIT_S)
            self.sock.sendall(self._out)
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(_RECEIVE_BYTES):
                pass

    def _ask(
        self,
        message: Message,
        ack: Ack,
        written: Callable[[], None] | None = None,
        noted: Ack | None = None,
        *,
        send: bool = True,
    ) -> None:
        number = self._next
        self._next += 1
        message["n"] = number
        self._waiting[number] = _Asked(message, ack, written, noted)
        self._out += encode(message)
        if send:  # else, if nothing more is asked, after this turn of the loop
            self.flush()


def _told(written: Callable[[], None]) -> Ack:
    return lambda _error: written()
