"""List: filters, order, pages, bounded work; and the walk in windows that it stands on."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta import keys
from spinetta.model import Exit, Reason, Revision, TaskId
from spinetta.node.services import limits, ordered
from spinetta.store.protocol import KeyValue, Page
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, Node, delete, etcd, etcd_member, failure, new_id, node, put, run, spec

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode


def ids_of(tasks: Iterable[api.TaskView]) -> list[str]:
    return [v.task.spec.id for v in tasks]


async def list_all(n: Node, page_size: int = 100, **filter_: Any) -> list[str]:
    """All pages, oldest first."""
    return await pages(n, page_size, newest_first=False, **filter_)


async def pages(n: Node, page_size: int, *, newest_first: bool, **filter_: Any) -> list[str]:
    out: list[str] = []
    token = ""
    for _ in range(100):
        page = await n.api.List(
            api.ListRequest(
                filter=api.Filter(**filter_), page_size=page_size, page_token=token, newest_first=newest_first
            )
        )
        assert len(page.tasks) <= page_size
        out += ids_of(page.tasks)
        token = page.next_page_token
        if not token:
            return out
    raise AssertionError("a hundred pages")


def test_filters(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            queued, on_a, on_b, ended, failed, cancelled = await a.submit(
                spec(name="q", owner="ann"),
                spec(labels={"run": "1", "kind": "x"}),
                spec(labels={"run": "1", "kind": "y"}),
                spec(owner="ann"),
                spec(),
                spec(),
            )
            assert await a.claim(on_a)
            assert await b.claim(on_b)
            for task_id, code in ((ended, 0), (failed, 3)):
                await a.claim(task_id)
                await a.end(task_id, Exit(Reason.EXIT, code))
            await a.api.Cancel(api.CancelRequest(ids=[cancelled]))
            expected: list[tuple[dict[str, Any], list[str]]] = [
                ({}, [queued, on_a, on_b, ended, failed, cancelled]),
                ({"states": [pb.QUEUED]}, [queued]),
                ({"states": [pb.RUNNING]}, [on_a, on_b]),
                ({"states": [pb.RUNNING, pb.QUEUED]}, [queued, on_a, on_b]),
                ({"states": [pb.COMPLETE]}, [ended, failed, cancelled]),
                ({"states": [pb.BLOCKED]}, []),
                ({"states": [pb.RUNNING], "node": "b"}, [on_b]),
                ({"node": "a"}, [on_a, ended, failed]),
                ({"outcomes": [pb.FAILED, pb.CANCELLED]}, [failed, cancelled]),
                ({"outcomes": [pb.OUTCOME_UNSPECIFIED]}, [queued, on_a, on_b]),
                ({"owner": "ann"}, [queued, ended]),
                ({"owner": "ann", "states": [pb.COMPLETE]}, [ended]),
                ({"name": "q"}, [queued]),
                ({"labels": {"run": "1"}}, [on_a, on_b]),
                ({"labels": {"run": "1", "kind": "y"}}, [on_b]),
                ({"labels": {"run": "2"}}, []),
            ]
            for filter_, ids in expected:
                assert await pages(a, 100, newest_first=False, **filter_) == ids, filter_
                assert await pages(a, 2, newest_first=False, **filter_) == ids, filter_
                assert await pages(a, 100, newest_first=True, **filter_) == ids[::-1], filter_
                assert await pages(a, 1, newest_first=True, **filter_) == ids[::-1], filter_
            page = await a.api.List(api.ListRequest(filter=api.Filter(states=[pb.RUNNING])))
            assert [v.node for v in page.tasks] == ["a", "b"]
            assert page.revision == (await a.store.read([])).revision
            await a.api.Cancel(api.CancelRequest(ids=[on_b]))
            page = await a.api.List(api.ListRequest())
            assert [v.task.spec.id for v in page.tasks if v.cancel_requested] == [on_b]

    run(scenario())


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        (api.ListRequest(page_size=1001), "page_size", "out of range"),
        (api.ListRequest(page_token="?"), "page_token", "not a page token"),  # noqa: S106
        (api.ListRequest(page_token="bm8="), "page_token", "not a page token"),  # noqa: S106
        (api.ListRequest(filter=api.Filter(states=[pb.State.ValueType(9)])), "filter.states[0]", "no state 9"),
        (api.ListRequest(filter=api.Filter(states=[pb.STATE_UNSPECIFIED])), "filter.states[0]", "no state 0"),
        (api.ListRequest(filter=api.Filter(outcomes=[pb.Outcome.ValueType(9)])), "filter.outcomes[0]", "no outcome"),
        (api.ListRequest(filter=api.Filter(node="A B")), "filter.node", "not a name"),
        (api.ListRequest(filter=api.Filter(labels={"": "x"})), "filter.labels", ""),
        (api.ListRequest(filter=api.Filter(owner="\n")), "filter.owner", ""),
    ],
)
def test_bad_requests(etcd: Etcd, tmp_path: Path, request_: api.ListRequest, field: str, text: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            failed = await failure(a.api.List(request_))
            assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, field)
            assert text in failed.detail.message

    run(scenario())


def test_a_token_of_the_other_order_is_refused(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await a.submit(spec(), spec())
            page = await a.api.List(api.ListRequest(page_size=1))
            failed = await failure(
                a.api.List(api.ListRequest(page_size=1, page_token=page.next_page_token, newest_first=True))
            )
            assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, "page_token")

    run(scenario())


def test_a_page_of_large_tasks_ends_before_the_message_does(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            big = ["/bin/echo", "x" * 100_000, "y" * 100_000]
            ids = await a.submit(*(spec(command=big) for _ in range(20)))
            page = await a.api.List(api.ListRequest())
            assert ids_of(page.tasks) == ids[:15]
            assert await list_all(a) == ids
            assert await pages(a, 100, newest_first=True) == ids[::-1]

    run(scenario())


def test_work_for_one_page_is_bounded(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(*(spec(owner="z" if i == 290 else "y") for i in range(300)))
            with mock.patch.multiple(limits, SCAN_MAX=100, SCAN_STEP=50):
                page = await a.api.List(api.ListRequest(filter=api.Filter(owner="z")))
                assert not page.tasks
                assert page.next_page_token
                assert await list_all(a, owner="z") == [ids[290]]
                assert await pages(a, 5, newest_first=True, owner="z") == [ids[290]]

    run(scenario())


def test_running_tasks_do_not_cost_a_reading_of_the_queue(etcd: Etcd, tmp_path: Path) -> None:
    """Two thousand wait, two run: the list of the running ones reads a handful of keys."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids: list[str] = []
            for _ in range(2):
                ids += await a.submit(*(spec() for _ in range(1000)))
            for task_id in (ids[5], ids[1500]):
                await a.claim(task_id)
            read: list[int] = []
            inner = a.store.list

            async def counting(prefix: str, **options: Any) -> Page:
                page = await inner(prefix, **options)
                read.append(len(page.entries))
                return page

            with mock.patch.object(a.store, "list", counting):
                page = await a.api.List(api.ListRequest(filter=api.Filter(states=[pb.RUNNING])))
            assert ids_of(page.tasks) == [ids[5], ids[1500]]
            assert sum(read) == 2

    run(scenario())


def test_pages_while_tasks_move(etcd: Etcd, tmp_path: Path) -> None:
    """Tasks that go from queued to running and back are in every listing of the two states together, once."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(*(spec() for _ in range(60)))
            stop = asyncio.Event()

            async def restless() -> None:
                while not stop.is_set():
                    task_id = random.choice(ids)
                    if await a.claim(task_id):
                        await a.end(task_id, Exit(Reason.RELEASED))

            async with asyncio.TaskGroup() as group:
                group.create_task(restless())
                for _ in range(20):
                    page = await a.api.List(api.ListRequest(filter=api.Filter(states=[pb.QUEUED, pb.RUNNING])))
                    assert ids_of(page.tasks) == ids
                stop.set()

    run(scenario())


# --- the walk --------------------------------------------------------------------------------------------------------


class Sorted:
    """Only the `list` of a store, over ids in memory: what the walk may ask of it, at any size."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.keys = sorted(keys.TASK + i for i in ids)
        self.calls = 0
        self.read = 0

    async def list(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = 0,
        keys_only: bool = False,  # noqa: ARG002
        newest_first: bool = False,
        revision: Revision = Revision(0),  # noqa: ARG002
        timeout_s: float = 5.0,  # noqa: ARG002
    ) -> Page:
        assert not newest_first, "etcd would read the whole range"
        assert limit, "everything would be read"
        self.calls += 1
        low = max(bisect_left(self.keys, prefix), bisect_right(self.keys, after))
        high = bisect_left(self.keys, prefix + "~")
        entries = tuple(KeyValue(k, b"", Revision(1), Revision(1)) for k in self.keys[low : min(high, low + limit)])
        self.read += len(entries)
        return Page(Revision(9), entries, high - low > limit)


def uuid_at(ms: int, tail: int) -> str:
    return str(UUID(int=(ms & (2**48 - 1)) << 80 | 0x7 << 76 | 0x2 << 62 | tail & (2**62 - 1)))


times = st.one_of(
    st.integers(0, 2**48 - 1),
    st.integers(1_700_000_000_000, 1_700_000_003_000),
    st.sampled_from([0, 2**48 - 1, 1_700_000_000_000]),
)


async def walk(store: Sorted, *, newest: bool, limit: int, now_ms: int) -> Sequence[str]:
    out: list[str] = []
    cursor = ""
    for _ in range(10_000):
        if newest:
            got = await ordered.newest_first(store, keys.TASK, before=cursor, limit=limit, now_ms=now_ms)  # type: ignore[arg-type]
            assert len(got.ids) == limit or not got.more
        else:
            got = await ordered.oldest_first(store, keys.TASK, after=cursor, limit=limit)  # type: ignore[arg-type]
        assert len(got.ids) <= limit
        out += got.ids
        if not got.more:
            return out
        cursor = got.ids[-1] if got.ids else cursor
    raise AssertionError("it does not end")


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.builds(uuid_at, times, st.integers(0, 2**62 - 1)), max_size=40, unique=True),
    limit=st.integers(1, 30),
    window=st.integers(1, 20),
    now_ms=times,
    newest=st.booleans(),
)
def test_the_walk_finds_each_id_once_and_in_order(
    ids: list[str], limit: int, window: int, now_ms: int, newest: bool
) -> None:
    with mock.patch.multiple(ordered, WINDOW_KEYS_MIN=window, WINDOW_KEYS_MAX=window):
        found = asyncio.run(walk(Sorted(ids), newest=newest, limit=limit, now_ms=now_ms))
    assert list(found) == sorted(ids, reverse=newest)


def test_the_walk_reads_little() -> None:
    now = 1_795_000_000_000
    ids = [uuid_at(now - random.Random(i).randrange(30 * 86_400_000), i) for i in range(50_000)]
    store = Sorted(ids)
    asyncio.run(ordered.newest_first(store, keys.TASK, before="", limit=100, now_ms=now))  # type: ignore[arg-type]
    assert (store.calls, store.read) < (40, 5000)
    small = Sorted(ids[:5])
    asyncio.run(ordered.newest_first(small, keys.TASK, before="", limit=100, now_ms=now))  # type: ignore[arg-type]
    assert small.calls == 4


def test_ids_from_the_future_come_first(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            future = uuid_at(2**47, 5)
            now = new_id()
            past = uuid_at(5, 5)
            await a.submit(spec(now), spec(future), spec(past))
            assert await pages(a, 2, newest_first=True) == [future, now, past]
            assert await pages(a, 2, newest_first=False) == [past, now, future]

    run(scenario())


def test_a_task_removed_between_two_reads_is_left_out(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(*(spec() for _ in range(3)))
            gone = TaskId(ids[1])
            await put(a.store, keys.queued(TaskId(new_id())))  # a status key of a task that is gone
            await delete(a.store, keys.task(gone), keys.queued(gone))
            assert await list_all(a) == [ids[0], ids[2]]
            assert await list_all(a, states=[pb.QUEUED]) == [ids[0], ids[2]]

    run(scenario())
