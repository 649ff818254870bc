"""The records on disk, written by a child process of the shim's own.

The shim itself never touches the disk: a frozen disk would stop its loop in an fsync, and with it the dead-man's
switch. So a second small process writes, in the order asked, and answers when things are durable.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import sysapi
from .logcap import cut_all
from .records import put_file, seal, sync_folder
from .wire import MESSAGE_CHARS_MAX, BadMessage, Lines, Message, decode, encode

TO_TRASH = "moved to the trash"  # the answer to a `discard` that leaves work
CUT = b"\n[spinetta: the disk was full; some of what was written here or to the other stream may be missing]\n"
LOG_BYTES_MAX = 1 << 20  # of each of the shim's two log files
Ack = Callable[[str], None]
"""Called with an empty text when the thing is durable, else with what went wrong."""


class Layout:
    """Where things are in a state directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.attempts = root / "attempts"
        self.services = root / "services"
        self.logs = root / "logs"
        self.scratch = root / "scratch"
        self.kept = root / "kept"  # scratch directories of forgotten attempts, as KEY@SECONDS
        self.trash = root / "trash"
        self.broken = root / "broken"  # made when there is something to put there

    def make(self) -> None:
        """Create what is missing; ours alone to read."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.attempts, self.services, self.logs, self.scratch, self.kept, self.trash):
            folder.mkdir(mode=0o700, exist_ok=True)


# In the writing process ---------------------------------------------------------------------------------------------


class _Log:
    """The shim's own log: two files of bounded size."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if self._path.exists() and self._path.stat().st_size > LOG_BYTES_MAX:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)


def _cut_logs(message: Message) -> str:
    """Nothing is written to them any more: for the last time, and to be said in the record of the end."""
    remark = cut_all(message["logs"], message["log_bytes_max"])
    end = message["record"]["exit"]
    if remark and remark not in end["message"]:
        end["message"] = "; ".join(part for part in (end["message"], remark) if part)[:MESSAGE_CHARS_MAX]
    return remark


def _do(message: Message, dirty: set[Path]) -> str:
    path = Path(message["path"])
    match message["op"]:
        case "put":
            put_file(path, json.dumps(seal(message["record"])).encode())
            dirty.add(path.parent)
        case "remove":
            path.unlink(missing_ok=True)
            dirty.add(path.parent)
        case "discard":
            # Usually empty: one call. Else out of the way with it, and the janitor takes its time.
            try:
                path.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                path.rename(Path(message["trash"]) / f"{path.name}.{os.urandom(4).hex()}")
                return TO_TRASH
        case "keep":
            # Its ctime then says since when it is kept. Asked again after it was done there is nothing left to move.
            with contextlib.suppress(FileNotFoundError):
                path.rename(message["to"])
        case "mark":
            # To what a task has written: not durable, and not made if it is not there.
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.write(fd, CUT)
                finally:
                    os.close(fd)
        case _:
            raise BadMessage("unknown operation")
    return ""


def _serve(sock: socket.socket, log: _Log) -> None:
    lines = Lines(64 << 20)
    while data := sock.recv(1 << 18):
        answers: dict[int, str] = {}
        remarks: dict[int, str] = {}
        folders: dict[int, Path] = {}
        dirty: set[Path] = set()
        # All that has gathered shares one sync of each folder.
        for line in lines.feed(data):
            message = decode(line)
            if message["op"] == "log":
                log.write(message["text"])
                continue
            number = message["n"]
            answers[number] = ""
            folders[number] = Path(message["path"]).parent
            if "logs" in message:
                remarks[number] = _cut_logs(message)
            try:
                answers[number] = _do(message, dirty)
            except OSError as error:
                answers[number] = error.strerror or str(error)
        for folder in dirty:
            try:
                sync_folder(folder)
            except OSError as error:
                for number in answers:
                    if folders[number] == folder:
                        answers[number] = answers[number] or error.strerror or str(error)
        if answers:
            sock.sendall(
                b"".join(encode({"n": n, "error": e, "remark": remarks.get(n, "")}) for n, e in answers.items())
            )


def _writer_main(sock: socket.socket, lock_fd: int, log_path: Path) -> NoReturn:
    status = 1
    try:
        sysapi.set_name("spinetta-writer")
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)  # every start and every end waits for it
        # A client must see its connection end, and whoever waits for our start the end of its pipe. The lock stays ours
        # too: should the shim be killed, no other may read records while we still have some of its to write.
        os.dup2(0, 1)
        first, second = sorted((sock.fileno(), lock_fd))
        os.closerange(3, first)
        os.closerange(first + 1, second)
        os.closerange(second + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        _serve(sock, _Log(log_path))
        status = 0
    except (OSError, BadMessage) as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"writer: {error}\n")
    finally:
        os._exit(status)


# In the shim --------------------------------------------------------------------------------------------------------


class Writer:
    """The shim's end of the writing process. Never blocks."""

    def __init__(self, layout: Layout, lock_fd: int) -> None:
        """`lock_fd`: the shim's lock, which the process holds with us. OSError: it could not be started."""
        self._layout = layout
        self._lock_fd = lock_fd
        self._waiting: dict[int, tuple[Message, Ack, Ack | None]] = {}
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
            _writer_main(theirs, self._lock_fd, self._layout.root / "shim.log")
        theirs.close()
        ours.setblocking(False)
        self.sock = ours
        self.pid = pid
        self._lines = Lines()
        self._out = bytearray()
        for message, _, _ in list(self._waiting.values()):
            self._out += encode(message)
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
        self._ask({"op": "put", "path": str(path), "record": record}, ack)

    def put_end(
        self, path: Path, record: Message, logs: Sequence[str], log_bytes_max: int, noted: Ack, ack: Ack
    ) -> None:
        """Make the record of an end durable, once its logs are no longer than that.

        If one was cut, now or before, `noted` is called first with what the record's message says of it.
        """
        message = {"op": "put", "path": str(path), "record": record, "logs": list(logs), "log_bytes_max": log_bytes_max}
        self._ask(message, ack, noted)

    def remove(self, path: Path, ack: Ack) -> None:
        """Remove a file durably."""
        self._ask({"op": "remove", "path": str(path)}, ack)

    def discard(self, path: Path, ack: Ack) -> None:
        """Remove a folder, at once if it is empty, else by moving it to the trash."""
        self._ask({"op": "discard", "path": str(path), "trash": str(self._layout.trash)}, ack)

    def keep(self, path: Path, to: Path, ack: Ack) -> None:
        """Move a folder to where it is kept."""
        self._ask({"op": "keep", "path": str(path), "to": str(to)}, ack)

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
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        done = []
        for line in self._lines.feed(data):
            message = decode(line)
            waiting = self._waiting.pop(message["n"], None)
            if waiting is not None:
                if message["remark"] and waiting[2] is not None:
                    waiting[2](message["remark"])
                done.append((waiting[1], message["error"]))
        return done

    def _ask(self, message: Message, ack: Ack, noted: Ack | None = None) -> None:
        number = self._next
        self._next += 1
        message["n"] = number
        self._waiting[number] = (message, ack, noted)
        self._out += encode(message)
        self.flush()
