"""A secured voter with everything that it serves, over real TLS and a real etcd, and one of each kind of caller."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from spinetta import __version__, keys, payload, trustcodec
from spinetta.access import MEMBERS, LabelKey, SecretRecord
from spinetta.model import NodeId
from spinetta.node import founding
from spinetta.node.secured import Hooks, Secured
from spinetta.node.services.server import serve
from spinetta.node.services.throttle import Throttle
from spinetta.node.vault import Vault
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import KeyValue, Store
from spinetta.trust import certificates, guest
from spinetta.trust.credentials import UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.trust.envelope import LabelPublicKey, seal_envelope
from spinetta.v1 import api_pb2, api_pb2_grpc, gateway_pb2, trust_pb2, trust_pb2_grpc
from spinetta.v1 import record_pb2 as records
from tests.contract.api_world import Etcd, HandNode, announce, eventually, put, spec
from tests.contract.trust_world import Newcomer

Pems = tuple[bytes, bytes, bytes]

GUEST, VIEWER, USER, OPERATOR, ADMIN, WORKER, SEAT = "guest", "viewer", "user", "operator", "admin", "worker", "voter"
WHO = (GUEST, VIEWER, USER, OPERATOR, ADMIN, WORKER, SEAT)
NAMES = {VIEWER: "vic", USER: "ann", OPERATOR: "olga", ADMIN: "root", WORKER: "w1", SEAT: "v2"}
LABEL = "red"
_ROLES = {
    VIEWER: records.USER_ROLE_VIEWER,
    USER: records.USER_ROLE_USER,
    OPERATOR: records.USER_ROLE_OPERATOR,
    ADMIN: records.USER_ROLE_ADMIN,
}


# --- every method ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One RPC, as its service's description has it."""

    path: str
    request: type[Message]
    streams_in: bool
    streams_out: bool

    @property
    def name(self) -> str:
        """``Service.Method``."""
        service, _, method = self.path.removeprefix("/").rpartition("/")
        return f"{service.rpartition('.')[2]}.{method}"


def _methods() -> dict[str, Method]:
    services: Iterable[ServiceDescriptor] = (
        service
        for module in (api_pb2, trust_pb2, gateway_pb2, health_pb2, reflection_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    )
    found = (
        Method(
            f"/{service.full_name}/{m.name}",
            message_factory.GetMessageClass(m.input_type),
            m.client_streaming,
            m.server_streaming,
        )
        for service in services
        for m in service.methods
    )
    return {m.name: m for m in found}


METHODS: Mapping[str, Method] = _methods()


async def call(channel: grpc.aio.Channel, method: Method, body: bytes, timeout_s: float = 10.0) -> grpc.StatusCode:
    """Any bytes to any method; of a stream its first message is awaited."""
    try:
        if method.streams_out:
            make = channel.stream_stream if method.streams_in else channel.unary_stream
            stream: Any = make(method.path, _as_is, _as_is)(
                iter([body]) if method.streams_in else body,  # type: ignore[arg-type]
                timeout=timeout_s,
            )
            try:
                await stream.read()
            finally:
                stream.cancel()
            return grpc.StatusCode.OK
        await channel.unary_unary(method.path, _as_is, _as_is)(body, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def _as_is(data: bytes) -> bytes:
    return data


# --- the voter and its callers ---------------------------------------------------------------------------------------


@dataclass
class Fortress:
    """See the module."""

    port: HandNode
    address: str
    store: Store
    pems: Mapping[str, Pems]
    tasks: Mapping[str, str]  # by owner

    def channel(self, who: str) -> grpc.aio.Channel:
        """To the voter, as one of `WHO`."""
        return Dialer.secured(lambda: self.pems[who]).channel(self.address, VOTER)

    async def state(self) -> dict[str, KeyValue]:
        """All that is stored."""
        found: dict[str, KeyValue] = {}
        after = ""
        while True:
            page = await self.store.list("", after=after, limit=500)
            found |= {entry.key: entry for entry in page.entries}
            if not page.more:
                return found
            after = page.entries[-1].key

    async def revision(self) -> int:
        """Of the store."""
        return (await self.store.read([keys.GENERATION])).revision


@asynccontextmanager
async def fortress(etcd: Etcd, directory: Path, *, throttle: Throttle | None = None) -> AsyncIterator[Fortress]:
    """Founded, with everybody in it and two tasks and secrets, ann's and bob's; nothing changes by itself any more.

    `throttle`: None: one that lets everything through.
    """
    store = EtcdStore([etcd.endpoint])
    credentials = await founding.found_cluster(directory / "trust", "n1", "127.0.0.1:7220")
    assert await founding.commit(store, credentials)
    port = HandNode("n1", store, directory)
    port.version = __version__
    port.credentials = credentials
    port.dialer = Dialer.secured(credentials.pems)
    labels = frozenset({MEMBERS})
    hooks = Hooks(_nothing, _nothing, lambda: True, lambda: False, lambda: labels)
    vault = Vault(store, NodeId("n1"), lambda: credentials.sealing_private)
    secured = Secured(port, credentials, store, vault, hooks, "127.0.0.1:7220")
    throttle = throttle or Throttle(lambda: time.monotonic() * 1e6)
    try:
        async with (
            serve(
                port,
                ["127.0.0.1:0"],
                acl=secured.acl,
                tokens=secured.tokens,
                throttle=throttle,
                extra=secured.services,
            ) as server,
            asyncio.TaskGroup() as group,
        ):
            running = group.create_task(secured.run())
            address = server.addresses[0]
            port.voters = (address,)
            await announce(store, "n1", address)
            admin = UserCredentials.from_file(directory / founding.ADMIN_FILE)
            dialer = Dialer.secured(lambda: (admin.ca_pem, admin.cert_pem, admin.key_pem))
            async with dialer.channel(address, VOTER) as channel:
                yield await _filled(port, address, store, channel)
            running.cancel()
    finally:
        await store.close()


async def _nothing(*_: Any) -> None:
    pass


async def _filled(port: HandNode, address: str, store: Store, channel: grpc.aio.Channel) -> Fortress:
    assert port.credentials is not None
    ca = port.credentials.ca_pem
    trust, api = trust_pb2_grpc.TrustStub(channel), api_pb2_grpc.SpinettaStub(channel)
    guest_key, guest_certificate = guest.guest_pair()
    pems: dict[str, Pems] = {GUEST: (ca, guest_certificate, guest_key)}
    async with Dialer.guest(ca).channel(address, VOTER) as door:
        enroll = trust_pb2_grpc.EnrollStub(door)
        for who, role in _ROLES.items():
            user = records.UserAcl(name=NAMES[who], role=role, projects=["genomes"] if who == USER else [])
            await trust.SetUser(trust_pb2.SetUserRequest(user=user, create=True))
            made = await trust.CreateToken(
                trust_pb2.CreateTokenRequest(role=records.TOKEN_ROLE_CLIENT, user=NAMES[who])
            )
            key = certificates.new_key()
            request = trust_pb2.LoginRequest(
                token=made.token, csr=certificates.csr(key, "x"), wall_ms=time.time_ns() // 1_000_000
            )
            got = (await enroll.Login(request)).certificates
            pems[who] = (got.ca_bundle, got.certificate, certificates.key_pem(key))
        nodes = {}
        for who, token_role in ((WORKER, records.TOKEN_ROLE_WORKER), (SEAT, records.TOKEN_ROLE_VOTER)):
            made = await trust.CreateToken(trust_pb2.CreateTokenRequest(role=token_role))
            new = nodes[who] = Newcomer(NAMES[who], "127.0.0.1:1")
            got = (await enroll.Join(new.request(made.token))).certificates
            pems[who] = (got.ca_bundle, got.certificate, certificates.key_pem(new.key))
            await announce(store, NAMES[who], "127.0.0.1:1")

    async def members() -> LabelKey | None:
        entry = (await store.read([keys.label(MEMBERS)])).entries[keys.label(MEMBERS)]
        known = trustcodec.decode(LabelKey, entry.value) if entry is not None else None
        return known if known is not None and len(known.latest.wraps) == 3 else None

    # Then the keeper of labels rests, and what changes is the caller's doing.
    key = await eventually(members, within_s=40, what="all nodes have the key of what is for members")
    public = LabelPublicKey(MEMBERS, key.latest.number, key.latest.public_key)
    tasks = {}
    for owner in ("ann", "bob"):
        submitted = await api.Submit(api_pb2.SubmitRequest(tasks=[spec(owner=owner, name=f"of {owner}")]))
        tasks[owner] = submitted.tasks[0].id
        sealed = seal_envelope(b"s3cret", [public], payload.secret_purpose(owner, "db", (MEMBERS,)))
        await put(store, keys.secret(owner, "db"), trustcodec.encode(SecretRecord(owner, "db", (MEMBERS,), sealed)))
    return Fortress(port, address, store, pems, tasks)


class Stage:
    """A loop that many short scenarios share, with a fortress that stands meanwhile."""

    def __init__(self, etcd: Etcd, directory: Path) -> None:
        self._etcd, self._directory = etcd, directory
        self._stack = contextlib.ExitStack()
        self._done = asyncio.Event()

    def __enter__(self) -> Self:
        self.runner = self._stack.enter_context(asyncio.Runner())
        ready: asyncio.Future[Fortress] = self.runner.get_loop().create_future()

        async def hold() -> None:
            async with fortress(self._etcd, self._directory) as made:
                ready.set_result(made)
                await self._done.wait()

        async def start() -> None:
            self._holding = asyncio.create_task(hold())
            await asyncio.wait((self._holding, ready), return_when=asyncio.FIRST_COMPLETED, timeout=60)
            if self._holding.done():
                self._holding.result()

        self.runner.run(start())
        self.fortress = ready.result()
        return self

    def run(self, scenario: Callable[[Fortress], Any], limit_s: float = 60.0) -> Any:
        """Run it."""

        async def limited() -> Any:
            async with asyncio.timeout(limit_s):
                return await scenario(self.fortress)

        return self.runner.run(limited())

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._done.set()
            async with asyncio.timeout(30):
                await self._holding

        try:
            self.runner.run(stop())
        finally:
            self._stack.close()
