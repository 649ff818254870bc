"""A command beside a running attempt, as the daemon holds it: a terminal or three pipes, and a word on how it ended.

The shim runs it (see `shim.execs`) and knows it by the connection that asked: closing that ends the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import pty
import socket
import struct
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from spinetta.errors import Busy, InvariantViolation, RuntimeUnavailable, UserError
from spinetta.runtime.launch import open_socket
from spinetta.runtime.protocol import AttemptKey
from spinetta.runtime.shim.wire import PROTOCOL_VERSION, SIDE_MAX, BadMessage, Lines, Message, decode, encode

READ_BYTES = 32 << 10  # of output at once: what a pipe gives is 64 KiB at most, a terminal 4 KiB
ANSWER_LIMIT_S = 15.0
DRAIN_S = 0.5  # after its end, when a process that it left behind holds a pipe open
DRAIN_BYTES_MAX = 2 << 20  # the same, if that one goes on writing: two pipes hold no more


@dataclass(frozen=True, slots=True)
class Size:
    """Of a terminal."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that the command wrote; `is_error`: to standard error, when that is apart."""

    data: bytes
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How the command ended: by a signal if that is not 0. `message`: why it was ended, when not by itself."""

    exit_code: int
    signal: int = 0
    message: str = ""


class NotRunning(UserError):
    """The attempt does not run (any more)."""

    reason = "not-running"


class Command:
    """A command that runs. Made by `open_command`."""

    def __init__(self, shim: _Shim, fds: _Descriptors, ours: Sequence[int], *, has_terminal: bool) -> None:
        self._shim = shim
        self._has_terminal = has_terminal
        self._in = ours[0]
        self._outs = {ours[0]: False} if has_terminal else {ours[1]: False, ours[2]: True}
        self._fds = fds
        self._ending = asyncio.ensure_future(shim.end())
        self._reading = {fd: asyncio.ensure_future(self._read(fd)) for fd in self._outs}

    async def write(self, data: bytes) -> None:
        """To its standard input; waits until there is room. Lost when nobody reads there any more."""
        view = memoryview(data)
        while view and self._in in self._fds:
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                await _ready(self._in, for_writing=True)
            except OSError:  # nobody reads: what the command does then is its own business
                self.end_input()
                return

    def end_input(self) -> None:
        """No more input. Of a terminal: nothing; there the user types the end."""
        if not self._has_terminal:
            self._fds.close(self._in)

    async def resize(self, size: Size) -> None:
        """The user's window has changed. RuntimeUnavailable: the shim does not answer."""
        if not self._has_terminal:
            return
        size = _within(size)
        _set_size(self._in, size)
        # In a container the command has another terminal, whose size an older shim leaves to the container's runtime.
        with contextlib.suppress(UserError):
            await self._shim.ask({"op": "exec_resize", "rows": size.rows, "columns": size.columns})

    async def signal(self, number: int) -> None:
        """To its process group. RuntimeUnavailable: the shim does not answer."""
        await self._shim.ask({"op": "exec_signal", "signal": number})

    async def outputs(self) -> AsyncIterator[Output | Ended]:
        """What it writes, read only as fast as it is taken; at last how it ended. May be left and called again.

        RuntimeUnavailable: the shim died, and the command with it.
        """
        drained = 0
        while self._reading and drained < DRAIN_BYTES_MAX:
            over = self._ending.done()
            await asyncio.wait(
                [*self._reading.values(), *([] if over else [self._ending])],
                timeout=DRAIN_S if over else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            ready = [fd for fd, task in self._reading.items() if task.done()]
            if over and not ready:
                break
            for fd in ready:
                data = self._reading.pop(fd).result()
                if data:
                    drained += len(data) if over else 0
                    self._reading[fd] = asyncio.ensure_future(self._read(fd))
                    yield Output(data, self._outs[fd])
        yield await asyncio.shield(self._ending)

    async def close(self) -> None:
        """End it; its descriptors may be closed afterwards."""
        tasks = (self._ending, *self._reading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, fd: int) -> bytes:
        while True:
            try:
                return os.read(fd, READ_BYTES)
            except BlockingIOError:
                await _ready(fd)
            except OSError as error:
                if error.errno == errno.EIO:  # a terminal that no process has open any more
                    return b""
                raise


class _Descriptors(set[int]):
    """Open ones, closed at the latest by `close_all`."""

    def close(self, fd: int) -> None:
        """Close one, if that has not been done."""
        if fd in self:
            self.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        """Close those that are left; a terminal hangs up."""
        for fd in list(self):
            self.close(fd)


class _Shim:
    """The connection to the shim that a command belongs to."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = Lines()
        self._ids = itertools.count(1)
        self._asking = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._taken_in = 0  # how often
        self._came: list[Message] = []
        self._ended: Message | None = None

    async def ask(self, message: Message, fds: Sequence[int] = ()) -> None:
        """One request. UserError, Busy, NotRunning: refused; RuntimeUnavailable: not answered."""
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S), self._asking:
                number = next(self._ids)
                data = encode({"id": number, **message})
                # The first bytes carry the descriptors; a new connection has room for them.
                sent = socket.send_fds(self._sock, [data], fds) if fds else 0
                await asyncio.get_running_loop().sock_sendall(self._sock, data[sent:])
                answer = await self._answer(number)
        except TimeoutError:
            raise RuntimeUnavailable(f"the shim did not answer within {ANSWER_LIMIT_S:g} s") from None
        except OSError as error:
            raise RuntimeUnavailable(f"the connection to the shim broke: {error}") from None
        if "error" in answer:
            raise _refusal(str(answer["error"]), str(answer.get("message", "")))

    async def end(self) -> Ended:
        """How the command ended, once it has."""
        while self._ended is None:
            await self._more()
        code, signal = self._ended.get("exit_code"), self._ended.get("signal")
        return Ended(code or 0, signal or 0, str(self._ended.get("message", "")))

    async def _answer(self, number: int) -> Message:
        while True:
            for message in self._came:
                if message.get("id") in (number, 0):
                    self._came.clear()
                    return message
            await self._more()

    async def _more(self) -> None:
        """Take in what comes next, or what another caller takes in meanwhile."""
        taken_in = self._taken_in
        async with self._reading:
            if self._taken_in != taken_in:  # while we waited for our turn, and our answer may be in it
                return
            try:
                data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
            except OSError as error:
                raise RuntimeUnavailable(f"the connection to the shim broke: {error}") from None
            if not data:
                raise RuntimeUnavailable("the shim has gone, and the command with it")
            self._taken_in += 1
            try:
                for message in map(decode, self._lines.feed(data)):
                    if message.get("event") == "exec-ended":
                        self._ended = message
                    elif "id" in message:
                        self._came.append(message)
            except BadMessage as error:
                raise RuntimeUnavailable(f"the connection to the shim was given up: {error}") from None


@asynccontextmanager
async def open_command(
    state_dir: Path,
    key: AttemptKey,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    working_directory: str = "",
    terminal: Size | None = None,
    takes_input: bool = True,
) -> AsyncIterator[Command]:
    """Run a command beside an attempt; leaving the block ends it (HUP, KILL after 2 s).

    Args:
        state_dir: of the shim.
        key: of the attempt.
        argv: program and arguments.
        env: beside the attempt's own variables.
        working_directory: relative to that of the attempt.
        terminal: give it one of this size; None: three pipes.
        takes_input: else its standard input is empty.

    Raises:
        NotRunning: the attempt does not run.
        UserError: it could not be started (reason ``cannot-start``).
        Busy: too many run already.
        RuntimeUnavailable: the shim does not answer.
    """
    async with contextlib.AsyncExitStack() as stack:
        fds = _Descriptors()
        stack.callback(fds.close_all)
        ours, theirs = _streams(fds, terminal)
        try:
            sock = await open_socket(state_dir)
        except (OSError, TimeoutError) as error:
            raise RuntimeUnavailable(f"no shim answers for {state_dir}: {error}") from None
        stack.callback(sock.close)
        shim = _Shim(sock)
        await shim.ask({"op": "hello", "version": PROTOCOL_VERSION})
        request = {"op": "exec", "key": key, "argv": list(argv), "env": dict(env or {}), "cwd": working_directory}
        await shim.ask(request, theirs)
        for fd in theirs:
            fds.close(fd)
        command = Command(shim, fds, ours, has_terminal=terminal is not None)
        stack.push_async_callback(command.close)
        if not takes_input:
            command.end_input()
        yield command


def _streams(fds: _Descriptors, terminal: Size | None) -> tuple[list[int], list[int]]:
    """Our ends and the command's."""
    if terminal is not None:
        master, slave = pty.openpty()
        fds |= {master, slave}
        _set_size(master, _within(terminal))
        ours, theirs = [master], [slave]
    else:
        pipes = []
        for _ in range(3):
            pipes.append(os.pipe2(os.O_CLOEXEC))
            fds |= set(pipes[-1])
        ours, theirs = [pipes[0][1], pipes[1][0], pipes[2][0]], [pipes[0][0], pipes[1][1], pipes[2][1]]
    for fd in ours:
        os.set_blocking(fd, False)
    return ours, theirs


def _within(size: Size) -> Size:
    return Size(*(min(max(side, 0), SIDE_MAX) for side in (size.rows, size.columns)))


def _set_size(fd: int, size: Size) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", size.rows, size.columns, 0, 0))


def _refusal(code: str, text: str) -> Exception:
    match code:
        case "not-running":
            return NotRunning(f"no command can be run beside it: {text}", field="id", hint="see: spinetta status ID")
        case "cannot-start":
            return UserError(text, field="command", reason="cannot-start")
        case "full":
            return Busy(text, retry_after_s=1.0, hint="end some of them, or try again later")
        case "unknown-operation" | "version":
            return UserError(
                "the shim of this node is of an older version, which runs no commands beside tasks",
                field="id",
                reason="shim-version",
                hint="it finishes what it holds; tasks that begin from now on have a shim in which this works",
            )
        case "closing":
            return RuntimeUnavailable(text)
        case _:
            return InvariantViolation(f"the shim refused to run a command: {code}: {text}")


async def _ready(fd: int, *, for_writing: bool = False) -> None:
    """Wait until `fd` can be read from, or written to."""
    loop = asyncio.get_running_loop()
    is_ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if for_writing else (loop.add_reader, loop.remove_reader)
    add(fd, is_ready.set)
    try:
        await is_ready.wait()
    finally:
        remove(fd)
