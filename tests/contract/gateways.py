"""Gateways for tests: real servers with mutual TLS over a real etcd, and stores that go through them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from spinetta import keys, trustcodec
from spinetta.access import NodeAcl, NodeRole
from spinetta.errors import Denied
from spinetta.model import NodeId, Revision
from spinetta.node.gateway.quota import GatewayLimits
from spinetta.node.gateway.server import GatewayService, add_gateway
from spinetta.store.etcd import EtcdStore
from spinetta.store.gateway import GatewayStore
from spinetta.trust import certificates as certs
from spinetta.trust.dial import Dialer, Pems, server_credentials
from spinetta.txn import Committed, Put, Txn
from tests.contract.etcds import loopback_host

CLUSTER = "00112233445566aa"
DAY_S = 86400.0
_numbers = itertools.count(1)


@dataclass
class Authority:
    """The authority of a cluster, and what it issues."""

    made: certs.Authority = field(default_factory=lambda: certs.create_authority("cluster", CLUSTER, now_s=time.time()))

    @property
    def pem(self) -> bytes:
        return self.made.certificate_pem

    def node(self, name: str, role: NodeRole, lifetime_s: float = DAY_S) -> Pems:
        key = certs.new_key()
        request = certs.csr(key, name)
        leaf = certs.issue_node(
            self.made, request, cluster=CLUSTER, name=name, role=role, now_s=time.time(), lifetime_s=lifetime_s
        )
        return self.pem, leaf, certs.key_pem(key)

    def dialer(self, name: str, role: NodeRole) -> Dialer:
        pems = self.node(name, role)
        return Dialer.secured(lambda: pems)


@dataclass
class Gate:
    """One voter's gateway."""

    service: GatewayService
    server: grpc.aio.Server
    address: str
    running: asyncio.Task[None]
    refused: list[tuple[str, str, str]] = field(default_factory=list)

    async def stop(self, grace_s: float | None = None) -> None:
        await self.server.stop(grace_s)
        self.running.cancel()
        await asyncio.wait((self.running,))


@dataclass
class GateWorld:
    """An etcd, an authority, and what stands on them."""

    endpoint: str
    authority: Authority
    etcd: EtcdStore
    gates: list[Gate] = field(default_factory=list)
    stores: list[GatewayStore] = field(default_factory=list)
    closing: list[EtcdStore] = field(default_factory=list)

    async def grant(self, name: str, role: NodeRole = NodeRole.WORKER, **more: Any) -> NodeAcl:
        """Write a node's rights."""
        acl = NodeAcl(name, role, **more)
        result = await self.etcd.commit(Txn(then=(Put(keys.acl_node(NodeId(name)), trustcodec.encode(acl)),)))
        assert isinstance(result, Committed)
        return acl

    async def gate(
        self, limits: GatewayLimits | None = None, address: str = "", options: Sequence[tuple[str, int]] = ()
    ) -> Gate:
        """Another voter with its own connection to etcd."""
        store = EtcdStore([self.endpoint])
        self.closing.append(store)
        refused: list[tuple[str, str, str]] = []
        service = GatewayService(store, self.who_over(store), refused=lambda *told: refused.append(told), limits=limits)
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0),
                     ("grpc.http2.min_ping_interval_without_data_ms", 5000), *options]
        )  # fmt: skip
        add_gateway(server, service)
        pems = self.authority.node(f"voter{next(_numbers)}", NodeRole.VOTER)
        host = loopback_host()
        port = server.add_secure_port(address or f"{host}:0", server_credentials(lambda: pems))
        running = asyncio.create_task(service.run())
        await server.start()
        gate = Gate(service, server, address or f"{host}:{port}", running, refused)
        self.gates.append(gate)
        return gate

    def who_over(self, store: EtcdStore) -> Any:
        async def who(context: Any) -> tuple[NodeId, NodeAcl, Revision]:
            pem = (context.auth_context().get("x509_pem_cert") or [b""])[0]
            identity = certs.identity_of(pem, [self.authority.pem], CLUSTER, now_s=time.time())
            if identity is None or identity.kind != "node":
                raise Denied("only nodes of this cluster are served", reason="unauthenticated")
            key = keys.acl_node(NodeId(identity.name))
            entry = (await store.read([key])).entries[key]
            if entry is None:
                raise Denied(f"nothing is known of node {identity.name}")
            return NodeId(identity.name), trustcodec.decode(NodeAcl, entry.value), entry.modified

        return who

    def store(
        self,
        name: str,
        role: NodeRole = NodeRole.WORKER,
        voters: Sequence[str] | None = None,
        dialer: Dialer | None = None,
    ) -> GatewayStore:
        addresses = [gate.address for gate in self.gates] if voters is None else voters
        found = GatewayStore(dialer or self.authority.dialer(name, role), addresses, name=name)
        self.stores.append(found)
        return found


@contextlib.asynccontextmanager
async def gate_world(endpoint: str, gates: int = 1, limits: GatewayLimits | None = None) -> AsyncIterator[GateWorld]:
    """Gateways over the etcd at `endpoint`, gone afterwards."""
    world = GateWorld(endpoint, Authority(), EtcdStore([endpoint]))
    try:
        for _ in range(gates):
            await world.gate(limits)
        yield world
    finally:
        for store in world.stores:
            await store.close()
        for gate in world.gates:
            await gate.stop()
        for each in (*world.closing, world.etcd):
            await each.close()


class CompactingGatewayStore(GatewayStore):
    """With what the contract's tests want beside the protocol."""

    def __init__(self, world: GateWorld, name: str) -> None:
        super().__init__(
            world.authority.dialer(name, NodeRole.VOTER), [gate.address for gate in world.gates], name=name
        )
        self._world = world

    async def compact(self, revision: Revision, *, timeout_s: float = 5.0) -> None:
        await self._world.etcd.compact(revision, timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def gateway_store(endpoint: str) -> AsyncIterator[CompactingGatewayStore]:
    """A store through two gateways, as a node of role voter: it may do everything."""
    async with gate_world(endpoint, gates=2) as world:
        name = f"seatless{os.getpid()}-{next(_numbers)}"
        await world.grant(name, NodeRole.VOTER)
        store = CompactingGatewayStore(world, name)
        try:
            yield store
        finally:
            await store.close()
