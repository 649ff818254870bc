"""One watch of ``/task/`` for all who wait on this node, and only while somebody does.

A listener subscribes first and reads afterwards, so that nothing falls between: every change after the revision it
read reaches it, or it is told of a *gap* and reads again. Changes of one task are folded into the latest, so a slow
listener costs a bounded amount of memory and loses intermediate states only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from spinetta import keys
from spinetta.errors import StoreUnavailable, UserError
from spinetta.model import Revision, TaskId
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store.protocol import Change, Changes, Store
from spinetta.trust.backoff import Backoff

log = logging.getLogger(__name__)
T = TypeVar("T")

LISTENERS_MAX = 2000  # each holds up to PENDING_MAX changes
PENDING_MAX = 10_000  # changed tasks not yet taken by a listener; past it the listener reads all again
LINGER_S = 10.0  # the watch stays this long after the last listener: waits often come one after another
STOPPING = "this node is stopping"
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0  # between attempts to get a lost watch back


@dataclass(frozen=True, slots=True)
class News:
    """What has happened since the last time: changes in revision order, and whether some may have been lost."""

    changes: tuple[Change, ...]
    gap: bool


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an iterator at the end, if it can be closed: what it holds must not wait for the collector."""
    try:
        yield items
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()


class Listener:
    """One who waits. Made by `Hub.listen`."""

    def __init__(self, pending_max: int) -> None:
        self._pending: OrderedDict[str, Change] = OrderedDict()
        self._pending_max = pending_max
        self._gap = False
        self._closed = False
        self._wake = asyncio.Event()
        self.ready = False  # has been told that the watch stands, and may have read since

    async def news(self, timeout_s: float) -> News:
        """What has happened, as soon as something has; empty when nothing does for `timeout_s`.

        Raises:
            StoreUnavailable: the node stops; another one can tell.
        """
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            return News((), gap=False)
        if self._closed:
            raise StoreUnavailable(STOPPING)
        self._wake.clear()
        out = News(tuple(self._pending.values()), self._gap)
        self._pending.clear()
        self._gap = False
        return out

    def put(self, change: Change) -> None:
        """Called by the hub."""
        if not self._gap and len(self._pending) >= self._pending_max and change.key not in self._pending:
            self.lose()
            return
        if self._gap:  # it will read everything after this anyway
            return
        self._pending[change.key] = change
        self._pending.move_to_end(change.key)
        self._wake.set()

    def lose(self) -> None:
        """Called by the hub: changes have been lost."""
        self._pending.clear()
        self._gap = True
        self._wake.set()

    def close(self) -> None:
        """Called by the hub: nothing will come any more."""
        self._closed = True
        self._wake.set()


class Hub:
    """Serves the changes of tasks to any number of listeners. `run` must be running."""

    def __init__(self, store: Store, *, linger_s: float = LINGER_S, pending_max: int = PENDING_MAX) -> None:
        self._store = store
        self._linger_s = linger_s
        self._pending_max = pending_max
        self._by_key: dict[str, set[Listener]] = {}
        self._to_all: set[Listener] = set()
        self._count = 0
        self._closed = False
        self._changed = asyncio.Event()  # the number of listeners
        self._standing = asyncio.Event()  # the watch is there: what happens from now on is seen

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return self._count

    @asynccontextmanager
    async def listen(
        self, ids: Collection[TaskId] | None = None, *, timeout_s: float = 10.0
    ) -> AsyncIterator[Listener]:
        """Changes of these tasks (None: of all) from now on.

        Raises:
            StoreUnavailable: the watch could not be had within `timeout_s`, or the node stops.
            UserError: too many listen already (reason ``busy``).
        """
        if self._closed:
            raise StoreUnavailable(STOPPING)
        if self._count >= LISTENERS_MAX:
            raise UserError(
                f"this node already serves {LISTENERS_MAX} listeners", reason="busy", hint="try another node"
            )
        listener = Listener(self._pending_max)
        wanted = None if ids is None else [keys.task(i) for i in ids]
        self._add(listener, wanted)
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._standing.wait()
            except TimeoutError:
                raise StoreUnavailable(f"the store could not be watched within {timeout_s:g} s") from None
            yield listener
        finally:
            self._remove(listener, wanted)

    def _add(self, listener: Listener, wanted: Iterable[str] | None) -> None:
        self._count += 1
        self._changed.set()
        listener.ready = self._standing.is_set()
        if wanted is None:
            self._to_all.add(listener)
        else:
            for key in wanted:
                self._by_key.setdefault(key, set()).add(listener)

    def _remove(self, listener: Listener, wanted: Iterable[str] | None) -> None:
        self._count -= 1
        self._changed.set()
        self._to_all.discard(listener)
        for key in wanted or ():
            those = self._by_key.get(key)
            if those is not None:
                those.discard(listener)
                if not those:
                    del self._by_key[key]

    def _everybody(self) -> set[Listener]:
        return self._to_all.union(*self._by_key.values())

    def close(self) -> None:
        """Let all who listen go, because the node stops."""
        self._closed = True
        for listener in self._everybody():
            listener.close()

    async def run(self) -> None:
        """Keep the watch while it is wanted. Runs until it is cancelled."""
        while True:
            await self._until(somebody=True)
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self._follow())
                await self._until_long_unwanted()
                following.cancel()
            self._standing.clear()

    async def _until(self, *, somebody: bool) -> None:
        while (self._count > 0) != somebody:
            self._changed.clear()
            await self._changed.wait()

    async def _until_long_unwanted(self) -> None:
        while True:
            await self._until(somebody=False)
            try:
                async with asyncio.timeout(self._linger_s):
                    await self._until(somebody=True)
            except TimeoutError:
                if self._count == 0:
                    return

    async def _follow(self) -> None:
        teller = Teller(log)
        wait = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while True:
            try:
                async with closing(self._changes()) as changes:
                    async for change in changes:
                        wait.reset()
                        for event in change.events:  # no await in here: nobody sees half a revision
                            self._deliver(event)
            except TROUBLE as e:  # also refusals: of a node whose rights are about to be given, or were just taken
                teller.tell(f"the watch of tasks was lost: {e}")
            finally:
                self._standing.clear()
            await wait.pause()

    async def _changes(self) -> AsyncIterator[Changes]:
        base = (await self._store.read([keys.GENERATION])).revision
        async with closing(self._store.watch(keys.TASK, start=Revision(base + 1))) as watch:
            # Whoever listened before may have missed something between the last watch and this one.
            for listener in self._everybody():
                if listener.ready:
                    listener.lose()
                listener.ready = True
            self._standing.set()
            async for changes in watch:
                yield changes

    def _deliver(self, change: Change) -> None:
        for listener in self._by_key.get(change.key, ()):
            listener.put(change)
        for listener in self._to_all:
            listener.put(change)
