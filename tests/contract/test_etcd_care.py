"""Real etcds that run full, grow holes and lose their majority: what is done about it, and what is said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aetcd import rpc

from spinetta import upkeep
from spinetta.errors import OutcomeUnknown, StoreFull, StoreUnavailable, UserError
from spinetta.node.etcdcare import EtcdCare
from spinetta.node.health import StoreHealth
from spinetta.store import maintenance
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import status
from spinetta.txn import Committed, Delete, Put, Txn
from spinetta.upkeep import Defragment, Disarm, MoveLeader, Rest
from tests.contract.etcds import etcd
from tests.contract.test_membership import Cluster, cluster, run

pytestmark = pytest.mark.contract

MIB = 1 << 20
COMMIT_S = 0.15  # etcd writes to its file every 100 ms


@dataclass
class Here:
    """A node, as far as the care for etcd looks at it."""

    member_id: int
    leading: bool = True


class World:
    """One who cares for an etcd; time goes as fast as the test wants."""

    def __init__(self, store: EtcdStore, here: Here, quota_bytes: int) -> None:
        self.store, self.now_s = store, 0.0
        self.health = StoreHealth(store.connections, quota_bytes, lambda: "abc")
        self.care = EtcdCare(here, here, store, self.health, pause_s=5.0, clock=lambda: self.now_s)

    async def steps(self, most: int = 20) -> list[object]:
        """What is done until there is nothing left to do, a quarter of a minute apart."""
        done: list[object] = []
        for _ in range(most):
            self.now_s += 16.0
            try:
                step = await self.care.step()
            except StoreUnavailable as e:  # told, and tried again
                step = Rest(str(e))
            if isinstance(step, Rest) and done and not step.reason:
                return done
            done.append(step)
            await self.store.commit(Txn(then=(Put("/beat/n1"),)))  # as nodes do; what is free is counted with it
            await asyncio.sleep(COMMIT_S)
        return done


@contextlib.asynccontextmanager
async def full_etcd() -> AsyncIterator[tuple[EtcdStore, World]]:
    """An etcd that has raised NOSPACE."""
    async with etcd("--quota-backend-bytes=6291456") as server:
        store = EtcdStore([server.client])
        here = Here((await status(server.client)).member_id)
        try:
            with pytest.raises(StoreFull):
                await fill(store)
            yield store, World(store, here, 6 * MIB)
        finally:
            await store.close()


async def fill(store: EtcdStore) -> None:
    for n in range(200):  # its file grows now and then, and is then looked at
        await store.commit(Txn(then=(Put(f"/{n % 20}", os.urandom(500_000)),)))


async def empty(store: EtcdStore) -> None:
    for n in range(20):
        await store.commit(Txn(then=(Delete(f"/{n}"),)))


def test_a_store_that_was_full_takes_writes_again_by_itself() -> None:
    async def scenario() -> None:
        async with full_etcd() as (store, world):
            await world.health.glance()
            refusal = world.health.refusal_of_submits(0)
            assert isinstance(refusal, UserError)
            assert refusal.reason == "store-full"
            await empty(store)
            done = await world.steps()
            assert {Defragment, Disarm} <= {type(step) for step in done}
            assert isinstance(await store.commit(Txn(then=(Put("/a", b"1"),))), Committed)
            await world.health.glance()
            assert world.health.refusal_of_submits(0) is None

    run(scenario())


def test_without_a_leader_the_node_of_etcds_leader_makes_room() -> None:
    """As when no node has a session any more: a new one cannot be had."""

    async def scenario() -> None:
        async with full_etcd() as (store, world):
            await empty(store)
            here = Here(0, leading=False)
            world.care = EtcdCare(here, here, store, world.health, pause_s=5.0, clock=lambda: world.now_s)
            await world.health.glance()
            assert await world.care.step() is None  # it has no seat
            here.member_id = (await maintenance.own_status(store.connections)).member_id + 1
            assert await world.care.step() is None  # another one's leads
            here.member_id -= 1
            assert Disarm in [type(step) for step in await world.steps()]
            await world.health.glance()
            assert await world.care.step() is None  # there is room, and others may be elected

    run(scenario())


def test_a_quick_client_does_not_run_past_the_limit_between_two_looks() -> None:
    async def scenario() -> None:
        async with etcd() as server:
            store = EtcdStore([server.client])
            health = StoreHealth(store.connections, 100 * MIB, lambda: "abc")
            assert health.refusal_of_submits(MIB) is None  # not known: etcd says it if need be
            await health.glance()
            taken = 0
            while health.refusal_of_submits(MIB) is None:
                taken += 1
                assert taken < 100
            assert 83 <= taken <= 85
            await health.glance()
            assert health.refusal_of_submits(MIB) is None  # nothing of it has come
            await store.close()

    run(scenario())


def test_clients_of_several_nodes_do_not_run_past_the_limit_together() -> None:
    """Each counts what it took itself, and looks again before the others can have taken much."""

    async def scenario() -> None:
        async with etcd() as server:
            store = EtcdStore([server.client])
            nodes = [StoreHealth(store.connections, 30 * MIB, lambda: "abc") for _ in range(3)]
            for health in nodes:
                await health.glance()
            for n in range(240):
                if await nodes[n % 3].room_for_submits(MIB // 5) is None:
                    await store.commit(Txn(then=(Put(f"/{n}", os.urandom(MIB // 5)),)))
            assert [await health.room_for_submits(0) is None for health in nodes] == [False] * 3
            view = await nodes[0].look()
            # Each of them may have stopped for want of room for one more. Etcd tells of what it took 100 ms ago.
            one = MIB // 5 / (30 * MIB)
            assert upkeep.SUBMITS_UP_TO - len(nodes) * one <= view.in_use_bytes / (30 * MIB) < 1.0
            await store.close()

    run(scenario())


def test_a_submit_waits_but_once_for_an_etcd_that_does_not_say_how_full_it_is() -> None:
    async def scenario() -> None:
        async with etcd() as server:
            store = EtcdStore([server.client])
            health = StoreHealth(store.connections, 2 * MIB, lambda: "abc")
            await health.glance()
            assert await health.room_for_submits(MIB) is None
            server.send(signal.SIGSTOP)
            try:
                began_s = time.monotonic()
                found = await asyncio.gather(*(health.room_for_submits(MIB) for _ in range(50)))
                assert found == [None] * 50  # not known: etcd says it if need be
                assert time.monotonic() - began_s < 10 * maintenance.ASK_S
            finally:
                server.send(signal.SIGCONT)
            await store.close()

    run(scenario())


async def grown(tmp_path: Path, world: Cluster) -> tuple[dict[int, str], EtcdStore]:
    await world.settle()
    names = {(await status(n.client_url)).member_id: n.name for n in world.nodes.values()}
    return names, EtcdStore([n.client_url for n in world.nodes.values()])


def test_holes_go_one_member_after_the_other_and_leases_live(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc") as world:
            names, store = await grown(tmp_path, world)
            lease = await store.grant_lease(15)
            await store.commit(Txn(then=(Put("/alive", b"", lease),)))
            for n in range(16):
                await store.commit(Txn(then=(Put(f"/{n}", os.urandom(MIB)),)), timeout_s=20)
            for n in range(12):
                result = await store.commit(Txn(then=(Delete(f"/{n}"),)))
            await store.compact(result.revision)

            async def beat() -> None:
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        await store.keep_alive(lease, timeout_s=1.0)
                    await asyncio.sleep(0.3)

            beating = asyncio.create_task(beat())
            care = World(store, Here(next(iter(names))), 18 * MIB)
            end_s = time.monotonic() + 30
            while (await care.health.look()).in_use_bytes > 8 * MIB:  # pages are free with a later write
                await store.commit(Txn(then=(Put("/later"),)))
                assert time.monotonic() < end_s
            done = await care.steps()
            beating.cancel()
            stopped = [step.member_id for step in done if isinstance(step, Defragment)]
            assert sorted(stopped) == sorted(names)
            moved = [step for step in done if isinstance(step, MoveLeader)]
            assert [step.member_id for step in moved] == stopped[-1:]  # etcd's leader, which did not lead by then
            view = await care.health.look()
            assert all(m.db_bytes < 8 * MIB for m in view.members)
            assert care.health.notices(view) == []
            assert (await store.read(["/alive"])).entries["/alive"] is not None
            await store.close()

    run(scenario())


def test_without_a_majority_it_is_said_who_answers_and_all_goes_on_by_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc") as world:
            await world.settle()
            own = world.nodes["a"]
            store = EtcdStore([own.client_url, *(n.client_url for n in world.nodes.values() if n is not own)])
            health = StoreHealth(store.connections, 1 << 30, lambda: "abc")
            running = asyncio.create_task(health.run())
            assert (await health.look()).has_majority
            assert health.lost() is None
            error = StoreUnavailable("something")
            assert await health.explain(error) is error
            frozen = [world.nodes[n].services.running["etcd"].process for n in "bc"]
            for process in frozen:
                process.send_signal(signal.SIGSTOP)
            end_s = time.monotonic() + 20
            while health.lost() is None:
                assert time.monotonic() < end_s
                await asyncio.sleep(0.05)
            lost = health.lost()
            assert lost is not None
            assert lost.reason == "no-quorum"
            assert "a answers but sees no leader; b, c do not answer" in str(lost)
            assert "when one more of them is back" in lost.hint
            assert "b, c" not in str(health.lost(named=False))
            told = await health.explain(OutcomeUnknown("no answer", hint="the same ids"))
            assert isinstance(told, OutcomeUnknown)
            assert "no majority" in str(told)
            assert told.hint.startswith("the same ids; it goes on by itself")
            why = await health.explain(StoreUnavailable("something"))
            assert isinstance(why, StoreUnavailable)
            assert why.reason == "no-quorum"

            own.services.running["etcd"].process.send_signal(signal.SIGSTOP)
            while (await health.look()).voters[0].answers:
                assert time.monotonic() < end_s + 20
            cut_off = await health.explain(StoreUnavailable("something"))
            assert isinstance(cut_off, StoreUnavailable)
            assert cut_off.reason == "cut-off"
            for process in (*frozen, own.services.running["etcd"].process):
                process.send_signal(signal.SIGCONT)
            end_s = time.monotonic() + 20
            while health.lost() is not None or not (await health.look()).has_majority:
                assert time.monotonic() < end_s
                await asyncio.sleep(0.05)
            running.cancel()
            await store.close()

    run(scenario())


def test_what_is_corrupt_is_said_and_left_alone() -> None:
    async def scenario() -> None:
        async with etcd() as server:
            store = EtcdStore([server.client])
            member_id = (await status(server.client)).member_id
            world = World(store, Here(member_id), 64 * MIB)
            connection = await store.connections.pick(5.0)
            alarm = rpc.AlarmRequest(action=rpc.AlarmRequest.ACTIVATE, memberID=member_id, alarm=rpc.CORRUPT)
            with connection.use() as stubs:
                await stubs.maintenance.Alarm(alarm, timeout=5.0)
            for write in (Txn(then=(Put("/a"),)), Txn(nested=(Txn(then=(Put("/a"),)),)), Txn(then=(Delete("/a"),))):
                with pytest.raises(StoreUnavailable, match="CORRUPT") as caught:
                    await store.commit(write)
                assert caught.value.reason == "store-corrupt"
                assert await world.health.explain(caught.value) is caught.value
            assert (await store.read(["/a"])).entries["/a"] is None  # certainly not done; reads are answered
            assert "CORRUPT" in world.health.notices(await world.health.look())[0]
            step = await world.care.step()
            assert isinstance(step, Rest)
            assert "CORRUPT" in step.reason
            await store.close()

    run(scenario())
