"""Nodes as far as their seats go, with real etcds, real calls between them and the real keeper of seats."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import grpc.aio

from spinetta.agent import Agent
from spinetta.errors import Fenced, OutcomeUnknown, StoreUnavailable
from spinetta.model import IncarnationId, NodeId, NodeRecord, Resources
from spinetta.node.entry import Memory
from spinetta.node.keeper import SeatKeeper
from spinetta.node.seats import OwnSeat
from spinetta.node.trouble import TROUBLE
from spinetta.store import identity as identities
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity
from spinetta.store.members import Members
from spinetta.store.process import initial_cluster
from spinetta.trust.dial import Dialer
from spinetta.v1 import api_pb2 as pb
from spinetta.v1 import api_pb2_grpc as rpc
from tests.contract.etcds import LocalServices, Program, free_port, loopback_host

T = TypeVar("T")
INSIST_S = 30.0


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Again while etcd elects; for what may be done twice."""
    async with asyncio.timeout(INSIST_S):
        while True:
            with contextlib.suppress(StoreUnavailable, OutcomeUnknown):
                return await call()
            await asyncio.sleep(0.1)


class Peer(rpc.PeerServicer):
    """What a node's daemon serves to the keeper. `allowed`: whether it takes a seat now."""

    def __init__(self, seat: OwnSeat, allowed: Callable[[], bool]) -> None:
        self._seat = seat
        self._allowed = allowed

    async def TakeSeat(self, request: pb.TakeSeatRequest, context: Any) -> pb.TakeSeatResponse:  # noqa: N802
        if not self._allowed():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "its etcd does not start")
        await self._seat.take(request.member_id, request.initial_cluster, request.cluster_id)
        return pb.TakeSeatResponse()

    async def GiveUpSeat(self, request: pb.GiveUpSeatRequest, context: Any) -> pb.GiveUpSeatResponse:  # noqa: N802
        del context
        await self._seat.give_up(request.member_id)
        return pb.GiveUpSeatResponse()


@dataclass
class Node:
    """One node. `here`: its daemon runs and is registered."""

    name: str
    folder: Path
    program: Program
    services: LocalServices = field(default_factory=LocalServices)
    here: bool = False
    takes_seats: bool = True

    def __post_init__(self) -> None:
        self.host = loopback_host()
        self.address = f"{self.host}:{free_port(self.host)}"
        self.client_url = f"http://{self.host}:{free_port(self.host)}"
        self.peer_url = f"http://{self.host}:{free_port(self.host)}"
        self.folder.mkdir()
        self._open()

    def _open(self) -> None:
        path = self.folder / "identity.json"
        self.memory = Memory(path, identities.load(path) or Identity(node=self.name))
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

    @property
    def record(self) -> NodeRecord:
        """What it says of itself."""
        return NodeRecord(
            NodeId(self.name), self.address, IncarnationId("i"), Resources(), Resources(),
            etcd_client_url=self.client_url, etcd_peer_url=self.peer_url, etcd_member_id=self.seat.member_id,
            candidate=True,
        )  # fmt: skip

    @property
    def etcd(self) -> Any:
        """Its process."""
        return self.services.running["etcd"].process

    async def start(self, endpoints: Sequence[str], *, look_s: float = 0.5) -> None:
        """As its daemon: with the seat it remembers, if it still has one."""
        self._open()
        self.store = EtcdStore(endpoints)
        self.seat.attach(self.store)
        with contextlib.suppress(Fenced):
            if self.memory.identity.has_joined:
                await self.seat.resume()
        self.server = grpc.aio.server()
        peer = Peer(self.seat, lambda: self.takes_seats)  # type: ignore[abstract] # only these two are called here
        rpc.add_PeerServicer_to_server(peer, self.server)
        self.server.add_insecure_port(self.address)
        await self.server.start()
        self.work = asyncio.create_task(self._live(look_s))
        self.here = True

    async def _live(self, look_s: float) -> None:
        async def look() -> None:
            while True:
                await asyncio.sleep(look_s)
                with contextlib.suppress(*TROUBLE):
                    await self.seat.look_for_itself()
                    if urls := await self.seat.endpoints():
                        await self.store.set_endpoints(urls)

        async with asyncio.TaskGroup() as group:
            group.create_task(self.seat.run())
            group.create_task(look())

    async def end_daemon(self) -> None:
        """Its daemon is gone; etcd runs on."""
        self.here = False
        self.work.cancel()
        await asyncio.wait([self.work])
        await self.server.stop(None)
        await self.store.close()

    async def die(self) -> None:
        """The whole machine is gone."""
        await self.end_daemon()
        self.services.end()


class World:
    """A cluster of nodes, and who of them leads."""

    def __init__(self, folder: Path, names: str, program: Program) -> None:
        self.nodes = {name: Node(name, folder / name, program) for name in names}
        self.vouched: set[str] = set()
        self.office = ""
        self.asked = 0
        self._keeping: asyncio.Task[None] | None = None

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    @property
    def endpoints(self) -> list[str]:
        return [n.client_url for n in self.nodes.values() if n.here and n.seat.member_id]

    async def found(self, voters: str) -> None:
        """Three voters at once: growing is the business of other tests."""
        cluster = initial_cluster((n, self[n].peer_url) for n in voters)
        async with asyncio.TaskGroup() as group:
            for name in voters:
                group.create_task(self[name].seat._start(cluster, existing=False, token="t"))  # noqa: S106 - a name
        for node in self.nodes.values():
            await node.start([self[n].client_url for n in voters])

    def lead(self, name: str, *, replace_after_s: float, office: bool = True) -> None:
        """The keeper of this node works from now on."""
        if office:
            self.office = name
        node = self[name]
        world = self

        class Stand:
            """What the keeper wants to know of the agent."""

            leading = True
            settings = SimpleNamespace(name=name)

            @property
            def session(self) -> Any:
                return SimpleNamespace(record=node.record)

            @property
            def peers(self) -> tuple[NodeRecord, ...]:
                return tuple(n.record for n in world.nodes.values() if n.here and n is not node)

            @property
            def leadership(self) -> Any:
                return SimpleNamespace(vouched_dead=frozenset(world.vouched))

        async def revoked(_: Any) -> frozenset[str]:
            return frozenset()

        async def holds_office() -> bool:
            world.asked += 1
            return world.office == name

        keeper = SeatKeeper(
            cast(Agent, Stand()), node.seat, 3, Dialer.open(), revoked,
            replace_after_s=replace_after_s, holds_office=holds_office,
        )  # fmt: skip
        self._keeping = asyncio.create_task(keeper.run())

    async def unlead(self) -> None:
        """The leader's daemon has ended."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
            if not self._keeping.cancelled():
                self._keeping.result()
            self._keeping = None

    async def members(self) -> dict[str, bool]:
        """Names of members by peer URL, and whether they vote."""
        names = {n.peer_url: n.name for n in self.nodes.values()}
        store = EtcdStore(self.endpoints)
        try:
            found = await insist(Members(store.connections).members)
            return {names[m.peer_url]: not m.learner for m in found.members}
        finally:
            await store.close()

    async def close(self) -> None:
        """End all."""
        await self.unlead()
        for node in self.nodes.values():
            if node.here:
                await node.end_daemon()
            node.services.end()


@contextlib.asynccontextmanager
async def world(folder: Path, names: str, program: Program, *, voters: str = "abc") -> AsyncIterator[World]:
    """Nodes of these names, of which some vote."""
    made = World(folder, names, program)
    try:
        await made.found(voters)
        yield made
    finally:
        await made.close()
