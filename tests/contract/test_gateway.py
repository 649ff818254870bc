"""What a worker does through the gateway: a whole life, over real TLS and a real etcd; voters that die meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from spinetta import codec, keys, trustcodec, txn
from spinetta.access import MEMBERS, LabelKey, NodeRole, SecretRecord
from spinetta.access import Envelope as Sealed
from spinetta.errors import Compacted, Denied, OutcomeUnknown, StoreUnavailable
from spinetta.model import Exit, LeaseId, Member, Membership, NodeId, Outcome, Reason, Revision, State, Task
from spinetta.node.gateway import fanout, service, watches
from spinetta.store import gateway
from spinetta.store.protocol import Changes, KeyValue, Store
from spinetta.trust.dial import Dialer, server_credentials
from spinetta.txn import Committed, Conflict, Delete, Put, Txn
from tests import builders, lives
from tests.contract.api_world import eventually
from tests.contract.etcds import etcd
from tests.contract.gateways import GateWorld, gate_world

pytestmark = pytest.mark.contract


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
        await eventually(lambda: bool(self.seen) or self.error is not None, within_s=10)
        return self

    async def shows(self, keys: list[str]) -> None:
        await eventually(lambda: self.keys == keys)

    async def ends(self) -> None:
        await eventually(lambda: self.error is not None)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))


async def drain(watch: AsyncIterator[Changes], into: list[Changes]) -> None:
    async for changes in watch:
        into.append(changes)  # noqa: PERF401 - what came before the error counts


# --- a worker's life ---------------------------------------------------------------------------------------------


def test_a_whole_life_through_the_gateway() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await submit(world, 1, 2, 3)
            worker = await Worker.begin(world, "w1")
            assert isinstance(await worker.store.commit(txn.renew(await worker.registration())), Committed)
            described = txn.advertise(await worker.registration(), worker.lease, lives.node_value("w1", running=2))
            assert isinstance(await worker.store.commit(described), Committed)
            assert await worker.store.keep_alive(worker.lease) == 60.0
            assert await worker.claim(1, 2) == (True, True)
            assert await worker.end(1) == (True,)
            assert await worker.end(2, how=Exit(Reason.RELEASED, ended_ms=3000)) == (True,)
            assert (await stored_task(world, 1)).outcome is Outcome.SUCCEEDED
            assert (await stored_task(world, 2)).state is State.QUEUED
            assert isinstance(await worker.store.commit(txn.deregister(await worker.registration())), Committed)
            await worker.store.revoke_lease(worker.lease)
            assert await worker.store.keep_alive(worker.lease) is None
            assert not world.gates[0].refused

    run(scenario())


def test_two_workers_race_for_a_task_and_one_wins() -> None:
    async def scenario() -> None:
        async with fresh(2) as world:
            await submit(world, 1)
            one, two = await Worker.begin(world, "w1"), await Worker.begin(world, "w2")
            won = await asyncio.gather(one.claim(1), two.claim(1))
            assert sorted(won) == [(False,), (True,)]

    run(scenario())


def test_a_full_batch_of_claims_and_of_ends() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            numbers = range(1, txn.NESTED_MAX + 1)
            await asyncio.gather(*(submit(world, n) for n in numbers))
            worker = await Worker.begin(world, "w1")
            assert all(await worker.claim(*numbers))
            assert all(await worker.end(*numbers))

    run(scenario())


# --- what it sees ------------------------------------------------------------------------------------------------


def test_what_a_worker_may_see_and_what_is_not_there_for_it() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await submit(world, 1)
            await submit(world, 2, clearance=("red",))
            await submit(world, 3, clearance=("blue", "red"))
            worker = await Worker.begin(world, "w1", effective=("red",), clearances=("red",))
            other = await Worker.begin(world, "w2")
            await world.grant("v1", NodeRole.VOTER)
            assert await other.claim(1) == (True,)
            await put(world.etcd, keys.OFFICE, codec.encode_office(NodeId("v1")))
            for label in ("red", "blue", MEMBERS):
                await put(world.etcd, keys.label(label), trustcodec.encode(LabelKey(label, ())))
            for name in ("admin", "eve"):
                await put(world.etcd, keys.acl_user(name), b"")
            t1, t2, t3 = (builders.task_id(n) for n in (1, 2, 3))
            sees = [
                keys.node(NodeId("w1")), keys.node(NodeId("w2")), keys.incarnation(NodeId("w1")), keys.OFFICE,
                keys.GENERATION, keys.acl_node(NodeId("w1")), keys.acl_node(NodeId("v1")), keys.acl_user("eve"),
                keys.queued(t2), keys.task(t2), keys.label("red"), keys.label(MEMBERS),
            ]  # fmt: skip
            hidden = [
                keys.incarnation(NodeId("w2")), keys.acl_node(NodeId("w2")), keys.queued(t3), keys.task(t3),
                keys.task(t1), keys.running(NodeId("w2"), t1), keys.label("blue"), keys.authority("cluster"),
            ]  # fmt: skip
            await put(world.etcd, keys.authority("cluster"), b"x")
            found = (await worker.store.read(sees + hidden)).entries
            assert {k for k, v in found.items() if v is not None} == set(sees)
            assert [e.key for e in (await worker.store.list(keys.QUEUED)).entries] == [keys.queued(t2)]
            assert [e.value for e in (await worker.store.list(keys.QUEUED, keys_only=True)).entries] == [b""]
            assert [e.key for e in (await worker.store.list(keys.INCARNATION)).entries] == [
                keys.incarnation(NodeId("w1"))
            ]
            assert len((await worker.store.list(keys.NODE)).entries) == 2
            assert [e.key for e in (await worker.store.list(keys.LEADER)).entries] == [keys.OFFICE]

    run(scenario())


def test_secrets_are_there_only_while_a_task_that_needs_them_runs_here() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await submit(world, 1, owner="ann", secrets=(("db", "db"),))
            sealed = SecretRecord("ann", "db", (MEMBERS,), Sealed((), b"n", b"c"))
            for name in ("db", "other"):
                await put(world.etcd, keys.secret("ann", name), trustcodec.encode(sealed))
            worker, other = await Worker.begin(world, "w1"), await Worker.begin(world, "w2")
            both = [keys.secret("ann", "db"), keys.secret("ann", "other")]

            async def seen(by: Worker) -> list[bool]:
                return [entry is not None for entry in (await by.store.read(both)).entries.values()]

            assert await seen(worker) == [False, False]
            assert await worker.claim(1) == (True,)
            assert await seen(worker) == [True, False]
            assert await seen(other) == [False, False]
            assert await worker.end(1) == (True,)
            assert await seen(worker) == [False, False]

    run(scenario())


def test_a_long_queue_that_is_mostly_hidden_is_listed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SCAN_KEYS_MAX", 20)
    monkeypatch.setattr(service, "SCAN_PAGE_KEYS", 10)

    async def scenario() -> None:
        async with fresh() as world:
            await asyncio.gather(
                *(submit(world, n, clearance=() if n in (7, 63, 99) else ("blue",)) for n in range(1, 101))
            )
            worker = await Worker.begin(world, "w1")
            shown = [keys.queued(builders.task_id(n)) for n in (7, 63, 99)]
            page = await worker.store.list(keys.QUEUED)
            assert ([e.key for e in page.entries], page.more) == (shown, False)
            page = await worker.store.list(keys.QUEUED, limit=2)
            assert ([e.key for e in page.entries], page.more) == (shown[:2], True)
            page = await worker.store.list(keys.QUEUED, after=shown[1], limit=2, revision=page.revision)
            assert ([e.key for e in page.entries], page.more) == (shown[2:], False)
            page = await worker.store.list(keys.QUEUED, newest_first=True, limit=1)
            assert [e.key for e in page.entries] == shown[2:]

    run(scenario())


# --- what it watches ---------------------------------------------------------------------------------------------


def test_one_watch_at_etcd_serves_all_workers_each_with_what_it_may_see() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            workers = [await Worker.begin(world, f"w{n}", effective=("red",) if n % 2 else ()) for n in range(6)]
            start = (await world.etcd.read([])).revision + 1
            queues = [await Follower(w.store, keys.QUEUED, start).stands() for w in workers]
            mine = [await Follower(w.store, keys.running_on(w.node), start).stands() for w in workers]
            await submit(world, 1)
            await submit(world, 2, clearance=("red",))
            await submit(world, 3, clearance=("blue",))
            await submit(world, 4, clearance=(MEMBERS,))
            q1, q2, q3, q4 = (keys.queued(builders.task_id(n)) for n in (1, 2, 3, 4))
            for n, queue in enumerate(queues):
                expected = [q1, q2, q4] if n % 2 else [q1, q4]
                await queue.shows(expected)
            assert await workers[4].claim(1) == (True,)
            await world.etcd.commit(Txn(then=(Delete(q3),)))
            for n, queue in enumerate(queues):  # that something is gone is told of what was hidden, too
                expected = [q1, q2, q4, q1, q3] if n % 2 else [q1, q4, q1, q3]
                await queue.shows(expected)
            await eventually(lambda: mine[4].keys == [keys.running(NodeId("w4"), builders.task_id(1))], within_s=10)
            assert not any(each.keys for n, each in enumerate(mine) if n != 4)
            feeds = world.gates[0].service.fanout._feeds
            assert set(feeds) == {keys.QUEUED, keys.RUNNING}
            for each in (*queues, *mine):
                assert each.error is None
                await each.stop()

    run(scenario())


def test_a_watch_begins_in_the_recent_past_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "RING_EVENTS", 10)

    async def scenario() -> None:
        async with fresh() as world:
            worker = await Worker.begin(world, "w1")
            start = (await world.etcd.read([])).revision + 1
            first = await Follower(worker.store, keys.QUEUED, start).stands()
            await submit(world, *range(1, 6))
            await eventually(lambda: len(first.keys) == 5, within_s=10)
            again = await Follower(worker.store, keys.QUEUED, start).stands()
            await eventually(lambda: again.keys == first.keys, within_s=10)
            middle = await Follower(worker.store, keys.QUEUED, start + 3).stands()
            await eventually(lambda: middle.keys == first.keys[3:], within_s=10)
            await submit(world, *range(6, 20))
            await eventually(lambda: len(first.keys) == 19, within_s=10)
            assert first.keys == again.keys == [keys.queued(builders.task_id(n)) for n in range(1, 20)]
            late = await Follower(worker.store, keys.QUEUED, start).stands()
            assert isinstance(late.error, Compacted)
            future = await Follower(worker.store, keys.QUEUED, start + 20).stands()
            await submit(world, 20, 21, 22, 23)
            await eventually(lambda: len(future.keys) == 3, within_s=10)
            for each in (first, again, middle, future):
                await each.stop()

    run(scenario())


def test_one_who_asks_for_all_of_history_does_not_spoil_it_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "BACK_REVISIONS_MAX", 5)

    async def scenario() -> None:
        async with fresh() as world:
            greedy, worker = await Worker.begin(world, "w1"), await Worker.begin(world, "w2")
            await submit(world, *range(1, 20))
            start = (await world.etcd.read([])).revision + 1
            first = await Follower(greedy.store, keys.QUEUED, 1).stands()
            assert isinstance(first.error, Compacted)
            far = await Follower(greedy.store, keys.QUEUED, 1 << 40).stands()
            second = await Follower(worker.store, keys.QUEUED, start).stands()
            await submit(world, 20)
            await eventually(lambda: second.keys == [keys.queued(builders.task_id(20))], within_s=10)
            await far.stop()
            await second.stop()

    run(scenario())


def test_a_slow_reader_is_cut_and_lists_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "BUFFER_BYTES", 1 << 20)

    async def scenario() -> None:
        async with fresh() as world:
            slow, quick = await Worker.begin(world, "w1"), await Worker.begin(world, "w2")
            start = Revision((await world.etcd.read([])).revision + 1)
            quickly = await Follower(quick.store, keys.NODE, start).stands()
            async with contextlib.aclosing(slow.store.watch(keys.NODE, start=start)) as watch:
                await anext(watch)
                for n in range(300):  # of 30 kB: more than a buffer, the ring and what TCP takes together
                    await put(world.etcd, keys.node(NodeId("w3")), bytes(30_000) + str(n).encode())
                await eventually(lambda: len(quickly.keys) == 300, within_s=30)
                seen: list[Changes] = []
                with pytest.raises(StoreUnavailable, match="too slow"):
                    await drain(watch, seen)
                assert sum(len(changes.events) for changes in seen) < 300
            await quickly.stop()

    run(scenario())


def test_a_quiet_watch_is_told_that_it_still_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "BEAT_S", 0.2)
    monkeypatch.setattr(gateway, "SILENT_S", 1.0)

    async def scenario() -> None:
        async with fresh() as world:
            worker = await Worker.begin(world, "w1")
            await world.grant("v9", NodeRole.VOTER)
            start = (await world.etcd.read([])).revision + 1
            followers = [
                await Follower(store, keys.QUEUED, start).stands()
                for store in (worker.store, world.store("v9", NodeRole.VOTER))
            ]
            await asyncio.sleep(3)  # not for something to happen, but for nothing to
            assert [f.error for f in followers] == [None, None]
            monkeypatch.setattr(watches, "BEAT_S", 60)
            await eventually(lambda: all(f.error is not None for f in followers), within_s=10)
            assert all("fallen silent" in str(f.error) for f in followers)

    run(scenario())


# --- rights that change ------------------------------------------------------------------------------------------


def test_rights_that_are_taken_away_end_everything_at_once() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await submit(world, 1, 2)
            worker = await Worker.begin(world, "w1")
            assert await worker.claim(1) == (True,)
            end, renewal = await worker.ends(1), txn.renew(await worker.registration())
            queue = await Follower(worker.store, keys.QUEUED, (await world.etcd.read([])).revision + 1).stands()
            await world.grant("w1", revoked=True)
            for body in (end, renewal):
                with pytest.raises(Denied, match="revoked"):
                    await worker.store.commit(body)
            for work in (
                worker.store.read([keys.GENERATION]),
                worker.store.list(keys.NODE),
                worker.store.grant_lease(5),
            ):
                with pytest.raises(Denied, match="revoked"):
                    await work
            await eventually(lambda: queue.error is not None, within_s=10)
            assert (await stored_task(world, 1)).state is State.RUNNING

    run(scenario())


def test_a_commit_that_was_under_way_when_the_rights_went_is_refused() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            worker = await Worker.begin(world, "w1")
            renewal = txn.renew(await worker.registration())
            service = world.gates[0].service
            ask, asked = service._who, 0

            async def then_revoke(context: Any) -> Any:
                nonlocal asked
                asked += 1
                found = await ask(context)
                if asked == 1:  # after the voter has looked, before it commits
                    await world.grant("w1", revoked=True)
                return found

            service._who = then_revoke
            beat = keys.beat(NodeId("w1"))
            before = (await get(world.etcd, beat)).modified
            with pytest.raises(Denied, match="revoked"):
                await worker.store.commit(renewal)
            assert asked == 2
            assert (await get(world.etcd, beat)).modified == before

    run(scenario())


def test_rights_that_change_otherwise_are_a_conflict_with_the_old_registration_only() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            worker = await Worker.begin(world, "w1")
            old = await worker.registration()
            queue = await Follower(worker.store, keys.QUEUED, (await world.etcd.read([])).revision + 1).stands()
            await world.grant("w1", effective=("red",))
            assert isinstance(await worker.store.commit(txn.renew(old)), Conflict)
            assert isinstance(await worker.store.commit(txn.renew(await worker.registration())), Committed)
            await eventually(lambda: queue.error is not None, within_s=10)  # it lists again, and sees more
            assert "rights have changed" in str(queue.error)

    run(scenario())


# --- leases ------------------------------------------------------------------------------------------------------


def test_leases_are_ones_own_also_at_another_voter() -> None:
    async def scenario() -> None:
        async with fresh(2) as world:
            worker, other = await Worker.begin(world, "w1"), await Worker.begin(world, "w2")
            at = {gate.address: gate for gate in world.gates}
            elsewhere = world.store("w1", voters=[a for a in at if a != worker.store.endpoints[0]])  # type: ignore[attr-defined]
            loose = await worker.store.grant_lease(60)
            assert await elsewhere.keep_alive(worker.lease) == 60.0  # by its registration
            assert await elsewhere.keep_alive(loose) is None  # nobody there knows of it
            assert await worker.store.keep_alive(loose) == 60.0
            for lease in (worker.lease, loose):
                assert await other.store.keep_alive(lease) is None
                await other.store.revoke_lease(lease)
                assert await world.etcd.keep_alive(lease) == 60.0
            await elsewhere.revoke_lease(loose)
            assert await world.etcd.keep_alive(loose) == 60.0
            await elsewhere.revoke_lease(worker.lease)
            assert await world.etcd.keep_alive(worker.lease) is None

    run(scenario())


# --- voters that come and go -------------------------------------------------------------------------------------


def test_a_voter_dies_under_load_and_nothing_is_lost_or_done_twice() -> None:
    async def scenario() -> None:
        async with fresh(2) as world:
            count = 300
            await asyncio.gather(*(submit(world, n) for n in range(1, count + 1)))
            workers = [await Worker.begin(world, f"w{n}") for n in range(6)]
            queue = await Follower(workers[0].store, keys.NODE, (await world.etcd.read([])).revision + 1).stands()
            todo = list(range(1, count + 1))
            done: dict[int, str] = {}

            async def work(worker: Worker) -> None:
                while todo:
                    n = todo.pop()
                    await finish(worker, n)
                    done[n] = worker.node

            async def finish(worker: Worker, n: int) -> None:
                """As a daemon does: an answer that is lost is read back."""
                while True:
                    try:
                        task = await stored(worker, n)
                        if task is not None and task.state is State.COMPLETE:
                            return
                        if task is not None and task.state is State.QUEUED:
                            await worker.claim(n)
                        else:
                            await worker.end(n)
                    except (StoreUnavailable, OutcomeUnknown):
                        await asyncio.sleep(0.01)

            async def stored(worker: Worker, n: int) -> Task | None:
                return await worker.task(n)

            async def kill() -> None:
                await eventually(lambda: len(done) > 60, within_s=30)
                await world.gates[0].stop()
                await eventually(lambda: len(done) > 150, within_s=30)
                back = await world.gate(address=world.gates[0].address)
                await world.gates[1].stop()
                assert back.address == world.gates[0].address

            await asyncio.gather(kill(), *(work(worker) for worker in workers))
            assert len(done) == count
            for n in range(1, count + 1):
                task = await stored_task(world, n)
                assert (task.state, task.outcome, task.attempts_started) == (State.COMPLETE, Outcome.SUCCEEDED, 1)
            assert not any(gate.refused for gate in world.gates)
            await queue.stop()

    run(scenario())


def test_a_write_is_never_sent_twice() -> None:
    async def scenario() -> None:
        async with fresh(2) as world:
            await world.grant("v9", NodeRole.VOTER)
            store = world.store("v9", NodeRole.VOTER)
            counts: dict[str, int] = {}
            n = 0

            async def write() -> None:
                nonlocal n
                while n < 1500:
                    n += 1
                    key = f"/w/{n:05}"
                    try:
                        result = await store.commit(Txn(then=(Put(key),)))
                        counts[key] = 1 if isinstance(result, Committed) else 0
                    except OutcomeUnknown:
                        counts[key] = -1
                    except StoreUnavailable:
                        counts[key] = 0

            def passed(mark: int) -> bool:
                return n >= mark

            async def kill() -> None:
                for gate in list(world.gates):
                    await eventually(functools.partial(passed, n + 250), within_s=30)
                    await gate.stop()
                    await world.gate(address=gate.address)

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(write())
                group.create_task(kill())
            found = {e.key: e for e in (await world.etcd.list("/w/")).entries}
            assert all(e.created == e.modified for e in found.values())
            assert {k for k, v in counts.items() if v == 1} <= set(found)
            assert not {k for k, v in counts.items() if v == 0} & set(found)
            assert sum(v == 1 for v in counts.values()) > 1000

    run(scenario())


def test_a_worker_is_nobodys_gateway() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await world.grant("w1")
            pems = world.authority.node("evil", NodeRole.WORKER)
            posing = grpc.aio.server()
            port = posing.add_secure_port("127.0.0.1:0", server_credentials(lambda: pems))
            await posing.start()
            store = world.store("w1", voters=[f"127.0.0.1:{port}"])
            with pytest.raises(StoreUnavailable, match="no connection"):
                await store.read([keys.GENERATION])
            await store.set_endpoints([f"127.0.0.1:{port}", world.gates[0].address])
            assert (await store.read([keys.GENERATION])).entries[keys.GENERATION] is not None
            await posing.stop(None)

    run(scenario())


def test_no_voter_is_known_and_an_etcd_that_is_gone() -> None:
    async def scenario() -> None:
        async with etcd() as server_, gate_world(server_.client) as world:
            await world.grant("w1")
            nobody = world.store("w1", voters=[])
            with pytest.raises(StoreUnavailable, match="none is known"):
                await nobody.read([keys.GENERATION])
            store = world.store("w1")
            await store.read([keys.GENERATION])
            server_.kill()
            for work in (store.commit(Txn()), store.read([keys.OFFICE]), store.list(keys.NODE)):
                began_s = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await work
                assert time.monotonic() - began_s < 6

    run(scenario())


def test_a_renewed_certificate_is_used_without_failing_a_call() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await world.grant("v9", NodeRole.VOTER)
            pems = [world.authority.node("v9", NodeRole.VOTER)]
            store = world.store("v9", NodeRole.VOTER, dialer=Dialer.secured(lambda: pems[-1]))
            seen: set[bytes] = set()
            service = world.gates[0].service
            ask = service._who

            async def who(context: Any) -> Any:
                seen.update(context.auth_context().get("x509_pem_cert") or ())
                return await ask(context)

            service._who = who
            stop = asyncio.Event()

            def shown(certificates: int) -> bool:
                return len(seen) == certificates

            async def write(n: int) -> int:
                count = 0
                while not stop.is_set():
                    assert isinstance(await store.commit(Txn(then=(Put(f"/w/{n}"),))), Committed)
                    count += 1
                return count

            start = (await world.etcd.read([])).revision + 1
            watch = await Follower(store, "/w/", start).stands()
            writers = [asyncio.create_task(write(n)) for n in range(8)]
            for _ in range(3):
                pems.append(world.authority.node("v9", NodeRole.VOTER))
                await eventually(functools.partial(shown, len(pems)), within_s=10)
            await eventually(lambda: watch.error is not None, within_s=10)
            assert "being replaced" in str(watch.error)
            stop.set()
            assert min(await asyncio.gather(*writers)) > 10

    run(scenario())


def test_members_are_told_of() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            await world.grant("w1")
            store = world.store("w1")
            with pytest.raises(StoreUnavailable):
                await store.members()
            told = Membership("abc", 7, (Member("v1", 7, "http://a", "http://b", True),), ("NOSPACE on v1",))

            async def membership() -> Membership:
                return told

            world.gates[0].service._membership = membership
            found = await store.members()
            assert (found.cluster_id, found.leader_member_id, found.alarms) == ("abc", 7, ("NOSPACE on v1",))
            assert (found.members[0].name, found.members[0].learner) == ("v1", True)

    run(scenario())
