# ruff: noqa: D102 - RPCs are told of in the .proto file
"""The service that voters offer to nodes without an etcd member.

Who calls is told by `Who`; what a worker may commit is judged by `gatekeeper`, what it may see by `visibility`; how
much it may ask is counted by `quota`. A node of role voter may do everything. Each commit stands under the revision of
its caller's rights, so that taking them away is atomic with all that it writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from spinetta import codec, gatekeeper, keys, visibility
from spinetta import gatewaycodec as gc
from spinetta.access import NodeAcl
from spinetta.codec import readable
from spinetta.errors import CorruptRecord, Denied, InvariantViolation, StoreUnavailable, UserError
from spinetta.gatekeeper import Admitted, Moot, Refused
from spinetta.model import LeaseId, NodeId, Revision
from spinetta.node.gateway.fanout import Fanout
from spinetta.node.gateway.leases import Leases
from spinetta.node.gateway.quota import GatewayLimits, Quota
from spinetta.node.gateway.watches import Caller, Watches
from spinetta.store.protocol import READ_KEYS_MAX, KeyValue, Store
from spinetta.txn import Conflict, Result, Txn

log = logging.getLogger(__name__)

Who = Callable[[Any], Awaitable[tuple[NodeId, NodeAcl, Revision]]]
"""Of a gRPC context: the node that calls, its rights, and the revision of their record. Raises `Denied`."""

CALL_MAX_S = 10.0  # the longest that a call may last, whatever its deadline
CALL_DEFAULT_S = 5.0  # of one without a deadline
ANSWER_S = 0.1  # before the deadline, so that the caller hears what became of it
LEASE_TTL_MAX_S = int(gatekeeper.LEASE_TTL_MAX_S)
PORTION_KEYS = 2048  # of a list in one message …
PORTION_BYTES = 1 << 20  # … whichever is first; one value may be larger
SCAN_PAGE_KEYS = 1024
SCAN_KEYS_MAX = 16_384  # looked at for one portion, when most may not be seen: some 50 ms at etcd and as much here
REFUSALS_TOLD, REFUSALS_EVERY_S = 30, 60.0  # of each node: a hostile one must not fill the logs
RIGHTS_TRIES = 2  # of a commit, when the caller's rights were changed meanwhile


class Unreadable:
    """In the place of a request that is no message."""


class GatewayService:
    """The gateway of one voter. `run` must be running while it serves; `add_gateway` puts it on a server.

    Args:
        store: straight to etcd.
        who: tells the caller of a gRPC context.
        membership: what etcd says of itself, as ``NodePort.membership``.
        serves: whether this node has a seat now; without one it would pass calls on, perhaps in a circle.
        refused: told of what a worker tried and may not, e.g. for the audit log: node, call, reason; some a minute.
    """

    def __init__(
        self,
        store: Store,
        who: Who,
        *,
        membership: Callable[[], Awaitable[Any]] | None = None,
        serves: Callable[[], bool] = lambda: True,
        refused: Callable[[NodeId, str, str], None] | None = None,
        limits: GatewayLimits | None = None,
    ) -> None:
        self._store = store
        self._who = who
        self._membership = membership
        self._serves = serves
        self._refused = refused
        self.quota = Quota(limits or GatewayLimits())
        self.leases = Leases()
        self._refusals: dict[NodeId, tuple[float, int]] = {}  # of approved nodes only: since when, and how many
        self.fanout = Fanout(store)
        self._watches = Watches(store, self.fanout, self.called)

    async def run(self) -> None:
        """Follow what workers watch, until cancelled."""
        await self.fanout.run()

    # --- transactions ------------------------------------------------------------------------------------------

    async def commit(self, context: Any, caller: Caller, request: Any, timeout_s: float) -> Any:
        body = gc.txn_from_pb(request.txn)
        now = asyncio.get_running_loop().time
        deadline_s = now() + timeout_s
        for left in reversed(range(RIGHTS_TRIES)):
            judged = await self._judged(caller, body, deadline_s - now())
            if isinstance(judged, Conflict):
                return gc.result_to_pb(judged)
            guarded = replace(judged, when=(*judged.when, caller.guard))
            result: Result = await self._store.commit(guarded, timeout_s=max(0.001, deadline_s - now()))
            if not isinstance(result, Conflict) or not left:
                break
            # Nothing was written. If it is the rights that have changed, the caller is told so, or tried by the new.
            key = keys.acl_node(caller.node)
            entry = (await self._store.read([key], timeout_s=max(0.001, deadline_s - now()))).entries[key]
            if entry is not None and entry.modified == caller.revision:
                break
            caller = await self.called(context)
        return gc.result_to_pb(result)

    async def _judged(self, caller: Caller, body: Txn, left_s: float) -> Txn | Conflict:
        if caller.is_voter:
            return body
        wanted = gatekeeper.needs(caller.node, body)
        revision, known = await self._known(wanted, left_s)
        verdict = gatekeeper.admit(
            caller.node,
            caller.acl.role,
            caller.acl,
            body,
            known,
            revision=revision,
            leases=self.leases.of(caller.node),
        )
        match verdict:
            case Admitted():
                return verdict.txn
            case Moot():
                return Conflict(revision)
            case Refused():
                self._refuse(caller, "Commit", verdict.reason)
                raise Denied(verdict.reason)

    async def _known(self, wanted: Sequence[str], left_s: float) -> tuple[Revision, dict[str, KeyValue | None]]:
        """What the store has of these, and a revision that none of it is older than."""
        known: dict[str, KeyValue | None] = {}
        revision = Revision(0)
        for at in range(0, len(wanted), READ_KEYS_MAX):
            snapshot = await self._store.read(wanted[at : at + READ_KEYS_MAX], timeout_s=max(0.001, left_s))
            revision = revision or snapshot.revision
            known |= snapshot.entries
        return revision, known

    def _refuse(self, caller: Caller, call: str, reason: str) -> None:
        now_s = asyncio.get_running_loop().time()
        since_s, count = self._refusals.get(caller.node, (now_s, 0))
        if now_s - since_s >= REFUSALS_EVERY_S:
            if count > REFUSALS_TOLD:
                reason = f"{reason} (and {count - REFUSALS_TOLD} more since the last that was told)"
            since_s, count = now_s, 0
        self._refusals[caller.node] = (since_s, count + 1)
        if count >= REFUSALS_TOLD:
            return
        log.warning("refused to node %s: %s: %s", caller.node, call, reason)
        if self._refused is not None:
            self._refused(caller.node, call, reason)

    # --- reading -----------------------------------------------------------------------------------------------

    async def read(self, _: Any, caller: Caller, request: Any, timeout_s: float) -> Any:
        wanted = [gc.key_from_pb(key) for key in request.keys]
        snapshot = await self._store.read(wanted, timeout_s=timeout_s)
        found = [kv for kv in snapshot.entries.values() if kv is not None]
        if not caller.is_voter:
            secrets = await self._secrets(caller, wanted, timeout_s)
            found = [
                kv for kv in found if visibility.visible(caller.node, caller.acl, kv.key, kv.value, secrets=secrets)
            ]
        return gc.READ.response(revision=snapshot.revision, entries=map(gc.entry_to_pb, found))

    async def _secrets(self, caller: Caller, wanted: Sequence[str], timeout_s: float) -> frozenset[str]:
        """Those of the secrets that are asked for which tasks of the caller need."""
        if not any(key.startswith(keys.SECRET) for key in wanted):
            return frozenset()
        running = await self._store.list(
            keys.running_on(caller.node), limit=PORTION_KEYS, keys_only=True, timeout_s=timeout_s
        )
        tasks = [keys.task(found[1]) for kv in running.entries if (found := keys.find_running(kv.key)) is not None]
        _, known = await self._known(tasks, timeout_s)
        records = (readable(codec.decode_task, kv.value) for kv in known.values() if kv is not None)
        return visibility.secrets_of(caller.node, (record for record in records if record is not None))

    async def list(self, _: Any, caller: Caller, request: Any, timeout_s: float) -> Any:
        prefix, cursor = gc.key_from_pb(request.prefix), gc.key_from_pb(request.after)
        if not caller.is_voter and not visibility.listable(caller.node, prefix):
            raise self._denied_range(caller, "List", prefix)
        if request.limit < 0 or request.revision < 0:
            raise UserError("a limit or revision below 0")
        most = min(request.limit, PORTION_KEYS) if request.limit else PORTION_KEYS
        now = asyncio.get_running_loop().time
        deadline_s = now() + timeout_s
        at, scanned, size_bytes, found = Revision(request.revision), 0, 0, []
        while True:
            page = await self._store.list(
                prefix,
                after=cursor,
                limit=most if caller.is_voter else SCAN_PAGE_KEYS,
                keys_only=request.keys_only and caller.is_voter,
                newest_first=request.newest_first,
                revision=at,
                timeout_s=max(0.001, deadline_s - now()),
            )
            at, scanned = page.revision, scanned + len(page.entries)
            for number, kv in enumerate(page.entries, 1):
                cursor = kv.key
                if not caller.is_voter and not visibility.visible(caller.node, caller.acl, kv.key, kv.value):
                    continue
                found.append(gc.entry_to_pb(kv, key_only=request.keys_only))
                size_bytes += len(kv.key) + (0 if request.keys_only else len(kv.value)) + 32
                if len(found) >= most or size_bytes >= PORTION_BYTES:
                    return _portion(at, found, cursor, page.more or number < len(page.entries))
            if not page.more or scanned >= SCAN_KEYS_MAX or deadline_s - now() < timeout_s / 2:
                return _portion(at, found, cursor, page.more)

    def _denied_range(self, caller: Caller, call: str, prefix: str) -> Denied:
        reason = f"a worker may not {call.lower()} {prefix!r}"
        self._refuse(caller, call, reason)
        return Denied(reason)

    # --- watching ----------------------------------------------------------------------------------------------

    async def watch(self, context: Any, caller: Caller, request: Any) -> AsyncIterator[bytes]:
        prefix, start = gc.key_from_pb(request.prefix), Revision(request.start)
        with self.quota.watch(caller.node, is_voter=caller.is_voter):
            if start < 0:
                raise UserError("a watch begins at a revision")
            if caller.is_voter:
                messages = self._watches.own(context, caller, prefix, start)
            else:
                if not visibility.watchable(caller.node, prefix):
                    raise self._denied_range(caller, "Watch", prefix)
                if not start:
                    raise UserError("a watch begins at a revision")
                messages = self._watches.shared(context, caller, prefix, start)
            async with contextlib.aclosing(messages):
                async for message in messages:
                    yield message

    # --- leases ------------------------------------------------------------------------------------------------

    async def grant_lease(self, _: Any, caller: Caller, request: Any, timeout_s: float) -> Any:
        if caller.is_voter:
            return gc.GRANT_LEASE.response(lease=await self._store.grant_lease(request.ttl_s, timeout_s=timeout_s))
        if not 1 <= request.ttl_s <= LEASE_TTL_MAX_S:
            raise UserError(f"a lease lasts from 1 to {LEASE_TTL_MAX_S} s")
        self.leases.check_room(caller.node)
        lease = await self._store.grant_lease(request.ttl_s, timeout_s=timeout_s)
        self.leases.granted(caller.node, lease, request.ttl_s)
        return gc.GRANT_LEASE.response(lease=lease)

    async def keep_alive(self, _: Any, caller: Caller, request: Any, timeout_s: float) -> Any:
        lease = LeaseId(request.lease)
        if not await self._is_own(caller, lease, timeout_s):
            return gc.KEEP_ALIVE.response()
        ttl_s = await self._store.keep_alive(lease, timeout_s=timeout_s)
        if not caller.is_voter:
            if ttl_s is None:
                self.leases.ended(caller.node, lease)
            else:
                self.leases.kept(caller.node, lease, ttl_s)
        return gc.KEEP_ALIVE.response(ttl_s=ttl_s or 0.0)

    async def revoke_lease(self, _: Any, caller: Caller, request: Any, timeout_s: float) -> Any:
        lease = LeaseId(request.lease)
        if await self._is_own(caller, lease, timeout_s):
            await self._store.revoke_lease(lease, timeout_s=timeout_s)
            self.leases.ended(caller.node, lease)
        return gc.REVOKE_LEASE.response()

    async def _is_own(self, caller: Caller, lease: LeaseId, timeout_s: float) -> bool:
        """Of a worker: one that was granted to it here, or that its registration is bound to."""
        if caller.is_voter or lease in self.leases.of(caller.node):
            return True
        key = keys.node(caller.node)
        entry = (await self._store.read([key], timeout_s=timeout_s)).entries[key]
        return entry is not None and bool(lease) and entry.lease == lease

    async def members(self, _context: Any, _caller: Caller, _request: Any, _timeout_s: float) -> Any:
        if self._membership is None:
            raise StoreUnavailable("this voter does not know etcd's members")
        return gc.membership_to_pb(await self._membership())

    # --- the boundary ------------------------------------------------------------------------------------------

    async def called(self, context: Any) -> Caller:
        """Who calls. Raises `Denied`, or `StoreUnavailable` when this node is not the one to ask."""
        if not self._serves():
            raise StoreUnavailable("this node has no seat: ask another")
        try:
            caller = Caller(*await self._who(context))
        except CorruptRecord as e:  # neither a yes nor a no
            raise StoreUnavailable(f"the rights of who calls cannot be read: {e}") from e
        if caller.acl.revoked:
            raise Denied(f"the rights of node {caller.node} have been revoked")
        return caller

    async def answer(self, method: gc.Method, request: Any, context: Any) -> Any:
        """One call, with its limits."""
        if isinstance(request, Unreadable):
            raise InvariantViolation("the request cannot be read")
        left_s = context.time_remaining()
        timeout_s = min(CALL_DEFAULT_S if left_s is None else left_s, CALL_MAX_S)
        timeout_s = max(timeout_s - ANSWER_S, timeout_s / 2)
        began_s = asyncio.get_running_loop().time()
        caller = await self.called(context)
        size_bytes = request.ByteSize()
        if size_bytes > gc.MESSAGE_BYTES_MAX:
            raise UserError("the request is larger than 1.5 MiB", hint="make it smaller", reason="too-large")
        left_s = max(0.001, timeout_s - (asyncio.get_running_loop().time() - began_s))
        if caller.is_voter:
            return await HANDLERS[method](self, context, caller, request, left_s)
        with self.quota.call(caller.node, size_bytes):
            response = await HANDLERS[method](self, context, caller, request, left_s)
            self.quota.charge(caller.node, response.ByteSize())
            return response


HANDLERS: dict[gc.Method, Callable[[GatewayService, Any, Caller, Any, float], Awaitable[Any]]] = {
    gc.COMMIT: GatewayService.commit,
    gc.READ: GatewayService.read,
    gc.LIST: GatewayService.list,
    gc.GRANT_LEASE: GatewayService.grant_lease,
    gc.KEEP_ALIVE: GatewayService.keep_alive,
    gc.REVOKE_LEASE: GatewayService.revoke_lease,
    gc.MEMBERS: GatewayService.members,
}


def _portion(at: Revision, found: list[Any], cursor: str, more: bool) -> Any:
    return gc.LIST.response(revision=at, entries=found, more=more, cursor=gc.key_to_pb(cursor) if more else b"")
