"""Growing from one voter to three and back, with real etcds, the planner and supervisors; data kept throughout."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spinetta.errors import AlreadyExists, Fenced, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity, check_data_dir
from spinetta.store.members import Members, hex_id, status, statuses
from spinetta.store.process import EtcdSettings, EtcdTls, initial_cluster
from spinetta.store.supervisor import EtcdSupervisor
from spinetta.store.wal import wal_owner
from spinetta.trust.certificates import Authority
from spinetta.txn import Absent, Committed, Put, Txn
from spinetta.voters import AddLearner, Nothing, Promote, Remove, Seat, Sitter, next_step
from tests.contract.etcds import (
    HOUR_S,
    LocalServices,
    Program,
    VoterFiles,
    etcd_authority,
    free_port,
    loopback_host,
)

pytestmark = pytest.mark.contract

LIMIT_S = 100
INSTALLED = Program("etcd", (3, 4, 23))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario

    asyncio.run(limited())


async def until(what: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


@dataclass
class Node:
    """A node, as far as its etcd goes."""

    name: str
    directory: Path
    host: str = field(default_factory=loopback_host)
    services: LocalServices = field(default_factory=LocalServices)
    leaving: bool = False
    supervisor: EtcdSupervisor | None = None
    authority: Authority | None = None
    lifetime_s: float = HOUR_S
    program: Program = INSTALLED

    def __post_init__(self) -> None:
        self.files: VoterFiles | None = None
        if self.authority is not None:
            self.files = VoterFiles(self.directory, self.name, self.host, self.authority)
            self.files.renew(lifetime_s=self.lifetime_s)
        scheme = "http" if self.files is None else "https"
        self.client_url = f"{scheme}://{self.host}:{free_port(self.host)}"
        self.peer_url = f"{scheme}://{self.host}:{free_port(self.host)}"

    @property
    def tls(self) -> Callable[[], EtcdTls] | None:
        files = self.files
        return (lambda: files.tls) if files is not None else None

    def settings(self, cluster: str = "", existing: bool = False) -> EtcdSettings:
        return EtcdSettings(
            program=self.program.path,
            name=self.name,
            data_dir=self.directory / f"{self.name}.etcd",
            client_url=self.client_url,
            peer_url=self.peer_url,
            initial_cluster=cluster or initial_cluster([(self.name, self.peer_url)]),
            existing=existing,
            tls=self.files.tls if self.files is not None else None,
        )

    async def start(self, cluster: str = "", existing: bool = False) -> None:
        self.supervisor = EtcdSupervisor(
            self.services,
            self.settings(cluster, existing),
            log_path=self.directory / f"{self.name}.log",
            version=self.program.version,
        )
        await self.supervisor.start(timeout_s=30)

    async def stop(self) -> None:
        if self.supervisor is not None:
            await self.supervisor.stop()
            self.supervisor = None


class Cluster:
    """Nodes, and one who carries out the planner's steps."""

    def __init__(
        self,
        directory: Path,
        names: str,
        authority: Authority | None = None,
        lifetime_s: float = HOUR_S,
        program: Program = INSTALLED,
    ) -> None:
        self.nodes = {
            name: Node(name, directory, authority=authority, lifetime_s=lifetime_s, program=program) for name in names
        }
        self.first = self.nodes[names[0]]
        self.store = EtcdStore([self.first.client_url], self.first.tls)
        self.members = Members(self.store.connections)
        self.steps: list[str] = []

    async def seats(self) -> list[Seat]:
        found = (await self.members.members()).members
        how = await statuses(found, self.first.tls)
        return [
            Seat(m.member_id, m.name, m.peer_url, m.learner, bool((s := how[m.member_id]) and s.healthy)) for m in found
        ]

    async def turn(self, wanted: int = 3) -> bool:
        """One step; False when there is nothing more to do."""
        seats = await self.seats()
        sitters = [Sitter(n.name, n.peer_url, leaving=n.leaving) for n in self.nodes.values()]
        leader = (await status(self.store.endpoints[0], self.first.tls)).leader_id
        step = next_step(seats, sitters, wanted=wanted, me=next(iter(self.nodes)), leader_member_id=leader)
        names = {seat.member_id: seat.name for seat in seats}
        match step:
            case AddLearner(name, peer_url):
                _, found = await self.members.add_learner(peer_url)
                by_url = {node.peer_url: node.name for node in self.nodes.values()}
                cluster = initial_cluster((by_url[m.peer_url], m.peer_url) for m in found.members)
                self.steps.append(f"add {name}")
                await self.nodes[name].start(cluster, existing=True)
            case Promote(member_id):
                await self.members.promote(member_id)
                self.steps.append(f"promote {names[member_id]}")
            case Remove(member_id, _):
                await self.members.remove(member_id)
                self.steps.append(f"remove {names[member_id]}")
                await self.nodes[names[member_id]].stop()
            case Nothing(_, settled):
                return not settled
        voters = [n.client_url for n in self.nodes.values() if n.supervisor is not None]
        await self.store.set_endpoints(voters)
        return True

    async def remove(self, member_id: int) -> None:
        """Etcd refuses until all members have been connected for 5 s."""
        while True:
            with contextlib.suppress(StoreUnavailable):
                return await self.members.remove(member_id)
            await asyncio.sleep(0.1)

    async def settle(self, limit_s: float = 60.0) -> float:
        start_s = time.monotonic()
        while True:
            try:
                if not await self.turn():
                    return time.monotonic() - start_s
            except (StoreUnavailable, OutcomeUnknown):
                # Not in sync yet, or not all connected for 5 s: that is what "try later" is for.
                await asyncio.sleep(0.1)
            assert time.monotonic() - start_s < limit_s


@contextlib.asynccontextmanager
async def cluster(
    directory: Path,
    names: str,
    authority: Authority | None = None,
    lifetime_s: float = HOUR_S,
    program: Program = INSTALLED,
) -> AsyncIterator[Cluster]:
    made = Cluster(directory, names, authority, lifetime_s, program)
    try:
        await made.nodes[names[0]].start()
        yield made
    finally:
        await made.store.close()
        for node in made.nodes.values():
            node.services.end()


def test_one_to_three_and_back_with_data_kept(
    program: Program, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc", program=program) as world:
            stop = asyncio.Event()
            written: list[str] = []

            async def write() -> None:
                """What is acknowledged must stay, whatever happens to the members meanwhile."""
                while not stop.is_set():
                    key = f"/k/{len(written):05}"
                    with contextlib.suppress(StoreUnavailable, OutcomeUnknown):
                        if isinstance(await world.store.commit(Txn(when=(Absent(key),), then=(Put(key),))), Committed):
                            written.append(key)
                            continue
                        written.append(key)  # an unknown one that took place after all
                    await asyncio.sleep(0.005)

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                grown_s = await world.settle()
                assert world.steps == ["add b", "promote b", "add c", "promote c"]
                assert [seat.learner for seat in await world.seats()] == [False] * 3
                before = len(written)
                await until(lambda: len(written) > before + 20)

                for node in world.nodes.values():  # each of them has it all
                    one = EtcdStore([node.client_url])
                    entries = (await one.list("/k/", keys_only=True)).entries
                    assert {entry.key for entry in entries} >= set(written[:before])
                    await one.close()

                world.steps.clear()
                world.nodes["c"].leaving = True
                shrunk_s = await world.settle()
                assert world.steps == ["remove c", "remove b"]
                before = len(written)
                await until(lambda: len(written) > before + 20)
                stop.set()
            assert {entry.key for entry in (await world.store.list("/k/", keys_only=True)).entries} >= set(written)
            record_property("grown_s", round(grown_s, 2))
            record_property("shrunk_s", round(shrunk_s, 2))
            print(f"one to three: {grown_s:.2f} s; three to one: {shrunk_s:.2f} s; {len(written)} writes kept")  # noqa: T201

    run(scenario())


def test_three_under_tls(program: Program, tmp_path: Path) -> None:
    """Each etcd takes the flags that make it ask for certificates."""

    async def scenario() -> None:
        async with cluster(tmp_path, "abc", etcd_authority(), program=program) as world:
            await world.settle()
            assert [seat.learner for seat in await world.seats()] == [False] * 3
            for node in world.nodes.values():
                assert (await status(node.client_url, node.tls)).healthy
                with pytest.raises(StoreUnavailable):
                    await status(node.client_url.replace("https", "http"))

    run(scenario())


def test_two_candidates_or_none(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "ab", program=program) as world:
            await world.settle()
            assert world.steps == []
            world.nodes["c"] = Node("c", tmp_path, program=program)
            while world.steps != ["add b", "promote b"]:
                with contextlib.suppress(StoreUnavailable):
                    await world.turn()
            del world.nodes["c"]  # in the middle the third one goes: back to one
            await world.settle()
            assert world.steps == ["add b", "promote b", "remove b"]
            await world.store.commit(Txn(then=(Put("/a"),)))

    run(scenario())


def test_changes_that_are_refused(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc", program=program) as world:
            a, b, c = world.nodes.values()
            with pytest.raises(AlreadyExists):
                await world.members.add_learner(a.peer_url)
            added, found = await world.members.add_learner(b.peer_url)
            assert (added.learner, added.name, len(found.members)) == (True, "", 2)
            with pytest.raises(StoreUnavailable, match="too many learner"):
                await world.members.add_learner(c.peer_url)
            with pytest.raises(StoreUnavailable, match="in sync"):
                await world.members.promote(added.member_id)
            (me,) = [m.member_id for m in found.members if not m.learner]
            await world.members.promote(me)  # a voter already
            await world.members.remove(added.member_id)
            await world.members.remove(added.member_id)  # gone already
            assert [m.name for m in (await world.members.members()).members] == ["a"]
            assert await world.members.alarms() == ()
            how = await status(a.client_url)
            assert how.healthy
            assert how.member_id == me == how.leader_id
            assert how.db_bytes >= how.db_in_use_bytes > 0
            with pytest.raises(StoreUnavailable):
                await status(b.client_url)

    run(scenario())


def test_a_supervisor_takes_over_what_runs_and_starts_again_what_was_killed(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "a", program=program) as world:
            node = world.nodes["a"]
            pid = node.services.running["etcd"].pid
            await node.start()  # as the next daemon would
            assert node.services.running["etcd"].pid == pid
            assert node.supervisor is not None
            keeping = asyncio.create_task(node.supervisor.run())
            try:
                await world.store.commit(Txn(then=(Put("/a"),)))
                node.services.running["etcd"].process.kill()
                await until(lambda: node.services.running["etcd"].pid != pid)
                await node.supervisor.wait_healthy(timeout_s=20)
                assert (await world.store.read(["/a"])).entries["/a"] is not None
            finally:
                keeping.cancel()
                await asyncio.wait([keeping])
            await node.supervisor.stop()
            await node.supervisor.stop()
            assert not await node.supervisor.running()

    run(scenario())


def test_a_removed_member_is_not_started_again(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc", program=program) as world:
            await world.settle()
            c = world.nodes["c"]
            assert c.supervisor is not None
            keeping = asyncio.create_task(c.supervisor.run())
            how = await status(c.client_url)
            await world.remove(how.member_id)
            with pytest.raises(Fenced):
                await keeping
            with pytest.raises(Fenced):
                await c.start()

    run(scenario())


def test_a_port_in_use_is_said_before_etcd_is_started(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "a", program=program) as world:
            other = Node("b", tmp_path, program=program)
            other.client_url = world.nodes["a"].client_url
            with pytest.raises(UserError, match="cannot listen on 127") as caught:
                await other.start()
            assert caught.value.reason == "address-in-use"
            assert "etcd" not in other.services.running

    run(scenario())


def test_an_etcd_that_ends_says_why(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node("b", tmp_path, program=program)
        try:
            with pytest.raises(UserError, match="etcd ended"):
                # It is not among the members it is told there are.
                await node.start(cluster="x=http://127.0.0.1:1")
        finally:
            node.services.end()

    run(scenario())


def test_without_a_majority_it_goes_on_trying(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node("b", tmp_path, program=program)
        cluster = initial_cluster(
            [("b", node.peer_url), ("x", f"http://{node.host}:1"), ("y", f"http://{node.host}:2")]
        )
        node.supervisor = EtcdSupervisor(
            node.services, node.settings(cluster), log_path=tmp_path / "b.log", version=program.version
        )
        try:
            with pytest.raises(StoreUnavailable):
                await node.supervisor.start(timeout_s=2)
            assert await node.supervisor.running()
        finally:
            node.services.end()

    run(scenario())


def test_the_log_stays_bounded(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.store.supervisor.LOG_BYTES_MAX", 100_000)

    async def scenario() -> None:
        async with cluster(tmp_path, "a", program=program) as world:
            node = world.nodes["a"]
            assert node.supervisor is not None
            log = tmp_path / "a.log"
            with log.open("ab") as file:
                file.write(b"x" * 99_999 + b"\nthe end\n")
            keeping = asyncio.create_task(node.supervisor.run())
            try:
                await until(lambda: log.stat().st_size < 50_000)
            finally:
                keeping.cancel()
                await asyncio.wait([keeping])
            assert (tmp_path / "a.log.1").read_text().endswith("the end\n")
            assert await node.supervisor.running()

    run(scenario())


def test_the_log_of_etcd_tells_whose_data_it_is(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc", program=program) as world:
            await world.settle()
            cluster_id = (await world.members.members()).cluster_id
            for node in world.nodes.values():
                how = await status(node.client_url)
                data_dir = node.settings().data_dir
                assert wal_owner(data_dir) == (hex_id(how.member_id), cluster_id)
                ours = Identity(node.name, cluster_id, hex_id(how.member_id), has_joined=True)
                check_data_dir(ours, data_dir)
                for other, message in (
                    (Identity(node.name, "abc", ours.member_id, has_joined=True), "belongs to cluster abc"),
                    (Identity(node.name, cluster_id, "abc", has_joined=True), "belongs to member abc"),
                    (None, "does not remember"),
                ):
                    with pytest.raises(UserError, match=message):
                        check_data_dir(other, data_dir)
                with pytest.raises(UserError, match="its data is gone"):
                    check_data_dir(ours, tmp_path / "empty")

    run(scenario())
