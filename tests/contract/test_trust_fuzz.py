"""Nonsense to every call of Enroll and Trust, as a guest, a worker and an administrator: each gets a clear status."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from spinetta.access import Policy
from spinetta.trust.dial import VOTER, Dialer
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from tests.contract.api_world import Etcd, etcd, etcd_member, run
from tests.contract.trust_world import Newcomer, World, world

__all__ = ["etcd", "etcd_member"]

CALLS = 25  # of each method by each caller
LAWFUL = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
TEXTS = [
    "",
    "n1",
    "admin",
    "cluster",
    "etcd",
    "../../x",
    "a\x00b",
    "\x1b[31m",
    "ä" * 40,
    "x" * 5000,
    "/",
    "a b",
    "\u202e",
]
NUMBERS = [0, 1, 2, 3, 99, 2**31 - 1]
FLOATS = [0.0, 1.0, 60.0, -1.0, 1e300, float("nan"), float("inf")]


def fill(message: Any, chance: random.Random, depth: int = 0) -> Any:
    """Any of its fields with anything that the types allow."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.3:
            continue
        count = chance.choice([0, 1, 2, 70]) if field.is_repeated else 1
        for _ in range(count if depth < 3 else 0):
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                target = getattr(message, field.name)
                fill(target.add() if field.is_repeated else target, chance, depth + 1)
                continue
            value = one(field, chance)
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


def one(field: FieldDescriptor, chance: random.Random) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return chance.choice(TEXTS)
        case FieldDescriptor.TYPE_BYTES:
            return chance.choice(
                [b"", b"\xff" * 32, chance.randbytes(50), b"-----BEGIN CERTIFICATE-----", b"x" * 70_000]
            )
        case FieldDescriptor.TYPE_BOOL:
            return chance.random() < 0.5
        case FieldDescriptor.TYPE_DOUBLE:
            return chance.choice(FLOATS)
        case _:
            return chance.choice(NUMBERS)


async def call(stub: Any, method: Any, request: Any) -> grpc.StatusCode:
    try:
        await getattr(stub, method.name)(request, timeout=20)
    except grpc.aio.AioRpcError as e:
        return e.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("seed", range(3))
def test_nonsense_gets_a_clear_status(etcd: Etcd, tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        async with world(etcd, tmp_path, policy=Policy(node_certificate_s=60.0)) as w:
            await everything(w, random.Random(seed))

    run(main())


async def everything(w: World, chance: random.Random) -> None:
    worker = await w.joined("n2")
    admin = w.admin_credentials
    callers = {
        "guest": Dialer.guest(w.voter.credentials.ca_pem),
        "worker": Dialer.secured(worker.pems),
        "admin": Dialer.secured(lambda: (admin.ca_pem, admin.cert_pem, admin.key_pem)),
    }
    for who, dialer in callers.items():
        async with dialer.channel(w.voter.address, VOTER) as channel:
            for service, stub in (("Enroll", EnrollStub(channel)), ("Trust", TrustStub(channel))):
                for method in pb.DESCRIPTOR.services_by_name[service].methods:
                    for _ in range(CALLS if who == "admin" or service == "Enroll" else 3):
                        request = fill(getattr(pb, method.input_type.name)(), chance)
                        code = await call(stub, method, request)
                        assert code in LAWFUL, (who, method.name, code, str(request)[:500])
                        if who == "guest" and service == "Trust":
                            assert code is grpc.StatusCode.UNAUTHENTICATED
    # Still there, and in order.
    await w.join(Newcomer("n9"), await w.token())


@pytest.mark.parametrize("which", ["Join", "Login", "Renew"])
def test_one_wrong_field_in_a_right_request(etcd: Etcd, tmp_path: Path, which: str) -> None:
    async def main() -> None:
        async with world(etcd, tmp_path) as w:
            role = records.TOKEN_ROLE_CLIENT if which == "Login" else records.TOKEN_ROLE_VOTER
            token = await w.token(role, uses=1000, user="admin" if which == "Login" else "")
            chance = random.Random(1)
            enroll, trust = await w.voter.enroll(), await w.voter.trust(await w.joined("n2", role=1))
            for i, field in enumerate(list(getattr(pb, f"{which}Request").DESCRIPTOR.fields) * 8):
                right = Newcomer(f"m{i}").request(token)
                if which == "Join":
                    stub: Any = enroll
                    request: Any = right
                elif which == "Login":
                    stub, request = enroll, pb.LoginRequest(token=token, csr=right.csr, wall_ms=right.wall_ms)
                else:
                    stub, request = trust, pb.RenewRequest(csr=right.csr, etcd_csr=right.etcd_csr)
                setattr(request, field.name, one(field, chance))
                method = next(m for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods if m.name == which)
                assert await call(stub, method, request) in LAWFUL, (field.name, getattr(request, field.name))

    run(main())
