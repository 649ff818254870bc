"""The records of rights, as this node knows them: kept in memory, and never older than `STALE_S` without being asked.

The copy is filled by a list and followed by a watch. A watch may lose an event, so what the copy holds is compared with
the store's revisions every `CONFIRM_S`; when that could not be done for `STALE_S`, each question goes to the store, and
fails when the store does not answer: unknown is neither "no" nor "yes".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from spinetta import keys, trustcodec
from spinetta.access import GroupAcl, NodeAcl, Policy, UserAcl
from spinetta.errors import Compacted, StoreUnavailable, UserError
from spinetta.model import NodeId, Revision
from spinetta.node.hub import closing
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store.protocol import KeyValue, Store
from spinetta.trust.backoff import Backoff

T = TypeVar("T")
log = logging.getLogger(__name__)

CONFIRM_S = 2.0  # between comparisons; keys and revisions only: 80 kB for a thousand records
STALE_S = 5.0  # two comparisons may fail; writes are guarded by the record's revision, so this bounds reading only
RETRY_MIN_S, RETRY_MAX_S = 0.1, 2.0  # after a lost watch; short, as every call costs a read until it is back
REFUSED_RETRY_S = 60.0  # when this node may not list them at all
LAG_S = 0.5  # by which a watch may be behind a list
ENTRIES_MAX = 20_000  # 6 MB, and a list of them still fits into a message; more than that are read one by one


class AclView:
    """Who may do what, by name. `run` should be running: without it every question is read from the store.

    All questions raise `StoreUnavailable` when the answer cannot be had now, and `CorruptRecord` when the record cannot
    be read. Each answers with the record and the revision of its last change, which is the guard of what is done on
    the strength of it. `fresh`: from the store, whatever is known here.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._entries: dict[str, KeyValue] = {}
        self._decoded: dict[str, tuple[Revision, object]] = {}
        self._touched: set[str] = set()  # changed by the watch since the comparison under way was sent
        self._follows = False
        self._confirmed_s = float("-inf")

    @property
    def is_stale(self) -> bool:
        """Questions are read from the store at the moment."""
        return not self._follows or self._clock() - self._confirmed_s > STALE_S

    async def user(self, name: str, *, fresh: bool = False) -> tuple[UserAcl, Revision] | None:
        """A person's rights; None: there is no such record."""
        return await self._one(UserAcl, keys.acl_user(name), fresh)

    async def node(self, name: NodeId, *, fresh: bool = False) -> tuple[NodeAcl, Revision] | None:
        """A node's rights; None: it has not been approved."""
        return await self._one(NodeAcl, keys.acl_node(name), fresh)

    async def group(self, name: str, *, fresh: bool = False) -> tuple[GroupAcl, Revision] | None:
        """What a group's nodes may be cleared for; None: there is no such group."""
        return await self._one(GroupAcl, keys.acl_group(name), fresh)

    async def policy(self, *, fresh: bool = False) -> tuple[Policy, Revision]:
        """The cluster's policy; the default one, at revision 0, when none has been set."""
        return await self._one(Policy, keys.POLICY, fresh) or (Policy(), Revision(0))

    async def _one(self, kind: type[T], key: str, fresh: bool) -> tuple[T, Revision] | None:
        entry = (await self._store.read([key])).entries[key] if fresh or self.is_stale else self._entries.get(key)
        if entry is None:
            return None
        known = self._decoded.get(key)
        if known is not None and known[0] == entry.modified and isinstance(known[1], kind):
            return known[1], entry.modified
        value = trustcodec.decode(kind, entry.value)
        if key in self._entries:  # of others nothing is kept, so that names that are tried out take no memory
            self._decoded[key] = (entry.modified, value)
        return value, entry.modified

    async def run(self) -> None:
        """Keep the copy. Runs until it is cancelled."""
        teller = Teller(log)
        wait = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while True:
            refused_s, began_s = 0.0, self._clock()
            try:
                await self._follow()
            except UserError as e:
                refused_s = REFUSED_RETRY_S
                teller.tell(f"the records of rights are read one by one: {e}")
            except TROUBLE as e:
                teller.tell(f"the records of rights are not followed now: {e}")
            finally:
                self._follows = False
                self._entries.clear()
                self._decoded.clear()
            if self._clock() - began_s > RETRY_MAX_S:  # it stood for a while
                wait.reset()
            await asyncio.sleep(refused_s + wait.next_s())

    async def _follow(self) -> None:
        asked_s = self._clock()
        page = await self._store.list(keys.ACL)
        if len(page.entries) > ENTRIES_MAX:
            raise UserError(f"there are more than {ENTRIES_MAX} of them", reason="too-large")
        self._entries = {e.key: e for e in page.entries}
        try:
            async with (
                closing(self._store.watch(keys.ACL, start=Revision(page.revision + 1))) as watch,
                asyncio.TaskGroup() as group,
            ):
                async for changes in watch:
                    for event in changes.events:
                        self._take(event.key, event.value)
                    if not self._follows:  # the first says that nothing since the list has been lost
                        self._confirmed_s, self._follows = asked_s, True
                        group.create_task(self._compare())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several

    async def _compare(self) -> None:
        while True:
            await asyncio.sleep(CONFIRM_S)
            self._touched.clear()
            asked_s = self._clock()
            with contextlib.suppress(StoreUnavailable, UserError):  # then it grows stale, which is the truth
                page = await self._store.list(keys.ACL, keys_only=True)
                await self._check({e.key: e.modified for e in page.entries})
                self._confirmed_s = asked_s

    async def _check(self, there: Mapping[str, Revision]) -> None:
        """Compare with what the store had a moment ago.

        Raises:
            Compacted: the watch has missed something.
        """
        here = {k: e.modified for k, e in self._entries.items()}
        differ = {k for k in there.keys() | here.keys() if there.get(k) != here.get(k)} - self._touched
        if differ:  # the list may have overtaken the watch
            await asyncio.sleep(LAG_S)
        if differ - self._touched:
            raise Compacted(Revision(0))

    def _take(self, key: str, value: KeyValue | None) -> None:
        self._touched.add(key)
        self._decoded.pop(key, None)
        if value is None:
            self._entries.pop(key, None)
        else:
            self._entries[key] = value
