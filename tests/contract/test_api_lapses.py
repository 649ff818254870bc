"""Rights that change while they are used: with open connections, open streams, and writes under way."""

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

from spinetta.access import NodeRole, UserAcl, UserRole
from spinetta.node.services import limits
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, delete, etcd, etcd_member, eventually, failure, new_id, run, spec
from tests.contract.rights_world import fails, log_request, secured

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
NO = (DENIED, UNKNOWN)


# --- rights that change --------------------------------------------------------------------------------------------


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
                await eventually(lambda: fails(hers.List(api.ListRequest()), UNKNOWN))
                await cluster.set_user(UserAcl("ann", UserRole.USER))  # back again: at once
                await hers.List(api.ListRequest())

    run(scenario())


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
                await eventually(lambda: fails(hers.List(api.ListRequest()), UNKNOWN))
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
                    await eventually(lambda: fails(peer.TakeSeat(take), code))

    run(scenario())


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "how"),
    [*product(["Watch", "Log", "Wait"], ["revoked", "expired"]), ("Log", "project")],  # status is for all who are here
)
def test_an_open_stream_ends_with_the_right(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
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


# --- one write between the check and the commit --------------------------------------------------------------------


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
