"""One watch at etcd for all workers: each change is taken in and encoded once, and handed to those who may see it.

A `Feed` follows one prefix and remembers its latest changes, so that a worker may begin a little in the past, as it
does after a list. A worker that reads more slowly than things change is cut, and lists again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from spinetta import gatewaycodec, keys, visibility
from spinetta.access import NodeAcl
from spinetta.errors import Compacted, SpinettaError, StoreUnavailable
from spinetta.model import NodeId, Revision
from spinetta.store.protocol import Change, Store

log = logging.getLogger(__name__)

PREFIXES = (keys.NODE, keys.QUEUED, keys.RUNNING, keys.LEADER)  # what workers watch; a feed for each at most
RING_EVENTS = 8192  # a list and its watch are milliseconds apart; this is several seconds of a busy cluster …
RING_BYTES = 4 << 20  # … whatever is in it
BUFFER_EVENTS, BUFFER_BYTES = 2 * RING_EVENTS, 2 * RING_BYTES  # of one watch; encoded changes are shared, not copied
BACK_REVISIONS_MAX = 10_000  # how far back a feed begins for the first who asks
LINGER_S = 30.0  # a feed that nobody listens to goes on for so long
MESSAGES_PER_S = 2000.0  # to all who listen to one prefix: some 200 µs each; past it changes are gathered
PAUSE_MAX_S = 0.2  # … for so long at most; the first change after a quiet time never waits
STAND_S = 4.0  # from asking for a feed to its standing; who asks waits 5 s


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One change, encoded. `clearance`: of a queued task; None: of no task, deleted, or not known."""

    key: str
    revision: Revision
    data: bytes
    deleted: bool
    clearance: tuple[str, ...] | None = None

    @classmethod
    def of(cls, change: Change) -> Item:
        """Take in a change."""
        labels: tuple[str, ...] | None = None
        if change.value is not None and change.key.startswith(keys.QUEUED):
            labels = visibility.queued_clearance(change.value.value)
        data = gatewaycodec.change_bytes(change.key, change.value, change.revision)
        return cls(change.key, change.revision, data, change.value is None, labels)


Sees = Callable[[Item], bool]


class Subscriber:
    """One worker's watch: what it may see of a feed and has not been sent yet."""

    def __init__(self, prefix: str, start: Revision, sees: Sees, group: set[Subscriber]) -> None:
        self.prefix = prefix
        self.start = start
        self._sees = sees
        self._group = group
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._ended: SpinettaError | None = None

    @property
    def pause_s(self) -> float:
        """How long to wait after a message: the more who listen to the same, the longer."""
        return min(len(self._group) / MESSAGES_PER_S, PAUSE_MAX_S)

    def push(self, item: Item) -> None:
        """A change; one that the worker may not see, or that is before its start, is left out."""
        if item.revision < self.start or self._ended is not None or not self._sees(item):
            return
        self._items.append(item)
        self._bytes += len(item.data)
        if len(self._items) > BUFFER_EVENTS or self._bytes > BUFFER_BYTES:
            self.end(StoreUnavailable("the watch was cut: its reader is too slow; list again"))
        else:
            self._wake.set()

    def end(self, error: SpinettaError) -> None:
        """No more; what has not been sent is dropped."""
        if self._ended is None:
            self._ended = error
            self._items.clear()
            self._wake.set()

    async def take(self, wait_s: float) -> list[Item]:
        """All there is, of whole revisions; waits for something; nothing when that took too long.

        Raises:
            SpinettaError: why the watch has ended.
        """
        if not self._items and self._ended is None:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
        if self._ended is not None:
            raise self._ended
        items = list(self._items)
        self._items.clear()
        self._bytes = 0
        return items


@dataclass(slots=True, eq=False)
class Feed:
    """One prefix, followed for all.

    Attributes:
        first: the earliest revision from which on nothing is missing; known once it stands.
    """

    prefix: str
    first: Revision
    stands: asyncio.Future[None]
    ring: deque[Item] = field(default_factory=deque)
    ring_bytes: int = 0
    listeners: dict[str, set[Subscriber]] = field(default_factory=dict)
    idle_since_s: float = 0.0
    ended: SpinettaError | None = None

    def take_in(self, changes: Iterable[Change]) -> None:
        """Whole revisions: into the ring, and to those who listen."""
        for change in changes:
            item = Item.of(change)
            self.ring.append(item)
            self.ring_bytes += len(item.data)
            for listener in self.listeners.get(self.prefix, ()):
                listener.push(item)
            if self.prefix == keys.RUNNING and (found := keys.find_running(item.key)) is not None:
                for listener in self.listeners.get(keys.running_on(found[0]), ()):
                    listener.push(item)
        while self.ring and (len(self.ring) > RING_EVENTS or self.ring_bytes > RING_BYTES):
            self._drop()
            while self.ring and self.ring[0].revision < self.first:
                self._drop()

    def _drop(self) -> None:
        item = self.ring.popleft()
        self.ring_bytes -= len(item.data)
        self.first = Revision(item.revision + 1)

    def end(self, error: SpinettaError) -> None:
        """Tell everybody."""
        self.ended = error
        if not self.stands.done():
            self.stands.set_exception(error)
            self.stands.exception()  # seen, should nobody be waiting
        for group in self.listeners.values():
            for listener in group:
                listener.end(error)


class Fanout:
    """The feeds of one voter. `run` must be running for as long as it is asked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._feeds: dict[str, Feed] = {}
        self._wanted: asyncio.Queue[Feed] = asyncio.Queue(len(PREFIXES))
        self._running = False

    async def run(self) -> None:
        """Follow what is listened to, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._running = True
                while True:
                    feed = await self._wanted.get()
                    group.create_task(self._follow(feed), name=f"feed of {feed.prefix}")
        finally:
            self._running = False
            for feed in self._feeds.values():
                feed.end(StoreUnavailable("this voter is stopping"))
            self._feeds.clear()

    @contextlib.asynccontextmanager
    async def subscribe(self, prefix: str, start: Revision, sees: Sees) -> AsyncIterator[Subscriber]:
        """Listen to `prefix` (one of `PREFIXES`, or all that one node runs) from `start` on.

        Raises:
            Compacted: `start` is too long ago.
            StoreUnavailable: there is no watch at present.
        """
        over = keys.RUNNING if prefix.startswith(keys.RUNNING) else prefix
        if not self._running:
            raise StoreUnavailable("this voter does not serve watches yet, or no longer")
        feed = self._feeds.get(over)
        if feed is None:
            feed = self._feeds[over] = Feed(over, start, asyncio.get_running_loop().create_future())
            self._wanted.put_nowait(feed)
        try:
            async with asyncio.timeout(STAND_S):
                await asyncio.shield(feed.stands)
        except TimeoutError:
            raise StoreUnavailable(f"no watch came about within {STAND_S:g} s") from None
        if feed.ended is not None:
            raise feed.ended
        if start < feed.first:
            raise Compacted(feed.first)
        # From here to the end of the replay nothing else runs: no change is missed, and none comes twice.
        group = feed.listeners.setdefault(prefix, set())
        subscriber = Subscriber(prefix, start, sees, group)
        for item in feed.ring:
            if item.revision >= start and item.key.startswith(prefix):
                subscriber.push(item)
        group.add(subscriber)
        try:
            yield subscriber
        finally:
            group.discard(subscriber)
            if not group:
                feed.listeners.pop(prefix, None)
            if not feed.listeners:
                feed.idle_since_s = asyncio.get_running_loop().time()

    async def _follow(self, feed: Feed) -> None:
        try:
            error = await self._followed(feed)
        except SpinettaError as e:
            error = e if isinstance(e, StoreUnavailable) else StoreUnavailable(f"the watch of {feed.prefix} ended: {e}")
            log.info("the watch of %s for workers ended: %s", feed.prefix, e)
        finally:
            if self._feeds.get(feed.prefix) is feed:
                del self._feeds[feed.prefix]
        feed.end(error)

    async def _followed(self, feed: Feed) -> SpinettaError:
        """Until it fails (raises), or nobody has listened for long (returns what a late listener is told)."""
        now = (await self._store.read(())).revision
        # Whoever asked first decides where it begins, within limits: not in the future, not in the remote past.
        feed.first = Revision(max(min(feed.first, now + 1), now + 1 - BACK_REVISIONS_MAX, 1))
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with contextlib.aclosing(self._store.watch(feed.prefix, start=feed.first)) as watch:
                    async for changes in watch:
                        if not feed.stands.done():
                            feed.idle_since_s = loop.time()
                            feed.stands.set_result(None)
                        feed.take_in(changes.events)
                        if not feed.listeners and loop.time() - feed.idle_since_s > LINGER_S:
                            return StoreUnavailable("nobody listened: ask again")
            except Compacted:
                if feed.stands.done() or feed.first > now:
                    raise
                feed.first = Revision(now + 1)
                continue
            return StoreUnavailable("the watch ended")


def sees_for(node: NodeId, acl: NodeAcl, prefix: str) -> Sees:
    """Which changes of a prefix that it may watch a worker may see. Deletions tell no more than that a key is gone."""
    if prefix == keys.QUEUED:
        return lambda item: item.deleted or visibility.covers(acl, item.clearance)
    if prefix == keys.LEADER:
        return lambda item: item.key == keys.OFFICE
    if prefix in (keys.NODE, keys.running_on(node)):
        return lambda _: True
    return lambda _: False
