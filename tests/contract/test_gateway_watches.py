"""What a worker watches through the gateway: one watch at etcd for all, and who is cut off from it."""

from __future__ import annotations

import asyncio

import pytest

from spinetta import keys
from spinetta.access import MEMBERS, NodeRole
from spinetta.errors import Compacted
from spinetta.model import NodeId
from spinetta.node.gateway import fanout, watches
from spinetta.store import gateway
from spinetta.txn import Delete, Txn
from tests import builders
from tests.contract.api_world import eventually
from tests.contract.workers import Follower, Worker, fresh, run, submit

pytestmark = pytest.mark.contract


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
            await eventually(lambda: mine[4].keys == [keys.running(NodeId("w4"), builders.task_id(1))], within_s=40)
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
            await eventually(lambda: len(first.keys) == 5, within_s=40)
            again = await Follower(worker.store, keys.QUEUED, start).stands()
            await eventually(lambda: again.keys == first.keys, within_s=40)
            middle = await Follower(worker.store, keys.QUEUED, start + 3).stands()
            await eventually(lambda: middle.keys == first.keys[3:], within_s=40)
            await submit(world, *range(6, 20))
            await eventually(lambda: len(first.keys) == 19, within_s=40)
            assert first.keys == again.keys == [keys.queued(builders.task_id(n)) for n in range(1, 20)]
            late = await Follower(worker.store, keys.QUEUED, start).stands()
            assert isinstance(late.error, Compacted)
            future = await Follower(worker.store, keys.QUEUED, start + 20).stands()
            await submit(world, 20, 21, 22, 23)
            await eventually(lambda: len(future.keys) == 3, within_s=40)
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
            await eventually(lambda: second.keys == [keys.queued(builders.task_id(20))], within_s=40)
            await far.stop()
            await second.stop()

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
            await eventually(lambda: all(f.error is not None for f in followers), within_s=40)
            assert all("fallen silent" in str(f.error) for f in followers)

    run(scenario())
