"""Connections to the cluster's nodes: any of them will do, and another one takes over when one is gone.

In a secured cluster only voters are shown what a user asks for. An address where no voter answers may be a worker's:
then it is asked, as a guest would be, which voters there are, and they are asked instead.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
import tenacity

from spinetta import names
from spinetta.client import diagnose
from spinetta.client.errors import ASK_A_VOTER, ASK_NODE, UNIMPLEMENTED, Redirected, Throttled, from_rpc
from spinetta.client.links import LINKS_MAX, Link, Links
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.trust.dial import ANY, VOTER, WORKER, Dialer, stands
from spinetta.v1 import trust_pb2 as trust

if TYPE_CHECKING:
    from spinetta.v1.api_pb2_grpc import SpinettaAsyncStub
    from spinetta.v1.trust_pb2_grpc import EnrollAsyncStub, TrustAsyncStub

Q = TypeVar("Q")
A = TypeVar("A")

CONNECT_TIMEOUT_S = 3.0  # on one machine or network a connection stands in milliseconds, or not at all
ATTEMPT_TIMEOUT_S = 10.0  # of one call at one node, so that a frozen one leaves time to ask another
RETRY_WAIT_MAX_S = 1.0
HOPS_MAX = 8  # addresses followed within one call: there are five voters at most
LEARNED_MAX = 16  # voters remembered beside the addresses that were given
OPEN_CLUSTER = "open-cluster"

_EXPONENTIAL = tenacity.wait_random_exponential(multiplier=0.1, max=RETRY_WAIT_MAX_S)


def _wait(state: tenacity.RetryCallState) -> float:
    """Longer each time, by chance; at least as long as a node that has too much to do has asked for."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked_s = error.retry_after_s if isinstance(error, Throttled) else 0.0
    return asked_s + _EXPONENTIAL(state)


class _NotReached(StoreUnavailable):
    """No connection to one node: certainly nothing has been sent to it."""

    def __init__(self, *addresses: str, is_silent: bool = False) -> None:
        super().__init__(f"no node answers at {' or '.join(addresses)}")
        self.is_silent = is_silent  # nothing came at all, not even a refusal


@dataclass(slots=True)
class Nodes:
    """The nodes a client talks to.

    Attributes:
        addresses: in order of preference; the one that answered last is asked first.
        timeout_s: for a whole call, with all retries.
        first_contact_s: for as long as no node has ever answered a call gives up after this time already: the
            addresses may be wrong, and nobody likes to wait for that.
        dialer: makes the connections.
    """

    addresses: tuple[str, ...]
    timeout_s: float
    first_contact_s: float
    dialer: Dialer = field(default_factory=Dialer.open)
    _links: Links = field(init=False)
    _learned: list[str] = field(default_factory=list)  # voters that others have told of
    _workers: set[str] = field(default_factory=set)  # addresses where workers answered: asked last
    _preferred: str = ""
    _met: bool = False  # a connection stood once

    def __post_init__(self) -> None:
        self._links = Links(self.dialer)

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        await self._links.close()

    async def _connected(self, address: str, timeout_s: float, expect: str = VOTER) -> Link:
        """The node's link once its connection stands.

        Raises:
            StoreUnavailable: it does not, so certainly nothing has been sent.
        """
        link = await self._links.get(address, expect)
        try:
            async with asyncio.timeout(min(timeout_s, CONNECT_TIMEOUT_S)):
                if not await stands(link.channel):
                    raise _NotReached(address)
        except TimeoutError as e:
            raise _NotReached(address, is_silent=True) from e
        self._met = True
        return link

    async def _voter(self, address: str, timeout_s: float) -> Link:
        """The link to a voter at this address.

        Raises:
            Redirected: a worker is there; it names voters.
            StoreUnavailable: nobody is there whom we believe.
        """
        end_s = time.monotonic() + timeout_s
        try:
            return await self._connected(address, timeout_s)
        except _NotReached as e:
            if not self.dialer.is_secured or e.is_silent:
                raise
            link = await self._connected(address, max(end_s - time.monotonic(), 0.05), WORKER)
        request = trust.GetAuthoritiesRequest()
        try:
            answer = await link.enroll.GetAuthorities(request, timeout=max(end_s - time.monotonic(), 0.05))
        except grpc.aio.AioRpcError as e:
            raise from_rpc(e, address, writes=False) from e
        if len(self._workers) >= LINKS_MAX:  # only an order of asking hangs on it
            self._workers.clear()
        self._workers.add(address)
        raise Redirected(ASK_A_VOTER, "this node is a worker", tuple(answer.voters))

    def _order(self) -> list[str]:
        """Known addresses: the one that answered last, those after it, voters that we were told of, workers."""
        first = self.addresses.index(self._preferred) if self._preferred in self.addresses else 0
        given = [*self.addresses[first:], *self.addresses[:first]]
        known = list(dict.fromkeys([*([self._preferred] if self._preferred else []), *given, *self._learned]))
        return sorted(known, key=lambda a: a in self._workers)

    def _follow(self, told: Sequence[str]) -> Iterator[str]:
        """Addresses that a node has told of, as far as they can be used; remembered if of voters."""
        for text in told[:HOPS_MAX]:
            try:
                address = names.check_address(text)
                if not self.dialer.is_secured:
                    names.require_loopback(address)
            except UserError:  # a node's mistake is no reason to stop
                continue
            if address not in self.addresses and address not in self._learned:
                self._learned.append(address)
                del self._learned[:-LEARNED_MAX]
            yield address

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
        return await self._call(
            lambda link: method(link.api), request, writes=writes, timeout_s=timeout_s, attempt_s=attempt_s
        )

    async def trust(
        self,
        method: Callable[[TrustAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        writes: bool = False,
        timeout_s: float | None = None,
    ) -> A:
        """As `call`, of the service Trust.

        Raises:
            UserError: also when the cluster is an open one, which has no such service (reason ``open-cluster``).
        """

        def pick(link: Link) -> grpc.aio.UnaryUnaryMultiCallable[Q, A]:
            return method(link.trust)

        try:
            return await self._call(pick, request, writes=writes, timeout_s=timeout_s, attempt_s=ATTEMPT_TIMEOUT_S)
        except UserError as e:
            if e.reason != UNIMPLEMENTED or self.dialer.is_secured:
                raise
            raise UserError(
                "this is an open cluster: everybody may do everything; there are no users, tokens, labels or secrets",
                hint="found a secured one: spinetta node join --tls on",
                reason=OPEN_CLUSTER,
            ) from None

    async def enroll(
        self,
        method: Callable[[EnrollAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        writes: bool = False,
        timeout_s: float | None = None,
    ) -> A:
        """As `call`, of the service Enroll."""
        return await self._call(
            lambda link: method(link.enroll), request, writes=writes, timeout_s=timeout_s, attempt_s=ATTEMPT_TIMEOUT_S
        )

    async def _call(
        self,
        method: Callable[[Link], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        writes: bool,
        timeout_s: float | None,
        attempt_s: float,
    ) -> A:
        start_s = time.monotonic()
        end_s = start_s + (self.timeout_s if timeout_s is None else timeout_s)
        unknown: OutcomeUnknown | None = None
        failure: StoreUnavailable | OutcomeUnknown | None = None  # the latest answer: what a user can act upon

        async def one_round() -> A:
            nonlocal unknown, failure
            known = self._order()
            waiting, tried, silent = deque(known), set[str](), list[str]()
            while waiting and len(tried) < len(known) + HOPS_MAX:
                address = waiting.popleft()
                if address in tried:
                    continue
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    break
                tried.add(address)
                try:
                    answer = await self._attempt(method, request, address, min(left_s, attempt_s), writes=writes)
                except Redirected as e:
                    failure = e
                    waiting.extendleft(reversed([a for a in self._follow(e.addresses) if a not in tried]))
                except OutcomeUnknown as e:
                    unknown = failure = e
                except _NotReached as e:
                    failure = failure or e  # what a node has answered says more: e.g. that there is no majority
                    silent.append(address)
                except StoreUnavailable as e:
                    failure = e
                else:
                    self._preferred = address
                    return answer
            if silent and len(silent) == len(tried):
                await self._explain(silent)
                raise _NotReached(*silent)
            raise failure or StoreUnavailable("the time was over before any node answered")

        def is_worth_another(error: BaseException) -> bool:
            if not self._met and time.monotonic() - start_s >= self.first_contact_s:
                return False
            return isinstance(error, (StoreUnavailable, OutcomeUnknown))

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_before_delay(max(end_s - start_s, 0.0)),
            wait=_wait,
            retry=tenacity.retry_if_exception(is_worth_another),
            reraise=True,
        )
        try:
            return await retrying(one_round)
        except (StoreUnavailable, UserError) as e:
            if unknown is not None and not isinstance(e, UserError):  # an earlier attempt may have gone through
                raise unknown from e
            raise

    async def _explain(self, silent: Sequence[str]) -> None:
        """When no node can be reached at all: raise what is wrong with the certificates, if that is it."""
        error = await diagnose.why(silent, self.dialer, CONNECT_TIMEOUT_S)
        if error is not None:
            raise error

    async def _attempt(
        self,
        method: Callable[[Link], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        address: str,
        timeout_s: float,
        *,
        writes: bool,
    ) -> A:
        end_s = time.monotonic() + timeout_s
        link = await self._voter(address, timeout_s)
        try:
            return await method(link)(request, timeout=max(end_s - time.monotonic(), 0.001))
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

        A node that is not the one to ask names others, before the first item: they are asked then.

        Raises:
            StoreUnavailable: no node could be reached, or the stream broke. The next call asks another node first.
            UserError, and others: what the node answered.
        """
        known = self._order()
        waiting = deque((address, VOTER) for address in known)
        tried, silent = set[tuple[str, str]](), list[str]()
        failure: StoreUnavailable | None = None
        while waiting and len(tried) < len(known) + HOPS_MAX:
            address, expect = waiting.popleft()
            if (address, expect) in tried:
                continue
            tried.add((address, expect))
            try:
                if expect == VOTER:
                    link = await self._voter(address, CONNECT_TIMEOUT_S)
                else:
                    link = await self._connected(address, CONNECT_TIMEOUT_S, expect)
            except Redirected as e:
                failure = e
                waiting.extendleft((a, VOTER) for a in reversed(list(self._follow(e.addresses))))
                continue
            except StoreUnavailable as e:
                failure = e
                silent.append(address)
                continue
            call = method(link.api)(request)
            begun = False
            try:
                async for item in call:
                    begun = True
                    if expect == VOTER:
                        self._preferred = address
                    yield item
            except grpc.aio.AioRpcError as e:
                error = from_rpc(e, address, writes=writes)
                if isinstance(error, Redirected) and not begun:
                    failure = error
                    if error.object and hasattr(request, "id"):
                        request.id = error.object
                    to = VOTER if error.reason == ASK_A_VOTER else ANY
                    waiting.extendleft((a, to) for a in reversed(self._holders(error)))
                    continue
                if isinstance(error, (StoreUnavailable, OutcomeUnknown)):
                    self._turn_away(address)
                raise error from e
            finally:
                call.cancel()  # no effect on one that has ended; leaving early must end it
            return
        if len(silent) == len(tried):
            await self._explain(silent)
            raise _NotReached(*silent)
        raise failure or _NotReached(*silent)

    def _holders(self, error: Redirected) -> list[str]:
        """Where to ask instead. A holder is one node among many: it is not remembered."""
        if error.reason == ASK_A_VOTER:
            return list(self._follow(error.addresses))
        if self.dialer.has_token:
            raise UserError(
                "this is on a node which does not take bearer tokens: it could use one in its turn",
                hint="log in for a certificate: spinetta login --bearer-file FILE",
                reason=ASK_NODE,
            )
        found = []
        for text in error.addresses[:HOPS_MAX]:
            address = names.check_address(text)
            found.append(address if self.dialer.is_secured else names.require_loopback(address))
        return found

    def _turn_away(self, address: str) -> None:
        """Ask another node first the next time."""
        order = self._order()
        self._preferred = order[(order.index(address) + 1) % len(order)] if address in order else order[0]

    def answered_by(self) -> str:
        """The address of the node that answered last."""
        return self._preferred or self.addresses[0]
