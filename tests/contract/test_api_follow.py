"""Wait and Watch, and the hub under them: nobody waits longer than needed, nothing is missed, nothing piles up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Self
from unittest import mock

import grpc
import pytest

from spinetta import keys
from spinetta.errors import StoreUnavailable, UserError
from spinetta.model import Exit, Reason, Revision, TaskId
from spinetta.node import hub as hub_module
from spinetta.node.hub import Hub
from spinetta.node.services import limits
from spinetta.store.protocol import Changes, Store
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import (
    Etcd,
    Node,
    delete,
    etcd,
    etcd_member,
    eventually,
    failure,
    new_id,
    node,
    put,
    run,
    spec,
)

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode


class Faulty:
    """A store whose watch loses events, or breaks, when told to."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.deaf = False
        self.broken = asyncio.Event()
        self.watches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        self.watches += 1
        watch = self.inner.watch(prefix, start=start)
        pending: asyncio.Task[Changes] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(watch))
                broken = asyncio.ensure_future(self.broken.wait())
                await asyncio.wait({pending, broken}, return_when=asyncio.FIRST_COMPLETED)
                broken.cancel()
                if self.broken.is_set():
                    self.broken.clear()
                    raise StoreUnavailable("the watch broke on request")
                if pending.done():
                    changes, pending = pending.result(), None
                    if not self.deaf:
                        yield changes
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.wait({pending})
            await watch.aclose()


def as_store(faulty: Faulty) -> Store:
    return faulty


def keeping(made: list[Faulty]) -> Callable[[Store], Store]:
    def wrap(inner: Store) -> Store:
        made.append(Faulty(inner))
        return as_store(made[-1])

    return wrap


def lingering(linger_s: float = 0.05, pending_max: int = 100) -> Callable[[Store], Hub]:
    return lambda store: Hub(store, linger_s=linger_s, pending_max=pending_max)


async def waiting(n: Node, count: int = 1) -> None:
    """Until so many listen."""
    await eventually(lambda: n.server.hub.listeners == count, what=f"{count} listeners")


# --- wait ------------------------------------------------------------------------------------------------------------


def test_wait_answers_when_the_task_ends(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await a.submit()
            call = asyncio.ensure_future(b.api.Wait(api.WaitRequest(ids=[task_id])))
            await waiting(b)
            await a.claim(task_id)
            await a.end(task_id, Exit(Reason.EXIT, 3))
            ended_s = time.monotonic()
            answer = await call
            assert time.monotonic() - ended_s < limits.REREAD_S / 5, "it was told, and did not have to look again"
            assert not answer.timed_out
            assert (answer.tasks[0].task.outcome, answer.tasks[0].task.attempts[0].exit_code) == (pb.FAILED, 3)

    run(scenario())


def test_wait_for_all_and_for_any(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(spec(), spec(), spec())
            all_ = asyncio.ensure_future(a.api.Wait(api.WaitRequest(ids=ids)))
            any_ = asyncio.ensure_future(a.api.Wait(api.WaitRequest(ids=ids, any=True)))
            await waiting(a, 2)
            await a.api.Cancel(api.CancelRequest(ids=[ids[1]]))
            first = await any_
            assert [v.task.state == pb.COMPLETE for v in first.tasks] == [False, True, False]
            assert not first.timed_out
            assert not all_.done()
            await a.api.Cancel(api.CancelRequest(ids=ids))
            assert [v.task.outcome for v in (await all_).tasks] == [pb.CANCELLED] * 3
            at_once = await a.api.Wait(api.WaitRequest(ids=ids))
            assert not at_once.timed_out

    run(scenario())


def test_wait_is_over_in_time(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit()
            for request, timeout in (
                (api.WaitRequest(ids=[task_id], timeout_s=0.3), 30.0),
                (api.WaitRequest(ids=[task_id]), 2.0),  # the caller's own limit: answered before it
            ):
                began_s = time.monotonic()
                answer = await a.api.Wait(request, timeout=timeout)
                assert answer.timed_out
                assert answer.tasks[0].task.state == pb.QUEUED
                assert 0.2 < time.monotonic() - began_s < 10.0
            failed = await failure(a.api.Wait(api.WaitRequest(ids=[task_id], timeout_s=-1)))
            assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, "timeout_s")

    run(scenario())


def test_many_waiters_share_one_watch(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Faulty] = []
        async with node(etcd, tmp_path, wrap=keeping(made)) as a:
            ids = await a.submit(*(spec() for _ in range(100)))
            calls = [asyncio.ensure_future(a.api.Wait(api.WaitRequest(ids=[i]))) for i in ids]
            await waiting(a, 100)
            assert made[0].watches == 1
            await a.api.Cancel(api.CancelRequest(ids=ids))
            began_s = time.monotonic()
            answers = await asyncio.gather(*calls)
            assert time.monotonic() - began_s < limits.REREAD_S / 5
            assert [r.tasks[0].task.spec.id for r in answers] == ids
            await waiting(a, 0)

    run(scenario())


def test_a_waiter_that_goes_away_leaves_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Faulty] = []
        async with node(etcd, tmp_path, wrap=keeping(made), hub=lingering()) as a:
            (task_id,) = await a.submit()
            for expected in (1, 2):  # the watch ends when nobody is left, and comes back
                call = a.api.Wait(api.WaitRequest(ids=[task_id]))
                reading = asyncio.ensure_future(eventually_cancelled(call))
                await waiting(a)
                call.cancel()
                await reading
                await waiting(a, 0)
                assert made[0].watches == expected
                await eventually(lambda: not a.server.hub._standing.is_set(), what="the end of the watch")

    async def eventually_cancelled(call: Any) -> None:
        with pytest.raises(asyncio.CancelledError):
            await call

    run(scenario())


def test_a_missed_event_only_delays_a_waiter(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Faulty] = []
        async with node(etcd, tmp_path, wrap=keeping(made)) as a:
            (task_id,) = await a.submit()
            with mock.patch.object(limits, "REREAD_S", 0.5):
                call = asyncio.ensure_future(a.api.Wait(api.WaitRequest(ids=[task_id])))
                await waiting(a)
                await eventually(lambda: made[0].watches == 1)
                made[0].deaf = True
                await a.api.Cancel(api.CancelRequest(ids=[task_id]))
                async with asyncio.timeout(20):
                    assert (await call).tasks[0].task.outcome == pb.CANCELLED

    run(scenario())


def test_a_broken_watch_is_made_up_for(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Faulty] = []
        async with node(etcd, tmp_path, wrap=keeping(made)) as a:
            (task_id,) = await a.submit()
            call = asyncio.ensure_future(a.api.Wait(api.WaitRequest(ids=[task_id])))
            await waiting(a)
            await eventually(lambda: made[0].watches == 1)
            made[0].deaf = True
            await a.api.Cancel(api.CancelRequest(ids=[task_id]))  # while nobody hears it …
            made[0].deaf = False
            made[0].broken.set()  # … and then the watch is lost
            async with asyncio.timeout(10):
                assert (await call).tasks[0].task.outcome == pb.CANCELLED
            assert made[0].watches == 2

    run(scenario())


def test_waiting_for_a_task_that_is_removed(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit()
            call = asyncio.ensure_future(failure(a.api.Wait(api.WaitRequest(ids=[task_id]))))
            await waiting(a)
            await delete(a.store, keys.task(TaskId(task_id)), keys.queued(TaskId(task_id)))
            failed = await call
            assert (failed.code, failed.detail.field) == (Code.NOT_FOUND, "ids[0]")

    run(scenario())


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_slow_listener_is_told_of_a_gap_and_holds_little(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path, hub=lingering(pending_max=10)) as a, a.server.hub.listen() as slow:
            ids = await a.submit(*(spec() for _ in range(8)))
            for _ in range(5):
                for task_id in ids:
                    await put(a.store, keys.task(TaskId(task_id)), b"")
            marker = TaskId(new_id())
            last = await put(a.store, keys.task(marker))
            news = await until(slow, last)
            assert not news.gap
            assert len(news.changes) == 9  # five rounds folded into the latest
            revisions = [c.revision for c in news.changes]
            assert revisions == sorted(revisions)
            await a.submit(*(spec() for _ in range(11)))
            await eventually(lambda: slow._gap)
            news = await slow.news(5)
            assert news.gap
            assert not news.changes
            assert not (await slow.news(0)).gap

    async def until(listener: hub_module.Listener, revision: Revision) -> hub_module.News:
        await eventually(lambda: any(c.revision == revision for c in listener._pending.values()))
        return await listener.news(1)

    run(scenario())


def test_too_many_listeners_are_refused(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            with mock.patch.object(hub_module, "LISTENERS_MAX", 1):
                async with a.server.hub.listen():
                    with pytest.raises(UserError, match="already serves 1"):
                        async with a.server.hub.listen():
                            pass
                    failed = await failure(a.api.Wait(api.WaitRequest(ids=[new_id()])))
                    assert (failed.code, failed.detail.reason) == (Code.RESOURCE_EXHAUSTED, "busy")

    run(scenario())


def test_no_watch_no_listener(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            idle = Hub(a.store)  # nobody runs it
            with pytest.raises(StoreUnavailable, match="could not be watched within"):
                async with idle.listen(timeout_s=0.05):
                    pass
            assert idle.listeners == 0

    run(scenario())


# --- watch -----------------------------------------------------------------------------------------------------------


class Watching:
    """A client of Watch that remembers what it has got."""

    def __init__(self, n: Node, **fields: Any) -> None:
        self.call = n.api.Watch(api.WatchRequest(**fields))
        self.got: list[api.WatchResponse] = []
        self.state: dict[str, int] = {}
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for response in self.call:
            self.got.append(response)
            for v in response.tasks:
                self.state[v.task.spec.id] = v.task.state
            for task_id in response.removed_ids:
                self.state.pop(task_id, None)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await eventually(lambda: condition() or self._reading.done(), what=what)
        if self._reading.done():
            await self._reading
        assert condition(), what

    @property
    def revision(self) -> int:
        return self.got[-1].revision

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await asyncio.wait({self._reading})


def test_watch_sends_the_present_state_and_then_changes(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(spec(), spec())
            async with Watching(a) as w:
                await w.until(lambda: bool(w.got) and w.got[-1].initial_done, "the present state")
                assert w.state == {ids[0]: pb.QUEUED, ids[1]: pb.QUEUED}
                third = (await a.submit())[0]
                await a.claim(ids[0])
                await w.until(lambda: w.state.get(third) == pb.QUEUED and w.state[ids[0]] == pb.RUNNING, "changes")
                await delete(a.store, keys.task(TaskId(third)), keys.queued(TaskId(third)))
                await w.until(lambda: third not in w.state, "the removal")
                await a.end(ids[0])
                await w.until(lambda: w.state[ids[0]] == pb.COMPLETE, "the end")
                assert not any(r.restarted for r in w.got)

    run(scenario())


def test_watch_with_a_filter_tells_of_leaving_it(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            mine, other = await a.submit(spec(labels={"x": "1"}), spec())
            wanted = api.Filter(states=[pb.QUEUED, pb.RUNNING], labels={"x": "1"})
            async with Watching(a, filter=wanted) as w, Watching(a, ids=[other[-8:]]) as by_id:
                await w.until(lambda: bool(w.got) and w.got[-1].initial_done, "the present state")
                await by_id.until(lambda: bool(by_id.got) and by_id.got[-1].initial_done, "the present state")
                assert (list(w.state), list(by_id.state)) == ([mine], [other])
                for task_id in (mine, other):
                    await a.claim(task_id)
                    await a.end(task_id)
                await w.until(lambda: w.state[mine] == pb.COMPLETE, "leaving the filter")
                await by_id.until(lambda: by_id.state[other] == pb.COMPLETE, "the end")
                assert (list(w.state), list(by_id.state)) == ([mine], [other])

    run(scenario())


def test_watch_resumes_where_it_left(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            (one,) = await a.submit()
            async with Watching(a) as w:
                await w.until(lambda: bool(w.got) and w.got[-1].initial_done, "the present state")
                seen = w.revision
            ids = await a.submit(*(spec() for _ in range(5)))
            await a.claim(one)
            await put(a.store, keys.GENERATION)  # so that the last revision is none of a task
            async with Watching(b, from_revision=seen + 1) as w:  # another node will do
                await w.until(lambda: len(w.state) == 6, "what was missed")
                assert w.state[one] == pb.RUNNING
                assert not any(r.initial_done or r.restarted for r in w.got)
                await a.end(one)
                await w.until(lambda: w.state[one] == pb.COMPLETE, "what came after")
                # From the listener now, not from the replay; and none of it twice.
                (last,) = await a.submit()
                await w.until(lambda: last in w.state, "more")
                revisions = [r.revision for r in w.got]
                assert revisions == sorted(set(revisions))
                assert sum(v.task.spec.id == one for r in w.got for v in r.tasks) == 2
                seen = w.revision
            async with Watching(b, from_revision=seen + 1) as w:
                await waiting(b, 1)
                await a.claim(ids[0])
                await w.until(lambda: w.state.get(ids[0]) == pb.RUNNING, "a change after nothing was missed")
                assert list(w.state) == [ids[0]]

    run(scenario())


def test_watch_from_a_compacted_revision_starts_again(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(spec(), spec())
            etcd.ctl("compact", str((await a.store.read([])).revision))
            async with Watching(a, from_revision=1) as w:
                await w.until(lambda: bool(w.got) and w.got[-1].initial_done, "the present state")
                assert w.got[0].restarted
                assert list(w.state) == ids
                await a.claim(ids[0])
                await w.until(lambda: w.state[ids[0]] == pb.RUNNING, "changes")

    run(scenario())


def test_a_watch_that_lost_changes_starts_again(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Faulty] = []
        async with node(etcd, tmp_path, wrap=keeping(made)) as a:
            (one,) = await a.submit()
            async with Watching(a) as w:
                await w.until(lambda: bool(w.got) and w.got[-1].initial_done, "the present state")
                made[0].deaf = True
                (two,) = await a.submit()
                made[0].deaf = False
                made[0].broken.set()
                await w.until(lambda: w.got[-1].initial_done and any(r.restarted for r in w.got), "a new start")
                assert list(w.state) == [one, two]
                await a.claim(two)
                await w.until(lambda: w.state[two] == pb.RUNNING, "changes")

    run(scenario())


def test_a_missed_event_only_delays_a_watch(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Faulty] = []
        async with node(etcd, tmp_path, wrap=keeping(made)) as a:
            (one,) = await a.submit()
            with mock.patch.object(limits, "REREAD_S", 0.5):
                async with Watching(a) as w:
                    await w.until(lambda: bool(w.got) and w.got[-1].initial_done, "the present state")
                    made[0].deaf = True
                    await a.api.Cancel(api.CancelRequest(ids=[one]))
                    await w.until(lambda: w.state[one] == pb.COMPLETE, "the end, read again")

    run(scenario())


def test_bad_watches(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            for request, field in (
                (api.WatchRequest(from_revision=-1), "from_revision"),
                (api.WatchRequest(ids=["?"]), "ids[0]"),
                (api.WatchRequest(filter=api.Filter(states=[pb.State.ValueType(7)])), "filter.states[0]"),
            ):
                failed = await failure(drained(a.api.Watch(request)))
                assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, field)
            failed = await failure(drained(a.api.Watch(api.WatchRequest(ids=[new_id()]))))
            assert (failed.code, failed.detail.field) == (Code.NOT_FOUND, "ids[0]")

    async def drained(call: Any) -> None:
        async for _ in call:
            pass

    run(scenario())


def test_a_client_that_does_not_read_costs_little(etcd: Etcd, tmp_path: Path) -> None:
    """It reads nothing while three thousand large changes are made; then it gets the latest of each, and no more."""

    async def scenario() -> None:
        async with node(etcd, tmp_path, hub=lingering(pending_max=20)) as a:
            ids = await a.submit(*(spec(command=["/bin/echo", "x" * 20_000]) for _ in range(30)))
            call = a.api.Watch(api.WatchRequest())
            await waiting(a)
            for _ in range(10):
                for task_id in ids:
                    await a.claim(task_id)
                    await a.end(task_id, Exit(Reason.RELEASED))
            for task_id in ids:
                await a.claim(task_id)
                await a.end(task_id)
            (listener,) = a.server.hub._to_all
            assert len(listener._pending) <= 20
            state: dict[str, int] = {}
            async for response in call:
                state.update((v.task.spec.id, v.task.state) for v in response.tasks)
                if len(state) == 30 and set(state.values()) == {pb.COMPLETE}:
                    break
            call.cancel()

    run(scenario())
