"""What every store does: the same tests on the model of etcd and on real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import pytest

from spinetta import keys
from spinetta.errors import Compacted, InvariantViolation, StoreUnavailable, UserError
from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import READ_KEYS_MAX, Change, Changes, KeyValue
from spinetta.txn import (
    NESTED_MAX,
    Absent,
    Committed,
    Conflict,
    CreatedAt,
    Delete,
    Guard,
    NoneUnder,
    Put,
    RevisionIs,
    Txn,
    batch,
)
from tests.contract.conftest import CompactingStore, Scenario

pytestmark = pytest.mark.contract
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


# --- transactions ------------------------------------------------------------------------------------------------


def test_put_read_delete(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        first = await put(store, p + "a", b"1")
        assert await get(store, p + "a") == KeyValue(p + "a", b"1", first, first)
        second = await put(store, p + "a", b"2")
        assert second == first + 1
        assert await get(store, p + "a") == KeyValue(p + "a", b"2", first, second)
        assert await delete(store, p + "a") == second + 1
        assert await get(store, p + "a") is None
        again = await put(store, p + "a", b"3")
        assert await get(store, p + "a") == KeyValue(p + "a", b"3", again, again)

    on_store(scenario)


def test_deleting_nothing_makes_no_revision(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        before = await put(store, p + "a")
        assert await store.commit(Txn(then=(Delete(p + "b"),))) == Committed(before)
        assert await store.commit(Txn()) == Committed(before)

    on_store(scenario)


def test_each_guard(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        a, gone = p + "a", p + "gone"
        created = await put(store, a)
        modified = await put(store, a, b"x")
        await put(store, gone)
        await delete(store, gone)
        for guard, expected in (
            (Absent(gone), True),
            (Absent(a), False),
            (CreatedAt(a, created), True),
            (CreatedAt(a, modified), False),
            (CreatedAt(gone, Revision(0)), True),
            (CreatedAt(gone, created), False),
            (RevisionIs(a, modified), True),
            (RevisionIs(a, created), False),
            (RevisionIs(gone, Revision(0)), True),
            (RevisionIs(a, Revision(0)), False),
            (NoneUnder(p + "gone"), True),
            (NoneUnder(p + "b"), True),
            (NoneUnder(p + "a"), False),
            (NoneUnder(p), False),
            (NoneUnder(p + "a/"), True),
        ):
            assert await holds(store, guard) is expected, guard
        assert await holds(store, Absent(gone), RevisionIs(a, modified))
        assert not await holds(store, Absent(gone), RevisionIs(a, created))

    on_store(scenario)


def test_none_under_ends_at_its_prefix(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        await put(store, p + "node/a")
        await put(store, p + "nodes")
        await put(store, p + "node0")  # "0" follows "/": the first key past the range
        assert await holds(store, NoneUnder(p + "node/b"))
        assert not await holds(store, NoneUnder(p + "node/"))
        await delete(store, p + "node/a")
        assert await holds(store, NoneUnder(p + "node/"))

    on_store(scenario)


def test_a_conflict_writes_nothing(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        before = await put(store, p + "a")
        assert await store.commit(Txn(when=(Absent(p + "a"),), then=(Put(p + "b"),))) == Conflict(before)
        assert await get(store, p + "b") is None

    on_store(scenario)


def test_nested_transactions_succeed_one_by_one_and_see_the_state_before(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        a = await put(store, p + "a")
        txn = Txn(
            when=(RevisionIs(p + "a", a),),
            then=(Put(p + "outer"),),
            nested=(
                Txn(when=(Absent(p + "b"),), then=(Put(p + "b", b"1"),)),
                Txn(when=(Absent(p + "a"),), then=(Put(p + "c"),)),
                Txn(when=(Absent(p + "b"), Absent(p + "outer")), then=(Put(p + "d"), Delete(p + "a"))),
            ),
        )
        assert await store.commit(txn) == Committed(Revision(a + 1), (True, False, True))
        found = await store.list(p)
        assert [entry.key for entry in found.entries] == [p + "b", p + "d", p + "outer"]
        assert {entry.modified for entry in found.entries} == {a + 1}
        assert await store.commit(txn) == Conflict(Revision(a + 1))

    on_store(scenario)


def test_only_failing_nested_transactions_make_no_revision(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        before = await put(store, p + "a")
        lost = Txn(when=(Absent(p + "a"),), then=(Put(p + "b"),))
        also = Txn(when=(NoneUnder(p),), then=(Put(p + "c"),))
        assert await store.commit(batch([lost, also])) == Committed(before, (False, False))

    on_store(scenario)


@pytest.mark.parametrize(
    "form",
    [
        lambda a: Txn(then=(Put(a), Put(a))),
        lambda a: Txn(then=(Put(a), Delete(a))),
        lambda a: batch([Txn(then=(Put(a),)), Txn(then=(Put(a),))]),
        lambda a: batch([Txn(when=(Absent("/no"),), then=(Put(a),)), Txn(when=(Absent(a),), then=(Put(a),))]),
        lambda a: Txn(then=(Put(a),), nested=(Txn(then=(Put(a),)),)),
        lambda a: Txn(then=(Delete(a),), nested=(Txn(then=(Put(a),)),)),
        lambda a: batch([Txn(then=(Delete(a),)), Txn(then=(Put(a),))]),
        lambda a: batch([batch([Txn(then=(Put(a),))])]),
    ],
)
def test_forms_that_are_refused(on_store: OnStore, form: Callable[[str], Txn]) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        with pytest.raises(InvariantViolation):
            await store.commit(form(p + "a"))
        assert await get(store, p + "a") is None

    on_store(scenario)


def test_deleting_twice_is_allowed(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        at = await put(store, p + "a")
        assert await store.commit(Txn(then=(Delete(p + "a"), Delete(p + "a")))) == Committed(Revision(at + 1))

    on_store(scenario)


def test_a_full_batch_of_claims_fits(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        guards = [Absent(f"{p}guard{i}") for i in range(3)]
        claims = [
            Txn(
                when=(Absent(f"{p}t{i:03}"),),
                then=(Delete(f"{p}q{i:03}"), Put(f"{p}r{i:03}"), Put(f"{p}t{i:03}", b"x" * 400)),
            )
            for i in range(NESTED_MAX)
        ]
        result = await store.commit(batch(claims, guards))
        assert isinstance(result, Committed)
        assert result.nested == (True,) * NESTED_MAX
        assert len((await store.list(p)).entries) == 2 * NESTED_MAX

    on_store(scenario)


def test_more_than_a_full_batch_is_refused_with_its_reason(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        with pytest.raises((UserError, InvariantViolation), match="operations"):
            await store.commit(batch([Txn(then=(Put(f"{p}{i}"),)) for i in range(129)]))

    on_store(scenario)


# --- reading -----------------------------------------------------------------------------------------------------


def test_read_is_of_one_revision(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        both = Txn(then=(Put(p + "a"), Put(p + "b")))
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                await store.commit(both)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            await store.commit(both)
            group.create_task(write())
            for _ in range(50):
                snapshot = await store.read([p + "a", p + "b", p + "none", p + "a"])
                a, b = snapshot.entries[p + "a"], snapshot.entries[p + "b"]
                assert a is not None
                assert b is not None
                assert a.modified == b.modified <= snapshot.revision
                assert snapshot.entries[p + "none"] is None
            stop.set()

    on_store(scenario)


def test_read_nothing_and_too_much(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        at = await put(store, p + "a")
        assert (await store.read([])).revision == at
        many = [f"{p}{i}" for i in range(READ_KEYS_MAX)]
        assert set((await store.read(many)).entries) == set(many)
        with pytest.raises(InvariantViolation):
            await store.read([*many, p + "one more"])

    on_store(scenario)


def test_list_pages_in_both_directions(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        names = [f"{p}k/{i}" for i in range(7)]
        await store.commit(Txn(then=tuple(Put(name, b"v") for name in names)))
        await put(store, p + "k")
        await put(store, p + "k0")  # just past the prefix

        async def pages(limit: int, newest_first: bool) -> list[list[str]]:
            found: list[list[str]] = []
            after = ""
            while True:
                page = await store.list(p + "k/", after=after, limit=limit, newest_first=newest_first)
                found.append([entry.key for entry in page.entries])
                if not page.more:
                    return found
                after = found[-1][-1]

        for limit in (0, 1, 3, 7, 8):
            n = limit or 7
            assert await pages(limit, False) == [names[i : i + n] for i in range(0, 7, n)]
            backwards = names[::-1]
            assert await pages(limit, True) == [backwards[i : i + n] for i in range(0, 7, n)]
        beyond = await store.list(p + "k/", after=p + "k0")
        assert (beyond.entries, beyond.more) == ((), False)
        before = await store.list(p + "k/", after=p + "k", newest_first=True)
        assert (before.entries, before.more) == ((), False)
        assert len((await store.list(p + "k/", after=p + "k")).entries) == 7
        assert len((await store.list(p + "k/", after=p + "k0", newest_first=True)).entries) == 7

    on_store(scenario)


def test_list_of_a_past_revision_and_keys_only(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        await put(store, p + "a", b"1")
        then = await put(store, p + "b", b"1")
        await store.commit(Txn(then=(Delete(p + "a"), Put(p + "b", b"2"), Put(p + "c"))))
        past = await store.list(p, revision=then)
        assert past.revision == then
        assert [(entry.key, entry.value) for entry in past.entries] == [(p + "a", b"1"), (p + "b", b"1")]
        now = await store.list(p, keys_only=True)
        assert [(entry.key, entry.value) for entry in now.entries] == [(p + "b", b""), (p + "c", b"")]
        assert now.revision == then + 1
        await store.compact(now.revision)
        with pytest.raises(Compacted):
            await store.list(p, revision=then)
        assert len((await store.list(p, revision=now.revision)).entries) == 2

    on_store(scenario)


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


# --- and -----------------------------------------------------------------------------------------------------------


def test_a_closed_store_says_so(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        await put(store, p + "a")
        await store.close()
        await store.close()
        with pytest.raises(StoreUnavailable):
            await store.read([p + "a"])
        with pytest.raises(StoreUnavailable):
            await put(store, p + "a")

    on_store(scenario)


def test_prefix_end_agrees_with_the_store(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        assert keys.prefix_end(p) == p[:-1] + "0"
        await put(store, p + "a")
        await put(store, p[:-1] + "0")
        assert len((await store.list(p)).entries) == 1
        await delete(store, p[:-1] + "0")

    on_store(scenario)
