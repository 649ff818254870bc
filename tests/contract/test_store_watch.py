"""Watches and leases: the same tests on the model of etcd and on real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from spinetta.errors import Compacted
from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import Change, Changes, KeyValue
from spinetta.txn import (
    Absent,
    Committed,
    Conflict,
    Put,
    Txn,
    batch,
)
from tests.contract.stores import CompactingStore, OnStore, collect, delete, events, get, put

pytestmark = pytest.mark.contract
# --- watching ----------------------------------------------------------------------------------------------------


def test_watch_tells_the_past_then_the_present_in_order(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        first = await put(store, p + "a", b"1")
        await put(store, p + "a", b"2")
        watching = asyncio.create_task(collect(store, p, first, 5))
        await delete(store, p + "a")
        await store.commit(Txn(then=(Put(p + "c"), Put(p + "b"))))
        found = events(await watching)
        r = first
        assert found == [
            Change(p + "a", KeyValue(p + "a", b"1", r, r), r),
            Change(p + "a", KeyValue(p + "a", b"2", r, Revision(r + 1)), Revision(r + 1)),
            Change(p + "a", None, Revision(r + 2)),
            Change(p + "c", KeyValue(p + "c", b"", Revision(r + 3), Revision(r + 3)), Revision(r + 3)),
            Change(p + "b", KeyValue(p + "b", b"", Revision(r + 3), Revision(r + 3)), Revision(r + 3)),
        ]

    on_store(scenario)


def test_watch_starts_exactly_at_its_revision(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        await put(store, p + "a", b"1")
        second = await put(store, p + "a", b"2")
        third = await put(store, p + "a", b"3")
        assert [event.revision for event in events(await collect(store, p, second, 2))] == [second, third]
        assert [event.revision for event in events(await collect(store, p, third, 1))] == [third]

    on_store(scenario)


def test_watch_sees_its_prefix_only(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        start = await put(store, p + "node")
        for name in ("node0", "nod", "node/", "node/a", "node0/a", "node/a/b"):
            await put(store, p + name)
        found = events(await collect(store, p + "node/", start, 3))
        assert [event.key for event in found] == [p + "node/", p + "node/a", p + "node/a/b"]

    on_store(scenario)


def test_watch_stands_at_once_and_for_the_future(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        now = (await store.read([])).revision
        async with contextlib.aclosing(store.watch(p, start=Revision(now + 1))) as changes:
            assert await anext(changes) == Changes(now, ())
            at = await put(store, p + "a")
            assert [event.key for event in (await anext(changes)).events] == [p + "a"]
        async with contextlib.aclosing(store.watch(p, start=Revision(at + 3))) as changes:
            await anext(changes)
            for name in "bcdef":
                await put(store, p + name)
            assert (await anext(changes)).events[0].key == p + "d"

    on_store(scenario)


def test_watch_never_yields_half_a_revision(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        # Forty revisions of 1.2 MB: each response of etcd is cut into fragments.
        value = b"x" * 60_000
        start = (await store.read([])).revision + 1
        for turn in range(40):
            await store.commit(Txn(then=tuple(Put(f"{p}{i:02}", value + bytes([turn])) for i in range(20))))
        found = await collect(store, p, start, 800)
        seen = [event.revision for event in events(found)]
        assert seen == sorted(seen)
        for each in found:
            revisions = {event.revision for event in each.events}
            assert len(each.events) == 20 * len(revisions)
            assert each.revision == max(revisions)
        await asyncio.gather(*(delete(store, f"{p}{i:02}") for i in range(20)))

    on_store(scenario)


def test_watch_of_what_has_been_compacted(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        first = await put(store, p + "a", b"1")
        await put(store, p + "b")
        deleted = await delete(store, p + "a")
        await put(store, p + "c")
        await store.compact(deleted)
        for start in (first, deleted):  # a watch from the very revision of the compaction would miss the deletion
            with pytest.raises(Compacted):
                await collect(store, p, start, 1)
        assert [event.key for event in events(await collect(store, p, deleted + 1, 1))] == [p + "c"]

    on_store(scenario)


def test_many_watches_at_once(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        start = (await store.read([])).revision + 1
        watching = [asyncio.create_task(collect(store, f"{p}{i % 10}/", start, 5)) for i in range(50)]
        for turn in range(5):
            await store.commit(Txn(then=tuple(Put(f"{p}{i}/k", bytes([turn])) for i in range(10))))
        for each in await asyncio.gather(*watching):
            assert len(events(each)) == 5

    on_store(scenario)


def test_a_watch_may_be_left_at_any_time(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        for _ in range(20):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.005):
                    await collect(store, p, 1 << 40, 1)
        # One that is only dropped must not disturb the loop either.
        dropped = store.watch(p, start=Revision((await store.read([])).revision + 1))
        await anext(dropped)
        await put(store, p + "a")
        assert (await anext(dropped)).events[0].key == p + "a"

    on_store(scenario)


# --- leases ------------------------------------------------------------------------------------------------------


def test_revoking_a_lease_deletes_its_keys_in_one_revision(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        lease = await store.grant_lease(60)
        other = await store.grant_lease(60)
        assert lease != other
        start = await put(store, p + "b", b"", lease)
        await put(store, p + "a", b"", lease)
        last = await put(store, p + "c", b"", other)
        found = await get(store, p + "b")
        assert found is not None
        assert found.lease == lease
        await store.revoke_lease(lease)
        assert (await store.read([])).revision == last + 1
        assert [entry.key for entry in (await store.list(p)).entries] == [p + "c"]
        tail = events(await collect(store, p, start, 5))[3:]
        assert tail == [Change(p + "a", None, Revision(last + 1)), Change(p + "b", None, Revision(last + 1))]
        await store.revoke_lease(lease)
        assert (await store.read([])).revision == last + 1
        await store.revoke_lease(other)

    on_store(scenario)


def test_a_lease_runs_out_unless_kept_alive(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        short, kept = await store.grant_lease(2), await store.grant_lease(2)
        await put(store, p + "short", b"", short)
        await put(store, p + "kept", b"", kept)
        end_s = time.monotonic() + 10
        while await get(store, p + "short") is not None:
            assert time.monotonic() < end_s
            assert await store.keep_alive(kept) == 2.0
            await asyncio.sleep(0.2)
        assert await get(store, p + "kept") is not None
        assert await store.keep_alive(short) is None
        await store.revoke_lease(kept)

    on_store(scenario)


def test_keep_alive_of_no_lease(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        assert await store.keep_alive(LeaseId(12345)) is None
        lease = await store.grant_lease(60)
        assert await store.keep_alive(lease) == 60.0
        await store.revoke_lease(lease)
        assert await store.keep_alive(lease) is None

    on_store(scenario)


def test_a_put_that_does_not_name_the_lease_detaches_the_key(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        lease, other = await store.grant_lease(60), await store.grant_lease(60)
        for name in "abc":
            await put(store, p + name, b"", lease)
        await put(store, p + "a")
        await put(store, p + "b", b"", other)
        await put(store, p + "c", b"again", lease)
        await store.revoke_lease(lease)
        assert [entry.key for entry in (await store.list(p)).entries] == [p + "a", p + "b"]
        await store.revoke_lease(other)
        assert [entry.key for entry in (await store.list(p)).entries] == [p + "a"]

    on_store(scenario)


def test_a_key_made_again_is_not_of_the_old_lease(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        lease = await store.grant_lease(60)
        await put(store, p + "a", b"", lease)
        await delete(store, p + "a")
        await put(store, p + "a")
        await store.revoke_lease(lease)
        assert await get(store, p + "a") is not None

    on_store(scenario)


def test_a_put_under_a_lease_that_is_gone_is_a_conflict(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        lease = await store.grant_lease(60)
        await store.revoke_lease(lease)
        at = await put(store, p + "a")
        txn = Txn(then=(Put(p + "b"), Put(p + "c", b"", lease)))
        assert await store.commit(txn) == Conflict(at)
        # Only what would really be written counts.
        aside = batch([Txn(when=(Absent(p + "a"),), then=(Put(p + "c", b"", lease),)), Txn(then=(Put(p + "d"),))])
        assert await store.commit(aside) == Committed(Revision(at + 1), (False, True))
        assert [entry.key for entry in (await store.list(p)).entries] == [p + "a", p + "d"]

    on_store(scenario)
