"""Who may call what, over real TLS: each role and each call, own and others' tasks, forged and lapsed identities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from spinetta.access import NodeRole, UserAcl, UserRole
from spinetta.node.services import limits
from spinetta.node.services.errors import DETAIL_KEY
from spinetta.rights import Call, Caller, CallerKind, Reach, reach
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, Failed, delete, etcd, etcd_member, eventually, failure, new_id, run, spec
from tests.contract.rights_world import Pair, Secured, all_of, first, log_request, secured
from tests.unit.trust_world import CLUSTER, OTHER, World, forge, forged_by

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
NO = (DENIED, UNKNOWN)
FORWARDED = (("spinetta-forwarded", "1"),)


# --- each role, each call --------------------------------------------------------------------------------------------


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
    "Watch": (Call.STATUS, lambda s, _: first(s.api.Watch(api.WatchRequest()))),
    "Wait": (Call.STATUS, lambda s, t: s.api.Wait(api.WaitRequest(ids=[t], timeout_s=0.01))),
    "Log": (Call.LOG, lambda s, t: all_of(s.api.Log(log_request(t)))),
    "ListNodes": (Call.NODES, lambda s, _: s.api.ListNodes(api.ListNodesRequest())),
    "DescribeCluster": (Call.NODES, lambda s, _: s.api.DescribeCluster(api.DescribeClusterRequest())),
    "Drain": (Call.DRAIN, lambda s, _: s.api.Drain(api.DrainRequest())),
    "Undrain": (Call.DRAIN, lambda s, _: s.api.Undrain(api.UndrainRequest())),
    "Leave": (Call.LEAVE, lambda s, _: all_of(s.api.Leave(api.LeaveRequest()))),
    "TakeSeat": (Call.PEER, lambda s, _: s.peer.TakeSeat(api.TakeSeatRequest(member_id=1))),
    "GiveUpSeat": (Call.PEER, lambda s, _: s.peer.GiveUpSeat(api.GiveUpSeatRequest(member_id=1))),
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
ONLY_PASSED_ON = {Call.LOG, Call.DRAIN, Call.LEAVE}  # by a node


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
    assert failed is None or (name, failed.detail.reason) == ("Log", "not-started")


# --- whose task it is ------------------------------------------------------------------------------------------------


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


def sealed(clearance: list[str]) -> pb.TaskSpec:
    envelope = pb.Envelope(
        shares=[pb.SealedKeyShare(label=label, generation=1, sealed=b"s" * 80) for label in clearance],
        nonce=b"n" * 12,
        ciphertext=b"c" * 64,
    )
    return pb.TaskSpec(id=new_id(), clearance=clearance, sealed=envelope)


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


# --- rights that change ----------------------------------------------------------------------------------------------


def test_a_revoked_user_with_an_open_connection(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            async with cluster.as_(a, ann) as hers:
                await hers.List(api.ListRequest())
                await cluster.set_user(UserAcl("ann", UserRole.USER, revoked=True, reason="left us"))
                # A write is guarded, so not one may pass from now on, whatever the node knows.
                failed = await failure(hers.Submit(api.SubmitRequest(tasks=[spec()])))
                assert failed.code is UNKNOWN
                assert "revoked: left us" in failed.text
                await eventually(lambda: _fails(hers.List(api.ListRequest()), UNKNOWN))
                await cluster.set_user(UserAcl("ann", UserRole.USER))  # back again: at once
                await hers.List(api.ListRequest())

    run(scenario())


async def _fails(call: Awaitable[Any], code: grpc.StatusCode) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError as e:
        return e.code() is code
    return False


def test_rights_granted_count_at_once(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann", UserRole.VIEWER)
            async with cluster.as_(a, ann) as hers:
                for _ in range(10):
                    await cluster.set_user(UserAcl("ann", UserRole.VIEWER))
                    assert (await failure(hers.Submit(api.SubmitRequest(tasks=[spec()])))).code is DENIED
                    await cluster.set_user(UserAcl("ann", UserRole.USER))
                    await hers.Submit(api.SubmitRequest(tasks=[spec()]))

    run(scenario())


def test_an_identity_that_lapses_on_an_open_connection(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            async with cluster.as_(a, ann) as hers:
                await hers.List(api.ListRequest())
                a.port.skew_ms = 3_601_000
                failed = await failure(hers.List(api.ListRequest()))
                assert failed.code is UNKNOWN
                assert "user ann has expired" in failed.text
                assert "spinetta login" in failed.text

    run(scenario())


def test_certificates_that_were_called_back(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            async with cluster.as_(a, ann) as hers:
                await hers.List(api.ListRequest())
                acl = UserAcl("ann", UserRole.USER, issued_after_ms=time.time_ns() // 1_000_000 + 5_000)
                await cluster.set_user(acl)
                await eventually(lambda: _fails(hers.List(api.ListRequest()), UNKNOWN))
            newer = cluster.world.user("ann", now_s=time.time() + 10)
            async with cluster.as_(a, newer) as hers:
                await hers.List(api.ListRequest())

    run(scenario())


def test_a_user_that_is_removed_or_never_was(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, cluster.world.user("eve")) as eves:
                await hers.List(api.ListRequest())
                await delete(cluster.store, "/acl/user/ann")
                assert (await failure(hers.Submit(api.SubmitRequest(tasks=[spec()])))).code is UNKNOWN
                failed = await failure(eves.List(api.ListRequest()))
                assert failed.code is UNKNOWN
                assert "no user eve" in failed.text

    run(scenario())


@pytest.mark.parametrize("change", ["revoked", "another-key", "next-key", "called-back", "removed", "demoted"])
def test_a_node_whose_record_says_otherwise(etcd: Etcd, tmp_path: Path, change: str) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            n9 = await cluster.node_pair("n9")
            key_hash = (await cluster.node_acl("n9")).key_hash
            async with cluster.channel(a.address, "a", n9) as channel:
                peer: rpc.PeerAsyncStub = rpc.PeerStub(channel)
                await peer.TakeSeat(api.TakeSeatRequest(member_id=1))
                if change == "removed":
                    await delete(cluster.store, "/acl/node/n9")
                else:
                    changes: dict[str, dict[str, Any]] = {
                        "revoked": {"revoked": True},
                        "another-key": {"key_hash": b"\1" * 32},
                        "next-key": {"key_hash": b"\1" * 32, "next_key_hash": key_hash},
                        "called-back": {"issued_after_ms": time.time_ns() // 1_000_000 + 5_000},
                        "demoted": {"role": NodeRole.WORKER},
                    }
                    await cluster.change_node("n9", **changes[change])
                code = DENIED if change == "demoted" else UNKNOWN
                take = api.TakeSeatRequest(member_id=1)
                if change == "next-key":
                    await asyncio.sleep(0.1)  # nothing to wait for: it must go on as it was
                    await peer.TakeSeat(take)
                else:
                    await eventually(lambda: _fails(peer.TakeSeat(take), code))

    run(scenario())


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["Watch", "Log", "Wait"])
@pytest.mark.parametrize("how", ["revoked", "expired", "project"])
def test_an_open_stream_ends_with_the_right(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    if (what, how) in (("Watch", "project"), ("Wait", "project")):
        pytest.skip("status is for all who have a place here")
    monkeypatch.setattr(limits, "RECHECK_S", 0.05)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann", projects=("blue",))
            [task] = await a.submit(spec(owner="blue"))
            await a.claim(task)
            a.write_log(task, b"one")
            async with cluster.as_(a, ann) as hers:
                got = asyncio.Event()

                async def follow() -> None:
                    if what == "Wait":
                        got.set()
                        await hers.Wait(api.WaitRequest(ids=[task], timeout_s=50))
                        return
                    calls: dict[str, Any] = {
                        "Watch": lambda: hers.Watch(api.WatchRequest()),
                        "Log": lambda: hers.Log(log_request(task, follow=True)),
                    }
                    async for _ in calls[what]():
                        got.set()

                following = asyncio.ensure_future(follow())
                await got.wait()
                await asyncio.sleep(0.3)  # several looks: it must go on for as long as the right does
                assert not following.done()
                if how == "revoked":
                    await cluster.set_user(UserAcl("ann", UserRole.USER, revoked=True))
                elif how == "expired":
                    a.port.skew_ms = 3_601_000
                else:
                    await cluster.set_user(UserAcl("ann", UserRole.USER))
                failed = await failure(following)
                assert failed.code is (DENIED if how == "project" else UNKNOWN)

    run(scenario())


# --- forged identities and metadata ----------------------------------------------------------------------------------


def _guest_made(cluster: Secured) -> Pair:
    from cryptography import x509

    from spinetta.trust import guest
    from spinetta.trust.certificates import key_pem

    issuer = x509.load_pem_x509_certificate(guest.guest_authority_pem()).subject
    uri = f"spiffe://{cluster.world.cluster}/user/root"
    pem, key = forge(guest.guest_authority_key(), issuer, time.time(), uris=[uri], dns=())
    return pem, key_pem(key)


def test_anyone_can_make_a_guest_certificate_and_it_is_worth_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.as_(a, _guest_made(cluster)) as eves,
        ):
            failed = await failure(eves.Submit(api.SubmitRequest(tasks=[spec()])))
            assert failed.code is UNKNOWN
            assert "of no authority that this cluster believes" in failed.text

    run(scenario())


@pytest.mark.parametrize("what", ["another-domain", "node-as-user", "two-names"])
def test_certificates_that_our_authority_would_not_issue(etcd: Etcd, tmp_path: Path, what: str) -> None:
    from spinetta.trust.certificates import key_pem

    uris = {
        "another-domain": [f"spiffe://{OTHER}/user/root"],
        "node-as-user": [f"spiffe://{CLUSTER}/user/../node/a"],
        "two-names": [f"spiffe://{CLUSTER}/user/eve", f"spiffe://{CLUSTER}/user/root"],
    }

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            pem, key = forged_by(cluster.world.authority, time.time(), uris=uris[what], dns=())
            async with cluster.as_(a, (pem, key_pem(key))) as eves:
                assert (await failure(eves.List(api.ListRequest()))).code is UNKNOWN

    run(scenario())


def test_another_clusters_certificate_does_not_even_get_a_connection(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            other = World(time.time(), OTHER)
            for pair in (other.user("root"), World(time.time()).user("root")):  # the latter: the same name, another key
                async with cluster.as_(a, pair) as eves:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await eves.List(api.ListRequest(), timeout=5)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    assert DETAIL_KEY not in dict(caught.value.trailing_metadata() or ())

    run(scenario())


def test_plain_text_gets_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            grpc.aio.insecure_channel(a.address) as channel,
        ):
            stub: rpc.SpinettaAsyncStub = rpc.SpinettaStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.List(api.ListRequest(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scenario())


def test_a_user_cannot_pose_as_a_node_that_passes_on(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            [task] = await a.submit(spec(owner="bob"))
            await a.claim(task)
            a.write_log(task, b"out")
            async with cluster.as_(a, ann) as hers:
                local = log_request(task, local_only=True)
                assert (await failure(all_of(hers.Log(local, metadata=FORWARDED)))).code is DENIED
                assert (await failure(all_of(hers.Log(local)))).code is DENIED
                assert (await failure(hers.Drain(api.DrainRequest(), metadata=FORWARDED))).code is DENIED
                mine = api.SubmitRequest(tasks=[spec()])
                assert (await failure(hers.Submit(mine, metadata=FORWARDED))).code is DENIED

    run(scenario())


@pytest.mark.parametrize("role", NodeRole)
def test_what_a_node_may_pass_on(etcd: Etcd, tmp_path: Path, role: NodeRole) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            n9 = await cluster.node_pair("n9", role)
            [task] = await a.submit(spec(owner="bob"))
            await a.claim(task)
            a.write_log(task, b"out")
            async with cluster.as_(a, n9) as theirs:
                calls: list[Callable[[], Awaitable[Any]]] = [
                    lambda: all_of(theirs.Log(log_request(task, local_only=True), metadata=FORWARDED)),
                    lambda: theirs.Drain(api.DrainRequest(node="a"), metadata=FORWARDED),
                    lambda: theirs.Undrain(api.UndrainRequest(node="a"), metadata=FORWARDED),
                    lambda: all_of(theirs.Leave(api.LeaveRequest(node="a"), metadata=FORWARDED)),
                ]
                for call in calls:
                    if role is NodeRole.VOTER:
                        await call()
                    else:
                        assert (await failure(call())).code is DENIED
                # not local: it would have this node ask on
                assert (await failure(all_of(theirs.Log(log_request(task), metadata=FORWARDED)))).code is DENIED

    run(scenario())


def test_a_certificate_and_a_token_together(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, None) as guests:
                both = await failure(hers.List(api.ListRequest(), metadata=(("authorization", "Bearer x.y.z"),)))
                assert both.code is UNKNOWN
                assert "came together" in both.text
                for authorization in ("Bearer x.y.z", "Basic cm9vdDo=", "Bearer ", ""):
                    failed = await failure(guests.List(api.ListRequest(), metadata=(("authorization", authorization),)))
                    assert failed.code is UNKNOWN, authorization
                two = (("authorization", "Bearer a"), ("authorization", "Bearer b"))
                assert (await failure(guests.List(api.ListRequest(), metadata=two))).code is UNKNOWN

    run(scenario())


def test_huge_metadata(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            for pair in (None, await cluster.user("ann")):
                async with cluster.as_(a, pair) as stub:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await stub.List(api.ListRequest(), metadata=(("x-big", "x" * 100_000),), timeout=5)
                    assert caught.value.code() in (
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.StatusCode.INTERNAL,
                    )
            await a.api.List(api.ListRequest())  # it lives

    run(scenario())


# --- one write between the check and the commit ----------------------------------------------------------------------


class Between:
    """A store that does something once, just before a transaction is sent."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.first: Callable[[], Awaitable[Any]] | None = None
        self.commits = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, txn: Any, **kw: Any) -> Any:
        first, self.first = self.first, None
        if first is not None:
            await first()
        self.commits += 1
        return await self._store.commit(txn, **kw)


@pytest.mark.parametrize("call", ["Submit", "Cancel waiting", "Cancel running"])
@pytest.mark.parametrize("change", ["revoked", "removed", "viewer", "project", "harmless"])
def test_rights_that_go_between_the_check_and_the_commit(etcd: Etcd, tmp_path: Path, call: str, change: str) -> None:
    between: list[Between] = []

    def wrap(store: Any) -> Any:
        between.append(Between(store))
        return between[0]

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving(wrap=wrap) as a:
            ann = await cluster.user("ann", projects=("blue",))
            task = new_id()
            if call != "Submit":
                await a.submit(spec(task, owner="blue"))
            if call == "Cancel running":
                await a.claim(task)

            async def lose() -> None:
                record = UserAcl("ann", UserRole.USER, projects=("blue",))
                if change == "removed":
                    await delete(cluster.store, "/acl/user/ann")
                    return
                changes: dict[str, dict[str, Any]] = {
                    "revoked": {"revoked": True},
                    "viewer": {"role": UserRole.VIEWER},
                    "project": {"projects": ()},
                    "harmless": {"projects": ("blue", "red")},
                }
                await cluster.set_user(replace(record, **changes[change]))

            async with cluster.as_(a, ann) as hers:
                between[0].first, between[0].commits = lose, 0
                if call == "Submit":
                    doing: Any = hers.Submit(api.SubmitRequest(tasks=[spec(task, owner="blue")]))
                else:
                    doing = hers.Cancel(api.CancelRequest(ids=[task]))
                if change == "harmless":
                    await doing
                    assert between[0].commits == 2
                else:
                    assert (await failure(doing)).code in NO
                    assert between[0].commits == 1
                found = {t.task.spec.id: t for t in (await a.api.List(api.ListRequest())).tasks}
                done = change == "harmless"
                if call == "Submit":
                    assert (task in found) == done
                elif call == "Cancel waiting":
                    assert (found[task].task.state == pb.COMPLETE) == done
                else:
                    assert found[task].cancel_requested == done

    run(scenario())
