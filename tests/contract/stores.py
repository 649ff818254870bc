"""Small words for tests of stores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import Change, Changes, KeyValue
from spinetta.txn import Committed, Delete, Guard, Put, Txn
from tests.contract.conftest import CompactingStore as CompactingStore
from tests.contract.conftest import Scenario

OnStore = Callable[[Scenario], None]


async def put(store: CompactingStore, key: str, value: bytes = b"", lease: LeaseId = LeaseId(0)) -> Revision:
    result = await store.commit(Txn(then=(Put(key, value, lease),)))
    assert isinstance(result, Committed)
    return result.revision


async def delete(store: CompactingStore, key: str) -> Revision:
    return (await store.commit(Txn(then=(Delete(key),)))).revision


async def get(store: CompactingStore, key: str) -> KeyValue | None:
    return (await store.read([key])).entries[key]


async def holds(store: CompactingStore, *guards: Guard) -> bool:
    return isinstance(await store.commit(Txn(when=guards)), Committed)


async def collect(store: CompactingStore, prefix: str, start: int, count: int) -> list[Changes]:
    """The first `count` events of a watch, after the item that says that it stands."""
    found: list[Changes] = []
    async with contextlib.aclosing(store.watch(prefix, start=Revision(start))) as changes:
        first = await anext(changes)
        assert (first.revision, first.events) == (start - 1, ())
        while sum(len(each.events) for each in found) < count:
            found.append(await anext(changes))
    return found


def events(found: list[Changes]) -> list[Change]:
    return [event for each in found for event in each.events]
