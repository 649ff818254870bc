"""The first contact at a hostile worker: it may not bring authorities of its own."""

from __future__ import annotations

import asyncio
import random
import time

import grpc.aio

from spinetta.access import NodeRole
from spinetta.trust import certificates as c
from spinetta.trust import dial
from spinetta.trust.contact import Met, meet
from spinetta.v1 import trust_pb2 as trust
from spinetta.v1 import trust_pb2_grpc
from tests.unit.trust_world import CLUSTER, World

WORLD, HOSTILE = World(time.time()), World(time.time())


def test_a_worker_cannot_add_an_authority() -> None:
    pair = WORLD.node("w1", NodeRole.WORKER)

    class Enroll(trust_pb2_grpc.EnrollServicer):
        async def Join(self, *_: object) -> trust.JoinResponse:  # noqa: N802
            raise AssertionError("the token is shown to a worker")

        async def Login(self, *_: object) -> trust.LoginResponse:  # noqa: N802
            raise AssertionError("the token is shown to a worker")

        async def GetAuthorities(self, *_: object) -> trust.GetAuthoritiesResponse:  # noqa: N802
            return trust.GetAuthoritiesResponse(
                cluster=CLUSTER,
                ca_bundle=WORLD.ca + HOSTILE.ca,
                voters=["127.9.9.9:7220"],
                wall_ms=int(time.time() * 1000),
                node="w1",
            )

    async def story() -> Met:
        server = grpc.aio.server()
        trust_pb2_grpc.add_EnrollServicer_to_server(Enroll(), server)
        host = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"
        port = server.add_secure_port(f"{host}:0", dial.server_credentials(lambda: (WORLD.ca, *pair)))
        await server.start()
        try:
            async with asyncio.timeout(20):
                return await meet([f"{host}:{port}"], c.authority_hash(WORLD.ca))
        finally:
            await server.stop(0)

    assert asyncio.run(story()).ca_bundle == WORLD.ca
