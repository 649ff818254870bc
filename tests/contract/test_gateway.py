"""What a worker does through the gateway: a whole life, over real TLS and a real etcd; voters that die meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import Any

import grpc.aio
import pytest

from spinetta import codec, keys, trustcodec, txn
from spinetta.access import MEMBERS, LabelKey, NodeRole, SecretRecord
from spinetta.access import Envelope as Sealed
from spinetta.errors import Denied, OutcomeUnknown, StoreUnavailable
from spinetta.model import Exit, Member, Membership, NodeId, Outcome, Reason, Revision, State, Task
from spinetta.node.gateway import fanout, service
from spinetta.store.protocol import Changes
from spinetta.trust.dial import Dialer, server_credentials
from spinetta.txn import Committed, Conflict, Put, Txn
from tests import builders, lives
from tests.contract.api_world import eventually
from tests.contract.etcds import etcd
from tests.contract.gateways import gate_world
from tests.contract.workers import Follower, Worker, drain, fresh, get, put, run, stored_task, submit

pytestmark = pytest.mark.contract


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
            await eventually(lambda: queue.error is not None, within_s=40)
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
            await eventually(lambda: queue.error is not None, within_s=40)  # it lists again, and sees more
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
                await eventually(functools.partial(shown, len(pems)), within_s=40)
            await eventually(lambda: watch.error is not None, within_s=40)
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
            told = Membership("abc", 7, (Member("v1", 7, "http://a", "http://b", True, False),), ("NOSPACE on v1",))

            async def membership() -> Membership:
                return told

            world.gates[0].service._membership = membership
            found = await store.members()
            assert (found.cluster_id, found.leader_member_id, found.alarms) == ("abc", 7, ("NOSPACE on v1",))
            assert found.members == told.members

    run(scenario())
