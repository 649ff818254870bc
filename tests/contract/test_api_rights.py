"""Who may call what, over real TLS: each role and each call, own and others' tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from spinetta.access import NodeRole, UserRole
from spinetta.rights import Call, Caller, CallerKind, Reach, reach
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, Failed, etcd, etcd_member, failure, new_id, run, spec
from tests.contract.rights_world import Pair, Secured, all_of, first, log_request, sealed, secured

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
NO = (DENIED, UNKNOWN)


# --- each role, each call ------------------------------------------------------------------------------------------


class Stubs:
    """All services of one node."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.api: rpc.SpinettaAsyncStub = rpc.SpinettaStub(channel)
        self.peer: rpc.PeerAsyncStub = rpc.PeerStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(channel)


Do = Callable[[Stubs, str], Awaitable[Any]]  # given the id of a task that belongs to the user "ann"

CALLS: dict[str, tuple[Call, Do]] = {
    "Submit": (Call.SUBMIT, lambda s, _: s.api.Submit(api.SubmitRequest(tasks=[spec()]))),
    "Cancel": (Call.CANCEL, lambda s, t: s.api.Cancel(api.CancelRequest(ids=[t]))),
    "Get": (Call.STATUS, lambda s, t: s.api.Get(api.GetRequest(ids=[t]))),
    "List": (Call.STATUS, lambda s, _: s.api.List(api.ListRequest())),
    "ListArchived": (Call.STATUS, lambda s, _: s.api.ListArchived(api.ListArchivedRequest())),
    "Watch": (Call.STATUS, lambda s, _: first(s.api.Watch(api.WatchRequest()))),
    "Wait": (Call.STATUS, lambda s, t: s.api.Wait(api.WaitRequest(ids=[t], timeout_s=0.01))),
    "Log": (Call.LOG, lambda s, t: all_of(s.api.Log(log_request(t)))),
    "ListNodes": (Call.NODES, lambda s, _: s.api.ListNodes(api.ListNodesRequest())),
    "DescribeCluster": (Call.NODES, lambda s, _: s.api.DescribeCluster(api.DescribeClusterRequest())),
    "Drain": (Call.DRAIN, lambda s, _: s.api.Drain(api.DrainRequest())),
    "Undrain": (Call.DRAIN, lambda s, _: s.api.Undrain(api.UndrainRequest())),
    "Leave": (Call.LEAVE, lambda s, _: all_of(s.api.Leave(api.LeaveRequest()))),
    "ConfirmDead": (Call.CONFIRM_DEAD, lambda s, _: s.api.ConfirmDead(api.ConfirmDeadRequest(node="nobody"))),
    "Backup": (Call.BACKUP, lambda s, _: all_of(s.api.Backup(api.BackupRequest()))),
    "PullImage": (
        Call.IMAGE_CHANGE,
        lambda s, _: all_of(s.api.PullImage(api.PullImageRequest(reference="docker://r.invalid/a"))),
    ),
    "PullImage of files": (
        Call.IMAGE_IMPORT,
        lambda s, _: all_of(s.api.PullImage(api.PullImageRequest(reference="rootfs:/etc"))),
    ),
    "ListImages": (Call.IMAGES, lambda s, _: s.api.ListImages(api.ListImagesRequest())),
    "RemoveImage": (Call.IMAGE_CHANGE, lambda s, _: s.api.RemoveImage(api.RemoveImageRequest(image="a"))),
    "PinImage": (Call.IMAGE_CHANGE, lambda s, _: s.api.PinImage(api.PinImageRequest(image="a"))),
    "VerifyImage": (Call.IMAGE_CHANGE, lambda s, _: all_of(s.api.VerifyImage(api.VerifyImageRequest(image="a")))),
    "TakeSeat": (Call.PEER, lambda s, _: s.peer.TakeSeat(api.TakeSeatRequest(member_id=1))),
    "GiveUpSeat": (Call.PEER, lambda s, _: s.peer.GiveUpSeat(api.GiveUpSeatRequest(member_id=1))),
    "Archive": (Call.PEER, lambda s, _: s.peer.Archive(api.ArchiveRequest())),
    "ReadArchive": (Call.PEER, lambda s, _: s.peer.ReadArchive(api.ReadArchiveRequest())),
    "Sample": (Call.USAGE, lambda s, _: s.peer.Sample(api.SampleRequest())),
    "Check": (Call.HEALTH, lambda s, _: s.health.Check(health_pb2.HealthCheckRequest())),
    "ServerReflectionInfo": (
        Call.REFLECTION,
        lambda s, _: all_of(
            s.reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        ),
    ),
}
WHO: dict[str, Caller] = {
    "nobody": Caller.nobody(),
    **{r.name.lower(): Caller(CallerKind.USER, "ann", role=r) for r in UserRole},
    **{r.name.lower(): Caller(CallerKind.NODE, "n9", node_role=r) for r in NodeRole},
}
# What is asked for above is allowed, and absent.
NOTHING_THERE = {
    ("Log", "not-started"),
    ("ConfirmDead", "not-found"),
    *((n, "no-containers") for n in ("PullImage", "PullImage of files", "RemoveImage", "PinImage", "VerifyImage")),
}
ONLY_PASSED_ON = {Call.LOG, Call.DRAIN, Call.LEAVE, Call.IMAGES, Call.IMAGE_CHANGE, Call.IMAGE_IMPORT}  # by a node


def is_allowed(who: str, call: Call) -> bool:
    caller = WHO[who]
    if caller.kind is CallerKind.NODE and call in ONLY_PASSED_ON:
        return False
    return reach(caller, call) is not Reach.NONE


async def show(cluster: Secured, who: str) -> Pair | None:
    caller = WHO[who]
    if caller.kind is CallerKind.NOBODY:
        return None
    if caller.role is not None:
        return await cluster.user("ann", caller.role)
    assert caller.node_role is not None
    return await cluster.node_pair("n9", caller.node_role)


async def _try(etcd: Etcd, tmp_path: Path, who: str, do: Do) -> tuple[Failed | None, list[Any]]:
    async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
        [task] = await a.submit(spec(owner="ann"))
        pair = await show(cluster, who)
        async with cluster.channel(a.address, "a", pair) as channel:
            a.port.audited.clear()
            try:
                await do(Stubs(channel), task)
            except grpc.aio.AioRpcError as e:
                return Failed(e), a.port.audited
            return None, a.port.audited


@pytest.mark.parametrize(
    ("who", "name"), [(w, n) for w, (n, (call, _)) in product(WHO, CALLS.items()) if not is_allowed(w, call)]
)
def test_what_is_not_in_the_table_is_refused(etcd: Etcd, tmp_path: Path, who: str, name: str) -> None:
    call, do = CALLS[name]
    failed, audited = run(_try(etcd, tmp_path, who, do))
    assert failed is not None, "it was allowed"
    assert failed.code is (UNKNOWN if who == "nobody" else DENIED)
    assert failed.detail.reason == ("unauthenticated" if who == "nobody" else "denied")
    assert [(c, title) for c, title, *_ in audited] == [(call.value, WHO[who].title)]
    assert audited[0][3].startswith(failed.detail.reason)


@pytest.mark.parametrize(
    ("who", "name"), [(w, n) for w, (n, (call, _)) in product(WHO, CALLS.items()) if is_allowed(w, call)]
)
def test_what_is_in_the_table_is_not(etcd: Etcd, tmp_path: Path, who: str, name: str) -> None:
    failed, _ = run(_try(etcd, tmp_path, who, CALLS[name][1]))
    assert failed is None or failed.code not in NO, failed
    assert failed is None or (name, failed.detail.reason) in NOTHING_THERE


# --- whose task it is ----------------------------------------------------------------------------------------------


def test_users_handle_their_own_tasks_and_their_projects(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann", projects=("blue",))
            mine, ours, others, nobodys = new_id(), new_id(), new_id(), new_id()
            await a.submit(
                spec(mine, owner="ann"), spec(ours, owner="blue"), spec(others, owner="bob"), spec(nobodys, owner="")
            )
            for task in (mine, ours, others, nobodys):
                await a.claim(task)
                a.write_log(task, b"out")
            async with cluster.as_(a, ann) as hers:
                for task in (mine, ours):
                    assert (await all_of(hers.Log(log_request(task))))[0].data == b"out"
                for task in (others, nobodys):  # the latter is root's: its submitter's
                    assert (await failure(all_of(hers.Log(log_request(task))))).code is DENIED
                    assert (await failure(hers.Cancel(api.CancelRequest(ids=[task])))).code is DENIED
                # one that is not hers spoils the whole call
                assert (await failure(hers.Cancel(api.CancelRequest(ids=[mine, others])))).code is DENIED
                assert not (await a.get(mine)).cancel_requested
                done = await hers.Cancel(api.CancelRequest(ids=[mine, ours]))
                assert [t.state for t in done.tasks] == [pb.RUNNING, pb.RUNNING]
                assert (await a.get(nobodys)).task.spec.owner == "root"

    run(scenario())


def test_submitting_for_whom(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann", projects=("blue",))
            op = await cluster.user("op", UserRole.OPERATOR)
            async with cluster.as_(a, ann) as hers, cluster.as_(a, op) as ops:
                task = new_id()
                await hers.Submit(api.SubmitRequest(tasks=[spec(task)]))
                assert (await a.get(task)).task.spec.owner == "ann"
                again = await hers.Submit(api.SubmitRequest(tasks=[spec(task)]))
                assert again.tasks[0].existed
                await hers.Submit(api.SubmitRequest(tasks=[spec(owner="blue")]))
                failed = await failure(hers.Submit(api.SubmitRequest(tasks=[spec(), spec(owner="bob")])))
                assert failed.code is DENIED
                assert "not of bob" in failed.text
                assert (await failure(ops.Submit(api.SubmitRequest(tasks=[spec(owner="ann")])))).code is DENIED
                await a.submit(spec(owner="bob"))  # an admin may
                assert len((await a.api.List(api.ListRequest())).tasks) == 3

    run(scenario())


def test_a_taken_id_tells_nothing_about_its_task(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann, bob = await cluster.user("ann"), await cluster.user("bob")
            task = new_id()
            async with cluster.as_(a, ann) as hers, cluster.as_(a, bob) as his:
                await hers.Submit(api.SubmitRequest(tasks=[spec(task, ["/bin/secret"])]))
                for command in ("/bin/secret", "/bin/guess"):
                    failed = await failure(his.Submit(api.SubmitRequest(tasks=[spec(task, [command])])))
                    assert failed.code is grpc.StatusCode.ALREADY_EXISTS
                    assert failed.detail.message == f"task {task} belongs to somebody else"
                failed = await failure(his.Submit(api.SubmitRequest(tasks=[spec(task, owner="ann")])))
                assert failed.code is DENIED
                assert (await a.get(task)).task.spec.owner == "ann"

    run(scenario())


def test_labels_must_be_covered(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving(clearances=["gene"]) as a:
            ann = await cluster.user("ann", clearances=("gene",))
            await cluster.label("gene")
            labelled = sealed(clearance=["gene"])
            async with cluster.as_(a, ann) as hers:
                await hers.Submit(api.SubmitRequest(tasks=[labelled]))
                failed = await failure(hers.Submit(api.SubmitRequest(tasks=[sealed(clearance=["gene", "top"])])))
                assert failed.code is DENIED
                assert "not cleared for top" in failed.text
                await a.claim(labelled.id)
                a.write_log(labelled.id, b"out")
                assert (await all_of(hers.Log(log_request(labelled.id))))[0].data == b"out"
            failed = await failure(a.read_log(labelled.id))  # an admin without the label
            assert failed.code is DENIED
            assert "root is not cleared for gene" in failed.text
            assert (await failure(a.submit(sealed(clearance=["gene"])))).code is DENIED

    run(scenario())


def test_what_others_run_is_withheld(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            viewer = await cluster.user("vic", UserRole.VIEWER)
            ann, op = await cluster.user("ann"), await cluster.user("op", UserRole.OPERATOR)
            task = new_id()
            secret = spec(task, ["/bin/x", "--key=s3cret"], env={"K": "s3cret"}, working_directory="/s3cret")
            secret.name, secret.owner = "shown", "ann"
            await a.submit(secret)
            await a.api.Cancel(api.CancelRequest(ids=[task], reason="said s3cret"))

            async def seen(api_: rpc.SpinettaAsyncStub) -> list[api.TaskView]:
                watched = await first(api_.Watch(api.WatchRequest(ids=[task])))
                return [
                    *(await api_.Get(api.GetRequest(ids=[task]))).tasks,
                    *(await api_.List(api.ListRequest())).tasks,
                    *(await api_.Wait(api.WaitRequest(ids=[task]))).tasks,
                    *watched.tasks,
                ]

            async with cluster.as_(a, viewer) as theirs:
                views = await seen(theirs)
                assert len(views) == 4
                for v in views:
                    assert b"s3cret" not in v.SerializeToString()
                    assert v.withheld
                    assert v.task.spec.name == "shown"
                    assert v.task.outcome == pb.CANCELLED
            for pair in (ann, op):
                async with cluster.as_(a, pair) as whole:
                    for v in await seen(whole):
                        assert v.task.spec.command[1] == "--key=s3cret"
                        assert "s3cret" in v.task.message
                        assert not v.withheld

    run(scenario())
