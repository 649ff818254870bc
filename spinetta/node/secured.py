"""What a secured cluster adds to a daemon: rights, certificates, the keys of labels, and the gateway for workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio

from spinetta.access import Limits, NodeAcl, NodeRole
from spinetta.errors import Denied, StoreUnavailable
from spinetta.model import NodeId, Revision
from spinetta.node.acl import AclView
from spinetta.node.gateway.server import GatewayService, add_gateway
from spinetta.node.keyring import Keyring
from spinetta.node.labeldesk import DirectDesk, LabelDesk, RemoteDesk
from spinetta.node.labels import LabelKeeper
from spinetta.node.port import NodePort
from spinetta.node.renewal import Report, TrustKeeper, VoterSource, WorkerSource
from spinetta.node.resealing import Resealer
from spinetta.node.services.authorities import RotationKeeper
from spinetta.node.services.callers import peer_address
from spinetta.node.services.desk import Desk
from spinetta.node.services.enroll import EnrollApi
from spinetta.node.services.server import Register
from spinetta.node.services.trust import SERVICES, TrustApi
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.node.vault import Vault
from spinetta.rights import Call, CallerKind
from spinetta.store.protocol import Store
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.trust.oidc import OidcVerifier
from spinetta.v1.trust_pb2_grpc import add_EnrollServicer_to_server, add_TrustServicer_to_server

log = logging.getLogger("spinetta.node")

ROTATE_EVERY_S = 2.0  # between the leader's looks at an exchange of authorities


@dataclass(frozen=True, slots=True)
class Hooks:
    """What this part does to the rest of the daemon.

    Attributes:
        report: says in the node's record how its certificates stand.
        restart_etcd: this node's member, if it has one.
        is_seated: whether it has.
        is_leading: whether this node holds the office.
        clearances: the labels that count for this node now.
    """

    report: Callable[[Report], Awaitable[None]]
    restart_etcd: Callable[[], Awaitable[None]]
    is_seated: Callable[[], bool]
    is_leading: Callable[[], bool]
    clearances: Callable[[], frozenset[str]]


class Secured:
    """Made by the daemon of a node that has credentials; `run` must be running."""

    def __init__(
        self, port: NodePort, credentials: NodeCredentials, store: Store, vault: Vault, hooks: Hooks, address: str
    ) -> None:
        self._port = port
        self._hooks = hooks
        self._desk: Desk | None = None
        name = NodeId(credentials.name)
        is_voter = credentials.role is NodeRole.VOTER
        self.acl = AclView(store)
        self.tokens = OidcVerifier()
        self.keyring = Keyring(store, credentials) if is_voter else None
        self._rotation = RotationKeeper(store, port.wall_ms) if is_voter else None
        self._gateway = (
            GatewayService(
                store, self._who, membership=port.membership, serves=hooks.is_seated, refused=self._write_refusal
            )
            if is_voter
            else None
        )
        self._certificates = TrustKeeper(
            credentials,
            VoterSource(store, self.keyring, name, address)
            if self.keyring is not None
            else WorkerSource(port.dialer, port.voter_addresses),
            report=hooks.report,
            restart_etcd=hooks.restart_etcd if is_voter else None,
            store=store if is_voter else None,
            denied=lambda words: log.error("this node has no place in the cluster any more: %s", words),
        )
        self._link = _VoterLink(port.dialer, port.voter_addresses)
        desk: LabelDesk = DirectDesk(store, name) if is_voter else RemoteDesk(self._link.channel)
        self._labels = LabelKeeper(
            desk, vault, name, credentials.role, hooks.clearances, resealer=Resealer(store) if is_voter else None
        )

    @property
    def services(self) -> Sequence[Register]:
        """What the server offers besides the API."""
        return (self._register,)

    def _register(self, server: grpc.aio.Server, desk: Desk) -> Sequence[str]:
        self._desk = desk
        add_EnrollServicer_to_server(EnrollApi(self._port, desk, self.keyring), server)
        add_TrustServicer_to_server(TrustApi(self._port, desk, self.keyring), server)
        if self._gateway is None:
            return SERVICES
        add_gateway(server, self._gateway)
        return (*SERVICES, "spinetta.v1.Gateway")

    async def run(self) -> None:
        """Keep all of it up until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                if self.keyring is not None:  # a worker may not list them, and reads those of its few callers
                    group.create_task(self.acl.run(), name="rights")
                group.create_task(self._certificates.run(), name="certificates")
                group.create_task(self._labels.run(), name="label keys")
                if self._gateway is not None:
                    group.create_task(self._gateway.run(), name="gateway")
                if self._rotation is not None:
                    group.create_task(self._rotate(self._rotation), name="authorities")
        finally:
            await self._link.close()

    async def _rotate(self, rotation: RotationKeeper) -> None:
        teller = Teller(log)
        while True:
            await asyncio.sleep(ROTATE_EVERY_S)
            if self._hooks.is_leading():
                try:
                    await rotation.step()
                except TROUBLE as e:
                    teller.tell(f"the authorities are not looked at now: {e}")

    async def _who(self, context: Any) -> tuple[NodeId, NodeAcl, Revision]:
        """The node that calls the gateway."""
        if self._desk is None:
            raise StoreUnavailable("this node is not ready")
        throttle, peer = self._desk.throttle, peer_address(context)
        caller = await self._desk.callers.of(context, before_no=partial(throttle.refusal, peer))
        if caller.kind is not CallerKind.NODE:  # nodes have a quota; the others are counted as at the desk
            throttle.call(caller, peer, Limits())
            throttle.denied(caller, peer)
            words = f"{caller.title} is no node: only nodes use the gateway"
            self._port.audit(Call.GATEWAY.value, caller.title, "", f"denied: {words}", 0)
            raise Denied(words)
        name = NodeId(caller.name)
        found = await self.acl.node(name) or await self.acl.node(name, fresh=True)  # approved a moment ago
        if found is None or found[0].revoked:
            raise Denied(f"node {name} has been revoked", reason="unauthenticated")
        return name, *found

    def _write_refusal(self, node: NodeId, call: str, reason: str) -> None:
        self._port.audit(Call.GATEWAY.value, f"node {node}", call, f"denied: {reason}", 0)


class _VoterLink:
    """A worker's connection to some voter, for calls that are made once in a while."""

    def __init__(self, dialer: Dialer, addresses: Callable[[], tuple[str, ...]]) -> None:
        self._dialer = dialer
        self._addresses = addresses
        self._turn = 0
        self._channel: grpc.aio.Channel | None = None

    async def channel(self) -> grpc.aio.Channel:
        """A fresh one each time, to the next voter: certificates and voters change.

        Raises:
            StoreUnavailable: none is known.
        """
        await self.close()
        addresses = self._addresses()
        if not addresses:
            raise StoreUnavailable("this node knows of no voter")
        self._turn += 1
        self._channel = self._dialer.channel(addresses[self._turn % len(addresses)], VOTER)
        return self._channel

    async def close(self) -> None:
        """Let go of it."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
