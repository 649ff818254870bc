"""The client against servers of our own making, which fail as nodes do: refuse, hang, break off, answer errors."""

# ruff: noqa: N802 - gRPC names methods as the .proto file does
from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta import validate
from spinetta.client import AsyncClient, Client, TaskFilter, make_spec
from spinetta.client.errors import Throttled
from spinetta.client.requests import parse_nodes
from spinetta.client.specs import ENTRY_KEYS, TaskOptions
from spinetta.codec import encode_task
from spinetta.errors import (
    AlreadyExists,
    Denied,
    InvariantViolation,
    NotFound,
    OutcomeUnknown,
    StoreUnavailable,
    UserError,
)
from spinetta.model import State, Task
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from spinetta.v1.api_pb2_grpc import SpinettaServicer, add_SpinettaServicer_to_server

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
Code = grpc.StatusCode
Answer = Callable[[Any, Any], Awaitable[Any]]


class Stand(SpinettaServicer):
    """A node that answers as it is told, and remembers what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[tuple[str, Any]] = []

    async def _one(self, name: str, request: Any, context: Any) -> Any:
        self.asked.append((name, request))
        return await self.answers[name](request, context)

    async def _many(self, name: str, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append((name, request))
        async for item in self.answers[name](request, context):
            yield item

    async def Submit(self, request: Any, context: Any) -> Any:
        return await self._one("Submit", request, context)

    async def Cancel(self, request: Any, context: Any) -> Any:
        return await self._one("Cancel", request, context)

    async def Get(self, request: Any, context: Any) -> Any:
        return await self._one("Get", request, context)

    async def List(self, request: Any, context: Any) -> Any:
        return await self._one("List", request, context)

    async def Wait(self, request: Any, context: Any) -> Any:
        return await self._one("Wait", request, context)

    async def ListNodes(self, request: Any, context: Any) -> Any:
        return await self._one("ListNodes", request, context)

    async def Drain(self, request: Any, context: Any) -> Any:
        return await self._one("Drain", request, context)

    async def ConfirmDead(self, request: Any, context: Any) -> Any:
        return await self._one("ConfirmDead", request, context)

    async def Undrain(self, request: Any, context: Any) -> Any:
        return await self._one("Undrain", request, context)

    async def DescribeCluster(self, request: Any, context: Any) -> Any:
        return await self._one("DescribeCluster", request, context)

    async def Watch(self, request: Any, context: Any) -> Any:
        async for item in self._many("Watch", request, context):
            yield item

    async def Log(self, request: Any, context: Any) -> Any:
        async for item in self._many("Log", request, context):
            yield item

    async def Leave(self, request: Any, context: Any) -> Any:
        async for item in self._many("Leave", request, context):
            yield item

    async def Exec(self, request: Any, context: Any) -> Any:
        async for item in self._many("Exec", request, context):
            yield item

    async def CopyOut(self, request: Any, context: Any) -> Any:
        async for item in self._many("CopyOut", request, context):
            yield item

    async def PullImage(self, request: Any, context: Any) -> Any:
        async for item in self._many("PullImage", request, context):
            yield item

    async def VerifyImage(self, request: Any, context: Any) -> Any:
        async for item in self._many("VerifyImage", request, context):
            yield item

    async def ListImages(self, request: Any, context: Any) -> Any:
        return await self._one("ListImages", request, context)

    async def RemoveImage(self, request: Any, context: Any) -> Any:
        return await self._one("RemoveImage", request, context)

    async def PinImage(self, request: Any, context: Any) -> Any:
        return await self._one("PinImage", request, context)

    async def ListArchived(self, request: Any, context: Any) -> Any:
        return await self._one("ListArchived", request, context)

    async def Backup(self, request: Any, context: Any) -> Any:
        async for item in self._many("Backup", request, context):
            yield item


@contextlib.asynccontextmanager
async def serving(stand: Stand) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_SpinettaServicer_to_server(stand, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def failing(code: grpc.StatusCode, reason: str = "", **detail: Any) -> Answer:
    async def answer(request: Any, context: Any) -> Any:
        metadata: tuple[tuple[str, bytes], ...] = ()
        if reason:
            metadata = (("spinetta-error-bin", api.ErrorDetail(reason=reason, **detail).SerializeToString()),)
        await context.abort(code, detail.get("message", "no"), metadata)

    return answer


def giving(message: Any) -> Answer:
    async def answer(request: Any, context: Any) -> Any:
        return message

    return answer


async def hanging(request: Any, context: Any) -> Any:
    await asyncio.Event().wait()


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def deaf() -> Iterator[str]:
    """An address that takes connections and says nothing: a frozen process."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def view(task_id: str = ID, state: pb.State.ValueType = pb.COMPLETE, **more: Any) -> api.TaskView:
    return api.TaskView(task=pb.Task(spec=pb.TaskSpec(id=task_id, command=["a"]), state=state, **more))


NODES = giving(api.ListNodesResponse(notices=["hello"]))


@pytest.mark.parametrize("which", ["refusing", "deaf"])
def test_another_node_is_asked(which: str, request: pytest.FixtureRequest) -> None:
    broken = request.getfixturevalue(which)

    async def main() -> None:
        async with serving(Stand(ListNodes=NODES)) as good, AsyncClient([broken, good]) as client:
            assert (await client.nodes()).notices == ("hello",)
            async with asyncio.timeout(2.5):  # the one that answered is asked first from now on
                assert (await client.nodes()).notices == ("hello",)

    asyncio.run(main())


def test_nobody_answers(refusing: str) -> None:
    async def main() -> None:
        async with AsyncClient(refusing, timeout_s=0.5) as client:
            with pytest.raises(StoreUnavailable, match=f"no node answers at {refusing}"):
                await client.nodes()
            with pytest.raises(StoreUnavailable):  # certainly nothing has been sent
                await client.submit(["true"])
        other = "127.255.255.254:1"
        async with AsyncClient([refusing, other], timeout_s=0.5) as client:
            with pytest.raises(StoreUnavailable, match=f"no node answers at {refusing} or {other}"):
                await client.nodes()

    asyncio.run(main())


def test_first_contact_gives_up_early(refusing: str) -> None:
    async def main() -> None:
        async with AsyncClient(refusing, timeout_s=60, first_contact_s=0.2) as client, asyncio.timeout(10):
            with pytest.raises(StoreUnavailable):
                await client.nodes()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (
            failing(Code.INVALID_ARGUMENT, "invalid", message="bad", field="ids[0]", hint="mend"),
            UserError,
            "bad (mend)",
        ),
        (failing(Code.FAILED_PRECONDITION, "ambiguous", message="two", field="ids[0]"), UserError, "two"),
        (failing(Code.NOT_FOUND, "not-found", message="none", field="ids[0]"), NotFound, "none"),
        (failing(Code.ALREADY_EXISTS, "already-exists", message="twice"), AlreadyExists, "twice"),
        (failing(Code.RESOURCE_EXHAUSTED), UserError, "send less at once"),
        (failing(Code.UNIMPLEMENTED), UserError, "does not know this call"),
        (failing(Code.INTERNAL, "bug", message="oh"), InvariantViolation, "failed: oh"),
        (failing(Code.UNAVAILABLE, "unavailable", message="no etcd"), StoreUnavailable, "no etcd"),
        (failing(Code.RESOURCE_EXHAUSTED, "busy", message="full"), Throttled, "full"),
        (failing(Code.ABORTED, "outcome-unknown", message="perhaps"), OutcomeUnknown, "perhaps"),
    ],
)
def test_what_a_node_answers(answer: Answer, error: type[Exception], text: str) -> None:
    async def main() -> None:
        # Some are asked again until the time is over: long enough for a first answer on a busy machine.
        async with serving(Stand(Cancel=answer)) as address, AsyncClient(address, timeout_s=5) as client:
            with pytest.raises(error) as caught:
                await client.cancel([ID])
            assert type(caught.value) is error
            assert text in str(caught.value)
            if isinstance(caught.value, UserError) and caught.value.field:
                assert caught.value.field == "ids[0]"

    asyncio.run(main())


def test_an_unavailable_node_is_passed_over_and_a_refusal_is_final() -> None:
    async def main() -> None:
        bad = Stand(Get=failing(Code.UNAVAILABLE, "unavailable", message="no etcd"))
        good = Stand(Get=giving(api.GetResponse(tasks=[view()])))
        async with serving(bad) as first, serving(good) as second, AsyncClient([first, second]) as client:
            assert (await client.get(ID)).id == ID
        assert len(bad.asked) == 1
        bad = Stand(Get=failing(Code.NOT_FOUND, "not-found", message="none"))
        good.asked.clear()
        async with serving(bad) as first, serving(good) as second, AsyncClient([first, second]) as client:
            with pytest.raises(NotFound):
                await client.get(ID)
        assert good.asked == []

    asyncio.run(main())


@pytest.mark.parametrize("bad_first", [True, False])
def test_what_one_node_says_is_told_rather_than_that_others_are_silent(refusing: str, bad_first: bool) -> None:
    async def main() -> None:
        bad = Stand(Get=failing(Code.UNAVAILABLE, "no-quorum", message="no majority"))
        async with serving(bad) as address:
            addresses = [address, refusing] if bad_first else [refusing, address]
            async with AsyncClient(addresses, timeout_s=3) as client:
                with pytest.raises(StoreUnavailable, match="no majority"):
                    await client.get(ID)

    asyncio.run(main())


def test_a_write_that_nobody_answers_may_have_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.client.channels.ATTEMPT_TIMEOUT_S", 0.3)

    async def main() -> None:
        stand = Stand(Submit=hanging, Get=hanging)
        async with serving(stand) as address, AsyncClient(address, timeout_s=1.0) as client:
            with pytest.raises(OutcomeUnknown, match="did not answer in time"):
                await client.submit(["true"])
            with pytest.raises(StoreUnavailable, match="did not answer in time"):
                await client.get(ID)

    asyncio.run(main())


def test_a_lost_answer_is_asked_for_again_with_the_same_id() -> None:
    async def main() -> None:
        tries: list[str] = []

        async def first_is_lost(request: Any, context: Any) -> Any:
            tries.append(request.tasks[0].id)
            if len(tries) == 1:
                await context.abort(Code.ABORTED, "perhaps")
            return api.SubmitResponse(tasks=[api.Submitted(id=request.tasks[0].id, existed=True)])

        async with serving(Stand(Submit=first_is_lost)) as address, AsyncClient(address) as client:
            handle = await client.submit("echo hello", cpus=1)
        assert tries == [handle.id, handle.id]

    asyncio.run(main())


def test_many_tasks_go_in_several_requests_and_errors_count_over_all() -> None:
    async def main() -> None:
        async def accept(request: Any, context: Any) -> Any:
            return api.SubmitResponse(tasks=[api.Submitted(id=t.id) for t in request.tasks])

        stand = Stand(Submit=accept)
        specs = [make_spec(["echo", str(i)]) for i in range(2500)]
        large = [make_spec(["echo", "x" * 100_000, "y" * 100_000]) for _ in range(50)]
        async with serving(stand) as address, AsyncClient(address) as client:
            done = await client.submit_many(specs)
            assert [s.id for s in done] == [s.id for s in specs]
            assert [len(r.tasks) for _, r in stand.asked] == [1000, 1000, 500]
            stand.asked.clear()
            await client.submit_many(large)
            assert all(r.ByteSize() <= validate.SUBMIT_BYTES_TARGET for _, r in stand.asked)
            assert sum(len(r.tasks) for _, r in stand.asked) == 50
            with pytest.raises(UserError, match=r"the id of tasks\[0\] is given again"):
                await client.submit_many([specs[0], specs[0]])

            async def second_refused(request: Any, context: Any) -> Any:
                if request.tasks[0].id != specs[0].id:
                    await failing(Code.ALREADY_EXISTS, "already-exists", message="other", field="tasks[7].name")(
                        0, context
                    )
                return await accept(request, context)

            stand.answers["Submit"] = second_refused
            with pytest.raises(AlreadyExists) as caught:
                await client.submit_many(specs)
            assert caught.value.field == "tasks[1007].name"

    asyncio.run(main())


def test_a_followed_log_goes_on_at_the_same_byte() -> None:
    text = bytes(range(256)) * 20

    async def breaks_off(request: Any, context: Any) -> AsyncIterator[api.LogChunk]:
        end = request.offset + 1000
        for at in range(request.offset, min(end, len(text)), 300):
            yield api.LogChunk(data=text[at : min(at + 300, end)], offset=at, attempt=1, node="n1")
        if end < len(text):
            await context.abort(Code.UNAVAILABLE, "the node stops")

    async def main() -> None:
        stands = [
            Stand(Log=breaks_off, Get=giving(api.GetResponse(tasks=[view(attempts_started=1)]))) for _ in range(2)
        ]
        async with serving(stands[0]) as first, serving(stands[1]) as second, AsyncClient([first, second]) as client:
            chunks = [c async for c in client.log(ID, follow=True)]
        assert b"".join(c.data for c in chunks) == text
        at = 0
        for chunk in chunks:
            assert chunk.offset == at
            at += len(chunk.data)
        assert all(any(name == "Log" for name, _ in s.asked) for s in stands)
        assert {r.attempt for s in stands for name, r in s.asked if name == "Log"} == {0, 1}

    asyncio.run(main())


def test_a_followed_log_goes_on_to_the_next_attempt() -> None:
    async def log(request: Any, context: Any) -> AsyncIterator[api.LogChunk]:
        number = request.attempt or 1
        if number == 1 and not request.offset:
            yield api.LogChunk(data=b"one", offset=0, attempt=1)
            await context.abort(Code.UNAVAILABLE, "the node stops")
        elif number == 2:
            yield api.LogChunk(data=b"two", offset=0, attempt=2)

    async def main() -> None:
        stand = Stand(Log=log, Get=giving(api.GetResponse(tasks=[view(attempts_started=2)])))
        async with serving(stand) as address, AsyncClient(address) as client:
            assert [(c.attempt, c.data) async for c in client.log(ID, follow=True)] == [(1, b"one"), (2, b"two")]

    asyncio.run(main())


def test_a_log_is_cut_at_its_limit_across_a_break() -> None:
    async def log(request: Any, context: Any) -> AsyncIterator[api.LogChunk]:
        yield api.LogChunk(data=b"x" * min(4, request.limit_bytes), offset=request.offset, attempt=1)
        await context.abort(Code.UNAVAILABLE, "the node stops")

    async def main() -> None:
        async with serving(Stand(Log=log)) as address, AsyncClient(address) as client:
            chunks = [c async for c in client.log(ID, limit_bytes=10)]
        assert [(c.offset, len(c.data)) for c in chunks] == [(0, 4), (4, 4), (8, 2)]

    asyncio.run(main())


def test_a_log_on_a_node_that_is_gone() -> None:
    tries = 0

    async def log(request: Any, context: Any) -> AsyncIterator[api.LogChunk]:
        nonlocal tries
        tries += 1
        if tries < 3:
            await failing(Code.UNAVAILABLE, "node-unreachable", message="n2 does not answer", hint="later")(0, context)
        yield api.LogChunk(data=b"x", offset=0, attempt=1)

    async def main() -> None:
        nonlocal tries
        stand = Stand(Log=log, Get=giving(api.GetResponse(tasks=[view(attempts_started=1)])))
        async with serving(stand) as address, AsyncClient(address) as client:
            with pytest.raises(UserError, match="n2 does not answer") as caught:
                [c async for c in client.log(ID)]
            assert (caught.value.reason, tries) == ("node-unreachable", 1)
            tries = 0
            assert [c.data async for c in client.log(ID, follow=True)] == [b"x"]
            assert tries == 3

    asyncio.run(main())


def test_a_stream_that_cannot_be_had_is_given_up(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.client.streams.PATIENCE_S", 0.3)

    async def main() -> None:
        async with AsyncClient(refusing) as client, asyncio.timeout(10):
            with pytest.raises(StoreUnavailable):
                async for _ in client.log(ID, follow=True):
                    pass

    asyncio.run(main())


def test_a_log_that_is_not_followed_is_given_up_in_the_time_of_a_call(refusing: str) -> None:
    async def main() -> None:
        async with AsyncClient(refusing, timeout_s=0.3) as client, asyncio.timeout(20):
            with pytest.raises(StoreUnavailable):
                await anext(aiter(client.log(ID)))

    asyncio.run(main())


def test_a_watch_resumes_after_what_it_has_seen() -> None:
    asked: list[int] = []

    async def watch(request: Any, context: Any) -> AsyncIterator[api.WatchResponse]:
        asked.append(request.from_revision)
        if len(asked) == 1:  # broken within the first state: all of it must come again
            yield api.WatchResponse(tasks=[view()])
        elif len(asked) == 2:
            yield api.WatchResponse(tasks=[view()])
            yield api.WatchResponse(revision=7, initial_done=True)
            yield api.WatchResponse(tasks=[view(state=pb.RUNNING)], revision=9)
        elif len(asked) == 3:
            await failing(Code.OUT_OF_RANGE, "compacted", message="gone")(request, context)
        else:
            yield api.WatchResponse(removed_ids=[ID], revision=12)
        await context.abort(Code.UNAVAILABLE, "the node stops")

    async def main() -> None:
        seen = []
        async with (
            serving(Stand(Watch=watch)) as address,
            AsyncClient(address) as client,
            contextlib.aclosing(client.watch(TaskFilter(states=(State.RUNNING,)))) as changes,
        ):
            async for change in changes:
                seen.append((len(change.tasks), change.removed, change.initial_done, change.restarted))
                if change.removed:
                    break
        assert asked == [0, 0, 10, 0]
        assert seen == [
            (1, (), False, False),
            (1, (), False, True),
            (0, (), True, False),
            (1, (), False, False),
            (0, (ID,), False, True),
        ]

    asyncio.run(main())


def test_wait_asks_again_until_its_own_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.client.aio.WAIT_POLL_S", 0.05)

    async def main() -> None:
        calls = 0

        async def slow(request: Any, context: Any) -> Any:
            nonlocal calls
            calls += 1
            assert 0 < request.timeout_s <= 0.05
            await asyncio.sleep(request.timeout_s)
            return api.WaitResponse(tasks=[view(state=pb.RUNNING)], timed_out=True)

        async with serving(Stand(Wait=slow)) as address, AsyncClient(address) as client:
            result = await client.wait([ID], timeout_s=1.0)
            assert result.timed_out
            assert not result.tasks[0].done
            assert calls > 2
            with pytest.raises(TimeoutError):
                await client.task(ID).wait(0.1)

    asyncio.run(main())


def test_pages_are_walked_and_empty_ones_are_no_end() -> None:
    async def page(request: Any, context: Any) -> Any:
        n = int(request.page_token or 0)
        tasks = [] if n == 1 else [view(ID[:-1] + str(n))]
        return api.ListResponse(tasks=tasks, next_page_token=str(n + 1) if n < 3 else "")

    async def main() -> None:
        stand = Stand(List=page)
        async with serving(stand) as address, AsyncClient(address) as client:
            assert [i.id[-1] async for i in client.list()] == ["0", "2", "3"]
            assert [i.id[-1] async for i in client.list(limit=2)] == ["0", "2"]

    asyncio.run(main())


def test_an_omitted_specification_is_fetched() -> None:
    async def get(request: Any, context: Any) -> Any:
        found = [view(i) for i in request.ids]
        if len(found) > 1:
            found[1].spec_omitted = True
            found[1].task.spec.ClearField("command")
        return api.GetResponse(tasks=found)

    async def main() -> None:
        async with serving(Stand(Get=get)) as address, AsyncClient(address) as client:
            found = await client.get_many([ID, ID[:-1] + "8"])
            assert [i.task.spec.command for i in found] == [("a",), ("a",)]

    asyncio.run(main())


def test_the_same_for_programs_without_asyncio() -> None:
    """The servers need a loop that runs while the client blocks: a thread has it."""
    import threading

    started, stop = threading.Event(), threading.Event()
    address = ""

    async def log(request: Any, context: Any) -> AsyncIterator[api.LogChunk]:
        for i in range(3):
            yield api.LogChunk(data=b"%d" % i, offset=i, attempt=1)

    async def submit(request: Any, context: Any) -> Any:
        return api.SubmitResponse(tasks=[api.Submitted(id=t.id) for t in request.tasks])

    async def main() -> None:
        nonlocal address
        stand = Stand(
            Submit=submit,
            Log=log,
            ListNodes=NODES,
            Get=failing(Code.NOT_FOUND, "not-found", message="none"),
            Wait=giving(api.WaitResponse(tasks=[view(outcome=pb.SUCCEEDED)])),
            List=giving(api.ListResponse(tasks=[view(), view()])),
        )
        async with serving(stand) as address:
            started.set()
            await asyncio.to_thread(stop.wait, 60)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert started.wait(30)
        with Client(address) as client:
            task = client.submit(["true"], name="x")
            assert task.wait(5).succeeded
            assert b"".join(c.data for c in task.log()) == b"012"
            for chunk in task.log():
                assert chunk.data == b"0"
                break  # an iterator left early ends its call
            assert len(list(client.list())) == 2
            assert client.nodes().notices == ("hello",)
            with pytest.raises(NotFound):
                task.status()
            unfinished = client.list()
            next(unfinished)
        client.close()
        unfinished.close()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="closed"):
            client.nodes()
    finally:
        stop.set()
        thread.join(30)


@pytest.mark.parametrize("nodes", ["", " , ", [], "127.0.0.1"])
def test_bad_addresses(nodes: Any) -> None:
    with pytest.raises(UserError) as caught:
        AsyncClient(nodes)
    assert caught.value.field == "nodes"


def test_off_loopback_nobody_is_spoken_to_without_credentials() -> None:
    with pytest.raises(Denied, match="you have no credentials for the cluster at") as caught:
        AsyncClient("10.0.0.1:7220")
    assert caught.value.reason == "unauthenticated"


def test_addresses() -> None:
    assert parse_nodes("127.0.0.1:1, localhost:1,127.0.0.2:1") == ("127.0.0.1:1", "127.0.0.2:1")


def test_specifications() -> None:
    spec = make_spec("echo 'a b'", cpus=0.5, memory="1GiB", gpu=1, countables={"fpga": 2}, time="1m", tags=["b", "a"])
    assert spec.command == ("echo", "a b")
    assert spec.resources.countables == (("fpga", 2), ("gpu", 1))
    assert (spec.walltime_s, spec.tags_required) == (60.0, ("a", "b"))
    assert validate.is_task_id(spec.id)
    assert make_spec(["a"]).id < make_spec(["a"]).id
    for arguments, field in (
        ({"command": ["a", 7]}, "command"),
        ({"command": ["a"], "gpu": 1, "countables": "gpu=1"}, "gpu"),
        ({"command": ["a"], "workdir": "x"}, "workdir"),
        ({"command": ["a"], "time": 1e9}, "time"),
        ({"command": ["a"], "tags": ["a b"]}, "tags[0]"),
        ({"command": ["a"], "grace": 1}, "grace"),
    ):
        with pytest.raises(UserError) as caught:
            make_spec(**arguments)
        assert caught.value.field == field


@pytest.mark.parametrize("key", ENTRY_KEYS)
def test_wrong_types_are_a_users_mistake(key: str) -> None:
    """Whatever is given, there is a specification that can be sent, or a UserError: never another error."""
    table: list[object] = [None, 1, 1.5, float("nan"), 10**30, -1, True, b"x", "x", "\ud800", (), object()]
    table += [["a"], ["ab"], [1], [("a",)], {"a": 1}, {1: "a"}, {"a": "b"}]
    for value in table:
        arguments: dict[str, Any] = {"command": ["a"], key: value}
        try:
            spec = make_spec(**arguments)
        except UserError as e:
            wrong = e.field.partition("[")[0].partition(".")[0]
        else:
            encode_task(Task(spec, State.QUEUED))
            continue
        assert wrong == key or {wrong, key} == {"gpu", "countables"}, value


def test_options_passed_on_are_those_of_make_spec() -> None:
    parameters = inspect.signature(make_spec).parameters
    assert TaskOptions.__annotations__.keys() == parameters.keys() - {"command"} == ENTRY_KEYS.keys() - {"command"}
    assert {k: typing.ForwardRef(p.annotation) for k, p in parameters.items() if k != "command"} == {
        k: typing.ForwardRef(v.__forward_arg__) for k, v in TaskOptions.__annotations__.items()
    }


def test_options_beside_a_specification_are_not_ignored(refusing: str) -> None:
    with Client(refusing) as client, pytest.raises(UserError, match="options beside a specification") as caught:
        client.submit(make_spec(["true"]), cpus=2)
    assert caught.value.field == "cpus"


def test_tags_in_text_are_not_letters() -> None:
    assert make_spec(["a"], tags="ssd, big", not_tags="old").tags_required == ("big", "ssd")
