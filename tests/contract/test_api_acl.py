"""The records of rights as a node knows them, and bearer tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta import keys
from spinetta.access import Issuer, Policy, UserAcl, UserRole
from spinetta.errors import Denied, StoreUnavailable
from spinetta.node.acl import AclView
from spinetta.node.services import limits
from spinetta.store.protocol import Store
from spinetta.v1 import api_pb2 as api
from tests.contract.api_world import Etcd, delete, etcd, etcd_member, eventually, failure, run, spec
from tests.contract.rights_world import Secured, secured

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED


# --- bearer tokens (a real issuer: see the tests of OIDC) ----------------------------------------------------------


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


# --- the records of rights as a node knows them --------------------------------------------------------------------


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
                assert time.monotonic() - began_s < 8
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
