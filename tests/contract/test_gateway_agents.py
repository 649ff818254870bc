"""Real agents as workers: all that a daemon wants from the store it gets through the gateway; nothing of it is refused.

The processes are played; agents, drivers, gateways with TLS, and etcd are real. One agent is a voter: it leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from spinetta import codec, keys, lifecycle, txn
from spinetta.access import NodeRole
from spinetta.agent import Agent
from spinetta.events import Happening, LeaveWanted, SetDraining
from spinetta.model import Exit, IncarnationId, NodeId, Outcome, QueueHint, Reason, State, Task, Usage
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.runtime.protocol import Exited, Held, Launch, ShimLost
from spinetta.store.protocol import Store
from spinetta.txn import Committed
from tests import builders, lives
from tests.contract.api_world import eventually
from tests.contract.gateways import GateWorld
from tests.contract.workers import fresh, get, run, stored_task, submit

pytestmark = pytest.mark.contract


@dataclass
class Played:
    """A runtime whose processes are played: each ends as its command says, after a moment."""

    running: dict[str, Launch] = field(default_factory=dict)
    ended: dict[str, tuple[Launch, Exit]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    news: asyncio.Queue[Exited | ShimLost] = field(default_factory=asyncio.Queue)
    endless: bool = False

    def capabilities(self) -> tuple[str, ...]:
        return ("process",)

    async def start(self, launch: Launch) -> Exit | None:
        if launch.key in self.running:
            return None
        if launch.key in self.ended:
            return self.ended[launch.key][1]
        if launch.argv[0] == "spawn-failed":
            return Exit(Reason.SPAWN_FAILED, message="no such file", ended_ms=5)
        self.started.append(launch.key)
        self.running[launch.key] = launch
        if not self.endless and launch.argv[0] != "endless":
            loop = asyncio.get_running_loop()
            code = 0 if launch.argv[0] != "fails" else 3
            how = Exit(Reason.EXIT, code, started_ms=10, ended_ms=20, usage=Usage(0.5, 0.25, 1 << 20))
            loop.call_later(random.uniform(0.0, 0.05), self.end, launch.key, how)
        return None

    def finish(self) -> None:
        """All that runs ends well, and nothing is endless any more."""
        self.endless = False
        for key in list(self.running):
            self.end(key, Exit(Reason.EXIT, 0, started_ms=10, ended_ms=20))

    def end(self, key: str, how: Exit) -> None:
        launch = self.running.pop(key, None)
        if launch is not None:
            self.ended[key] = (launch, how)
            self.news.put_nowait(Exited(key, how))

    async def prepare(self, launch: Launch) -> Launch:
        return launch

    async def stop(self, key: str, why: str) -> None:
        self.end(key, Exit(Reason(why), signal=15, started_ms=10, ended_ms=20))

    async def renew(self, renewed_at_s: float) -> None:
        pass

    async def forget(self, key: str) -> None:
        self.ended.pop(key, None)

    async def held(self) -> Sequence[Held]:
        running = [Held(k, launch.token, launch.incarnation, 10, None) for k, launch in self.running.items()]
        return running + [Held(k, launch.token, launch.incarnation, 10, how) for k, (launch, how) in self.ended.items()]

    async def usage(self, key: str) -> Usage | None:  # noqa: ARG002 - nobody asks
        return None

    def log_path(self, key: str, stream: str) -> Path:
        raise NotImplementedError(f"{key} has no {stream}")

    async def events(self) -> AsyncIterator[Exited | ShimLost]:
        for key, (_, how) in list(self.ended.items()):
            yield Exited(key, how)
        while True:
            yield await self.news.get()


@dataclass
class Node:
    """A node: what it has on disk, its runtime, and the daemon that runs now."""

    name: str
    store: Store
    candidate: bool = False
    runtime: Played = field(default_factory=Played)
    incarnation: IncarnationId | None = None
    driver: Driver | None = None
    task: asyncio.Task[None] | None = None

    def start(self) -> Node:
        settings = builders.settings(self.name, candidate=self.candidate, secured=True)
        agent = Agent(settings, self.incarnation)
        launch = LaunchSettings(self.name, 100, "127.0.0.1:1")
        self.driver = Driver(agent, self.store, self.runtime, launch, remember=self._remember)
        self.task = asyncio.create_task(self.driver.run())
        return self

    def _remember(self, incarnation: IncarnationId) -> None:
        self.incarnation = incarnation

    @property
    def agent(self) -> Agent:
        assert self.driver is not None
        return self.driver.agent

    async def tell(self, event: Happening) -> None:
        assert self.driver is not None
        await self.driver.tell(event)

    async def until(self, condition: Callable[[Agent], bool], timeout_s: float = 20) -> None:
        assert self.driver is not None
        assert await self.driver.until(condition, timeout_s)

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait((self.task,))
            if not self.task.cancelled():
                self.task.result()


@contextlib.asynccontextmanager
async def cluster(world: GateWorld, workers: int) -> AsyncIterator[list[Node]]:
    """A leading voter straight on etcd, and workers behind the gateways; all alive."""
    await world.grant("v1", NodeRole.VOTER)
    nodes = [Node("v1", world.etcd, candidate=True)]
    for n in range(1, workers + 1):
        await world.grant(f"w{n}", effective=("red",) if n == 1 else (), clearances=("red",) if n == 1 else ())
        nodes.append(Node(f"w{n}", world.store(f"w{n}")))
    try:
        for node in nodes:
            node.start()
        nodes[0].runtime.endless = True
        for node in nodes[1:]:
            await node.until(lambda agent: agent.session.may_start)
        await nodes[0].tell(SetDraining(True))  # it leads, and takes nothing
        await nodes[0].until(lambda agent: agent.leading and agent.draining)
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


async def complete(world: GateWorld, *numbers: int) -> list[Task]:
    async def all_done() -> bool:
        return all([(await stored_task(world, n)).state is State.COMPLETE for n in numbers])

    await eventually(all_done, within_s=40)
    return [await stored_task(world, n) for n in numbers]


def nothing_was_refused(world: GateWorld) -> bool:
    told = list(itertools.chain.from_iterable(gate.refused for gate in world.gates))
    assert not told, told
    return True


def test_workers_take_and_finish_all_that_there_is() -> None:
    async def scenario() -> None:
        async with fresh(2) as world, cluster(world, 3) as nodes:
            numbers = range(1, 61)
            for n in numbers:
                command = ("fails",) if n % 7 == 0 else ("spawn-failed",) if n % 11 == 0 else ("/bin/true",)
                task = builders.queued(n, resources=builders.cpus(0.5), retries=1 if n % 7 == 0 else 0)
                task = replace(task, spec=replace(task.spec, command=command))
                assert isinstance(await world.etcd.commit(lives.submit(task)), Committed)
            done = await complete(world, *numbers)
            for task in done:
                n = int(task.id[:8], 16)
                wanted = Outcome.FAILED if n % 7 == 0 or n % 11 == 0 else Outcome.SUCCEEDED
                assert (task.outcome, task.attempts_started) == (wanted, 2 if n % 7 == 0 else 1)
            assert {a.node for task in done for a in task.attempts} == {"w1", "w2", "w3"}
            assert not nodes[0].runtime.started
            assert nothing_was_refused(world)

    run(scenario())


def test_a_labelled_task_runs_on_the_cleared_worker_only() -> None:
    async def scenario() -> None:
        async with fresh() as world, cluster(world, 3):
            await submit(world, *range(1, 9), clearance=("red",), resources=builders.cpus(0.5))
            await submit(world, 20, clearance=("blue",))
            done = await complete(world, *range(1, 9))
            assert {a.node for task in done for a in task.attempts} == {"w1"}
            assert (await stored_task(world, 20)).state is State.QUEUED
            assert nothing_was_refused(world)

    run(scenario())


def test_cancel_drain_restart_and_leave() -> None:
    async def scenario() -> None:
        async with fresh() as world, cluster(world, 2) as (_, one, two):
            for n in range(1, 7):
                task = builders.queued(n, resources=builders.cpus(1))
                task = replace(task, spec=replace(task.spec, command=("endless",)))
                assert isinstance(await world.etcd.commit(lives.submit(task)), Committed)
            await eventually(lambda: len(one.runtime.running) + len(two.runtime.running) == 6, within_s=40)
            # A request to cancel, from a voter.
            victim = next(iter(one.runtime.running.values()))
            number = int(victim.key[:8], 16)
            running = await get(world.etcd, keys.running(NodeId("w1"), builders.task_id(number)))
            asked = replace(codec.decode_holding(running.value), cancel_requested=True, cancel_reason="no more")
            body = txn.cancel_running(
                NodeId("w1"), builders.task_id(number), running.modified, codec.encode_holding(asked)
            )
            assert isinstance(await world.etcd.commit(body), Committed)
            assert (await complete(world, number))[0].outcome is Outcome.CANCELLED
            # A new daemon goes on with the life of the one that died.
            held = set(one.runtime.running)
            await one.stop()
            one.start()
            await one.until(lambda agent: agent.session.may_start and len(agent.holdings.held) == len(held))
            assert set(one.runtime.running) == held
            # One leaves: what it holds is given back, and runs on the other.
            await two.tell(SetDraining(True))
            await two.until(lambda agent: agent.session.told and agent.draining)
            await two.tell(LeaveWanted(release=True))
            await two.until(lambda agent: agent.left)
            assert not two.runtime.running
            assert (await world.etcd.read([keys.node(NodeId("w2"))])).entries[keys.node(NodeId("w2"))] is None
            assert nothing_was_refused(world)

    run(scenario())


def test_voters_die_and_come_back_under_a_running_fleet() -> None:
    async def scenario() -> None:
        async with fresh(2) as world, cluster(world, 3) as nodes:
            stop = asyncio.Event()
            submitted: list[int] = []

            async def submitting() -> None:
                while not stop.is_set():
                    n = len(submitted) + 1
                    await submit(world, n, resources=builders.cpus(0.5))
                    submitted.append(n)
                    await asyncio.sleep(0.02)

            def passed(mark: int) -> bool:
                return len(submitted) > mark

            async def killing() -> None:
                gates = list(world.gates)
                for turn in range(4):
                    await eventually(functools.partial(passed, (turn + 1) * 60), within_s=30)
                    await gates[turn % 2].stop()
                    gates[turn % 2] = await world.gate(address=gates[turn % 2].address)
                stop.set()

            await asyncio.gather(submitting(), killing())
            done = await complete(world, *submitted)
            assert all(task.outcome is Outcome.SUCCEEDED for task in done)
            # No attempt was lost, and none ran twice: what was started is what the records tell of.
            started = sorted(key for node in nodes for key in node.runtime.started)
            assert started == sorted(f"{t.id}.{a.number}" for t in done for a in t.attempts) or len(started) == len(
                done
            )
            assert {task.attempts_started for task in done} == {1}
            assert nothing_was_refused(world)

    run(scenario())


def test_a_worker_that_falls_silent_is_given_up_and_what_it_held_runs_elsewhere() -> None:
    async def scenario() -> None:
        async with fresh() as world, cluster(world, 3) as nodes:
            silent = nodes[1]
            silent.runtime.endless = True
            await submit(world, *range(1, 40), resources=builders.cpus(0.5), grace_s=4.0)
            await eventually(lambda: len(silent.runtime.running) > 0, within_s=40)
            await silent.stop()
            held = {int(key[:8], 16) for key in silent.runtime.running}
            done = await complete(world, *range(1, 40))
            assert all(t.attempts_started == 2 for t in done if int(t.id[:8], 16) in held)
            # It comes back, says that nothing of that life runs any more, and begins another.
            silent.runtime.running.clear()
            silent.runtime.endless = False
            silent.start()
            await silent.until(lambda agent: agent.session.may_start, 30)
            await submit(world, *range(50, 70), resources=builders.cpus(0.5))
            await complete(world, *range(50, 70))
            assert nothing_was_refused(world)

    run(scenario())


def test_a_revoked_worker_stays_up_and_tells_of_each_cause_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinetta.node.driver.REMARK_EVERY_S", 0.0)
    caplog.set_level(logging.DEBUG, "spinetta.node")

    def told(level: int) -> list[str]:
        return [r.message for r in caplog.records if r.levelno == level and "revoked" in r.message]

    async def scenario() -> None:
        async with fresh(2) as world, cluster(world, 2) as nodes:
            caplog.clear()
            await world.grant("w2", revoked=True)
            await eventually(lambda: len(told(logging.DEBUG)) >= 5, within_s=60)
            assert nodes[2].task is not None
            assert not nodes[2].task.done()
            lines = told(logging.INFO)
            assert lines
            assert len(lines) == len(set(lines))

    run(scenario())


def test_a_late_finish_of_a_fenced_worker_is_lost() -> None:
    async def scenario() -> None:
        async with fresh() as world, cluster(world, 2) as nodes:
            _, worker, other = nodes
            worker.runtime.endless = other.runtime.endless = True
            await submit(world, *range(1, 10), resources=builders.cpus(0.5))  # one more than one of them has room for
            await eventually(lambda: len(worker.runtime.running) > 0, within_s=40)
            other.runtime.finish()
            key = next(iter(worker.runtime.running))
            number = int(key[:8], 16)
            task_id = builders.task_id(number)
            running, record = (
                await get(world.etcd, keys.running(NodeId("w1"), task_id)),
                await stored_task(world, number),
            )
            lost = lifecycle.ended(
                record, Exit(Reason.NODE_LOST, ended_ms=1), running.created, cancel_requested=False, now_ms=1
            ).task
            hint = codec.encode_hint(QueueHint.of(lost.spec))
            taken = txn.give_back(NodeId("w1"), task_id, running.modified, codec.encode_task(lost), hint)
            assert isinstance(await world.etcd.commit(taken), Committed)
            worker.runtime.end(key, Exit(Reason.EXIT, 0, started_ms=10, ended_ms=20))
            worker.runtime.finish()
            done = await complete(world, *range(1, 10))
            assert next(t for t in done if t.id == task_id).attempts[0].outcome is Outcome.LOST
            assert nothing_was_refused(world)

    run(scenario())
