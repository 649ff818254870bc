"""A secured cluster for tests of its API: real certificates, real TLS, real records of rights, hand-driven nodes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from spinetta import keys, trustcodec
from spinetta.access import LabelGeneration, LabelKey, NodeAcl, NodeRole, Policy, UserAcl, UserRole
from spinetta.model import NodeId, Revision
from spinetta.node.hub import Hub
from spinetta.node.services.server import serve
from spinetta.node.services.throttle import Throttle
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from spinetta.trust import guest
from spinetta.trust.certificates import identity_of
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import Dialer, node_name
from spinetta.trust.sealing import new_sealing_key, public_of
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, HandNode, Node, announce, new_id, put
from tests.unit.trust_world import World

Pair = tuple[bytes, bytes]  # certificate, key


class SkewedNode(HandNode):
    """A node whose clock the test sets."""

    skew_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.skew_ms


class SecuredNode(Node):
    """A node under test. Its own channel is that of an admin."""

    port: SkewedNode

    def read_log_raw(self, task_id: str) -> Any:
        """The call for a log, as an admin."""
        return self.api.Log(log_request(task_id))


@dataclass
class Secured:
    """A cluster's authority and records."""

    etcd: Etcd
    directory: Path
    world: World = field(default_factory=lambda: World(time.time()))

    def __post_init__(self) -> None:
        self.store = EtcdStore([self.etcd.endpoint])

    async def user(self, name: str = "ann", role: UserRole = UserRole.USER, **fields: Any) -> Pair:
        """A person with a record and a certificate."""
        await self.set_user(UserAcl(name, role, **fields))
        return self.world.user(name)

    async def set_user(self, acl: UserAcl) -> Revision:
        """Write a person's record."""
        return await put(self.store, keys.acl_user(acl.name), trustcodec.encode(acl))

    async def node_pair(self, name: str, role: NodeRole = NodeRole.VOTER, **fields: Any) -> Pair:
        """A node with a record and a certificate."""
        pair = self.world.node(name, role)
        identity = identity_of(pair[0], [self.world.ca], self.world.cluster, now_s=time.time())
        assert identity is not None
        await self.set_node(NodeAcl(name, role, key_hash=identity.key_hash, **fields))
        return pair

    async def set_node(self, acl: NodeAcl) -> Revision:
        """Write a node's record."""
        return await put(self.store, keys.acl_node(NodeId(acl.name)), trustcodec.encode(acl))

    async def node_acl(self, name: str) -> NodeAcl:
        """A node's record."""
        key = keys.acl_node(NodeId(name))
        entry = (await self.store.read([key])).entries[key]
        assert entry is not None
        return trustcodec.decode(NodeAcl, entry.value)

    async def change_node(self, name: str, **changes: Any) -> None:
        """Change a node's record."""
        await self.set_node(replace(await self.node_acl(name), **changes))

    async def policy(self, policy: Policy) -> None:
        """Set the policy."""
        await put(self.store, keys.POLICY, trustcodec.encode(policy))

    async def label(self, name: str) -> None:
        """Make a label's key."""
        public_key = public_of(new_sealing_key())
        key = LabelKey(name, (LabelGeneration(1, public_key, ()),))
        await put(self.store, keys.label(name), trustcodec.encode(key))

    @asynccontextmanager
    async def serving(
        self,
        name: str = "a",
        role: NodeRole = NodeRole.VOTER,
        *,
        wrap: Callable[[Store], Store] = lambda store: store,
        throttle: Throttle | None = None,
        clearances: Sequence[str] = (),
        tokens: Any = None,
    ) -> AsyncIterator[SecuredNode]:
        """A node that serves, known to the others. Its `api` is an admin's."""
        logs = self.directory / name
        logs.mkdir()
        certificate, key = await self.node_pair(name, role, effective=tuple(clearances))
        credentials = NodeCredentials.create(
            logs / "trust",
            ca_pem=self.world.ca,
            node_pem=certificate,
            node_key_pem=key,
            sealing_private=new_sealing_key(),
        )
        inner = EtcdStore([self.etcd.endpoint])
        port = SkewedNode(name, wrap(inner), logs)
        port.credentials = credentials
        port.dialer = Dialer.secured(credentials.pems)
        port.clearances = frozenset(clearances)
        try:
            async with serve(port, ["127.0.0.1:0"], hub=Hub(port.store), throttle=throttle, tokens=tokens) as server:
                await announce(inner, name, server.addresses[0])
                port.voters = (server.addresses[0],)
                async with self.channel(server.addresses[0], name, await self.user("root", UserRole.ADMIN)) as channel:
                    yield SecuredNode(port, server, channel)
        finally:
            await inner.close()

    def channel(self, address: str, name: str, pair: Pair | None) -> grpc.aio.Channel:
        """A channel to a node with this certificate; None: a guest's."""
        if pair is None:
            key, certificate = guest.guest_pair()
            pair = (certificate, key)
        return Dialer.secured(lambda: self.world.pems(pair)).channel(address, node_name(name))

    @asynccontextmanager
    async def as_(self, node: Node, pair: Pair | None) -> AsyncIterator[rpc.SpinettaAsyncStub]:
        """The API of a node as somebody sees it."""
        async with self.channel(node.address, node.port.name, pair) as channel:
            yield rpc.SpinettaStub(channel)

    async def close(self) -> None:
        """Let go."""
        await self.store.close()


@asynccontextmanager
async def secured(etcd: Etcd, directory: Path) -> AsyncIterator[Secured]:
    """A new cluster in an empty etcd."""
    cluster = Secured(etcd, directory)
    try:
        yield cluster
    finally:
        await cluster.close()


async def first(stream: Any) -> Any:
    """The first item of a stream, which is then left."""
    try:
        async for item in stream:
            return item
    finally:
        stream.cancel()
    return None


async def all_of(stream: Any) -> list[Any]:
    """All items of a stream."""
    return [item async for item in stream]


def log_request(task_id: str, **fields: Any) -> api.LogRequest:
    """A request for a log."""
    return api.LogRequest(id=task_id, **fields)


def sealed(clearance: list[str]) -> pb.TaskSpec:
    """A labelled task, sealed as far as a node that is not cleared can tell."""
    envelope = pb.Envelope(
        shares=[pb.SealedKeyShare(label=label, generation=1, sealed=b"s" * 80) for label in clearance],
        nonce=b"n" * 12,
        ciphertext=b"c" * 64,
    )
    return pb.TaskSpec(id=new_id(), clearance=clearance, sealed=envelope)


async def fails(call: Awaitable[Any], code: grpc.StatusCode) -> bool:
    """Whether a call ends with this status."""
    try:
        await call
    except grpc.aio.AioRpcError as e:
        return e.code() is code
    return False
