"""The two kinds of watches that the gateway serves: a worker's, fed by the fan-out, and a voter's, with one at etcd."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from spinetta import gatewaycodec as gc
from spinetta import keys
from spinetta.access import NodeAcl, NodeRole
from spinetta.errors import StoreUnavailable
from spinetta.model import NodeId, Revision
from spinetta.node.gateway.fanout import Fanout, sees_for
from spinetta.store.protocol import Store
from spinetta.txn import RevisionIs

WATCH_BYTES = 256 << 10  # of a message of a watch, unless one revision has more
BEAT_S = 5.0  # a watch without news sends a sign of life
RECHECK_S = 2.0  # between looks at the rights of one whose watch has news


@dataclass(frozen=True, slots=True)
class Caller:
    """A node that calls, with its rights as of `revision`."""

    node: NodeId
    acl: NodeAcl
    revision: Revision

    @property
    def is_voter(self) -> bool:
        """Trusted with everything."""
        return self.acl.role is NodeRole.VOTER

    @property
    def guard(self) -> RevisionIs:
        """Its rights are as they were."""
        return RevisionIs(keys.acl_node(self.node), self.revision)


class Watches:
    """Makes the messages of watches. `called` tells anew who calls, with its rights as they are now."""

    def __init__(self, store: Store, fanout: Fanout, called: Callable[[Any], Awaitable[Caller]]) -> None:
        self._store = store
        self._fanout = fanout
        self._called = called

    async def shared(self, context: Any, caller: Caller, prefix: str, start: Revision) -> AsyncGenerator[bytes, None]:
        """A worker's: what it may see of one of the feeds."""
        now = asyncio.get_running_loop().time
        checked_s = now()
        sees = sees_for(caller.node, caller.acl, prefix)
        async with self._fanout.subscribe(prefix, start, sees) as subscriber:
            yield gc.watch_response(Revision(start - 1))
            while True:
                items = await subscriber.take(BEAT_S)
                if now() - checked_s >= RECHECK_S:
                    await self._same_rights(context, caller)
                    checked_s = now()
                if not items:
                    yield gc.watch_response(Revision(0))
                    continue
                sent_s = now()
                for revision, parts in _in_portions([(i.revision, i.data) for i in items]):
                    yield gc.watch_response(revision, parts)
                await asyncio.sleep(max(0.0, subscriber.pause_s - (now() - sent_s)))

    async def own(self, context: Any, caller: Caller, prefix: str, start: Revision) -> AsyncGenerator[bytes, None]:
        """A voter's: whatever it asks for."""
        now = asyncio.get_running_loop().time
        checked_s = now()
        async with contextlib.aclosing(self._store.watch(prefix, start=start)) as watch:
            following: asyncio.Future[Any] | None = None
            try:
                while True:
                    following = following or asyncio.ensure_future(anext(watch))
                    done, _ = await asyncio.wait((following,), timeout=BEAT_S)
                    if now() - checked_s >= RECHECK_S:
                        await self._same_rights(context, caller)
                        checked_s = now()
                    if not done:
                        yield gc.watch_response(Revision(0))
                        continue
                    changes, following = following.result(), None
                    if not changes.events:
                        yield gc.watch_response(changes.revision)
                    encoded = [(e.revision, gc.change_bytes(e.key, e.value, e.revision)) for e in changes.events]
                    for revision, parts in _in_portions(encoded):
                        yield gc.watch_response(revision, parts)
            except StopAsyncIteration:
                raise StoreUnavailable("the watch was ended") from None
            finally:
                if following is not None:
                    following.cancel()
                    await asyncio.wait((following,))
                    if not following.cancelled():
                        following.exception()  # seen

    async def _same_rights(self, context: Any, caller: Caller) -> None:
        """Raises when the caller's rights are not what its watch began with."""
        if (await self._called(context)).revision != caller.revision:
            raise StoreUnavailable("the node's rights have changed: list again")


def _in_portions(changes: list[tuple[Revision, bytes]]) -> list[tuple[Revision, list[bytes]]]:
    """Cut into messages, between revisions only."""
    portions: list[tuple[Revision, list[bytes]]] = []
    size_bytes = 0
    for revision, data in changes:
        if not portions or (size_bytes >= WATCH_BYTES and portions[-1][0] != revision):
            portions.append((revision, []))
            size_bytes = 0
        parts = portions[-1][1]
        parts.append(data)
        size_bytes += len(data)
        portions[-1] = (revision, parts)
    return portions
