"""What every store does: the same tests on the model of etcd and on real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from spinetta.errors import Compacted, InvariantViolation, StoreUnavailable, UserError
from spinetta.model import Revision
from spinetta.store.protocol import READ_KEYS_MAX, KeyValue
from spinetta.txn import (
    NESTED_MAX,
    Absent,
    Committed,
    Conflict,
    CreatedAt,
    Delete,
    NoneUnder,
    Put,
    RevisionIs,
    Txn,
    batch,
)
from tests.contract.stores import CompactingStore, OnStore, delete, get, holds, put

pytestmark = pytest.mark.contract
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


def test_a_prefix_ends_where_its_last_character_does(on_store: OnStore) -> None:
    async def scenario(store: CompactingStore, p: str) -> None:
        await put(store, p + "a")
        await put(store, p[:-1] + "0")
        assert len((await store.list(p)).entries) == 1
        await delete(store, p[:-1] + "0")

    on_store(scenario)
