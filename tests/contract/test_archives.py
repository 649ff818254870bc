"""Archives through the API: written for the leader, listed from all nodes, shown to whom List would show them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta import codec, keys, messages, txn
from spinetta.access import NodeRole, UserRole
from spinetta.agent import Agent
from spinetta.client import AsyncClient
from spinetta.errors import NotFound, StoreUnavailable
from spinetta.model import Completed, NodeId, NodeRecord, Outcome, State, Task, TaskId
from spinetta.node.archive import Archive
from spinetta.node.archiving import NodeArchivist
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.node.services import limits
from spinetta.node.services.peers import Peers
from spinetta.runtime.protocol import Runtime
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests import builders
from tests.builders import settings
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
from tests.contract.rights_world import secured

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode
DENIED = Code.PERMISSION_DENIED


def finished(
    at: str, *, task_id: str = "", owner: str = "", outcome: Outcome = Outcome.SUCCEEDED, **more: Any
) -> bytes:
    """The record of a task that ended on a node."""
    task = messages.task_from_pb(
        pb.Task(
            spec=spec(task_id, owner=owner, **more),
            state=pb.COMPLETE,
            outcome=pb.Outcome.ValueType(outcome),
            attempts_started=1,
            attempts=[pb.Attempt(number=1, node=at, incarnation="i", outcome=pb.Outcome.ValueType(outcome))],
            completed_ms=5,
            message="what went wrong",
        )
    )
    return codec.encode_task(task)


def id_of(record: bytes) -> str:
    return codec.decode_task(record).id


async def archive(n: Node, records: Sequence[bytes]) -> list[str]:
    """As the leader does: written there, then remembered."""
    done = await n.peer.Archive(api.ArchiveRequest(records=records))
    await put(n.store, keys.archive(n.port.name))
    return list(done.ids)


async def pages(stub: rpc.SpinettaAsyncStub, size: int = 100, **more: Any) -> tuple[list[str], dict[str, str]]:
    """All pages: ids, and who was silent."""
    ids: list[str] = []
    silent: dict[str, str] = {}
    token = ""
    for _ in range(200):
        page = await stub.ListArchived(api.ListArchivedRequest(page_size=size, page_token=token, **more))
        assert len(page.tasks) <= size
        ids += [v.task.spec.id for v in page.tasks]
        silent |= {s.node: s.why for s in page.silent}
        token = page.next_page_token
        if not token:
            return ids, silent
    raise AssertionError("two hundred pages")


def test_what_several_nodes_have_is_one_list(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b, node(etcd, tmp_path, "c") as c:
            records = [finished("abc"[i % 3]) for i in range(90)]
            for i, n in enumerate((a, b, c)):
                own = records[i::3]
                assert await archive(n, own) == [id_of(r) for r in own]
            await archive(b, records[:20])  # an answer was lost, and the leader asked another
            ids = [id_of(r) for r in records]
            for n in (a, b, c):
                assert await pages(n.api, 7) == (ids, {})
            assert await pages(a.api, 7, newest_first=True) == (ids[::-1], {})
            assert await pages(a.api, 1000) == (ids, {})

    run(scenario())


def test_what_is_still_in_the_store_is_not_in_the_list(etcd: Etcd, tmp_path: Path) -> None:
    """Between its archiving and its deletion a task is listed once, by List."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            task = (await a.submit())[0]
            await a.claim(task)
            await a.end(task)
            key = keys.task(TaskId(task))
            entry = (await a.store.read([key])).entries[key]
            assert entry is not None
            await archive(a, [entry.value])
            assert await pages(a.api) == ([], {})
            await delete(a.store, key, keys.complete(TaskId(task)))
            assert await pages(a.api) == ([task], {})
            failed = await failure(a.api.Get(api.GetRequest(ids=[task])))
            assert failed.code is Code.NOT_FOUND
            assert "spinetta list --archived" in failed.detail.hint

    run(scenario())


def test_filters_and_times(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            ann, bob = finished("a", owner="ann", labels={"run": "7"}), finished("b", owner="bob", name="x")
            failed = finished("b", owner="ann", outcome=Outcome.FAILED)
            old = finished("a", task_id="01000000-0000-7000-8000-000000000001")
            await archive(a, [old, ann])
            await archive(b, [bob, failed])
            at_ms = 0x010000000000
            for wanted, more in (
                ([old, ann, bob, failed], {}),
                ([ann, failed], {"filter": api.Filter(owner="ann")}),
                ([failed], {"filter": api.Filter(outcomes=[pb.FAILED])}),
                ([ann], {"filter": api.Filter(labels={"run": "7"})}),
                ([bob], {"filter": api.Filter(name="x")}),
                ([bob, failed], {"filter": api.Filter(node="b")}),
                ([], {"filter": api.Filter(states=[pb.RUNNING])}),
                ([old], {"before_ms": at_ms + 1}),
                ([ann, bob, failed], {"since_ms": at_ms + 1}),
            ):
                assert await pages(a.api, 1, **more) == ([id_of(r) for r in wanted], {}), more

    run(scenario())


def test_a_node_that_does_not_tell_is_named(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            mine = finished("a")
            await archive(a, [mine])
            async with node(etcd, tmp_path, "b") as b:
                await archive(b, [finished("b")])
            for what in ("stopped", "lost", "left"):
                ids, silent = await pages(a.api)
                assert ids == [id_of(mine)], what
                assert list(silent) == ["b"], what
                await delete(a.store, keys.node(NodeId("b")) if what == "stopped" else keys.incarnation(NodeId("b")))
            a.port.archive = Archive(tmp_path / "a" / "broken", 0)
            (tmp_path / "a" / "broken").mkdir()
            (tmp_path / "a" / "broken" / "x.jsonl.gz").write_bytes(b"not an archive at all, by any means")
            assert (await pages(a.api))[0] == []  # nothing there can be read, and nothing falls over

    run(scenario())


def test_a_node_that_cannot_be_looked_up_is_named(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def record(_: Peers, __: NodeId) -> NodeRecord:
        raise StoreUnavailable("no answer")

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            own = finished("a")
            await archive(a, [own])
            await archive(b, [finished("b")])
            monkeypatch.setattr(Peers, "record", record)
            assert await pages(a.api) == ([id_of(own)], {"b": "no answer"})

    run(scenario())


def test_what_is_asked_wrongly(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await archive(a, [finished("a") for _ in range(3)])
            token = (await a.api.ListArchived(api.ListArchivedRequest(page_size=1))).next_page_token
            for request, field in (
                (api.ListArchivedRequest(page_token="x"), "page_token"),  # noqa: S106 - no secret
                (api.ListArchivedRequest(page_token=token, newest_first=True), "page_token"),
                (api.ListArchivedRequest(page_size=100_000), "page_size"),
                (api.ListArchivedRequest(since_ms=-1), "since_ms"),
                (api.ListArchivedRequest(before_ms=1 << 60), "before_ms"),
                (api.ListArchivedRequest(filter=api.Filter(states=[pb.STATE_UNSPECIFIED])), "filter.states[0]"),
            ):
                failed = await failure(a.api.ListArchived(request))
                assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, field)
            for bad in (
                api.ReadArchiveRequest(after="x"),
                api.ReadArchiveRequest(since_ms=-1),
                api.ReadArchiveRequest(before_ms=1 << 60),
                api.ReadArchiveRequest(limit=5000),
            ):
                assert (await failure(a.peer.ReadArchive(bad))).code is Code.INVALID_ARGUMENT
            many = api.ArchiveRequest(records=[b""] * (limits.ARCHIVE_RECORDS_MAX + 1))
            assert (await failure(a.peer.Archive(many))).detail.reason == "too-large"
            assert list((await a.peer.Archive(api.ArchiveRequest(records=[b"\xff", b""]))).ids) == []

    run(scenario())


def test_a_full_disk_is_said_and_nothing_is_confirmed(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (tmp_path / "a" / "archive").write_text("in the way")
            failed = await failure(a.peer.Archive(api.ArchiveRequest(records=[finished("a")])))
            assert failed.detail.reason == "archive-unwritable"
            archivist = NodeArchivist(NodeId("z"), a.port.archive, a.port.dialer, list)
            done, why = await archivist.archive(NodeId("z"), [finished("z")])
            assert not done
            assert "cannot be written" in why

    run(scenario())


# --- who may ------------------------------------------------------------------------------------------------------


def test_it_shows_what_list_would_show(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving("a") as a, cluster.serving("b") as b:
            hers = finished("b", owner="ann", command=["/bin/secret"], env={"KEY": "x"})
            leader = await cluster.node_pair("n9")
            async with cluster.channel(b.address, "b", leader) as channel:
                done = await rpc.PeerStub(channel).Archive(api.ArchiveRequest(records=[hers]))
            assert list(done.ids) == [id_of(hers)]
            for name, role, may in (
                ("ann", UserRole.USER, True),
                ("eve", UserRole.USER, False),
                ("op", UserRole.OPERATOR, True),
            ):
                async with cluster.as_(a, await cluster.user(name, role)) as stub:
                    (view,) = (await stub.ListArchived(api.ListArchivedRequest())).tasks
                    assert list(view.task.spec.command) == (["/bin/secret"] if may else [])
                    assert bool(view.task.message) == may
                    assert view.withheld != may
            async with cluster.as_(a, None) as guest:
                assert (await failure(guest.ListArchived(api.ListArchivedRequest()))).code is Code.UNAUTHENTICATED

    run(scenario())


def test_only_voters_write_and_read_archives(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving("a") as a:
            everybody = [
                await cluster.user("root2", UserRole.ADMIN),
                await cluster.node_pair("w", NodeRole.WORKER),
                None,
            ]
            for pair in everybody:
                async with cluster.channel(a.address, "a", pair) as channel:
                    peer = rpc.PeerStub(channel)
                    no = (DENIED, Code.UNAUTHENTICATED)
                    assert (await failure(peer.Archive(api.ArchiveRequest(records=[finished("a")])))).code in no
                    assert (await failure(peer.ReadArchive(api.ReadArchiveRequest()))).code in no
            assert not (tmp_path / "a" / "archive").exists()

    run(scenario())


def test_a_leader_reaches_a_worker_and_no_worker_anybody(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER) as w,
        ):
            records = [replace(builders.node_record(n.port.name), address=n.address) for n in (a, w)]
            own = finished("w")
            leader = NodeArchivist(a.port.name, a.port.archive, a.port.dialer, lambda: records)
            assert await leader.archive(w.port.name, [own]) == (frozenset({id_of(own)}), "")
            worker = NodeArchivist(w.port.name, w.port.archive, w.port.dialer, lambda: records)
            done, why = await worker.archive(a.port.name, [own])
            assert not done
            assert "may not" in why
            assert [c for c in w.port.audited if c[0] == "peer"] == []  # one line for each batch would be a flood

    run(scenario())


def test_a_worker_is_believed_of_its_own_tasks_only(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER) as w,
        ):
            own, invented = finished("w"), finished("a", owner="ann")
            await asyncio.to_thread(w.port.archive.append, [own, invented], 1)
            await put(a.store, keys.archive(NodeId("w")))
            assert await pages(a.api) == ([id_of(own)], {})
            # and what somebody else has of that id wins
            other = finished("w", task_id=id_of(own), outcome=Outcome.FAILED)
            await asyncio.to_thread(a.port.archive.append, [other], 1)
            await put(a.store, keys.archive(NodeId("a")))
            (view,) = (await a.api.ListArchived(api.ListArchivedRequest())).tasks
            assert view.task.outcome == pb.FAILED
            async with cluster.as_(w, await cluster.user("ann")) as hers:
                failed = await failure(hers.ListArchived(api.ListArchivedRequest()))
                assert failed.detail.reason == "ask-a-voter"

    run(scenario())


def test_what_is_sealed_stays_sealed(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            share = pb.SealedKeyShare(label="gene", generation=1, sealed=b"\x00s\xff" * 30)
            envelope = pb.Envelope(shares=[share], nonce=b"n" * 12, ciphertext=b"\xff\x00" * 50)
            record = finished("a", clearance=["gene"], sealed=envelope, command=())
            await archive(a, [record])
            (view,) = (await a.api.ListArchived(api.ListArchivedRequest())).tasks
            assert view.task == pb.Task.FromString(record)

    run(scenario())


# --- the client, and a leader -------------------------------------------------------------------------------------


def test_the_client_reads_them(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            records = [finished("a") for _ in range(250)]
            await archive(a, records)
            await put(a.store, keys.archive(NodeId("gone")))
            async with AsyncClient(a.address) as client:
                found = [p async for p in client.list_archived()]
                assert [t.id for p in found for t in p.tasks] == [id_of(r) for r in records]
                assert all(t.done and t.succeeded for p in found for t in p.tasks)
                assert all("gone" in p.silent for p in found)
                newest = [p async for p in client.list_archived(newest_first=True, limit=3)]
                assert [t.id for p in newest for t in p.tasks] == [id_of(r) for r in records[:-4:-1]]
                with pytest.raises(NotFound, match="list --archived"):
                    await client.get(id_of(records[0]))

    run(scenario())


class NoRuntime:
    """A runtime that holds nothing and is asked for nothing else."""

    async def held(self) -> tuple[()]:
        return ()

    async def events(self) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    async def renew(self, renewed_at_s: float) -> None: ...


@asynccontextmanager
async def leading(n: Node, **fields: Any) -> AsyncIterator[Driver]:
    """A real agent and driver beside a node that serves; they lead."""
    made = settings("leader", reconcile_s=1.0, **fields)
    agent = Agent(replace(made, record=replace(made.record, address=n.address)))
    launch = LaunchSettings("leader", 0, n.address)
    archivist = NodeArchivist(NodeId("leader"), n.port.archive, n.port.dialer, lambda: agent.peers)
    runtime: Runtime = NoRuntime()  # type: ignore[assignment]
    driver = Driver(agent, n.store, runtime, launch, remember=lambda _: None, archivist=archivist)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(driver.run())
        try:
            yield driver
        finally:
            running.cancel()


async def end_at(n: Node, task: Task, completed_ms: int) -> None:
    """A finished task as its node leaves it."""
    done = replace(task, completed_ms=completed_ms, state=State.COMPLETE)
    told = codec.encode_completed(Completed(n.port.name, completed_ms))
    writes = (txn.Put(keys.task(task.id), codec.encode_task(done)), txn.Put(keys.complete(task.id), told))
    assert isinstance(await n.store.commit(txn.Txn(then=writes)), txn.Committed)


def test_a_leader_collects_from_a_real_store_into_two_archives(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            await put(a.store, keys.GENERATION, codec.encode_generation("g"))
            now_ms = a.port.wall_ms()
            old = [codec.decode_task(finished("ab"[i % 2], task_id=new_id())) for i in range(230)]
            for i, task in enumerate(old):
                await end_at((a, b)[i % 2], task, now_ms - 10_000)
            waiting = (await a.submit(spec(tags_required=["nowhere"])))[0]
            async with leading(a, collect_after_s=5.0, collect_keep=0):

                async def collected() -> bool:
                    left = await a.store.list(keys.COMPLETE, keys_only=True)
                    return not left.entries

                await eventually(collected, within_s=30)
            ids = [t.id for t in old]
            assert await pages(b.api, 50) == (ids, {})
            assert (await a.get(waiting)).task.state == pb.QUEUED
            here = {id_of(r) for r in (await b.peer.ReadArchive(api.ReadArchiveRequest(limit=1000))).records}
            assert here == set(ids[1::2])
            names = [keys.parse_node(e.key) for e in (await a.store.list(keys.ARCHIVE)).entries]
            assert names == ["a", "b"]

    run(scenario())


def test_an_effect_always_has_its_answer(etcd: Etcd, tmp_path: Path) -> None:
    """Whatever becomes of it: the collector waits for nothing else."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            deaf = [replace(builders.node_record("deaf"), address="127.0.0.1:1")]
            archivist = NodeArchivist(NodeId("z"), a.port.archive, a.port.dialer, lambda: deaf)
            for target, why in (("nobody", "not here"), ("deaf", "connect"), ("z", "")):
                done, said = await archivist.archive(NodeId(target), [b"\xff"])
                assert (done, why in said) == (frozenset(), True), said

    run(scenario())
