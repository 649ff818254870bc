"""One store that may become another: straight to etcd while this node has a seat, through a voter while it has none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field

from spinetta.errors import StoreUnavailable
from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import Changes, Page, Snapshot, Store
from spinetta.txn import Result, Txn

FINISH_S = 15.0  # for calls under way on the store that is left: above the longest limit of one (10 s)


@dataclass(slots=True, eq=False)
class _Way:
    """A store and who is on it."""

    store: Store
    calls: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[Store]:
        self.calls += 1
        self.idle.clear()
        try:
            yield self.store
        finally:
            self.calls -= 1
            if not self.calls:
                self.idle.set()


class RoutedStore:
    """`Store` by way of whichever store is current. None: there is none yet, and every call is `StoreUnavailable`."""

    def __init__(self, store: Store | None = None) -> None:
        self._way = _Way(store) if store is not None else None
        self._closed = False

    @property
    def current(self) -> Store | None:
        """The store in use."""
        return self._way.store if self._way is not None else None

    async def use(self, store: Store, *, close_old: bool = True) -> None:
        """Use this one from now on.

        New calls go there at once; those under way finish on the old one, whose watches end with `StoreUnavailable`.
        Returns when nothing is under way on the old one any more, and closes it. The same store again: no effect.
        """
        if self._closed:
            await store.close()
            return
        old = self._way
        if old is not None and old.store is store:
            return
        self._way = _Way(store)
        if old is None:
            return
        old.left.set()
        try:
            async with asyncio.timeout(FINISH_S):
                await old.idle.wait()
        except TimeoutError:
            pass
        finally:
            if close_old:
                await old.store.close()

    def _current(self) -> _Way:
        if self._closed or self._way is None:
            raise StoreUnavailable("this store has been closed" if self._closed else "there is no way to the store yet")
        return self._way

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        """As `Store.commit`."""
        async with self._current().call() as store:
            return await store.commit(txn, timeout_s=timeout_s)

    async def read(self, keys: Sequence[str], *, timeout_s: float = 5.0) -> Snapshot:
        """As `Store.read`."""
        async with self._current().call() as store:
            return await store.read(keys, timeout_s=timeout_s)

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
        """As `Store.list`."""
        async with self._current().call() as store:
            return await store.list(
                prefix,
                after=after,
                limit=limit,
                keys_only=keys_only,
                newest_first=newest_first,
                revision=revision,
                timeout_s=timeout_s,
            )

    async def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        """As `Store.watch`; ends with `StoreUnavailable` when another store becomes the current one."""
        way = self._current()
        async with contextlib.aclosing(way.store.watch(prefix, start=start)) as changes:
            leaving = asyncio.ensure_future(way.left.wait())
            try:
                while True:
                    following = asyncio.ensure_future(anext(changes))
                    try:
                        await asyncio.wait((leaving, following), return_when=asyncio.FIRST_COMPLETED)
                        if not following.done():
                            raise StoreUnavailable("the watch ends: the way to the store has changed")
                        found = following.result()
                    except StopAsyncIteration:
                        raise StoreUnavailable("the watch was ended") from None
                    finally:
                        if not following.done():
                            following.cancel()
                            await asyncio.wait((following,))
                        if not following.cancelled():
                            following.exception()  # seen
                    yield found
            finally:
                leaving.cancel()

    async def grant_lease(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseId:
        """As `Store.grant_lease`."""
        async with self._current().call() as store:
            return await store.grant_lease(ttl_s, timeout_s=timeout_s)

    async def keep_alive(self, lease: LeaseId, *, timeout_s: float = 5.0) -> float | None:
        """As `Store.keep_alive`."""
        async with self._current().call() as store:
            return await store.keep_alive(lease, timeout_s=timeout_s)

    async def revoke_lease(self, lease: LeaseId, *, timeout_s: float = 5.0) -> None:
        """As `Store.revoke_lease`."""
        async with self._current().call() as store:
            await store.revoke_lease(lease, timeout_s=timeout_s)

    async def close(self) -> None:
        """Let go of connections. May be called twice."""
        self._closed = True
        if self._way is not None:
            await self._way.store.close()
