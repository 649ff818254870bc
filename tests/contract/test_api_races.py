"""Races, made to happen: something changes exactly between the look and the write, or between two looks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from spinetta import keys
from spinetta.model import Exit, Outcome, Reason, State
from spinetta.node.services import limits
from spinetta.store.protocol import Page, Store
from spinetta.txn import Result, Txn
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, Node, etcd, etcd_member, failure, node, run, spec
from tests.contract.test_api_list import pages, uuid_at

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode
Step = Callable[[], Awaitable[object]]


class Meddled:
    """A store in which something happens just before a commit, or just after a list of a prefix."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.before_commit: list[Step] = []
        self.after_list: dict[str, Step] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        if self.before_commit:
            await self.before_commit.pop(0)()
        return await self.inner.commit(txn, timeout_s=timeout_s)

    async def list(self, prefix: str, **options: Any) -> Page:
        page = await self.inner.list(prefix, **options)
        step = self.after_list.pop(prefix, None)
        if step is not None:
            await step()
        return page


def meddled(made: list[Meddled]) -> Callable[[Store], Store]:
    def wrap(inner: Store) -> Store:
        made.append(Meddled(inner))
        return made[-1]

    return wrap


async def cancel(n: Node, task_id: str) -> tuple[int, bool]:
    done = await n.api.Cancel(api.CancelRequest(ids=[task_id]))
    return done.tasks[0].state, done.tasks[0].was_complete


def test_a_waiting_task_is_claimed_under_the_cancel(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await b.submit()
            made[0].before_commit = [lambda: b.claim(task_id)]
            assert await cancel(a, task_id) == (pb.RUNNING, False)
            assert (await a.get(task_id)).cancel_requested
            assert (await a.task(task_id)).state is State.RUNNING
            assert not (await a.store.list(keys.COMPLETE)).entries
            await b.end(task_id, Exit(Reason.CANCELLED, signal=15))
            assert (await a.task(task_id)).outcome is Outcome.CANCELLED

    run(scenario())


def test_a_waiting_task_is_claimed_and_given_back_under_the_cancel(etcd: Etcd, tmp_path: Path) -> None:
    """The queue key is there again, but it is another one, and so is the record."""

    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await b.submit()

            async def round_trip() -> None:
                assert await b.claim(task_id)
                await b.end(task_id, Exit(Reason.RELEASED))

            made[0].before_commit = [round_trip]
            assert await cancel(a, task_id) == (pb.COMPLETE, False)
            task = await a.task(task_id)
            assert (task.outcome, task.attempts_started) == (Outcome.CANCELLED, 1)
            assert not await b.claim(task_id)

    run(scenario())


def test_a_running_task_ends_under_the_cancel(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await b.submit()
            await b.claim(task_id)
            made[0].before_commit = [lambda: b.end(task_id)]
            assert await cancel(a, task_id) == (pb.COMPLETE, True)
            assert (await a.task(task_id)).outcome is Outcome.SUCCEEDED
            assert not (await a.store.list(keys.RUNNING)).entries

    run(scenario())


def test_a_running_task_is_given_back_under_the_cancel(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await b.submit()
            await b.claim(task_id)
            made[0].before_commit = [lambda: b.end(task_id, Exit(Reason.RELEASED))]
            assert await cancel(a, task_id) == (pb.COMPLETE, False)
            assert not await b.claim(task_id)
            assert (await a.task(task_id)).outcome is Outcome.CANCELLED

    run(scenario())


def test_a_running_task_changes_nodes_under_the_cancel(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with (
            node(etcd, tmp_path, wrap=meddled(made)) as a,
            node(etcd, tmp_path, "b") as b,
            node(etcd, tmp_path, "c") as c,
        ):
            (task_id,) = await b.submit()
            await b.claim(task_id)

            async def move() -> None:
                await b.end(task_id, Exit(Reason.RELEASED))
                assert await c.claim(task_id)

            made[0].before_commit = [move]
            assert await cancel(a, task_id) == (pb.RUNNING, False)
            v = await a.get(task_id)
            assert (v.node, v.cancel_requested) == ("c", True)

    run(scenario())


def test_a_task_that_never_rests_is_given_up_and_said_so(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await b.submit()
            made[0].before_commit = [
                lambda: b.claim(task_id),
                lambda: b.end(task_id, Exit(Reason.RELEASED)),
            ] * 4
            with mock.patch.object(limits, "TRY_WAIT_S", 0.001):
                failed = await failure(a.api.Cancel(api.CancelRequest(ids=[task_id])))
            assert failed.code is Code.UNAVAILABLE
            assert f"task {task_id} changed hands 8 times" in failed.text
            assert (await a.task(task_id)).state is State.QUEUED

    run(scenario())


def test_two_submits_of_one_id_at_two_nodes(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            same, other = spec(), spec()
            made[0].before_commit = [lambda: b.submit(same)]
            done = await a.api.Submit(api.SubmitRequest(tasks=[same]))
            assert done.tasks[0].existed
            made[0].before_commit = [lambda: b.submit(other)]
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[spec(other.id, command=["/bin/false"])])))
            assert failed.code is Code.ALREADY_EXISTS
            assert (await a.task(other.id)).spec.command == ("/bin/true",)
            assert (await a.task(same.id)).submitted_at_node == "b"

    run(scenario())


def test_a_task_that_moves_between_two_readings_of_one_page(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Meddled] = []
        async with node(etcd, tmp_path, wrap=meddled(made)) as a, node(etcd, tmp_path, "b") as b:
            held, waiting = await b.submit(spec(), spec())
            await b.claim(held)

            async def swap() -> None:
                await b.end(held, Exit(Reason.RELEASED))
                assert await b.claim(waiting)

            made[0].after_list = {keys.QUEUED: swap}
            page = await a.api.List(api.ListRequest(filter=api.Filter(states=[pb.QUEUED, pb.RUNNING])))
            assert [v.task.spec.id for v in page.tasks] == [held, waiting]

    run(scenario())


@pytest.mark.parametrize("newest_first", [False, True])
def test_pages_over_states_whose_tasks_lie_hours_apart(etcd: Etcd, tmp_path: Path, newest_first: bool) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            # Three wait in each hour, one runs; at each half hour two are over. A window of 17 minutes holds one sort
            # only, so what is read of one state reaches further than what is read of another.
            hour, minute, now = 3_600_000, 60_000, a.port.wall_ms()
            waiting = [uuid_at(now - h * hour - m * minute, m) for h in range(12) for m in range(4)]
            over = [uuid_at(now - h * hour - (30 + m) * minute, m) for h in range(12) for m in range(2)]
            ids = waiting + over
            await a.submit(*(spec(i) for i in ids))
            await a.api.Cancel(api.CancelRequest(ids=over))
            for task_id in waiting[::4]:
                await a.claim(task_id)
            for size in (1, 3, 7, 100):
                found = await pages(a, size, newest_first=newest_first, states=[pb.QUEUED, pb.COMPLETE, pb.RUNNING])
                assert found == sorted(ids, reverse=newest_first)

    run(scenario())
