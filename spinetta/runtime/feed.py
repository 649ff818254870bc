"""A stream of the latest news, one item a subject: a slow listener costs memory for subjects, not for events."""

from __future__ import annotations

import asyncio
import weakref
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """One listener's end. An item about a subject replaces an earlier one that was not read yet."""

    def __init__(self) -> None:
        self._pending: dict[str, T] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, subject: str, item: T) -> None:
        """Add an item."""
        self._pending[subject] = item
        self._wake.set()

    def drop(self, subject: str) -> None:
        """No more of interest."""
        self._pending.pop(subject, None)

    def close(self) -> None:
        """End the stream once all is read."""
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._pending:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._pending.pop(next(iter(self._pending)))


class Hub(Generic[T]):
    """All listeners. Those that nobody holds any more are forgotten."""

    def __init__(self) -> None:
        self._feeds: weakref.WeakSet[Feed[T]] = weakref.WeakSet()
        self._closed = False

    def open(self) -> Feed[T]:
        """A new listener; it hears what is put from now on."""
        feed: Feed[T] = Feed()
        self._feeds.add(feed)
        if self._closed:
            feed.close()
        return feed

    def put(self, subject: str, item: T) -> None:
        """Tell all."""
        for feed in list(self._feeds):
            feed.put(subject, item)

    def drop(self, subject: str) -> None:
        """Take back what was not read."""
        for feed in list(self._feeds):
            feed.drop(subject)

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for feed in list(self._feeds):
            feed.close()
