"""Real TLS servers in this process that answer as they are told, and the certificates for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from spinetta.access import NodeRole
from spinetta.client.credentials import Stored, save
from spinetta.trust import certificates
from spinetta.trust.credentials import UserCredentials
from spinetta.trust.dial import server_credentials
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import trust_pb2 as trust
from spinetta.v1.api_pb2_grpc import SpinettaServicer, add_SpinettaServicer_to_server
from spinetta.v1.trust_pb2_grpc import (
    EnrollServicer,
    TrustServicer,
    add_EnrollServicer_to_server,
    add_TrustServicer_to_server,
)

CLUSTER = "00112233445566ff"
HOUR_S = 3600.0
Answer = Callable[[Any, Any], Awaitable[Any]]


@dataclass
class World:
    """A cluster's authority, and whoever it certifies."""

    cluster: str = CLUSTER
    now_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.authority = certificates.create_authority("cluster", self.cluster, now_s=self.now_s - HOUR_S)

    @property
    def ca_pem(self) -> bytes:
        return self.authority.certificate_pem

    @property
    def ca_hash(self) -> bytes:
        return certificates.authority_hash(self.ca_pem)

    def node(self, name: str, role: NodeRole = NodeRole.VOTER, *, since_s: float = 0.0, life_s: float = HOUR_S) -> Any:
        """What a node shows: authorities, certificate and key. `since_s`: from when on, relative to now."""
        key = certificates.new_key()
        pem = certificates.issue_node(
            self.authority, certificates.csr(key, name), cluster=self.cluster, name=name, role=role,
            now_s=self.now_s + since_s, lifetime_s=life_s,
        )  # fmt: skip
        return self.ca_pem, pem, certificates.key_pem(key)

    def certify_user(self, name: str, csr: bytes, *, since_s: float = 0.0, life_s: float = HOUR_S) -> bytes:
        return certificates.issue_user(
            self.authority, csr, cluster=self.cluster, name=name, now_s=self.now_s + since_s, lifetime_s=life_s
        )

    def user(self, name: str = "ann", *, since_s: float = 0.0, life_s: float = HOUR_S) -> UserCredentials:
        key = certificates.new_key()
        pem = self.certify_user(name, certificates.csr(key, name), since_s=since_s, life_s=life_s)
        return UserCredentials.create(self.ca_pem, pem, certificates.key_pem(key))

    def user_file(self, path: Path, name: str = "ann", *nodes: str, **times: float) -> Path:
        own = self.user(name, **times)
        save(path, Stored(own.ca_pem, own, nodes))
        return path

    def authorities(self, *voters: str) -> trust.GetAuthoritiesResponse:
        return trust.GetAuthoritiesResponse(
            cluster=self.cluster, ca_bundle=self.ca_pem, voters=voters, wall_ms=int(time.time() * 1000), node="n1"
        )


_Services: Any = type("_Services", (SpinettaServicer, TrustServicer, EnrollServicer), {})


class Stand(_Services):  # type: ignore[misc] # only what a test needs is there, the rest is refused as not implemented
    """A node that answers as it is told, and remembers what it was asked, and by whom."""

    def __init__(self, **answers: Any) -> None:
        self.asked: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.callers: list[bytes] = []
        for name, answer in answers.items():
            setattr(self, name, self._remembering(name, answer))

    def _remembering(self, name: str, answer: Any) -> Any:
        if name in ("Watch", "Log", "Leave"):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                self._note(name, context)
                async for item in answer(request, context):
                    yield item

            return stream

        async def one(request: Any, context: Any) -> Any:
            self._note(name, context)
            return await answer(request, context) if callable(answer) else answer

        return one

    def _note(self, name: str, context: Any) -> None:
        self.asked.append(name)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.callers.append((context.auth_context().get("x509_pem_cert") or [b""])[0])


@contextlib.asynccontextmanager
async def serving(stand: Stand, pems: Any | None) -> AsyncIterator[str]:
    """Serve with these PEMs (or a function that gives them), or in plain text."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_SpinettaServicer_to_server(stand, server)
    add_TrustServicer_to_server(stand, server)
    add_EnrollServicer_to_server(stand, server)
    if pems is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        get = pems if callable(pems) else lambda: pems
        port = server.add_secure_port("127.0.0.1:0", server_credentials(get))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def failing(code: grpc.StatusCode, reason: str, *addresses: str, message: str = "no") -> Answer:
    """Refuses as nodes do."""

    async def answer(_: Any, context: Any) -> Any:
        detail = api.ErrorDetail(reason=reason, message=message, addresses=addresses)
        await context.abort(code, message, (("spinetta-error-bin", detail.SerializeToString()),))

    return answer
