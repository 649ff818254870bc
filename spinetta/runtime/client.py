"""One connection to a shim: requests with their answers, and what it reports of its own accord."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinetta.errors import InvariantViolation, RuntimeUnavailable, UserError
from spinetta.model import Exit, Reason, Usage
from spinetta.runtime.launch import open_socket
from spinetta.runtime.shim.wire import (
    MESSAGE_BYTES_MAX,
    OUTPUT_BYTES_MAX,
    PROTOCOL_OLDEST,
    PROTOCOL_VERSION,
    BadMessage,
    Message,
    decode,
    encode,
)

REQUEST_LIMIT_S = 15.0


@dataclass(frozen=True, slots=True)
class Hello:
    """What a shim says of itself.

    Attributes:
        version: of the protocol, the highest that both know.
        code: see `launch.code_of`; empty: it is from before shims were told.
        release: of the package that its code was part of.
        started_ms: wall clock; 0: it does not say.
    """

    shim: str
    pid: int
    kill_margin_s: float
    capabilities: tuple[str, ...]
    warnings: tuple[str, ...]
    version: int = PROTOCOL_VERSION
    code: str = ""
    release: str = ""
    started_ms: int = 0


def parse_exit(value: Any) -> Exit | None:
    """An exit as it is sent; None stays None."""
    if value is None:
        return None
    reason, message = _reason(value)
    return Exit(
        reason=reason,
        exit_code=value["exit_code"],
        signal=value["signal"],
        message=message,
        started_ms=value["started_ms"],
        ended_ms=value["ended_ms"],
        usage=parse_usage(value),
    )


def _reason(value: Any) -> tuple[Reason, str]:
    """Why, and in words. A shim of a later version may know a reason that we do not: its name goes before the words."""
    name, message = value["reason"], value["message"]
    try:
        return Reason(name), message
    except ValueError:
        nearest = Reason.EXIT if value["exit_code"] else Reason.SIGNAL  # whatever it is, it is no success
        return nearest, f"{name}: {message}" if message else str(name)


def parse_usage(value: Any) -> Usage:
    """The counters of an exit or a usage answer. Shims and records of earlier versions have three of them."""
    return Usage(
        cpu_user_s=value["cpu_user_s"],
        cpu_system_s=value["cpu_system_s"],
        memory_peak_bytes=value["memory_peak_bytes"],
        io_read_bytes=value.get("io_read_bytes", 0),
        io_write_bytes=value.get("io_write_bytes", 0),
        pids_peak=value.get("pids_peak", 0),
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """A running attempt: what it has used, and how much memory, how many processes and threads it has now."""

    usage: Usage
    memory_bytes: int
    pids: int


def parse_sample(value: Any) -> Sample:
    """A usage answer; shims of earlier versions do not say what is used now."""
    return Sample(parse_usage(value), value.get("memory_bytes", 0), value.get("pids", 0))


class ShimClient:
    """Talks to one shim over one connection. Use `open_client`.

    `on_event` is called with each event, from the reading task. When the connection breaks every waiting request
    raises RuntimeUnavailable.
    """

    def __init__(self, sock: socket.socket, on_event: Callable[[Message], None]) -> None:
        self._sock = sock
        self._on_event = on_event
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._ids = itertools.count(1)
        self._broken = ""
        self.broken = asyncio.Event()

    async def start(self) -> None:
        """Make the streams."""
        limit = max(MESSAGE_BYTES_MAX, OUTPUT_BYTES_MAX)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._sock, limit=limit)

    async def read(self) -> None:
        """Deliver answers and events until the connection breaks; returns then."""
        why = "the shim closed the connection"
        try:
            while line := await self._reader.readline():
                self._deliver(decode(line))
        except (OSError, ValueError) as error:
            why = f"the connection to the shim broke: {error}"
        except BadMessage as error:
            why = f"the connection to the shim was given up: {error}"
        finally:
            self._break(why)

    async def request(self, op: str, limit_s: float = REQUEST_LIMIT_S, **fields: object) -> Message:
        """Ask, and return the answer. RuntimeUnavailable: not answered, or the shim cannot now; may be repeated."""
        if self._broken:
            raise RuntimeUnavailable(self._broken)
        number = next(self._ids)
        data = encode({"id": number, "op": op, **fields})
        if len(data) > MESSAGE_BYTES_MAX:
            raise UserError(f"a request of more than {MESSAGE_BYTES_MAX} bytes", field="command")
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(limit_s):
                self._writer.write(data)
                await self._writer.drain()
                message = await answer
        except TimeoutError:
            raise RuntimeUnavailable(f"the shim did not answer {op!r} within {limit_s:g} s") from None
        except OSError as error:
            self._break(f"the connection to the shim broke: {error}")  # writing may tell of it before reading does
            raise RuntimeUnavailable(self._broken) from None
        finally:
            self._waiting.pop(number, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # looked at: when the writing has failed nobody waits for it
        _raise_refusal(op, message)
        return message

    async def hello(self, kill_margin_s: float) -> Hello:
        """Say who we are; must come first."""
        answer = await self._greet(kill_margin_s)
        # Credentials of the listening side, in our own pid namespace.
        peer = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return Hello(
            shim=answer["shim"],
            pid=struct.unpack("3i", peer)[0],
            kill_margin_s=answer["kill_margin_s"],
            capabilities=tuple(answer["capabilities"]),
            warnings=tuple(answer["warnings"]),
            version=answer["version"],
            code=str(answer.get("code", "")),
            release=str(answer.get("release", "")),
            started_ms=int(answer.get("started_ms", 0)),
        )

    async def _greet(self, kill_margin_s: float) -> Message:
        """In the highest version that the shim takes. One that is newer answers with ours, an older one refuses it."""
        for version in range(PROTOCOL_VERSION, PROTOCOL_OLDEST, -1):
            try:
                return await self.request("hello", version=version, kill_margin_s=kill_margin_s)
            except UserError as error:
                if error.reason != "shim-version":
                    raise
        return await self.request("hello", version=PROTOCOL_OLDEST, kill_margin_s=kill_margin_s)

    async def close(self) -> None:
        """Close the connection; the shim and all it holds go on."""
        self._break("the connection to the shim was closed")
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _deliver(self, message: Message) -> None:
        if "event" in message:
            self._on_event(message)
            return
        answer = self._waiting.get(message.get("id", 0))
        if answer is not None and not answer.done():
            answer.set_result(message)
        elif message.get("id") == 0:
            raise BadMessage(str(message.get("message", "")))

    def _break(self, why: str) -> None:
        self._broken = self._broken or why
        self.broken.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(RuntimeUnavailable(self._broken))


def _raise_refusal(op: str, message: Message) -> None:
    code = message.get("error")
    if code is None:
        return
    text = str(message.get("message", ""))
    if code in ("full", "closing", "disk"):
        raise RuntimeUnavailable(f"the shim cannot {op} now: {text}")
    if code == "version":
        raise UserError(text, reason="shim-version", hint="stop the node and its shim altogether, then start it again")
    raise InvariantViolation(f"the shim refused {op!r}: {code}: {text}")


@asynccontextmanager
async def open_client(state_dir: Path, on_event: Callable[[Message], None]) -> AsyncIterator[ShimClient]:
    """A connection to the shim of `state_dir`. OSError or TimeoutError when none listens."""
    client = ShimClient(await open_socket(state_dir), on_event)
    await client.start()
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        try:
            await client.close()
        finally:
            await cancelled(reading)


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end, whatever it is. Our own cancellation is not taken for the task's."""
    task.cancel()
    await asyncio.wait([task])
