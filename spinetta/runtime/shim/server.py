"""The shim's socket: who may connect, what they may ask, what they are told."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from .attempt import Held, Phase, usage_dict
from .connection import Connection
from .disk import Layout
from .execs import Execs
from .keeper import Keeper, Refused
from .loop import READ, Loop, now_s
from .requests import attempt_of, describe, end_event, service_of
from .wire import (
    CONNECTIONS_MAX,
    PAGE_ATTEMPTS,
    PROTOCOL_OLDEST,
    PROTOCOL_VERSION,
    BadMessage,
    Message,
    integer,
    key,
    number,
    text,
)

ACCEPT_AGAIN_S = 0.5  # where one could not be let in; a client waits for 5 s
REASONS = ("cancelled", "released", "fenced", "walltime", "node-lost")


@dataclass(frozen=True)
class Identity:
    """What the shim says of itself in `hello`. `code`, `release`: as whoever started it names its code."""

    shim: str
    node: str
    capabilities: tuple[str, ...]
    warnings: tuple[str, ...]
    code: str
    release: str
    started_ms: int


class Server:
    """Serves the keeper to clients of our own user.

    Attributes:
        quiet_since_s: when the last client went; None while there is one.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        keeper: Keeper,
        layout: Layout,
        identity: Identity,
        log: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._keeper = keeper
        self._layout = layout
        self._identity = identity
        self._log = log
        self._connections: set[Connection] = set()
        execs = Execs(loop, keeper, log)
        self._operations: dict[str, Callable[[Connection, Message], None]] = {
            "start": self._start,
            "stop": self._stop,
            "renew": self._renew,
            "forget": self._forget,
            "held": self._held,
            "usage": self._usage,
            "start_service": self._start_service,
            "stop_service": self._stop_service,
            "services": self._services,
            "subscribe": self._subscribe,
            "shutdown": self._shutdown,
            "exec": execs.start,
            "exec_signal": execs.signal,
            "exec_resize": execs.resize,
        }
        self.quiet_since_s: float | None = now_s()
        keeper.on_end = self._on_end
        self._listen()

    def watch(self, connection: Connection, mask: int) -> None:
        """Wait for a connection's socket."""
        self._loop.watch(connection.fileno(), mask, connection.on_ready)

    def cut(self, connection: Connection, why: str) -> None:
        """Close a connection, and it alone."""
        if connection.open:
            if why:
                self._log(f"a client was cut: {why}")
            self._loop.unwatch(connection.fileno())
            connection.close()
        self._connections.discard(connection)
        if not self._connections:
            self.quiet_since_s = now_s()

    def handle(self, connection: Connection, message: Message) -> None:
        """Answer one request."""
        request_id = integer(message, "id")
        name = text(message, "op")
        try:
            if name == "hello":
                self._hello(connection, message)
                return
            if not connection.greeted:
                raise BadMessage("hello must come first")
            operation = self._operations.get(name)
            if operation is None:
                raise Refused("unknown-operation", f"this shim has no operation {name!r}")
            operation(connection, message)
        except Refused as refused:
            connection.send({"id": request_id, "error": refused.code, "message": str(refused)})
        except OSError as error:  # no descriptor is left, for one: what came behind it is to be heard all the same
            self._log(f"{name}: {error}")
            connection.send({"id": request_id, "error": "full", "message": f"{name}: {error.strerror or error}"})

    def close(self) -> None:
        """Stop listening; connections are closed when they have been told all."""
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        for connection in list(self._connections):
            connection.closing = True
            connection.flush()

    def _listen(self) -> None:
        if self._sock.fileno() >= 0:  # else we are about to end
            self._loop.watch(self._sock.fileno(), READ, self._accept)

    # Connections -------------------------------------------------------------------------------------------------

    def _accept(self, _mask: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptor is left, or no memory: it would be ready again at once, and again
            self._log(f"nobody can be let in now: {error.strerror}")
            self._loop.unwatch(self._sock.fileno())
            self._loop.call_in(ACCEPT_AGAIN_S, self._listen)
            return
        sock.setblocking(False)
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", peer)
        connection = Connection(self, sock)
        if uid not in (os.geteuid(), 0):
            self._refuse(connection, "forbidden", f"user {uid} may not talk to this shim")
        elif len(self._connections) >= CONNECTIONS_MAX:
            self._refuse(connection, "full", f"{CONNECTIONS_MAX} clients are connected already")
        else:
            self._connections.add(connection)
            self.quiet_since_s = None
            self.watch(connection, READ)

    def _refuse(self, connection: Connection, code: str, message: str) -> None:
        connection.send({"id": 0, "error": code, "message": message})
        self.cut(connection, message)

    def _hello(self, connection: Connection, message: Message) -> None:
        theirs = integer(message, "version")
        if theirs < PROTOCOL_OLDEST:
            raise Refused(
                "version",
                f"the shim speaks versions {PROTOCOL_OLDEST} to {PROTOCOL_VERSION} of its protocol, not {theirs}",
            )
        connection.greeted = True
        for other in list(self._connections):
            # A start that an earlier daemon has asked for must be among what the next one is told of: that one would
            # else take it for never made, have the task run elsewhere, and be wrong.
            if other is not connection:
                other.hear_out()
        self._keeper.switch.widen_margin(number(message, "kill_margin_s", 0))
        connection.send(
            {
                "id": message["id"],
                "ok": True,
                "version": min(theirs, PROTOCOL_VERSION),
                "shim": self._identity.shim,
                "node": self._identity.node,
                "kill_margin_s": self._keeper.switch.kill_margin_s,
                "capabilities": self._identity.capabilities,
                "warnings": self._identity.warnings,
                "code": self._identity.code,
                "release": self._identity.release,
                "started_ms": self._identity.started_ms,
            }
        )

    def _subscribe(self, connection: Connection, message: Message) -> None:
        connection.send({"id": message["id"], "ok": True})
        connection.subscribed = True
        for held in list(self._keeper.all_held()):
            if held.phase is Phase.ENDED:
                connection.send(end_event(held))
        connection.send({"event": "synced"})

    def _on_end(self, held: Held) -> None:
        for connection in list(self._connections):
            if connection.subscribed:
                connection.send(end_event(held))

    # Operations --------------------------------------------------------------------------------------------------

    def _start(self, connection: Connection, message: Message) -> None:
        held = attempt_of(message, self._layout)
        self._keeper.start(held, lambda end: connection.send({"id": message["id"], "ok": True, "exit": end}))

    def _stop(self, connection: Connection, message: Message) -> None:
        why = text(message, "why")
        if why not in REASONS:
            raise Refused("bad-request", f"why must be one of {', '.join(REASONS)}")
        held = self._keeper.attempts.get(key(message))
        if held is not None:
            self._keeper.stop(held, why)
        connection.send({"id": message["id"], "ok": True})

    def _renew(self, connection: Connection, message: Message) -> None:
        self._keeper.switch.renew(number(message, "renewed_at_s"))
        connection.send({"id": message["id"], "ok": True})

    def _forget(self, connection: Connection, message: Message) -> None:
        def done(error: str) -> None:
            if error:
                connection.send({"id": message["id"], "error": "disk", "message": error})
            else:
                connection.send({"id": message["id"], "ok": True})

        self._keeper.forget(key(message), done)

    def _held(self, connection: Connection, message: Message) -> None:
        after = text(message, "after", "")
        keys = sorted(name for name in self._keeper.attempts if name > after)
        page = [describe(self._keeper.attempts[name]) for name in keys[:PAGE_ATTEMPTS]]
        connection.send({"id": message["id"], "ok": True, "held": page, "more": len(keys) > PAGE_ATTEMPTS})

    def _usage(self, connection: Connection, message: Message) -> None:
        held = self._keeper.attempts.get(key(message))
        usage = None
        if held is not None and held.alive and held.group is not None and held.group.kills:
            counters, now = held.group.sample()
            usage = {**usage_dict(counters), "memory_bytes": now.memory_bytes or 0, "pids": now.pids or 0}
        connection.send({"id": message["id"], "ok": True, "usage": usage})

    def _start_service(self, connection: Connection, message: Message) -> None:
        held = service_of(message, self._layout)
        self._keeper.start_service(
            held, lambda it: connection.send({"id": message["id"], "ok": True, "service": describe(it)})
        )

    def _stop_service(self, connection: Connection, message: Message) -> None:
        held = self._keeper.services.get(key(message))
        signum = integer(message, "signal", int(signal.SIGTERM))
        if not 1 <= signum <= 64:
            raise Refused("bad-request", "signal must be 1 to 64")

        def answer() -> None:
            connection.send({"id": message["id"], "ok": True, "service": describe(held) if held else None})

        if held is None or held.phase is Phase.ENDED:
            answer()
            return
        held.end_waiters.append(answer)
        self._keeper.stop(held, "released", number(message, "wait_s"), signum)

    def _services(self, connection: Connection, message: Message) -> None:
        services = [describe(held) for held in self._keeper.services.values()]
        connection.send({"id": message["id"], "ok": True, "services": services})

    def _shutdown(self, connection: Connection, message: Message) -> None:
        why = text(message, "why", "released")
        if why not in REASONS:
            raise Refused("bad-request", f"why must be one of {', '.join(REASONS)}")
        Shutdown(self, self._keeper, self._loop, why, number(message, "wait_s", 10.0)).begin(
            lambda: connection.send({"id": message["id"], "ok": True})
        )


class Shutdown:
    """Ends attempts, then services in the reverse of their starting order, then the shim."""

    def __init__(self, server: Server, keeper: Keeper, loop: Loop, why: str, wait_s: float) -> None:
        self._server = server
        self._keeper = keeper
        self._loop = loop
        self._why = why
        self._wait_s = wait_s

    def begin(self, done: Callable[[], None]) -> None:
        """Start ending; `done` is called before the shim goes."""
        self._keeper.closing = True
        self._done = done
        self._stop_all(
            [held for held in self._keeper.attempts.values() if held.phase < Phase.ENDED], self._next_service
        )

    def _stop_all(self, those: list[Held], then: Callable[[], None]) -> None:
        if not those:
            then()
            return
        left = len(those)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                then()

        for held in those:
            held.end_waiters.append(one_less)
            self._keeper.stop(held, self._why, min(held.stop_wait_s, self._wait_s))

    def _next_service(self) -> None:
        running = [held for held in self._keeper.services.values() if held.phase < Phase.ENDED]
        if running:
            self._stop_all(running[-1:], self._next_service)
            return
        self._done()
        self._server.close()
        self._loop.stop()
