"""This node's own seat, on real etcd: given up, crashed in between, taken again, removed by others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.errors import RuntimeUnavailable, StoreUnavailable
from spinetta.node.entry import Memory
from spinetta.node.seats import OwnSeat
from spinetta.store import identity as identities
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity
from spinetta.store.members import Members
from spinetta.store.process import initial_cluster
from spinetta.store.wal import wal_owner
from tests.contract.api_world import eventually
from tests.contract.etcds import LocalServices, Program, free_port, loopback_host

pytestmark = pytest.mark.contract
LIMIT_S = 60.0


class Crash(Exception):
    """The daemon ends here."""


class Sitter:
    """One node, as far as its seat goes."""

    def __init__(self, name: str, folder: Path, services: LocalServices, program: Program) -> None:
        self.name, self.folder, self.services, self.program = name, folder, services, program
        host = loopback_host()
        self.client_url = f"http://{host}:{free_port(host)}"
        self.peer_url = f"http://{host}:{free_port(host)}"
        folder.mkdir()
        self.memory = Memory(folder / "identity.json", Identity(node=name))
        self.seat = self.daemon()

    def daemon(self) -> OwnSeat:
        known = identities.load(self.folder / "identity.json")
        self.memory = Memory(self.folder / "identity.json", known or Identity(node=self.name))
        self.seat = OwnSeat(
            self.services,
            name=self.name,
            data_dir=self.folder,
            program=self.program.path,
            version=self.program.version,
            client_url=self.client_url,
            peer_url=self.peer_url,
            identity=lambda: self.memory.identity,
            update=self.memory.update,
        )
        return self.seat


@contextlib.asynccontextmanager
async def sitters(tmp_path: Path, program: Program) -> AsyncIterator[tuple[Sitter, Sitter, Members]]:
    services = [LocalServices(), LocalServices()]
    a, b = (Sitter(f"n{i}", tmp_path / f"n{i}", s, program) for i, s in enumerate(services))
    store = EtcdStore([a.client_url])
    try:
        async with asyncio.timeout(LIMIT_S):
            await a.seat.bootstrap()
            yield a, b, Members(store.connections)
    finally:
        await store.close()
        for each in services:
            each.end()


async def seated(b: Sitter, members: Members) -> int:
    """Make `b` a learner of the cluster; its member id."""
    while True:
        try:
            member, after = await members.add_learner(b.peer_url)
            break
        except StoreUnavailable:  # etcd makes ids of the URL and the second: no two of one URL in the same one
            await asyncio.sleep(0.1)
    names = {m.peer_url: m.name for m in after.members if m.name} | {b.peer_url: b.name}
    cluster = initial_cluster((names[m.peer_url], m.peer_url) for m in after.members)
    await b.seat.take(member.member_id, cluster, after.cluster_id)
    return member.member_id


def test_given_up_and_taken_again_after_a_crash_in_between(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with sitters(tmp_path, program) as (_, b, members):
            first = await seated(b, members)
            await members.remove(first)

            def crash(_: OwnSeat) -> None:
                raise Crash

            with monkeypatch.context() as patched:
                patched.setattr(OwnSeat, "_put_aside", crash)
                with pytest.raises(Crash):
                    await b.seat.give_up(first)
            assert wal_owner(b.folder / "etcd") is not None
            seat = b.daemon()  # the next daemon: a worker that remembers no member
            assert seat.member_id == 0
            assert not b.memory.identity.has_joined
            second = await seated(b, members)
            assert seat.member_id == second != first
            assert wal_owner(b.folder / "etcd.removed") != wal_owner(b.folder / "etcd")

    asyncio.run(scenario())


def test_a_member_that_others_removed_is_put_away(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with sitters(tmp_path, program) as (_, b, members), asyncio.TaskGroup() as group:
            running = group.create_task(b.seat.run())
            member_id = await seated(b, members)
            await members.remove(member_id)
            await eventually((b.folder / "etcd.removed").exists, within_s=30)
            assert b.seat.member_id == 0
            assert not (b.folder / "etcd").exists()
            running.cancel()

    asyncio.run(scenario())


def test_a_seat_whose_etcd_cannot_be_stopped_now_is_kept(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with sitters(tmp_path, program) as (_, b, members):
            member_id = await seated(b, members)

            async def unavailable(*_: Any) -> None:
                raise RuntimeUnavailable("for a moment")

            with monkeypatch.context() as patched:
                patched.setattr(b.services, "stop_service", unavailable)
                with pytest.raises(RuntimeUnavailable):
                    await b.seat.give_up(member_id)
            assert b.seat.member_id == member_id
            await b.seat.give_up(member_id)
            assert b.seat.member_id == 0
            assert (b.services.running["etcd"].exit) is not None

    asyncio.run(scenario())


def test_two_changes_of_the_memory_at_once_keep_both(tmp_path: Path) -> None:
    async def scenario() -> None:
        memory = Memory(tmp_path / "identity.json", Identity(node="n"))
        for n in range(50):
            await asyncio.gather(
                asyncio.to_thread(memory.update, incarnation_id=f"life {n}"),
                asyncio.to_thread(memory.update, cluster_id=f"{n}"),
            )
            want = replace(memory.identity, incarnation_id=f"life {n}", cluster_id=f"{n}")
            assert identities.load(tmp_path / "identity.json") == memory.identity == want

    asyncio.run(scenario())
