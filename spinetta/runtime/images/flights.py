"""Single flight: what several want at once is done once; it ends when nobody wants it any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from spinetta.errors import RuntimeUnavailable
from spinetta.runtime.images.errands import Step

T = TypeVar("T")


@dataclass(slots=True)
class Coming:
    """Something under way: how far it is."""

    name: str
    step: Step = field(default_factory=lambda: Step("wait"))
    _listeners: list[Callable[[Step], None]] = field(default_factory=list)

    def tell(self, step: Step) -> None:
        """It is so far."""
        self.step = step
        for listener in self._listeners:
            listener(step)

    def listen(self, listener: Callable[[Step], None]) -> None:
        """Have it told how far it is, now and from now on."""
        self._listeners.append(listener)
        listener(self.step)


@dataclass(slots=True)
class _Flight(Generic[T]):
    coming: Coming
    task: asyncio.Task[T]
    waiters: int = 0


class Flights(Generic[T]):
    """Work by key. Whoever asks while it is under way waits for the same; all get its result or its error."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}
        self._ending: set[asyncio.Task[T]] = set()
        self._closed = False

    def keys(self) -> list[str]:
        """What is under way."""
        return list(self._flights)

    def get(self, key: str) -> Coming | None:
        """How far it is; None: it is not under way."""
        flight = self._flights.get(key)
        return flight.coming if flight is not None else None

    async def join(
        self,
        key: str,
        work: Callable[[Coming], Coroutine[Any, Any, T]],
        joined: Callable[[Coming], None] = lambda _: None,
    ) -> T:
        """The result of `work`, which is only called when nothing is under way for the key.

        Who is cancelled leaves; the last one to leave ends the work, and waits for its end.

        Args:
            key: names the work.
            work: begins it; is given where to tell how far it is.
            joined: is given the same.

        Raises:
            RuntimeUnavailable: the store is being closed.
            Others: of the work.
        """
        if self._closed:
            raise RuntimeUnavailable("this node's images are being closed")
        flight = self._flights.get(key)
        if flight is None:
            coming = Coming(key)
            task = asyncio.create_task(work(coming), name=f"image {key[:80]}")
            flight = self._flights[key] = _Flight(coming, task)
            task.add_done_callback(lambda done: self._landed(key, done))
        joined(flight.coming)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if self._closed:
                raise RuntimeUnavailable("this node's images are being closed") from None
            raise
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._forget(key, flight.task)  # who comes now begins anew
                self._ending.add(flight.task)
                flight.task.cancel()
                await asyncio.wait((flight.task,))

    def _landed(self, key: str, task: asyncio.Task[T]) -> None:
        self._forget(key, task)
        self._ending.discard(task)
        if not task.cancelled():
            task.exception()  # its waiters may all have gone

    def _forget(self, key: str, task: asyncio.Task[T]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]

    async def close(self) -> None:
        """End all work. Whoever waits for it gets RuntimeUnavailable."""
        self._closed = True
        tasks = [*(f.task for f in self._flights.values()), *self._ending]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            if tasks:
                await asyncio.wait(tasks)
