"""Connections to the cluster's nodes: any of them will do, and another one takes over when one is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
import tenacity

from spinetta.client.errors import from_rpc
from spinetta.errors import OutcomeUnknown, StoreUnavailable
from spinetta.v1.api_pb2_grpc import SpinettaStub
from spinetta.validate import MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from spinetta.v1.api_pb2_grpc import SpinettaAsyncStub

Q = TypeVar("Q")
A = TypeVar("A")

CONNECT_TIMEOUT_S = 3.0  # on one machine or network a connection stands in milliseconds, or not at all
ATTEMPT_TIMEOUT_S = 10.0  # of one call at one node, so that a frozen one leaves time to ask another
RETRY_WAIT_MAX_S = 1.0

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # nodes are never behind a web proxy, and loopback least of all
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A frozen node keeps its connections: a stream notices by these.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
)


class _NotReached(StoreUnavailable):
    """No connection to one node: certainly nothing has been sent to it."""

    def __init__(self, *addresses: str) -> None:
        super().__init__(f"no node answers at {' or '.join(addresses)}")


@dataclass(slots=True)
class _Link:
    channel: grpc.aio.Channel
    stub: SpinettaAsyncStub


@dataclass(slots=True)
class Nodes:
    """The nodes a client talks to.

    Attributes:
        addresses: in order of preference; the one that answered last is asked first.
        timeout_s: for a whole call, with all retries.
        first_contact_s: for as long as no node has ever answered a call gives up after this time already: the
            addresses may be wrong, and nobody likes to wait for that.
    """

    addresses: tuple[str, ...]
    timeout_s: float
    first_contact_s: float
    _links: dict[str, _Link] = field(default_factory=dict)
    _current: int = 0
    _met: bool = False  # a connection stood once

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            await link.channel.close()

    def _link(self, address: str) -> _Link:
        link = self._links.get(address)
        if link is None:
            channel = grpc.aio.insecure_channel(address, options=list(_OPTIONS))
            link = self._links[address] = _Link(channel, SpinettaStub(channel))
        return link

    async def _connected(self, address: str, timeout_s: float) -> SpinettaAsyncStub:
        """The node's stub once its connection stands.

        Raises:
            StoreUnavailable: it does not, so certainly nothing has been sent.
        """
        link = self._link(address)
        channel = link.channel
        try:
            async with asyncio.timeout(min(timeout_s, CONNECT_TIMEOUT_S)):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise _NotReached(address)
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError as e:
            raise _NotReached(address) from e
        self._met = True
        return link.stub

    def _order(self) -> list[tuple[int, str]]:
        n = len(self.addresses)
        return [((self._current + i) % n, self.addresses[(self._current + i) % n]) for i in range(n)]

    async def call(
        self,
        method: Callable[[SpinettaAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        writes: bool = False,
        timeout_s: float | None = None,
        attempt_s: float = ATTEMPT_TIMEOUT_S,
    ) -> A:
        """Make a call at whichever node answers, asking again while there is time.

        Only for calls that may be repeated, which all of ours may: ids are the client's, and asking twice for a
        cancel or a drain is asking once.

        Args:
            method: picks it from a stub.
            request: what to send.
            writes: it changes something.
            timeout_s: for all attempts together; None: the client's own.
            attempt_s: for one attempt at one node.

        Raises:
            StoreUnavailable: no node answered; nothing was changed.
            OutcomeUnknown: no node answered, and one may have carried it out.
            UserError, and others: what the node answered.
        """
        start_s = time.monotonic()
        end_s = start_s + (self.timeout_s if timeout_s is None else timeout_s)
        unknown: OutcomeUnknown | None = None
        failure: StoreUnavailable | OutcomeUnknown | None = None  # of the latest attempt: what a user can act upon

        async def one_round() -> A:
            nonlocal unknown, failure
            silent = 0
            for index, address in self._order():
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    break
                try:
                    answer = await self._attempt(method, request, address, min(left_s, attempt_s), writes=writes)
                except OutcomeUnknown as e:
                    unknown = failure = e
                except StoreUnavailable as e:
                    failure = e
                    silent += isinstance(e, _NotReached)
                else:
                    self._current = index
                    return answer
            if silent == len(self.addresses):
                raise _NotReached(*self.addresses)
            raise failure or StoreUnavailable("the time was over before any node answered")

        def is_worth_another(error: BaseException) -> bool:
            if not self._met and time.monotonic() - start_s >= self.first_contact_s:
                return False
            return isinstance(error, (StoreUnavailable, OutcomeUnknown))

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_before_delay(max(end_s - start_s, 0.0)),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=RETRY_WAIT_MAX_S),
            retry=tenacity.retry_if_exception(is_worth_another),
            reraise=True,
        )
        try:
            return await retrying(one_round)
        except StoreUnavailable as e:
            if unknown is not None:  # an earlier attempt may have gone through
                raise unknown from e
            raise

    async def _attempt(
        self,
        method: Callable[[SpinettaAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        address: str,
        timeout_s: float,
        *,
        writes: bool,
    ) -> A:
        end_s = time.monotonic() + timeout_s
        stub = await self._connected(address, timeout_s)
        try:
            return await method(stub)(request, timeout=max(end_s - time.monotonic(), 0.001))
        except grpc.aio.AioRpcError as e:
            raise from_rpc(e, address, writes=writes) from e

    async def stream(
        self,
        method: Callable[[SpinettaAsyncStub], grpc.aio.UnaryStreamMultiCallable[Q, A]],
        request: Q,
        *,
        writes: bool = False,
    ) -> AsyncGenerator[A, None]:
        """One stream from the first node that can be reached, until it ends or breaks.

        Raises:
            StoreUnavailable: no node could be reached, or the stream broke. The next call asks another node first.
            UserError, and others: what the node answered.
        """
        for index, address in self._order():
            try:
                stub = await self._connected(address, CONNECT_TIMEOUT_S)
            except StoreUnavailable:
                continue
            self._current = index
            call = method(stub)(request)
            try:
                async for item in call:
                    yield item
            except grpc.aio.AioRpcError as e:
                error = from_rpc(e, address, writes=writes)
                if isinstance(error, (StoreUnavailable, OutcomeUnknown)):
                    self._current = (index + 1) % len(self.addresses)
                raise error from e
            finally:
                call.cancel()  # no effect on one that has ended; leaving early must end it
            return
        raise _NotReached(*self.addresses)

    def answered_by(self) -> str:
        """The address of the node that answered last."""
        return self.addresses[self._current]
