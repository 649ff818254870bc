"""Connections to etcd's members: which one to ask, with which certificates, and how long to wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.store import tls as certificates
from spinetta.store import wire
from spinetta.store.failures import (
    GONE,
    TOO_LARGE_FOR_CLIENT,
    Meaning,
    Refused,
    cancelled_ourselves,
    meaning_of,
)
from spinetta.store.tls import Material, TlsSource
from spinetta.trust.dial import stands

RECEIVE_BYTES_MAX = 32 << 20  # a page of 4096 task records of 8 KB; lists halve their page when one does not fit
CONNECT_S = 1.0  # a local or nearby member answers in milliseconds; longer means frozen or cut off
HOLD_REFUSED_S = 1.0  # leave an endpoint alone that refused a connection or said that it cannot serve
HOLD_SILENT_S = 15.0  # … or that did not answer: by then keep-alive has found out whether the connection is dead
CLOSE_GRACE_S = 1.0  # for calls under way when a connection is let go of
REFRESH_GRACE_S = 15.0  # above the longest limit of a call (10 s)
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


@dataclass(slots=True, eq=False)
class Line:
    """One channel, and how many calls are on it.

    Attributes:
        material: what it was opened with; None: plain text.
        users: calls under way; watches, which have no end, are not counted.
        idle: set while there are none.
    """

    channel: grpc.aio.Channel
    stubs: wire.Stubs
    material: Material | None
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def open(cls, endpoint: str, material: Material | None) -> Line:
        """Connects when it is first used."""
        if material is None:
            channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        else:
            options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", certificates.SERVER_NAME))
            channel = grpc.aio.secure_channel(endpoint, material.credentials(), options=options)
        line = cls(channel, wire.stubs(channel), material)
        line.idle.set()
        return line

    @property
    def connected(self) -> bool:
        """Has a connection; if not, asking begins to make one."""
        return self.channel.get_state(try_to_connect=True) == grpc.ChannelConnectivity.READY

    async def retire(self, grace_s: float) -> None:
        """Close it as soon as no call is on it, at the latest after so long."""
        try:
            async with asyncio.timeout(grace_s):
                await self.idle.wait()
        except TimeoutError:
            pass
        finally:
            await self.channel.close()


@dataclass(slots=True, eq=False)
class Connection:
    """One member, over one channel for as long as the endpoint is in use and the certificates are the same.

    Attributes:
        endpoint: ``HOST:PORT``.
        tls: where the certificates are; None: plain text.
        held_until_s: after a failure it is not asked before this (event loop time); 0 while all is well.
        trouble: why there was no connection the last time, in words.
    """

    endpoint: str
    tls: TlsSource | None = None
    held_until_s: float = 0.0
    trouble: str = "no connection"
    _line: Line | None = None

    def _material(self) -> Material | None:
        return certificates.read(self.tls()) if self.tls is not None else None

    def _open(self) -> Line:
        """Opened at first use, because a channel belongs to the running event loop. Raises `StoreUnavailable`."""
        if self._line is None:
            self._line = Line.open(self.endpoint, self._material())
        return self._line

    @contextlib.contextmanager
    def use(self, *, endless: bool = False) -> Iterator[wire.Stubs]:
        """Its services, for one call. A `refresh` waits for those that have begun, unless they are `endless`.

        Raises:
            StoreUnavailable: there are no certificates.
        """
        line = self._open()
        if endless:
            yield line.stubs
            return
        line.users += 1
        line.idle.clear()
        try:
            yield line.stubs
        finally:
            line.users -= 1
            if not line.users:
                line.idle.set()

    def usable(self, now_s: float) -> bool:
        """Not held, or held long enough and found connected again."""
        if not self.held_until_s:
            return True
        # Asking also starts a new attempt to connect, in the background: coming back costs no request.
        try:
            connected = self._open().connected
        except StoreUnavailable:
            return False
        if connected and now_s >= self.held_until_s:
            self.held_until_s = 0.0
            return True
        return False

    def hold(self, for_s: float = HOLD_REFUSED_S) -> None:
        """Prefer others for so long."""
        self.held_until_s = max(self.held_until_s, asyncio.get_running_loop().time() + for_s)

    async def ready(self, timeout_s: float) -> bool:
        """Wait for a connection. Until there is one nothing has been sent, which is why writes wait here first."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    line = self._open()
                    if line.connected:
                        return True
                    # A channel keeps the certificates it was made with, and those may have been renewed since.
                    if line.material != self._material():
                        self._line = None
                        await line.channel.close()
                        continue
                    if await stands(line.channel):
                        return True
                    if self._line is line:
                        break
        except TimeoutError:
            pass
        except StoreUnavailable as error:
            self.trouble = str(error)
            return False
        material = self._line.material if self._line is not None else None
        self.trouble = (material.trouble(time.time()) if material is not None else "") or "no connection"
        return False

    async def refresh(self, material: Material, *, grace_s: float) -> bool:
        """Move on to new certificates, see `Connections.refresh`. False: they do not work here, and the old ones do."""
        old = self._line
        if old is None or old.material == material:
            return True
        new = Line.open(self.endpoint, material)
        try:
            async with asyncio.timeout(CONNECT_S):
                works = await stands(new.channel)
        except TimeoutError:
            works = False
        except BaseException:
            await new.channel.close()
            raise
        if self._line is not old or (not works and old.connected):
            await new.channel.close()
            return self._line is not old
        self._line = new
        await old.retire(grace_s)
        return True

    async def close(self) -> None:
        """End the channel; calls under way get a moment. May be called twice."""
        line, self._line = self._line, None
        if line is not None:
            await line.channel.close(grace=CLOSE_GRACE_S)


@dataclass(slots=True, eq=False)
class Connections:
    """The members that may be asked, the first by preference.

    A failing one is left alone for a while and the next one asked; as soon as the preferred one is connected again it
    is used again.
    """

    endpoints: Sequence[str]
    tls: TlsSource | None = None
    _all: list[Connection] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self.endpoints = normal_endpoints(self.endpoints, secured=self.tls is not None)
        self._all = [Connection(endpoint, self.tls) for endpoint in self.endpoints]

    async def set_endpoints(self, endpoints: Sequence[str]) -> None:
        """Use these from now on, in this order. Connections to others are closed, which ends their watches."""
        wanted = normal_endpoints(endpoints, secured=self.tls is not None)
        known = {each.endpoint: each for each in self._all}
        self.endpoints = wanted
        self._all = [known[endpoint] if endpoint in known else Connection(endpoint, self.tls) for endpoint in wanted]
        for each in known.values():
            if each.endpoint not in wanted:
                await each.close()

    async def refresh(self, *, grace_s: float = REFRESH_GRACE_S) -> bool:
        """Let go of connections that were made with other certificates than the files hold now.

        New calls use new connections at once, calls under way end on the old ones, and watches over those end with
        `StoreUnavailable`. Returns when the old ones are closed: when the last call on them has been answered, after
        `grace_s` at the latest.

        Returns:
            False when a member takes the old certificates but not the new ones: its connection has been kept.

        Raises:
            StoreUnavailable: the files cannot be read or do not fit each other; nothing was changed.
        """
        if self.tls is None:
            return True
        material = certificates.read(self.tls())
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each.refresh(material, grace_s=grace_s)) for each in self._all]
        return all(task.result() for task in tasks)

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
            if not await connection.ready(_patience_s(at, order, left_s)):
                connection.hold()
                failures.append(f"{connection.endpoint}: {connection.trouble}")
                continue
            left_s = deadline_s - now()
            if not write and at + 1 < len(order):
                left_s /= 2  # a read may be asked again elsewhere: keep time for that
            try:
                with connection.use() as stubs:
                    return await method(stubs)(request, timeout=max(left_s, 0.001), metadata=REQUIRE_LEADER)
            except grpc.aio.AioRpcError as error:
                code, text = error.code(), error.details() or ""
            except GONE:
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
        order = self._order()
        for at, connection in enumerate(order):
            left_s = deadline_s - now()
            if left_s <= 0:
                break
            if await connection.ready(_patience_s(at, order, left_s)):
                return connection
            connection.hold()
            failed.append(f"{connection.endpoint}: {connection.trouble}")
        raise StoreUnavailable(f"no etcd member answered: {'; '.join(failed)}")

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


def _patience_s(at: int, order: Sequence[Connection], left_s: float) -> float:
    """How long to wait for a connection: with nobody left to ask, giving up early would gain nothing."""
    return min(CONNECT_S, left_s) if at + 1 < len(order) else left_s


def normal_endpoints(endpoints: Sequence[str], *, secured: bool = False) -> tuple[str, ...]:
    """``http://HOST:PORT`` (`secured`: ``https://``) or ``HOST:PORT`` to the latter, each once. Raises `UserError`."""
    found: dict[str, None] = {}
    for endpoint in endpoints:
        scheme, separator, rest = endpoint.rpartition("://")
        if separator and scheme != ("https" if secured else "http"):
            raise UserError(
                f"etcd endpoint {endpoint!r}: "
                + (
                    "this cluster has certificates, and all its etcd endpoints are https"
                    if secured
                    else "without etcd certificates only plain http can be spoken"
                ),
                field="endpoints",
                reason="endpoint-scheme",
            )
        host, colon, port = rest.rstrip("/").rpartition(":")
        if not (colon and host and port.isdigit()):
            raise UserError(f"etcd endpoint {endpoint!r} is not HOST:PORT", field="endpoints")
        found[f"{host}:{port}"] = None
    if not found:
        raise UserError("no etcd endpoint was given", field="endpoints")
    return tuple(found)
