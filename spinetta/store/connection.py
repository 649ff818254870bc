"""Connections to etcd's members: which one to ask, how long to wait, and what a failure means.

What a failure means is the heart of it. A write that failed is *not done* only when that is certain: the text of etcd
or gRPC says that it never left or was refused before it was proposed. Everything else is unknown.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from spinetta.errors import InvariantViolation, OutcomeUnknown, SpinettaError, StoreUnavailable, UserError
from spinetta.store import wire

RECEIVE_BYTES_MAX = 32 << 20  # a page of 4096 task records of 8 KB; lists halve their page when one does not fit
CONNECT_S = 1.0  # a local or nearby member answers in milliseconds; longer means frozen or cut off
HOLD_REFUSED_S = 1.0  # leave an endpoint alone that refused a connection or said that it cannot serve
HOLD_SILENT_S = 15.0  # … or that did not answer: by then keep-alive has found out whether the connection is dead
CLOSE_GRACE_S = 1.0  # for calls under way when a connection is let go of
KEEPALIVE_S = 10.0  # etcd drops clients that ping more often than every 5 s
KEEPALIVE_ANSWER_S = 5.0

# A member that has lost its leader refuses at once instead of holding the request until it times out.
REQUIRE_LEADER = (("hasleader", "true"),)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_ANSWER_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_ANSWER_S * 1000)),  # 60 s otherwise, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),  # an idle watch must be pinged for ever
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also the limit of one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 2000),  # etcd restarts in a second; gRPC's default is 120 s
    ("grpc.enable_retries", 0),  # a write is never sent twice behind our back
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # members are neighbours
)


class Meaning(enum.Enum):
    """What a failed call says about the request."""

    NOT_DONE = enum.auto()  # certainly; another member may do it
    REFUSED = enum.auto()  # certainly not, and no member will
    UNKNOWN = enum.auto()  # it may have been carried out


class Refused(Exception):
    """Etcd said no. Never leaves `spinetta.store`: its callers know what the text means for them."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"etcd refused: {text}")
        self.code = code
        self.text = text


NOT_DONE_TEXTS = (
    "failed to connect to all addresses",  # gRPC: there was no connection to send it on
    "etcdserver: no leader",  # refused on arrival, because we require one
    "etcdserver: rpc not supported for learner",
    "etcdserver: too many requests",
    "etcdserver: not capable",
)
REFUSED_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.DATA_LOSS,
    }
)
TOO_LARGE_FOR_SERVER = "grpc: received message larger than max"
TOO_LARGE_FOR_CLIENT = "CLIENT: Received message larger than max"  # with more around it


def meaning_of(code: grpc.StatusCode, text: str) -> Meaning:
    """Judge a failure by what gRPC and etcd say of it.

    A code alone proves nothing: gRPC makes RESOURCE_EXHAUSTED and PERMISSION_DENIED of broken streams too.
    """
    if text.startswith(NOT_DONE_TEXTS):
        return Meaning.NOT_DONE
    if text.startswith("etcdserver: ") and (code in REFUSED_CODES or text == "etcdserver: unhealthy cluster"):
        return Meaning.REFUSED
    return Meaning.REFUSED if text.startswith(TOO_LARGE_FOR_SERVER) else Meaning.UNKNOWN


def refusal(error: Refused) -> SpinettaError:
    """The error of ours that tells the caller what to do about a refusal it did not foresee."""
    text = error.text
    if "request is too large" in text or text.startswith(TOO_LARGE_FOR_SERVER):
        return UserError(
            "the request is larger than the 1.5 MiB that etcd takes", hint="make it smaller", reason="too-large"
        )
    if "too many operations" in text:
        return UserError("more operations than etcd takes in one transaction", reason="too-many-operations")
    if "database space exceeded" in text:
        return StoreUnavailable(
            "etcd is full (alarm NOSPACE): it takes no writes until it has been compacted and "
            "defragmented and the alarm disarmed"
        )
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvariantViolation(str(error))
    return StoreUnavailable(str(error))


@dataclass(slots=True, eq=False)
class Connection:
    """One member, over one channel for as long as the endpoint is in use.

    Attributes:
        endpoint: ``HOST:PORT``.
        held_until_s: after a failure it is not asked before this (event loop time); 0 while all is well.
    """

    endpoint: str
    held_until_s: float = 0.0
    _channel: grpc.aio.Channel | None = None
    _stubs: wire.Stubs | None = None

    @property
    def stubs(self) -> wire.Stubs:
        """Its services."""
        if self._stubs is None:
            self._stubs = wire.stubs(self.channel)
        return self._stubs

    @property
    def channel(self) -> grpc.aio.Channel:
        """Opened at first use, because a channel belongs to the running event loop."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS)
        return self._channel

    def usable(self, now_s: float) -> bool:
        """Not held, or held long enough and found connected again."""
        if not self.held_until_s:
            return True
        # Asking also starts a new attempt to connect, in the background: coming back costs no request.
        state = self.channel.get_state(try_to_connect=True)
        if now_s >= self.held_until_s and state == grpc.ChannelConnectivity.READY:
            self.held_until_s = 0.0
            return True
        return False

    def hold(self, for_s: float = HOLD_REFUSED_S) -> None:
        """Prefer others for so long."""
        self.held_until_s = max(self.held_until_s, asyncio.get_running_loop().time() + for_s)

    async def ready(self, timeout_s: float) -> bool:
        """Wait for a connection. Until there is one nothing has been sent, which is why writes wait here first."""
        channel = self.channel
        state = channel.get_state(try_to_connect=True)
        if state == grpc.ChannelConnectivity.READY:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                while state != grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        return False
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            return False
        except grpc.aio.UsageError:  # closed while we waited
            return False
        return True

    async def close(self) -> None:
        """End the channel; calls under way get a moment. May be called twice."""
        channel, self._channel, self._stubs = self._channel, None, None
        if channel is not None:
            await channel.close(grace=CLOSE_GRACE_S)


@dataclass(slots=True, eq=False)
class Connections:
    """The members that may be asked, the first by preference.

    A failing one is left alone for a while and the next one asked; as soon as the preferred one is connected again it
    is used again.
    """

    endpoints: Sequence[str]
    _all: list[Connection] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self.endpoints = normal_endpoints(self.endpoints)
        self._all = [Connection(endpoint) for endpoint in self.endpoints]

    async def set_endpoints(self, endpoints: Sequence[str]) -> None:
        """Use these from now on, in this order. Connections to others are closed, which ends their watches."""
        wanted = normal_endpoints(endpoints)
        known = {each.endpoint: each for each in self._all}
        self.endpoints = wanted
        self._all = [known[endpoint] if endpoint in known else Connection(endpoint) for endpoint in wanted]
        for each in known.values():
            if each.endpoint not in wanted:
                await each.close()

    async def close(self) -> None:
        """Let go of all. May be called twice."""
        self._closed = True
        for each in self._all:
            await each.close()

    async def call(
        self,
        method: Callable[[wire.Stubs], Any],
        request: wire.Message,
        *,
        timeout_s: float,
        write: bool,
    ) -> wire.Message:
        """Ask one member after the other until one answers, the preferred one first.

        Raises:
            StoreUnavailable: nobody answered, and nothing was done.
            OutcomeUnknown: a write was sent and may have been carried out.
            Refused: etcd said no.
        """
        now = asyncio.get_running_loop().time
        deadline_s = now() + timeout_s
        failures: list[str] = []
        order = self._order()
        for at, connection in enumerate(order):
            left_s = deadline_s - now()
            if left_s <= 0:
                break
            if not await connection.ready(min(CONNECT_S, left_s)):
                connection.hold()
                failures.append(f"{connection.endpoint}: no connection")
                continue
            left_s = deadline_s - now()
            if not write and at + 1 < len(order):
                left_s /= 2  # a read may be asked again elsewhere: keep time for that
            try:
                return await method(connection.stubs)(request, timeout=max(left_s, 0.001), metadata=REQUIRE_LEADER)
            except grpc.aio.AioRpcError as error:
                code, text = error.code(), error.details() or ""
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if cancelled_ourselves():
                    raise
                code, text = grpc.StatusCode.CANCELLED, "the connection was closed"
            meaning = meaning_of(code, text)
            if meaning is Meaning.REFUSED or (not write and TOO_LARGE_FOR_CLIENT in text):
                raise Refused(code, text)
            silent = code is grpc.StatusCode.DEADLINE_EXCEEDED
            connection.hold(HOLD_SILENT_S if silent else HOLD_REFUSED_S)
            failures.append(f"{connection.endpoint}: {text or code.name}")
            if write and meaning is Meaning.UNKNOWN:
                raise OutcomeUnknown(f"no answer to a write: {failures[-1]}")
        raise StoreUnavailable("no etcd member answered: " + ("; ".join(failures) or f"within {timeout_s:g} s"))

    async def pick(self, timeout_s: float) -> Connection:
        """A connected member for a stream. Raises `StoreUnavailable` when there is none."""
        now = asyncio.get_running_loop().time
        deadline_s = now() + timeout_s
        failed: list[str] = []
        for connection in self._order():
            left_s = deadline_s - now()
            if left_s <= 0:
                break
            if await connection.ready(min(CONNECT_S, left_s)):
                return connection
            connection.hold()
            failed.append(connection.endpoint)
        raise StoreUnavailable(f"no etcd member answered: {', '.join(failed)}")

    def _order(self) -> list[Connection]:
        """Those in good standing by preference, then the others, longest left alone first."""
        if self._closed:
            raise StoreUnavailable("this store has been closed")
        now_s = asyncio.get_running_loop().time()
        good: list[Connection] = []
        held: list[Connection] = []
        for each in self._all:
            (good if each.usable(now_s) else held).append(each)
        held.sort(key=lambda each: each.held_until_s)
        return good + held


def cancelled_ourselves() -> bool:
    """Inside `except CancelledError`: is it this task that was cancelled?

    gRPC raises the same error when a channel is closed under a call, and that must not end the task.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def normal_endpoints(endpoints: Sequence[str]) -> tuple[str, ...]:
    """``http://HOST:PORT`` or ``HOST:PORT`` to the latter, each once. Raises `UserError`."""
    found: dict[str, None] = {}
    for endpoint in endpoints:
        scheme, separator, rest = endpoint.rpartition("://")
        if separator and scheme != "http":
            raise UserError(
                f"etcd endpoint {endpoint!r}: only plain http is supported until the cluster has certificates",
                field="endpoints",
            )
        host, colon, port = rest.rstrip("/").rpartition(":")
        if not (colon and host and port.isdigit()):
            raise UserError(f"etcd endpoint {endpoint!r} is not HOST:PORT", field="endpoints")
        found[f"{host}:{port}"] = None
    if not found:
        raise UserError("no etcd endpoint was given", field="endpoints")
    return tuple(found)
