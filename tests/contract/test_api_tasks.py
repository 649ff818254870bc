"""Submit, Get, Cancel: each call, each refusal, and races."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from spinetta import keys, validate
from spinetta.model import Exit, Outcome, Reason, State, TaskId, Usage
from spinetta.node.port import RunningSample
from spinetta.node.services import limits
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import (
    Etcd,
    etcd,
    etcd_member,
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


def test_submit_writes_the_record_and_its_queue_key(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit(spec(name="one", priority=3))
            task = await a.task(task_id)
            assert (task.state, task.submitted_at_node, task.spec.owner) == (State.QUEUED, "a", "")
            assert task.spec.name == "one"
            entry = (await a.store.read([keys.queued(TaskId(task_id))])).entries[keys.queued(TaskId(task_id))]
            assert entry is not None
            v = await a.get(task_id)
            assert (v.task.state, v.node, v.cancel_requested) == (pb.QUEUED, "", False)
            assert v.revision == entry.modified

    run(scenario())


def test_a_thousand_tasks_in_one_request(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            specs = [spec() for _ in range(validate.SUBMIT_TASKS_MAX)]
            before = (await a.store.read([])).revision
            assert await a.submit(*specs) == [s.id for s in specs]
            page = await a.store.list(keys.QUEUED, keys_only=True)
            assert [keys.parse_task(e.key) for e in page.entries] == [s.id for s in specs]
            assert page.revision - before == 9  # 1000 / 120 transactions

    run(scenario())


def test_large_specifications_are_spread_over_several_transactions(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            big = ["/bin/echo", "x" * 100_000, "y" * 100_000]
            ids = await a.submit(*(spec(command=big) for _ in range(20)))
            got = await a.api.Get(api.GetRequest(ids=ids))
            assert [v.task.spec.id for v in got.tasks] == ids
            assert got.ByteSize() < 4 * 2**20
            assert [v.spec_omitted for v in got.tasks] == [False] * 15 + [True] * 5
            assert got.tasks[-1].task.state == pb.QUEUED

    run(scenario())


def test_the_same_submit_again_changes_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            one = spec(labels={"x": "1", "a": "2"}, env={"B": "1", "A": "2"}, tags_required=["z", "a"])
            two = spec()
            await a.submit(one)
            await a.claim(one.id)
            again = await b.api.Submit(api.SubmitRequest(tasks=[one, two]))
            assert [(t.id, t.existed) for t in again.tasks] == [(one.id, True), (two.id, False)]
            assert (await a.task(one.id)).state is State.RUNNING

    run(scenario())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"command": ["/bin/false"]}, "tasks[1].command"),
        ({"name": "other"}, "tasks[1].name"),
        ({"env": {"A": "1"}}, "tasks[1].env"),
        ({"resources": pb.Resources(memory_bytes=5)}, "tasks[1].resources.memory_bytes"),
        ({"restart_on_node_failure": False}, "tasks[1].restart_on_node_failure"),
        ({"owner": "somebody"}, "tasks[1].owner"),
    ],
)
def test_another_task_under_the_same_id_is_refused(
    etcd: Etcd, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit()
            failed = await failure(
                a.api.Submit(api.SubmitRequest(tasks=[spec(), spec(task_id, **{"command": ["/bin/true"], **change})]))
            )
            assert failed.code is Code.ALREADY_EXISTS
            assert (failed.detail.field, failed.detail.reason) == (field, "already-exists")
            assert (await a.task(task_id)).spec.command == ("/bin/true",)

    run(scenario())


SAME = new_id()
REFUSED = {
    "no tasks": ([], "tasks", "no task is given"),
    "no id": ([pb.TaskSpec(command=["x"])], "tasks[0].id", "a task needs an id"),
    "bad id": ([pb.TaskSpec(id="7", command=["x"])], "tasks[0].id", "not a task id"),
    "no command": ([spec(), spec(command=[])], "tasks[1].command", "the command is empty"),
    "nul": ([spec(command=["a\0b"])], "tasks[0].command[0]", "NUL"),
    "twice": ([spec(SAME), spec(), spec(SAME)], "tasks[2].id", "tasks[0]"),
    "too many": ([spec() for _ in range(validate.SUBMIT_TASKS_MAX + 1)], "tasks", "1001 tasks in one request"),
    "walltime": ([spec(walltime_s=-1)], "tasks[0].walltime_s", "out of range"),
    "nan": ([spec(walltime_s=float("nan"))], "tasks[0].walltime_s", "out of range"),
    "memory": ([spec(resources=pb.Resources(memory_bytes=2**60))], "tasks[0].resources.memory_bytes", "out of range"),
    "tags": ([spec(tags_required=["a"], tags_forbidden=["a"])], "tasks[0].tags_forbidden", "both"),
    "directory": ([spec(working_directory="here")], "tasks[0].working_directory", "not an absolute path"),
    "env": ([spec(env={"A=B": ""})], "tasks[0].env", "not a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_bad_specification_and_nothing_is_written(etcd: Etcd, tmp_path: Path, case: str) -> None:
    tasks, field, text = REFUSED[case]

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[*tasks])))
            assert failed.code is Code.INVALID_ARGUMENT
            assert failed.detail.field == field
            assert text in failed.detail.message
            assert failed.text.startswith(f"{field}: {failed.detail.message}")
            assert not (await a.store.list(keys.TASK)).entries
            assert not (await a.store.list("/status/")).entries

    run(scenario())


def test_a_message_beyond_the_limit_is_refused(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            tasks = [spec(command=["x" * 100_000, "y" * 100_000]) for _ in range(100)]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await a.api.Submit(api.SubmitRequest(tasks=tasks))
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            assert not (await a.store.list(keys.TASK)).entries

    run(scenario())


def test_two_hundred_submits_at_once(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            specs = [spec() for _ in range(200)]
            # Each goes to both nodes at once: every task exists once, and exactly one of the two was first.
            answers = await asyncio.gather(*(n.api.Submit(api.SubmitRequest(tasks=[s])) for s in specs for n in (a, b)))
            existed = [r.tasks[0].existed for r in answers]
            assert all(x != y for x, y in zip(existed[::2], existed[1::2], strict=True))
            assert len((await a.store.list(keys.QUEUED)).entries) == 200
            assert len((await a.store.list(keys.TASK)).entries) == 200

    run(scenario())


# --- get -------------------------------------------------------------------------------------------------------------


def test_get_by_beginning_and_by_end(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            one = "01890a5d-ac96-774b-bcce-b302099a8057"
            two = "01890a5d-ac96-774b-bcce-b3020aaaaaaa"
            await a.submit(spec(one), spec(two), spec())
            got = await a.api.Get(api.GetRequest(ids=["9A8057", two, "aaaaaa", one]))
            assert [v.task.spec.id for v in got.tasks] == [one, two]
            failed = await failure(a.api.Get(api.GetRequest(ids=[one, "0189"])))
            assert failed.code is Code.FAILED_PRECONDITION
            assert (failed.detail.reason, failed.detail.field) == ("ambiguous", "ids[1]")
            assert one in failed.text
            assert two in failed.text

    run(scenario())


@pytest.mark.parametrize(
    ("ids", "code", "field", "text"),
    [
        ([], Code.INVALID_ARGUMENT, "ids", "no task is named"),
        ([new_id()] * 1001, Code.INVALID_ARGUMENT, "ids", "1001 ids in one request"),
        (["xyz!"], Code.INVALID_ARGUMENT, "ids[0]", "not a task id"),
        (["01"], Code.INVALID_ARGUMENT, "ids[0]", "too short"),
        (["abcdef"], Code.NOT_FOUND, "ids[0]", "there is no task abcdef"),
        ([new_id()], Code.NOT_FOUND, "ids[0]", "there is no task"),
    ],
)
def test_ids_that_name_nothing(
    etcd: Etcd, tmp_path: Path, ids: list[str], code: grpc.StatusCode, field: str, text: str
) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            calls = (
                a.api.Get(api.GetRequest(ids=ids)),
                a.api.Cancel(api.CancelRequest(ids=ids)),
                a.api.Wait(api.WaitRequest(ids=ids, timeout_s=5)),
            )
            for call in calls:
                failed = await failure(call)
                assert (failed.code, failed.detail.field) == (code, field)
                assert text in failed.detail.message

    run(scenario())


def test_get_of_the_largest_tasks(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            largest = spec(
                command=["x" * 126_000, "y" * 126_000, "z" * 10_000],
                labels={f"{i:0128}": "v" * 256 for i in range(validate.LABELS_MAX)},
                name="n" * validate.NAME_MAX,
            )
            ids: list[str] = []
            for _ in range(3):
                specs = [pb.TaskSpec.FromString(largest.SerializeToString()) for _ in range(40)]
                for s in specs:
                    s.id = new_id()
                ids += await a.submit(*specs)
            got = await a.api.Get(api.GetRequest(ids=ids))
            assert [v.task.spec.id for v in got.tasks] == ids
            done = await a.api.Cancel(api.CancelRequest(ids=ids))
            assert len(done.tasks) == 120

    run(scenario())


def test_get_shows_a_running_task(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await a.submit()
            await b.claim(task_id)
            b.port.usage = Usage(1.5, 0.25, 4096)
            v = await b.get(task_id)
            assert (v.task.state, v.node) == (pb.RUNNING, "b")
            assert v.task.attempts[0].usage.memory_peak_bytes == 4096
            assert not v.cancel_requested
            await a.api.Cancel(api.CancelRequest(ids=[task_id]))
            assert (await a.get(task_id)).cancel_requested

    run(scenario())


def test_any_node_tells_what_a_task_uses_now(etcd: Etcd, tmp_path: Path) -> None:
    """It asks the node that runs it; one that cannot say is no reason to fail, or to wait."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            here, there, elsewhere = await a.submit(), await a.submit(), await a.submit()
            await a.claim(here[0])
            await b.claim(there[0])
            async with node(etcd, tmp_path, "c") as gone:
                await gone.claim(elsewhere[0])
            a.port.usage, b.port.usage = Usage(1.0), Usage(2.0, 0.5, 4096, 1, 2, 7)
            got = await a.api.Get(api.GetRequest(ids=[*here, *there, *elsewhere]))
            assert [v.task.attempts[0].usage.cpu_user_s for v in got.tasks] == [1.0, 2.0, 0.0]
            assert [v.HasField("now") for v in got.tasks] == [True, True, False]
            assert (got.tasks[1].now.memory_bytes, got.tasks[1].now.pids) == (5 << 20, 3)
            assert dict(got.tasks[1].now.units) == {"gpu": "0,2"}
            assert got.tasks[1].task.attempts[0].usage.pids_peak == 7
            running = api.ListRequest(filter=api.Filter(states=[pb.RUNNING]), with_usage=True)
            listed = await a.api.List(running)
            assert [v.HasField("now") for v in listed.tasks] == [True, True, False]
            assert not any(v.HasField("now") for v in (await a.api.List(api.ListRequest())).tasks)
            b.port.usage = None
            assert not (await a.get(there[0])).HasField("now")

    run(scenario())


def test_a_node_that_is_frozen_is_not_waited_for(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: TaskId) -> RunningSample | None:
        await asyncio.Event().wait()
        return None

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            (task_id,) = await a.submit()
            await b.claim(task_id)
            monkeypatch.setattr(b.port, "running_sample", never)
            began_s = time.monotonic()
            assert not (await a.get(task_id)).HasField("now")
            assert 0.5 < time.monotonic() - began_s < 10.0

    monkeypatch.setattr(limits, "SAMPLE_TIMEOUT_S", 0.5)
    run(scenario())


def test_a_corrupt_record_is_said_to_be_one(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            task_id = TaskId(new_id())
            await put(a.store, keys.task(task_id), b"\xff\xff\xff")
            failed = await failure(a.api.Get(api.GetRequest(ids=[task_id])))
            assert (failed.code, failed.detail.reason) == (Code.DATA_LOSS, "corrupt")
            assert task_id in failed.text

    run(scenario())


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_of_each_state(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            waiting, running, ended = await a.submit(spec(), spec(), spec())
            for task_id in (running, ended):
                assert await a.claim(task_id)
            await a.end(ended)
            done = await a.api.Cancel(api.CancelRequest(ids=[waiting, running, ended], reason="no need"))
            assert [(t.id, t.state, t.was_complete) for t in done.tasks] == [
                (waiting, pb.COMPLETE, False),
                (running, pb.RUNNING, False),
                (ended, pb.COMPLETE, True),
            ]
            task = await a.task(waiting)
            assert (task.outcome, task.message) == (Outcome.CANCELLED, "no need")
            assert not await a.claim(waiting)
            assert (await a.task(ended)).outcome is Outcome.SUCCEEDED
            await a.end(running, Exit(Reason.CANCELLED, signal=15))
            assert (await a.task(running)).outcome is Outcome.CANCELLED
            again = await a.api.Cancel(api.CancelRequest(ids=[waiting, running]))
            assert [t.was_complete for t in again.tasks] == [True, True]

    run(scenario())


def test_cancel_twice_while_running_asks_once(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit()
            await a.claim(task_id)
            await a.api.Cancel(api.CancelRequest(ids=[task_id]))
            before = (await a.store.read([])).revision
            await a.api.Cancel(api.CancelRequest(ids=[task_id]))
            assert (await a.store.read([])).revision == before

    run(scenario())


def test_cancel_of_a_thousand(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(*(spec() for _ in range(1000)))
            done = await a.api.Cancel(api.CancelRequest(ids=ids))
            assert [t.id for t in done.tasks] == ids
            assert not (await a.store.list(keys.QUEUED)).entries
            assert len((await a.store.list(keys.COMPLETE)).entries) == 1000

    run(scenario())


def test_one_unknown_id_and_nothing_is_cancelled(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            ids = await a.submit(*(spec() for _ in range(60)))
            failed = await failure(a.api.Cancel(api.CancelRequest(ids=[*ids, new_id()])))
            assert (failed.code, failed.detail.field) == (Code.NOT_FOUND, "ids[60]")
            assert len((await a.store.list(keys.QUEUED)).entries) == 60

    run(scenario())


def test_a_long_reason_is_refused(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            failed = await failure(a.api.Cancel(api.CancelRequest(ids=[new_id()], reason="x" * 2000)))
            assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, "reason")

    run(scenario())


def test_cancel_races_with_claims_and_requeues(etcd: Etcd, tmp_path: Path) -> None:
    """Whoever wins, the two agree: acknowledged while waiting means never started after, running means asked."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            ids = await a.submit(*(spec() for _ in range(150)))
            stop = asyncio.Event()
            started: dict[str, int] = {}

            async def restless(task_ids: list[str]) -> None:
                """Claims what is queued and gives it back, again and again."""
                while not stop.is_set():
                    for task_id in task_ids:
                        if await b.claim(task_id):
                            started[task_id] = (await b.task(task_id)).attempts_started
                            await b.end(task_id, Exit(Reason.RELEASED))
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as group:
                for i in range(3):
                    group.create_task(restless(ids[i::3]))
                answers: dict[str, api.Cancelled] = {}
                for i in range(0, len(ids), 10):
                    done = await a.api.Cancel(api.CancelRequest(ids=ids[i : i + 10]))
                    for t in done.tasks:
                        answers[t.id] = t
                        if t.state == pb.COMPLETE and not t.was_complete:
                            started[f"after {t.id}"] = (await a.task(t.id)).attempts_started
                stop.set()
            assert set(answers) == set(ids)
            for task_id in ids:
                task = await a.task(task_id)
                if answers[task_id].state == pb.COMPLETE:
                    assert task.outcome is Outcome.CANCELLED
                    assert task.attempts_started == started[f"after {task_id}"]
                else:  # released after it was asked to stop: a cancel comes before a release
                    assert task.outcome is Outcome.CANCELLED
            states = {(await a.task(t)).state for t in ids}
            assert states == {State.COMPLETE}

    run(scenario())
