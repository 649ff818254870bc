"""The store through the daemons of voters, for nodes without an etcd member of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import grpc.aio

from spinetta import gatewaycodec as gc
from spinetta.errors import InvariantViolation, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import LeaseId, Membership, Revision
from spinetta.store.failures import GONE, cancelled_ourselves
from spinetta.store.protocol import READ_KEYS_MAX, Change, Changes, KeyValue, Page, Snapshot
from spinetta.store.voterlinks import Line, Voter, VoterLinks, told_by
from spinetta.store.watch import reading
from spinetta.trust.dial import Dialer
from spinetta.txn import Result, Txn

STAND_S = 5.0  # from asking for a watch to its standing
SILENT_S = 15.0  # a voter gives a sign of life every 5 s; a watch that is quiet for longer is dead


class GatewayStore:
    """`Store` over the gateway of any voter.

    Construct and use it inside one event loop. Each call goes to one voter, or, when that one certainly has not
    carried it out, to the next. What this node may not see is not there, and what it may not do raises `Denied`.

    Args:
        dialer: how to connect; new certificates are used as soon as its serial says so, without failing a call.
        voters: addresses of their API.
        name: this node's; nodes of different names prefer different voters.
    """

    def __init__(self, dialer: Dialer, voters: Sequence[str], *, name: str = "") -> None:
        self._links = VoterLinks(dialer, name)
        self._first: Sequence[str] | None = voters

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The voters in use, the preferred one first."""
        return self._links.addresses

    async def set_endpoints(self, voters: Sequence[str]) -> None:
        """Use these from now on. Watches over one that is no longer among them end with `StoreUnavailable`."""
        self._first = None
        await self._links.set_addresses(voters)

    async def close(self) -> None:
        """Let go of connections. May be called twice."""
        await self._links.close()

    async def _call(self, method: gc.Method, request: Any, timeout_s: float) -> Any:
        await self._begin()
        return await self._links.call(method, request, timeout_s=timeout_s)

    async def _begin(self) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            await self._links.set_addresses(first)

    # --- transactions ------------------------------------------------------------------------------------------

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        """As `Store.commit`.

        Raises also:
            UserError: it is larger than etcd takes; `Denied`: this node may not commit it.
            InvariantViolation: it is of no form that etcd takes.
        """
        request = gc.COMMIT.request(txn=gc.txn_to_pb(txn))
        return gc.result_from_pb(await self._call(gc.COMMIT, request, timeout_s))

    # --- reading -----------------------------------------------------------------------------------------------

    async def read(self, keys: Sequence[str], *, timeout_s: float = 5.0) -> Snapshot:
        """As `Store.read`."""
        wanted = tuple(dict.fromkeys(keys))
        if len(wanted) > READ_KEYS_MAX:
            raise InvariantViolation(f"{len(wanted)} keys in one read: at most {READ_KEYS_MAX}")
        request = gc.READ.request(keys=[gc.key_to_pb(key) for key in wanted])
        response = await self._call(gc.READ, request, timeout_s)
        entries: dict[str, KeyValue | None] = dict.fromkeys(wanted)
        entries |= {kv.key: kv for kv in map(_key_value, response.entries)}
        return Snapshot(Revision(response.revision), entries)

    async def list(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = 0,
        keys_only: bool = False,
        newest_first: bool = False,
        revision: Revision = Revision(0),
        timeout_s: float = 5.0,
    ) -> Page:
        """As `Store.list`; `timeout_s` is for each message of a long list.

        `more` may be true although what follows may not be seen by this node: the next page is empty then.
        """
        found: list[KeyValue] = []
        at, cursor = revision, gc.key_to_pb(after)
        while True:
            request = gc.LIST.request(
                prefix=gc.key_to_pb(prefix),
                after=cursor,
                limit=limit - len(found) if limit else 0,
                keys_only=keys_only,
                newest_first=newest_first,
                revision=at,
            )
            response = await self._call(gc.LIST, request, timeout_s)
            found += map(_key_value, response.entries)
            at = Revision(response.revision)  # all portions of one list are of one revision
            if not response.more or (limit and len(found) >= limit):
                return Page(at, tuple(found), response.more)
            if response.cursor == cursor:
                raise StoreUnavailable("a voter does not get on with a list")
            cursor = response.cursor

    async def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        """As `Store.watch`. Close it (``contextlib.aclosing``) when leaving it early.

        Also ends with `StoreUnavailable` when this node reads too slowly, its rights change, or its certificate has
        been renewed.
        """
        await self._begin()
        voter, line = await self._links.pick(STAND_S)
        async with line.use() as channel, contextlib.aclosing(_watch(voter, line, channel, prefix, start)) as changes:
            async for each in changes:
                yield each

    # --- leases ------------------------------------------------------------------------------------------------

    async def grant_lease(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseId:
        """As `Store.grant_lease`."""
        return LeaseId((await self._call(gc.GRANT_LEASE, gc.GRANT_LEASE.request(ttl_s=ttl_s), timeout_s)).lease)

    async def keep_alive(self, lease: LeaseId, *, timeout_s: float = 5.0) -> float | None:
        """As `Store.keep_alive`. A lease that is not this node's does not exist for it."""
        ttl_s = (await self._call(gc.KEEP_ALIVE, gc.KEEP_ALIVE.request(lease=lease), timeout_s)).ttl_s
        return float(ttl_s) if ttl_s > 0 else None

    async def revoke_lease(self, lease: LeaseId, *, timeout_s: float = 5.0) -> None:
        """As `Store.revoke_lease`."""
        await self._call(gc.REVOKE_LEASE, gc.REVOKE_LEASE.request(lease=lease), timeout_s)

    # --- what etcd says of itself ------------------------------------------------------------------------------

    async def members(self, *, timeout_s: float = 5.0) -> Membership:
        """etcd's members, leader and alarms, as a voter tells of them."""
        return gc.membership_from_pb(await self._call(gc.MEMBERS, gc.MEMBERS.request(), timeout_s))


def _key_value(message: Any) -> KeyValue:
    return KeyValue(*gc.entry_from_pb(message))


async def _watch(
    voter: Voter, line: Line, channel: grpc.aio.Channel, prefix: str, start: Revision
) -> AsyncGenerator[Changes, None]:
    open_stream = channel.unary_stream(gc.WATCH.path, gc.WATCH.encode_request, gc.WATCH.response.FromString)
    call = open_stream(gc.WATCH.request(prefix=gc.key_to_pb(prefix), start=start))
    try:
        first = await _next(voter, call, STAND_S)
        yield Changes(Revision(first.revision), ())
        while True:
            response = await _next(voter, call, SILENT_S)
            if response.changes:
                yield Changes(Revision(response.revision), tuple(map(_change, response.changes)))
            if line.retired:
                raise StoreUnavailable(f"the watch ends: the connection to {voter.address} is being replaced")
    except grpc.aio.AioRpcError as error:
        told = told_by(error)
        voter_failed = told is None or isinstance(told, StoreUnavailable | OutcomeUnknown)
        if told is not None and not voter_failed and not _is_busy(told):
            raise told from error
        if told is None:
            voter.hold()
        raise StoreUnavailable(f"the watch broke: {voter.address}: {told or error.details()}") from error
    except GONE as error:
        if cancelled_ourselves():
            raise
        raise StoreUnavailable(f"the watch broke: {voter.address}: the connection was closed") from error
    finally:
        call.cancel()


def _is_busy(error: Exception) -> bool:
    return isinstance(error, UserError) and error.reason == gc.Busy.reason


async def _next(voter: Voter, call: Any, limit_s: float) -> Any:
    async with reading(call) as message:
        done, _ = await asyncio.wait((message,), timeout=limit_s)
        if not done:
            voter.hold()
            raise StoreUnavailable(f"the watch broke: {voter.address} has fallen silent")
        response = message.result()
    if response is grpc.aio.EOF:
        raise StoreUnavailable(f"the watch was ended by {voter.address}")
    return response


def _change(message: Any) -> Change:
    kv = _key_value(message.entry)
    return Change(kv.key, None if message.deleted else kv, Revision(message.revision))
