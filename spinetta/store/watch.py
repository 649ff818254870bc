"""One watch: one stream, whole revisions, in order, and an error as soon as it can no longer be relied on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import grpc

from spinetta.errors import Compacted, StoreUnavailable
from spinetta.model import Revision
from spinetta.store import wire
from spinetta.store.connection import REQUIRE_LEADER, Connection, Connections
from spinetta.store.failures import GONE, cancelled_ourselves
from spinetta.store.protocol import Change, Changes

STAND_S = 5.0  # from asking for a watch to its standing; it takes milliseconds
IDLE_S = 10.0  # quiet for so long: ask the stream for a sign of life …
ANSWER_S = 5.0  # … and give it so long to answer
# Events of one revision held back until the next begins. A transaction is at most 1.5 MiB; only the end of a lease with
# very many keys could be more, and we bind a handful to each.
REVISION_EVENTS_MAX = 100_000


async def watch(connections: Connections, prefix: str, start: Revision) -> AsyncGenerator[Changes, None]:
    """As `Store.watch`. Reads only as fast as its consumer: a slow one holds back etcd, not memory here."""
    connection = await connections.pick(STAND_S)
    with connection.use(endless=True) as stubs:
        async with contextlib.aclosing(_watch(connection, stubs, prefix, start)) as changes:
            async for each in changes:
                yield each


async def _watch(
    connection: Connection, stubs: wire.Stubs, prefix: str, start: Revision
) -> AsyncGenerator[Changes, None]:
    call = stubs.watch.Watch(metadata=REQUIRE_LEADER)
    try:
        async with contextlib.aclosing(_changes(connection, stubs, call, prefix, start)) as changes:
            async for each in changes:
                yield each
    except grpc.aio.AioRpcError as error:
        connection.hold()
        raise StoreUnavailable(f"the watch broke: {connection.endpoint}: {error.details()}") from error
    except GONE as error:
        if cancelled_ourselves():
            raise
        raise StoreUnavailable(f"the watch broke: {connection.endpoint}: the connection was closed") from error
    finally:
        call.cancel()


async def _changes(
    connection: Connection, stubs: wire.Stubs, call: Any, prefix: str, start: Revision
) -> AsyncGenerator[Changes, None]:
    yield await _stand(connection, stubs, call, prefix, start)
    whole = Reassembly(start)
    while True:
        response = await _next(connection, call)
        if response.canceled:
            raise_cancelled(response)
        for changes in whole.add([wire.change(event) for event in response.events], response.fragment):
            yield changes


async def _stand(connection: Connection, stubs: wire.Stubs, call: Any, prefix: str, start: Revision) -> Changes:
    """Open the watch and make sure that nothing from `start` on has been compacted."""
    try:
        async with asyncio.timeout(STAND_S):
            await call.write(wire.watch_create(prefix, start))
            response = await call.read()
            if response is grpc.aio.EOF:
                raise StoreUnavailable(f"the watch was ended by {connection.endpoint}")
            if response.canceled:
                raise_cancelled(response)
            if start > 1:
                await _require_history(stubs, prefix, start)
    except TimeoutError as error:
        raise StoreUnavailable(f"{connection.endpoint} did not open a watch within {STAND_S:g} s") from error
    return Changes(Revision(start - 1) if start else Revision(response.header.revision), ())


async def _require_history(stubs: wire.Stubs, prefix: str, start: Revision) -> None:
    """Reading at `start` - 1 works exactly when `start` itself has not been compacted.

    Etcd serves a watch that starts at the very revision of the compaction, and 3.4.23 then leaves out its deletions.
    """
    request = wire.range_request(wire.encode(prefix) or wire.ALL_KEYS, b"", revision=start - 1)
    try:
        await stubs.kv.Range(request, timeout=STAND_S, metadata=REQUIRE_LEADER)
    except grpc.aio.AioRpcError as error:
        text = error.details() or ""
        if "has been compacted" in text:
            raise Compacted(start) from error
        if "future revision" not in text:  # a watch may begin in the future; nothing of it can be gone
            raise


async def _next(connection: Connection, call: Any) -> wire.Message:
    """The next message; asks for one when it is quiet for long, because a quiet stream may be a dead one."""
    async with reading(call) as message:
        done, _ = await asyncio.wait((message,), timeout=IDLE_S)
        if not done:
            await call.write(wire.watch_progress())
            done, _ = await asyncio.wait((message,), timeout=ANSWER_S)
            if not done:
                raise StoreUnavailable(f"the watch broke: {connection.endpoint} has fallen silent")
        response = message.result()
    if response is grpc.aio.EOF:
        raise StoreUnavailable(f"the watch was ended by {connection.endpoint}")
    return response


@contextlib.asynccontextmanager
async def reading(call: Any) -> AsyncIterator[asyncio.Future[Any]]:
    """The next message of a stream, which may be waited for with a limit; leaving early leaves the stream as it is."""
    # A task of its own: cancelling `read` itself would cancel the whole stream.
    message = asyncio.ensure_future(call.read())
    try:
        yield message
    finally:
        if not message.done():
            message.cancel()
            await asyncio.wait((message,))
        if not message.cancelled():
            message.exception()  # seen: asyncio must not complain of it when something else failed first


def raise_cancelled(response: wire.Message) -> None:
    """Etcd ended the watch: say why in our words."""
    if response.compact_revision:
        raise Compacted(response.compact_revision)
    raise StoreUnavailable(f"etcd ended the watch: {response.cancel_reason or 'no reason given'}")


class Reassembly:
    """Puts the fragments of a watch together again, into whole revisions.

    A response that is not a fragment, or the last fragment, ends with a whole revision. In any other fragment the last
    revision may go on in the next one, and is held back.
    """

    def __init__(self, start: Revision) -> None:
        self._seen = start - 1  # etcd may repeat, never skip
        self._held: list[Change] = []

    def add(self, events: Sequence[Change], fragment: bool) -> list[Changes]:
        """What has become whole. Empty responses (progress) yield nothing: 3.4 lets them overtake events."""
        held = self._held
        held.extend(event for event in events if event.revision > self._seen)
        if len(held) > REVISION_EVENTS_MAX:
            raise StoreUnavailable(f"one revision with more than {REVISION_EVENTS_MAX} events")
        if not held:
            return []
        end = len(held)
        if fragment:
            last = held[-1].revision
            while end and held[end - 1].revision == last:
                end -= 1
            if not end:
                return []
        whole, self._held = held[:end], held[end:]
        self._seen = whole[-1].revision
        return [Changes(Revision(self._seen), tuple(whole))]
