"""Workers by hand, over gateways and a real etcd: for tests of what they may do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from spinetta import codec, keys, txn
from spinetta.errors import Compacted, Denied, OutcomeUnknown, StoreUnavailable
from spinetta.model import Exit, LeaseId, NodeId, Revision, Task
from spinetta.store.protocol import Changes, KeyValue, Store
from spinetta.txn import Committed, Put, Txn
from tests import builders, lives
from tests.contract.api_world import eventually
from tests.contract.etcds import etcd
from tests.contract.gateways import GateWorld, gate_world


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(90):
            await scenario

    asyncio.run(limited())


@contextlib.asynccontextmanager
async def fresh(gates: int = 1, **more: Any) -> AsyncIterator[GateWorld]:
    """A world over an etcd of its own, with a generation."""
    async with etcd() as server_, gate_world(server_.client, gates, **more) as world:

        async def begun() -> bool:
            with contextlib.suppress(StoreUnavailable, OutcomeUnknown):  # a machine too busy to connect in a second
                await put(world.etcd, keys.GENERATION, codec.encode_generation("g"))
                return True
            return False

        await eventually(begun)
        yield world


async def put(store: Store, key: str, value: bytes = b"", lease: LeaseId = LeaseId(0)) -> Revision:
    result = await store.commit(Txn(then=(Put(key, value, lease),)))
    assert isinstance(result, Committed)
    return result.revision


async def get(store: Store, key: str) -> KeyValue:
    found = (await store.read([key])).entries[key]
    assert found is not None, key
    return found


async def submit(world: GateWorld, *numbers: int, **fields: Any) -> None:
    for n in numbers:
        assert isinstance(await world.etcd.commit(lives.submit(builders.queued(n, **fields))), Committed)


@dataclass
class Worker:
    """A worker's daemon, by hand."""

    node: NodeId
    store: Store
    lease: LeaseId = LeaseId(0)

    @classmethod
    async def begin(cls, world: GateWorld, name: str, store: Store | None = None, **rights: Any) -> Worker:
        await world.grant(name, **rights)
        self = cls(NodeId(name), store or world.store(name))
        await self.register()
        return self

    async def register(self) -> None:
        self.lease = await self.store.grant_lease(60)
        entries = (await self.store.read([keys.GENERATION, keys.acl_node(self.node)])).entries
        generation, acl = entries[keys.GENERATION], entries[keys.acl_node(self.node)]
        assert generation is not None
        assert acl is not None
        body = lives.register(self.node, self.lease, generation.modified, acl.modified)
        assert isinstance(await self.store.commit(body), Committed)

    async def registration(self) -> txn.Registration:
        mine = [keys.node(self.node), keys.incarnation(self.node), keys.GENERATION, keys.acl_node(self.node)]
        node, life, generation, acl = (await self.store.read(mine)).entries.values()
        assert node is not None
        assert life is not None
        assert generation is not None
        assert acl is not None
        return txn.Registration(self.node, node.created, life.modified, generation.modified, acl.modified)

    async def claim(self, *numbers: int) -> tuple[bool, ...]:
        parts = []
        for n in numbers:
            task = builders.task_id(n)
            queued, record = (await self.store.read([keys.queued(task), keys.task(task)])).entries.values()
            assert queued is not None
            assert record is not None
            parts.append(lives.claim(self.node, queued, record))
        result = await self.store.commit(txn.batch(parts, (await self.registration()).guards()))
        assert isinstance(result, Committed)
        return result.nested

    async def ends(self, *numbers: int, how: Exit | None = None) -> Txn:
        parts = []
        for n in numbers:
            task = builders.task_id(n)
            running, record = (await self.store.read([keys.running(self.node, task), keys.task(task)])).entries.values()
            assert running is not None
            assert record is not None
            parts.append(lives.end(self.node, running, record, how))
        now = await self.registration()
        return txn.batch(parts, txn.finish_guards(self.node, now.incarnation_revision, now.acl_revision))

    async def end(self, *numbers: int, how: Exit | None = None) -> tuple[bool, ...]:
        result = await self.store.commit(await self.ends(*numbers, how=how))
        assert isinstance(result, Committed)
        return result.nested

    async def task(self, n: int) -> Task | None:
        key = keys.task(builders.task_id(n))
        entry = (await self.store.read([key])).entries[key]
        return codec.decode_task(entry.value) if entry is not None else None


async def stored_task(world: GateWorld, n: int) -> Task:
    return codec.decode_task((await get(world.etcd, keys.task(builders.task_id(n)))).value)


async def drain(watch: AsyncIterator[Changes], into: list[Changes]) -> None:
    async for changes in watch:
        into.append(changes)  # noqa: PERF401 - what came before the error counts


class Follower:
    """A watch in a task of its own: what it has seen, and how it ended."""

    def __init__(self, store: Store, prefix: str, start: int) -> None:
        self.seen: list[Changes] = []
        self.error: Exception | None = None
        self._task = asyncio.create_task(self._follow(store, prefix, Revision(start)))

    async def _follow(self, store: Store, prefix: str, start: Revision) -> None:
        try:
            async with contextlib.aclosing(store.watch(prefix, start=start)) as watch:
                async for changes in watch:
                    self.seen.append(changes)
        except (Compacted, StoreUnavailable, Denied) as error:
            self.error = error

    @property
    def keys(self) -> list[str]:
        return [event.key for changes in self.seen for event in changes.events]

    async def stands(self) -> Follower:
        await eventually(lambda: bool(self.seen) or self.error is not None, within_s=40)
        return self

    async def shows(self, keys: list[str]) -> None:
        await eventually(lambda: self.keys == keys)

    async def ends(self) -> None:
        await eventually(lambda: self.error is not None)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
