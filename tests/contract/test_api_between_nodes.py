"""Secured nodes among each other: logs passed on or pointed to, workers that send people to voters, limits, tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spinetta import keys
from spinetta.access import Issuer, Limits, NodeRole, Policy, UserAcl, UserRole
from spinetta.client import AsyncClient
from spinetta.errors import Denied, StoreUnavailable
from spinetta.node.acl import AclView
from spinetta.node.services import limits
from spinetta.store.protocol import Store
from spinetta.trust.credentials import UserCredentials
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, announce, delete, etcd, etcd_member, eventually, failure, run, spec
from tests.contract.rights_world import Secured, SecuredNode, all_of, log_request, secured
from tests.contract.test_api_rights import sealed

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED


async def text_of(stream: Any) -> bytes:
    return b"".join([chunk.data for chunk in await all_of(stream)])


async def made_on(node: SecuredNode, task: pb.TaskSpec, by: SecuredNode) -> str:
    """A task that runs on a node, with a log there; an admin has submitted it."""
    await by.submit(task)
    await node.claim(task.id)
    node.write_log(task.id, b"out")
    return task.id


# --- from node to node -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", NodeRole)
def test_a_voter_passes_on_logs_drains_and_leaves(etcd: Etcd, tmp_path: Path, role: NodeRole) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving("a") as a, cluster.serving("b", role) as b:
            task = await made_on(b, spec(owner="ann"), a)
            ann, op = await cluster.user("ann"), await cluster.user("op", UserRole.OPERATOR)
            async with cluster.as_(a, ann) as hers, cluster.as_(a, op) as ops:
                assert await text_of(hers.Log(log_request(task))) == b"out"
                assert (await failure(hers.Drain(api.DrainRequest(node="b")))).code is DENIED
                await ops.Drain(api.DrainRequest(node="b"))
                await ops.Undrain(api.UndrainRequest(node="b"))
                assert b.port.draining == [True, False]
                assert (await all_of(ops.Leave(api.LeaveRequest(node="b"))))[-1].done
            assert ("drain", "node a", "drain b", "ok", 0) in b.port.audited
            assert ("drain", "user op", "drain b", "ok", 0) in a.port.audited

    run(scenario())


def test_who_answers_at_a_nodes_address_must_be_that_node(etcd: Etcd, tmp_path: Path) -> None:
    """A worker that has taken another's address is shown nothing and is not believed."""

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("evil", NodeRole.WORKER) as evil,
        ):
            await announce(cluster.store, "good", evil.address)
            failed = await failure(a.api.Drain(api.DrainRequest(node="good")))
            assert failed.detail.reason == "node-unreachable"
            assert evil.port.draining == []
            assert evil.port.audited == []

    run(scenario())


def test_peers_follow_a_renewed_certificate(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving("a") as a, cluster.serving("b") as b:
            task = await made_on(b, spec(), a)
            assert await text_of(a.read_log_raw(task)) == b"out"
            old = await cluster.node_acl("a")
            certificate, key = await cluster.node_pair("a")  # for another key
            assert a.port.credentials is not None
            a.port.credentials.update(node_pem=certificate, node_key_pem=key)
            assert (await cluster.node_acl("a")).key_hash != old.key_hash
            assert await text_of(a.read_log_raw(task)) == b"out"

    run(scenario())


def test_an_uncleared_voter_points_to_the_node_that_has_the_log(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("c", clearances=["gene"]) as c,
            cluster.serving("w", NodeRole.WORKER, clearances=["gene"]) as w,
        ):
            await cluster.label("gene")
            ann = await cluster.user("ann", clearances=("gene",))
            bob = await cluster.user("bob", UserRole.OPERATOR)
            task = sealed(clearance=["gene"])
            async with cluster.as_(a, ann) as hers:
                await hers.Submit(api.SubmitRequest(tasks=[task]))
            await w.claim(task.id)
            w.write_log(task.id, b"out")
            async with cluster.as_(a, ann) as at_a, cluster.as_(c, ann) as at_c, cluster.as_(w, ann) as at_w:
                failed = await failure(all_of(at_a.Log(log_request(task.id[-12:]))))
                assert (failed.code, failed.detail.reason) == (PRECONDITION, "ask-node")
                assert list(failed.detail.addresses) == [w.address]
                assert failed.detail.object == task.id
                assert await text_of(at_w.Log(log_request(task.id))) == b"out"  # there it is told
                assert await text_of(at_c.Log(log_request(task.id))) == b"out"  # a cleared voter passes it on
            for node in (a, c, w):
                async with cluster.as_(node, bob) as his:
                    failed = await failure(all_of(his.Log(log_request(task.id))))
                    assert failed.code is DENIED
                    assert "bob is not cleared for gene" in failed.text
            # nor does the holder give it to a voter that is not cleared, whatever that one says
            n9 = await cluster.node_pair("n9")
            async with cluster.as_(w, n9) as theirs:
                passed_on = theirs.Log(log_request(task.id, local_only=True), metadata=(("spinetta-forwarded", "1"),))
                assert (await failure(all_of(passed_on))).code is DENIED

    run(scenario())


def test_our_client_finds_its_way(etcd: Etcd, tmp_path: Path) -> None:
    """It knows a voter that is not cleared, and a fragment of an id; the log lies on a worker."""

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER, clearances=["gene"]) as w,
        ):
            w.port.voters = (a.address,)
            await cluster.label("gene")
            certificate, key = await cluster.user("ann", clearances=("gene",))
            task = sealed(clearance=["gene"])
            async with cluster.as_(a, (certificate, key)) as hers:
                await hers.Submit(api.SubmitRequest(tasks=[task]))
            await w.claim(task.id)
            w.write_log(task.id, b"out")
            credentials = UserCredentials.create(cluster.world.ca, certificate, key)
            async with AsyncClient([a.address], credentials=credentials) as client:
                assert b"".join([c.data async for c in client.log(task.id[-12:])]) == b"out"
                assert (await client.get(task.id)).id == task.id

    run(scenario())


def test_a_worker_sends_people_to_voters(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER) as w,
        ):
            w.port.voters = (a.address,)
            here, there = await made_on(w, spec(owner="ann"), a), await made_on(a, spec(owner="ann"), a)
            ann = await cluster.user("ann")
            async with cluster.as_(w, ann) as hers:
                calls: list[Awaitable[Any]] = [
                    hers.Submit(api.SubmitRequest(tasks=[spec()])),
                    hers.Cancel(api.CancelRequest(ids=[here])),
                    hers.Get(api.GetRequest(ids=[here])),
                    hers.List(api.ListRequest()),
                    all_of(hers.Watch(api.WatchRequest())),
                    hers.Wait(api.WaitRequest(ids=[here])),
                    hers.ListNodes(api.ListNodesRequest()),
                    all_of(hers.Log(log_request(there))),
                    all_of(hers.Log(log_request(here[-12:]))),  # it may not search for what a fragment means
                ]
                for call in calls:
                    failed = await failure(call)
                    assert (failed.code, failed.detail.reason) == (PRECONDITION, "ask-a-voter")
                    assert list(failed.detail.addresses) == [a.address]
                assert await text_of(hers.Log(log_request(here))) == b"out"
                assert (await failure(hers.Drain(api.DrainRequest()))).code is DENIED  # what she may not is no redirect
            assert (await failure(w.api.Drain(api.DrainRequest(node="w")))).detail.reason == "ask-a-voter"
            bob = await cluster.user("bob")
            async with cluster.as_(w, bob) as his:
                assert (await failure(all_of(his.Log(log_request(here))))).code is DENIED

    run(scenario())


# --- too much --------------------------------------------------------------------------------------------------------


def test_a_limit_hit_and_recovered(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann", limits=Limits(calls_per_s=2.0))
            bob = await cluster.user("bob")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, bob) as his:
                for _ in range(20):
                    await hers.ListNodes(api.ListNodesRequest())
                failed = await failure(_until_it_fails(hers))
                assert (failed.code, failed.detail.reason) == (BUSY, "busy")
                assert 0 < failed.detail.retry_after_s <= limits.BUSY_MAX_S
                await his.ListNodes(api.ListNodesRequest())
                await asyncio.sleep(failed.detail.retry_after_s)
                await hers.ListNodes(api.ListNodesRequest())
                assert "busy" not in str(a.port.audited)

    run(scenario())


async def _until_it_fails(stub: Any) -> None:
    while True:
        await stub.ListNodes(api.ListNodesRequest())


def test_a_submit_beyond_the_policys_rate_writes_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster:
            await cluster.policy(Policy(limits=Limits(tasks_per_s=0.5)))
            async with cluster.serving() as a:
                ann = await cluster.user("ann")
                async with cluster.as_(a, ann) as hers:
                    await hers.Submit(api.SubmitRequest(tasks=[spec() for _ in range(10)]))
                    failed = await failure(hers.Submit(api.SubmitRequest(tasks=[spec()])))
                    assert (failed.code, failed.detail.reason) == (BUSY, "busy")
                    assert len((await hers.List(api.ListRequest())).tasks) == 10

    run(scenario())


def test_refusals_use_up_what_one_may_ask_for(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            eve = await cluster.user("eve", UserRole.VIEWER, limits=Limits(calls_per_s=1.0))
            async with cluster.as_(a, eve) as hers:
                codes = [(await failure(hers.Drain(api.DrainRequest()))).code for _ in range(3)]
                assert codes == [DENIED, BUSY, BUSY]

    run(scenario())


def test_streams_of_one_caller(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAMS_PER_CALLER_MAX", 3)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann, bob = await cluster.user("ann"), await cluster.user("bob")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, bob) as his:
                calls = [hers.Watch(api.WatchRequest()) for _ in range(3)]
                for call in calls:
                    await call.read()
                assert (await failure(all_of(hers.Watch(api.WatchRequest())))).code is BUSY
                await hers.List(api.ListRequest())  # calls that are over at once are not streams
                await his.Watch(api.WatchRequest()).read()
                for call in calls:
                    call.cancel()

                async def again() -> bool:
                    call = hers.Watch(api.WatchRequest())
                    try:
                        await call.read()
                    except grpc.aio.AioRpcError:
                        return False
                    finally:
                        call.cancel()
                    return True

                await eventually(again)

    run(scenario())


def test_guests_cannot_use_up_a_nodes_streams(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GUEST_OPEN_MAX", 2)

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.channel(a.address, "a", None) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            calls = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for call in calls:
                assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert (await failure(health.Watch(health_pb2.HealthCheckRequest()).read())).code is BUSY
            await a.api.List(api.ListRequest())
            for call in calls:
                call.cancel()
            await eventually(lambda: _checked(health))

    run(scenario())


@pytest.mark.parametrize("is_guest", [True, False])
def test_calls_whose_requests_never_come(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_guest: bool
) -> None:
    """Each would hold one of the server's calls for ever."""
    monkeypatch.setattr(limits, "GUEST_OPEN_MAX", 5)
    monkeypatch.setattr(limits, "CALLS_OPEN_PER_CALLER_MAX", 5)
    monkeypatch.setattr(limits, "REQUEST_S", 1.0)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            pair = None if is_guest else await cluster.user("ann")
            async with cluster.channel(a.address, "a", pair) as channel:
                methods: list[Any] = [
                    channel.stream_unary("/spinetta.v1.Spinetta/Submit"),
                    channel.stream_stream("/spinetta.v1.Spinetta/Watch"),
                ]
                calls: list[Any] = [methods[n % 2]() for n in range(10)]
                codes = [await call.code() for call in calls]
                assert codes == [BUSY] * 10  # five at once, five when their time was over
                texts = [str(await call.details()) for call in calls]
                assert sum("has not arrived" in t for t in texts) == 5
                await a.api.List(api.ListRequest())
                assert a.server.desk.throttle.open_now == 0

    run(scenario())


def test_an_empty_and_a_garbled_request(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.channel(a.address, "a", await cluster.user("ann")) as channel,
        ):
            empty: Any = channel.stream_unary("/spinetta.v1.Spinetta/List")()
            await empty.done_writing()
            assert await empty.code() is grpc.StatusCode.INVALID_ARGUMENT
            for method in ("List", "Nothing"):
                garbled: Any = channel.unary_unary(f"/spinetta.v1.Spinetta/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await garbled(b"\xff" * 1000)
                assert (caught.value.code() is grpc.StatusCode.UNIMPLEMENTED) == (method == "Nothing")
            await a.api.List(api.ListRequest())

    run(scenario())


async def _checked(health: Any) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await health.Check(health_pb2.HealthCheckRequest())
        return True
    return False


def test_a_guest_that_knocks_all_the_time(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.as_(a, None) as guest,
        ):
            codes = [(await failure(guest.List(api.ListRequest()))).code for _ in range(30)]
            assert codes[0] is UNKNOWN
            assert codes[-1] is BUSY
            assert len(a.port.audited) < 20  # nor does it fill the audit log
            await a.api.List(api.ListRequest())

    run(scenario())


# --- bearer tokens (a real issuer: see the tests of OIDC) ------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    name: str
    role: UserRole = UserRole.USER
    projects: tuple[str, ...] = ()
    clearances: tuple[str, ...] = ()
    expires_s: float = float("inf")


class Book:
    """Believes tokens that the test has written down."""

    def __init__(self) -> None:
        self.known: dict[str, Shown] = {}

    async def verify(self, token: str, issuers: Sequence[Issuer]) -> Shown:
        assert issuers
        if token not in self.known:
            raise Denied("not believed", reason="unauthenticated")
        return self.known[token]

    def forget(self, issuers: Sequence[Issuer]) -> None:
        pass


def test_bearers(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECHECK_S", 0.05)

    async def scenario() -> None:
        book = Book()
        book.known["t"] = Shown("sso-ann")
        bearer = (("authorization", "Bearer t"),)
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving(tokens=book) as a,
            cluster.as_(a, None) as guest,
        ):
            submit = api.SubmitRequest(tasks=[spec()])
            failed = await failure(guest.Submit(submit, metadata=bearer))
            assert "bearer tokens are not taken here" in failed.text
            await cluster.policy(Policy(issuers=(Issuer("https://issuer.example", "spinetta"),)))
            await guest.Submit(submit, metadata=bearer)
            assert (await a.get(submit.tasks[0].id)).task.spec.owner == "sso-ann"
            assert (await failure(guest.Submit(submit))).code is UNKNOWN
            wrong = (("authorization", "Bearer u"),)
            assert (await failure(guest.Submit(submit, metadata=wrong))).code is UNKNOWN
            assert (await failure(guest.Drain(api.DrainRequest(), metadata=bearer))).code is DENIED
            # an administrator's word on this person goes before the mapping of groups
            await cluster.set_user(UserAcl("sso-ann", UserRole.VIEWER))
            assert (await failure(guest.Submit(submit, metadata=bearer))).code is DENIED
            await cluster.set_user(UserAcl("sso-ann", UserRole.ADMIN, revoked=True))
            assert (await failure(guest.Submit(submit, metadata=bearer))).code is UNKNOWN
            await delete(cluster.store, keys.acl_user("sso-ann"))
            watch = guest.Watch(api.WatchRequest(), metadata=bearer)
            await watch.read()
            del book.known["t"]  # as when it expires

            async def ended() -> None:
                while True:
                    await watch.read()

            assert (await failure(ended())).code is UNKNOWN

    run(scenario())


# --- the records of rights as a node knows them ----------------------------------------------------------------------


class Flaky:
    """A store that can be cut off, and whose watch can be deaf."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_down = False
        self.deaf_to = ""
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def read(self, *args: Any, **kw: Any) -> Any:
        if self.is_down:
            raise StoreUnavailable("cut off")
        self.reads += 1
        return await self._store.read(*args, **kw)

    async def list(self, *args: Any, **kw: Any) -> Any:
        if self.is_down:
            raise StoreUnavailable("cut off")
        return await self._store.list(*args, **kw)

    async def watch(self, prefix: str, **kw: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._store.watch(prefix, **kw)) as changes:
            async for each in changes:
                kept = tuple(e for e in each.events if not self.deaf_to or e.key != self.deaf_to)
                yield type(each)(each.revision, kept)


@contextlib.asynccontextmanager
async def viewing(cluster: Secured) -> AsyncIterator[tuple[AclView, Flaky]]:
    store: Any = Flaky(cluster.store)
    view = AclView(store)
    running = asyncio.ensure_future(view.run())
    try:
        await eventually(lambda: not view.is_stale)
        yield view, store
    finally:
        running.cancel()
        await asyncio.wait([running])


def test_the_copy_follows_and_answers_without_reading(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, viewing(cluster) as (view, store):
            assert await view.user("ann") is None
            revision = await cluster.set_user(UserAcl("ann", UserRole.USER))

            async def known() -> bool:
                return await view.user("ann") == (UserAcl("ann", UserRole.USER), revision)

            await eventually(known)
            assert await view.policy() == (Policy(), 0)
            assert store.reads == 0
            assert await view.user("ann", fresh=True) == (UserAcl("ann", UserRole.USER), revision)
            assert store.reads == 1
            await delete(cluster.store, keys.acl_user("ann"))

            async def gone() -> bool:
                return await view.user("ann") is None

            await eventually(gone)

    run(scenario())


def test_a_change_that_the_watch_missed_is_found(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.acl.CONFIRM_S", 0.1)
    monkeypatch.setattr("spinetta.node.acl.LAG_S", 0.05)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster:
            await cluster.set_user(UserAcl("ann", UserRole.USER))
            async with viewing(cluster) as (view, store):
                store.deaf_to = keys.acl_user("ann")
                await cluster.set_user(UserAcl("ann", UserRole.USER, revoked=True))

                async def found() -> bool:
                    known = await view.user("ann")
                    return known is not None and known[0].revoked

                await eventually(found)

    run(scenario())


def test_unknown_is_neither_no_nor_yes(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.acl.CONFIRM_S", 0.05)
    monkeypatch.setattr("spinetta.node.acl.STALE_S", 0.5)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster:
            await cluster.set_user(UserAcl("ann", UserRole.USER))
            async with viewing(cluster) as (view, store):
                store.is_down = True
                assert await view.user("ann") is not None  # it was so a moment ago
                began_s = time.monotonic()

                async def unknown() -> bool:
                    try:
                        await view.user("ann")
                    except StoreUnavailable:
                        return True
                    return False

                await eventually(unknown)
                assert time.monotonic() - began_s < 2
                assert await failing(view)
                store.is_down = False
                await eventually(lambda: not view.is_stale)
                assert await view.user("ann") is not None

    run(scenario())


async def failing(view: AclView) -> bool:
    try:
        await view.user("nobody at all")
    except StoreUnavailable:
        return True
    return False


def test_without_a_store_calls_fail_and_are_not_refused(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinetta.node.acl.CONFIRM_S", 0.05)
    monkeypatch.setattr("spinetta.node.acl.STALE_S", 0.3)
    stores: list[Any] = []

    def wrap(store: Store) -> Any:
        stores.append(Flaky(store))
        return stores[0]

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving(wrap=wrap) as a:
            eve = cluster.world.user("eve")  # unknown here
            await a.api.List(api.ListRequest())
            stores[0].is_down = True
            async with cluster.as_(a, eve) as eves:

                async def code() -> grpc.StatusCode:
                    return (await failure(eves.List(api.ListRequest()))).code

                assert await code() is grpc.StatusCode.UNAVAILABLE
                stores[0].is_down = False
                assert await code() is UNKNOWN

    run(scenario())


def test_a_record_that_cannot_be_read_is_not_no_record(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            etcd.ctl("put", keys.acl_user("ann"), "\x08not a record")
            async with cluster.as_(a, ann) as hers:
                failed = await failure(hers.Submit(api.SubmitRequest(tasks=[spec()])))
                assert (failed.code, failed.detail.reason) == (grpc.StatusCode.DATA_LOSS, "corrupt")

    run(scenario())
