"""The process that writes for the shim: what it is asked through a socket, in the order asked. See `disk`.

What must be durable is answered when it is. What may wait (see ADR 0040) is answered twice: when it is written, so that
it outlives every process of ours, and when it is durable too; and if the file is removed before that, it never is.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from . import sysapi
from .bundle import WORK
from .logcap import cut_all
from .records import beside, put_beside, put_file, seal, settle, sync_folder
from .wire import MESSAGE_CHARS_MAX, BadMessage, Lines, Message, decode, encode

TO_TRASH = "moved to the trash"  # the answer to a `discard` that leaves work
CUT = b"\n[spinetta: the disk was full; some of what was written here or to the other stream may be missing]\n"
LOG_BYTES_MAX = 1 << 20  # of each of the shim's two log files
SYNC_AFTER_S = 0.1  # what may wait is synced so long after it was written: by then most of it was removed
SYNCS_AT_ONCE = 16  # of those, then it is looked what else is asked for: a start must not wait for hundreds of ends
_RECEIVE_BYTES = 1 << 16  # less than what the C library would map and unmap each time


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


class Writing:
    """The process's life."""

    def __init__(self, sock: socket.socket, log_path: Path) -> None:
        """`sock`: blocking."""
        self._sock = sock
        self._log = _Log(log_path)
        self._out = bytearray()
        self._waiting: dict[Path, tuple[int, float]] = {}  # the request and when it is to be synced, oldest first
        self._renamed: dict[int, Path] = {}  # what is durable once its folder is synced

    def serve(self) -> None:
        """Until the shim is gone; then sync what waits."""
        lines, poll = Lines(64 << 20), select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            if poll.poll(self._wait_ms()):
                data = self._sock.recv(_RECEIVE_BYTES)
                if not data:
                    break
                for line in lines.feed(data):
                    self._hear(decode(line))
                self._sync_folders()
                self._flush()
            self._sync_due(time.monotonic())
            self._flush()
        while self._waiting:
            self._sync_due(float("inf"))

    def _wait_ms(self) -> float | None:
        for _, due_s in self._waiting.values():
            return max(due_s - time.monotonic(), 0) * 1000 + 1
        return None

    def _hear(self, message: Message) -> None:
        if message["op"] == "log":
            self._log.write(message["text"])
            return
        number, path = message["n"], Path(message["path"])
        error, remark, more = "", "", {}
        if "logs" in message:
            remark = _cut_logs(message)
        try:
            match message["op"]:
                case "put" if message["later"]:
                    put_beside(path, _sealed(message))
                    self._supersede(path)
                    self._waiting[path] = number, time.monotonic() + SYNC_AFTER_S
                    more = {"written": True}
                case "put":
                    self._flush()  # nobody whose thing is done is to wait for this
                    self._supersede(path)
                    # First: what a service of that name has left must not be taken for what becomes of this one.
                    beside(path).unlink(missing_ok=True)
                    put_file(path, _sealed(message))
                    self._renamed[number] = path
                    return
                case "remove":
                    path.unlink(missing_ok=True)
                    beside(path).unlink(missing_ok=True)
                    self._supersede(path)
                case name:
                    error = _do(name, path, message)
        except OSError as problem:
            error = problem.strerror or str(problem)
        self._answer(number, error, remark=remark, **more)

    def _answer(self, number: int, error: str, **more: object) -> None:
        self._out += encode({"n": number, "error": error, **more})

    def _flush(self) -> None:
        if self._out:
            with contextlib.suppress(OSError):  # nobody listens any more, which reading tells
                self._sock.sendall(self._out)
            self._out.clear()

    def _supersede(self, path: Path) -> None:
        """There is nothing more to be done for what was written beside it."""
        if (waiting := self._waiting.pop(path, None)) is not None:
            self._answer(waiting[0], "")

    def _sync_due(self, now_s: float) -> None:
        """Make durable what has waited long enough, or some of it."""
        due = [path for path, (_, due_s) in self._waiting.items() if due_s <= now_s][:SYNCS_AT_ONCE]
        for path in due:
            number, _ = self._waiting.pop(path)
            try:
                settle(path)
            except OSError as error:
                self._answer(number, error.strerror or str(error))
            else:
                self._renamed[number] = path
        self._sync_folders()

    def _sync_folders(self) -> None:
        """Once for all that has gathered."""
        errors: dict[Path, str] = {}
        for folder in {path.parent for path in self._renamed.values()}:
            try:
                sync_folder(folder)
            except OSError as error:
                errors[folder] = error.strerror or str(error)
        for number, path in self._renamed.items():
            self._answer(number, errors.get(path.parent, ""))
        self._renamed.clear()


def _sealed(message: Message) -> bytes:
    return json.dumps(seal(message["record"])).encode()


def _cut_logs(message: Message) -> str:
    """Nothing is written to them any more: for the last time, and to be said in the record of the end."""
    remark = cut_all(message["logs"], message["log_bytes_max"])
    end = message["record"]["exit"]
    if remark and remark not in end["message"]:
        end["message"] = "; ".join(part for part in (end["message"], remark) if part)[:MESSAGE_CHARS_MAX]
    return remark


def _do(name: str, path: Path, message: Message) -> str:
    """What is never synced: done again, or found by the next shim, it does no harm."""
    match name:
        case "discard":
            # Usually empty: a call or three. Else out of the way with it, and the janitor takes its time.
            try:
                _remove_empty(path)
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


def _remove_empty(folder: Path) -> None:
    """Also a container's, with its empty folder inside. OSError: there is more in it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (folder / WORK).rmdir()
    folder.rmdir()


def writer_main(sock: socket.socket, lock_fd: int, log_path: Path) -> NoReturn:
    """Become the writing process, in a child."""
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
        Writing(sock, log_path).serve()
        status = 0
    except (OSError, BadMessage) as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"writer: {error}\n")
    finally:
        os._exit(status)
