"""A secured cluster for tests: real etcd, real mutual TLS, nodes in this process that are founded and joined as they
would be by hand. Plain etcd, as what is tested is the API."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spinetta import __version__, keys, trustcodec
from spinetta.access import Policy
from spinetta.errors import OutcomeUnknown
from spinetta.model import NodeId
from spinetta.node import founding
from spinetta.node.keyring import Keyring
from spinetta.node.services import trust
from spinetta.node.services.server import ApiServer, serve
from spinetta.node.services.throttle import Throttle
from spinetta.node.services.tokendesk import TokenDesk
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from spinetta.trust import certificates, sealing
from spinetta.trust.credentials import EtcdPems, NodeCredentials, UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.txn import Result, Txn
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from tests.contract.api_world import Etcd, HandNode, announce, put

if TYPE_CHECKING:
    from spinetta.v1.trust_pb2_grpc import EnrollAsyncStub, TrustAsyncStub

T = TypeVar("T")


class Meddling(EtcdStore):
    """Real etcd, with something that happens before a commit, or an answer that is lost after it."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__(endpoints)
        self.before: list[Callable[[], Awaitable[Any]]] = []  # each before one commit
        self.lost = 0  # answers
        self.undone = 0  # commits that are not made, of which that is not known

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        if self.before:
            await self.before.pop(0)()
        if self.undone:
            self.undone -= 1
            raise OutcomeUnknown("not made")
        result = await super().commit(txn, timeout_s=timeout_s)
        if self.lost:
            self.lost -= 1
            raise OutcomeUnknown("made")
        return result


class Newcomer:
    """A machine with keys that wants to be a node."""

    def __init__(self, name: str, address: str = "127.0.0.1:7777") -> None:
        self.name = name
        self.address = address
        self.key, self.etcd_key = certificates.new_key(), certificates.new_key()
        self.private = sealing.new_sealing_key()

    @property
    def key_hash(self) -> bytes:
        """What an administrator compares."""
        return certificates.csr_key_hash(certificates.csr(self.key, self.name))

    def request(self, token: str, **changes: Any) -> pb.JoinRequest:
        fields: dict[str, Any] = {
            "token": token,
            "name": self.name,
            "address": self.address,
            "csr": certificates.csr(self.key, self.name),
            "etcd_csr": certificates.csr(self.etcd_key, self.name),
            "sealing_key": sealing.public_of(self.private),
            "wall_ms": time.time_ns() // 1_000_000,
            "version": __version__,
        }
        return pb.JoinRequest(**(fields | changes))


class Voter:
    """A node under test, and calls to it by whoever."""

    def __init__(self, port: HandNode, keyring: Keyring, server: ApiServer, stack: contextlib.AsyncExitStack) -> None:
        self.port = port
        self.acl = server.desk.callers.acl
        self.keyring = keyring
        self.address = server.addresses[0]
        self._stack = stack

    @property
    def store(self) -> Store:
        return self.port.store

    @property
    def credentials(self) -> NodeCredentials:
        assert self.port.credentials is not None
        return self.port.credentials

    async def enroll(self) -> EnrollAsyncStub:
        """The door, as a guest."""
        dialer = Dialer.guest(self.credentials.ca_pem)
        return EnrollStub(await self._stack.enter_async_context(dialer.channel(self.address, VOTER)))

    async def trust(self, who: UserCredentials | NodeCredentials) -> TrustAsyncStub:
        """As somebody."""
        pems = who.pems if isinstance(who, NodeCredentials) else lambda: (who.ca_pem, who.cert_pem, who.key_pem)
        channel = Dialer.secured(pems).channel(self.address, VOTER)
        return TrustStub(await self._stack.enter_async_context(channel))

    async def record(self, kind: type[T], key: str) -> T | None:
        entry = (await self.store.read([key])).entries[key]
        return trustcodec.decode(kind, entry.value) if entry is not None else None


class World:
    """A cluster with one voter."""

    def __init__(self, voter: Voter, admin: UserCredentials, directory: Path, store: Meddling) -> None:
        self.meddling = store
        self.voter = voter
        self.admin_credentials = admin
        self.directory = directory
        self._admin: TrustAsyncStub | None = None

    async def admin(self) -> TrustAsyncStub:
        if self._admin is None:
            self._admin = await self.voter.trust(self.admin_credentials)
        return self._admin

    async def token(self, role: Any = 2, **fields: Any) -> str:
        """A new token: of a worker unless told otherwise."""
        admin = await self.admin()
        return (await admin.CreateToken(pb.CreateTokenRequest(role=role, **fields))).token

    async def join(self, newcomer: Newcomer, token: str, **changes: Any) -> pb.JoinResponse:
        return await (await self.voter.enroll()).Join(newcomer.request(token, **changes))

    async def joined(self, name: str, *, role: int = 2, **token_fields: Any) -> NodeCredentials:
        """A new node's credentials."""
        newcomer = Newcomer(name)
        answer = await self.join(newcomer, await self.token(role, **token_fields))
        assert answer.decision == pb.JoinResponse.APPROVED
        return saved(self.directory / name, newcomer, answer.certificates)


def saved(directory: Path, newcomer: Newcomer, made: pb.Certificates) -> NodeCredentials:
    etcd = None
    if made.etcd_certificate:
        etcd = EtcdPems(made.etcd_ca_bundle, made.etcd_certificate, certificates.key_pem(newcomer.etcd_key))
    return NodeCredentials.create(
        directory / "trust",
        ca_pem=made.ca_bundle,
        node_pem=made.certificate,
        node_key_pem=certificates.key_pem(newcomer.key),
        sealing_private=newcomer.private,
        etcd=etcd,
    )


@asynccontextmanager
async def voter_node(
    store: Store, directory: Path, credentials: NodeCredentials, *, is_patient: bool = True
) -> AsyncIterator[Voter]:
    """A voter's server. `is_patient`: nothing is too often."""
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - a test
    port = HandNode(credentials.name, store, directory)
    port.version = __version__
    port.credentials = credentials
    port.dialer = Dialer.secured(credentials.pems)
    keyring = Keyring(store, credentials)
    clock = (lambda: time.monotonic() * 1e6) if is_patient else time.monotonic
    checker = TokenDesk(clock)

    async with (
        contextlib.AsyncExitStack() as stack,
        serve(
            port,
            ["127.0.0.1:0"],
            throttle=Throttle(clock),
            extra=[lambda server, desk: trust.register(server, port, desk, keyring, checker)],
        ) as server,
    ):
        port.voters = (server.addresses[0],)
        yield Voter(port, keyring, server, stack)


@asynccontextmanager
async def world(
    etcd: Etcd, directory: Path, *, policy: Policy | None = None, is_patient: bool = True
) -> AsyncIterator[World]:
    """A founded cluster with its first node, n1."""
    store = Meddling([etcd.endpoint])
    try:
        credentials = await founding.found_cluster(directory / "trust", "n1", "127.0.0.1:7220", policy=policy)
        assert await founding.commit(store, credentials)
        admin = UserCredentials.from_file(directory / founding.ADMIN_FILE)
        async with voter_node(store, directory / "n1", credentials, is_patient=is_patient) as voter:
            await announce(store, "n1", voter.address)
            yield World(voter, admin, directory, store)
    finally:
        await store.close()


async def report(store: Store, name: str, address: str, **changes: Any) -> None:
    """What a daemon says in its node's record."""
    await announce(store, name, address, **changes)


async def set_record(store: Store, key: str, kind: type[T], **changes: Any) -> None:
    """Change a record as nobody may."""
    entry = (await store.read([key])).entries[key]
    assert entry is not None
    await put(store, key, trustcodec.encode(replace(trustcodec.decode(kind, entry.value), **changes)))  # type: ignore[type-var]


def acl_key(name: str) -> str:
    return keys.acl_node(NodeId(name))
