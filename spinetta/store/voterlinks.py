"""Connections to voters' daemons: which one to ask, and what a failed call means."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from spinetta.errors import Compacted, Denied, InvariantViolation, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.gatewaycodec import ERROR_KEY, MESSAGE_BYTES_MAX, Busy, Method, error_from_bytes
from spinetta.store.failures import GONE, NOT_DONE_TEXTS, cancelled_ourselves
from spinetta.trust.dial import VOTER, Dialer, stands

RECEIVE_BYTES_MAX = 16 << 20  # far above a portion of a list or watch; a read of 120 large records has most
CONNECT_S = 2.0  # with TLS over a wide network; longer means frozen or cut off, and there are others to ask
HOLD_REFUSED_S = 1.0  # leave a voter alone that refused a connection or said that it cannot serve
HOLD_SILENT_S = 15.0  # … or that did not answer: by then keep-alive has found out whether the connection is dead
NEW_LINE_RETRY_S = 5.0  # after new certificates did not work and the old connection still does
CLOSE_GRACE_S = 1.0  # for calls under way when a connection is let go of
KEEPALIVE_S, KEEPALIVE_ANSWER_S = 10.0, 5.0  # nodes allow pings every 5 s

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_ANSWER_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_ANSWER_S * 1000)),  # 60 s otherwise, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),  # an idle watch must be pinged for ever
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # also the limit of one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 2000),  # a daemon restarts in seconds; gRPC's default is 120 s
    ("grpc.enable_retries", 0),  # a write is never sent twice behind our back
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

# What gRPC says of a call that no handler has seen.
UNSEEN_TEXTS = (*NOT_DONE_TEXTS, "Concurrent RPC limit exceeded!", "Method not found!")
TOO_LARGE_TEXT = "larger than max"


@dataclass(slots=True, eq=False)
class Line:
    """One channel, and how many calls are on it.

    Attributes:
        serial: of the dialer's certificates when it was opened.
        retired: another has taken its place; its last user closes it.
    """

    channel: grpc.aio.Channel
    serial: int
    users: int = 0
    retired: bool = False

    @property
    def connected(self) -> bool:
        """Has a connection; if not, asking begins to make one."""
        return self.channel.get_state(try_to_connect=True) == grpc.ChannelConnectivity.READY

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[grpc.aio.Channel]:
        """The channel, for one call or stream."""
        self.users += 1
        try:
            yield self.channel
        finally:
            self.users -= 1
            if self.retired and not self.users:
                await self.channel.close()

    async def retire(self) -> None:
        """No new calls; those under way end on it."""
        self.retired = True
        if not self.users:
            await self.channel.close()


@dataclass(slots=True, eq=False)
class Voter:
    """One voter's daemon.

    Attributes:
        address: ``HOST:PORT`` of its API.
        held_until_s: after a failure it is not asked before this (event loop time); 0 while all is well.
    """

    address: str
    dialer: Dialer
    held_until_s: float = 0.0
    _line: Line | None = None
    _renew_at_s: float = 0.0

    def _open(self) -> Line:
        serial = self.dialer.serial
        return Line(self.dialer.channel(self.address, VOTER, OPTIONS), serial)

    def usable(self, now_s: float) -> bool:
        """Not held, or held long enough and found connected again."""
        if not self.held_until_s:
            return True
        # Asking also starts a new attempt to connect, in the background: coming back costs no request.
        if self._line is None:
            self._line = self._open()
        if self._line.connected and now_s >= self.held_until_s:
            self.held_until_s = 0.0
            return True
        return False

    def hold(self, for_s: float = HOLD_REFUSED_S) -> None:
        """Prefer others for so long."""
        self.held_until_s = max(self.held_until_s, asyncio.get_running_loop().time() + for_s)

    async def line(self, timeout_s: float) -> Line | None:
        """A connected line, with the certificates of today if those work; None: there is no connection.

        Until there is one nothing has been sent, which is why writes wait here first.
        """
        try:
            async with asyncio.timeout(timeout_s):
                line = self._line
                if line is None:
                    line = self._line = self._open()
                elif line.serial != self.dialer.serial:
                    line = await self._renewed(line)
                return line if await stands(line.channel) else None
        except TimeoutError:
            return None

    async def _renewed(self, old: Line) -> Line:
        """A line with the new certificates; the old one stays while it is connected and they do not work."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._renew_at_s and old.connected:
            return old
        self._renew_at_s = now_s + NEW_LINE_RETRY_S
        new = self._open()
        works = False
        try:
            works = await stands(new.channel) or not old.connected
        finally:
            if not works or self._line is not old:
                await new.channel.close()
        if self._line is old and works:
            self._line = new
            await old.retire()
        return self._line or new

    async def close(self) -> None:
        """End the channel; calls under way get a moment. May be called twice."""
        line, self._line = self._line, None
        if line is not None:
            await line.channel.close(grace=CLOSE_GRACE_S)


@dataclass(slots=True, eq=False)
class VoterLinks:
    """The voters that may be asked, in an order of this node's own, so that nodes spread over them.

    A failing one is left alone for a while and the next one asked; as soon as the preferred one is connected again it
    is used again.
    """

    dialer: Dialer
    name: str = ""
    _all: list[Voter] = field(default_factory=list)
    _closed: bool = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those in use, the preferred one first."""
        return tuple(each.address for each in self._all)

    async def set_addresses(self, addresses: Sequence[str]) -> None:
        """Use these from now on. Connections to others are closed, which ends their watches."""
        known = {each.address: each for each in self._all}
        wanted = sorted(dict.fromkeys(addresses), key=lambda a: (zlib.crc32(f"{self.name} {a}".encode()), a))
        self._all = [known.get(address) or Voter(address, self.dialer) for address in wanted]
        for each in known.values():
            if each.address not in wanted:
                await each.close()

    async def close(self) -> None:
        """Let go of all. May be called twice."""
        self._closed = True
        for each in self._all:
            await each.close()

    async def call(self, method: Method, request: Any, *, timeout_s: float) -> Any:
        """Ask one voter after the other until one answers, the preferred one first.

        Raises:
            StoreUnavailable: nobody answered, and nothing was done.
            OutcomeUnknown: a write was sent and may have been carried out.
            Compacted, UserError, InvariantViolation: as the voter said.
        """
        if request.ByteSize() > MESSAGE_BYTES_MAX:
            raise _too_large()
        now = asyncio.get_running_loop().time
        deadline_s = now() + timeout_s
        failures: list[str] = []
        order = self._order()
        for at, voter in enumerate(order):
            left_s = deadline_s - now()
            if left_s <= 0:
                break
            is_last = at + 1 == len(order)
            line = await voter.line(left_s if is_last else min(CONNECT_S, left_s))
            if line is None:
                voter.hold()
                failures.append(f"{voter.address}: no connection")
                continue
            left_s = deadline_s - now()
            if not method.writes and not is_last:
                left_s /= 2  # a read may be asked again elsewhere: keep time for that
            try:
                return await _ask(line, method, request, max(left_s, 0.001))
            except _Failed as failed:
                voter.hold(HOLD_SILENT_S if failed.silent else HOLD_REFUSED_S)
                failures.append(f"{voter.address}: {failed}")
                if method.writes and not failed.unseen:
                    raise OutcomeUnknown(f"no answer to a write: {failures[-1]}") from None
        raise StoreUnavailable("no voter answered: " + ("; ".join(failures) or self._nobody(timeout_s)))

    async def pick(self, timeout_s: float) -> tuple[Voter, Line]:
        """A connected voter for a stream. Raises `StoreUnavailable` when there is none."""
        now = asyncio.get_running_loop().time
        deadline_s = now() + timeout_s
        failed: list[str] = []
        for voter in self._order():
            left_s = deadline_s - now()
            if left_s <= 0:
                break
            line = await voter.line(min(CONNECT_S, left_s))
            if line is not None:
                return voter, line
            voter.hold()
            failed.append(voter.address)
        raise StoreUnavailable("no connection to a voter: " + (", ".join(failed) or self._nobody(timeout_s)))

    def _nobody(self, timeout_s: float) -> str:
        return f"within {timeout_s:g} s" if self._all else "none is known"

    def _order(self) -> list[Voter]:
        """Those in good standing by preference, then the others, longest left alone first."""
        if self._closed:
            raise StoreUnavailable("this store has been closed")
        now_s = asyncio.get_running_loop().time()
        good: list[Voter] = []
        held: list[Voter] = []
        for each in self._all:
            (good if each.usable(now_s) else held).append(each)
        held.sort(key=lambda each: each.held_until_s)
        return good + held


class _Failed(Exception):
    """One voter did not do it; never leaves this file. `unseen`: it certainly did not; `silent`: it said nothing."""

    def __init__(self, text: str, *, unseen: bool, silent: bool = False) -> None:
        super().__init__(text)
        self.unseen = unseen
        self.silent = silent


async def _ask(line: Line, method: Method, request: Any, timeout_s: float) -> Any:
    async with line.use() as channel:
        send = channel.unary_unary(method.path, method.encode_request, method.response.FromString)
        try:
            return await send(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _meaning(error) from error
        except GONE as error:
            if cancelled_ourselves():
                raise
            raise _Failed("the connection was closed", unseen=False) from error


def _meaning(error: grpc.aio.AioRpcError) -> Exception:
    told = told_by(error)
    match told:
        case Busy():  # not at another voter: what is too much here would be too much there
            return StoreUnavailable(str(told))
        case UserError() | Compacted() | InvariantViolation():
            return told
        case StoreUnavailable():
            return _Failed(str(told), unseen=True)
        case OutcomeUnknown():
            return _Failed(str(told), unseen=False)
    text = error.details() or error.code().name
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and TOO_LARGE_TEXT in text and "CLIENT" not in text:
        return _too_large()
    unseen = text.startswith(UNSEEN_TEXTS) or error.code() is grpc.StatusCode.UNIMPLEMENTED
    return _Failed(text, unseen=unseen, silent=error.code() is grpc.StatusCode.DEADLINE_EXCEEDED)


def told_by(error: grpc.aio.AioRpcError) -> Exception | None:
    """What the voter's service says of a failed call; None: it was not the service that answered."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            return error_from_bytes(value)
    if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return Denied(error.details() or "the voter refuses this node")
    return None


def _too_large() -> UserError:
    return UserError(
        "the request is larger than the 1.5 MiB that etcd takes", hint="make it smaller", reason="too-large"
    )
