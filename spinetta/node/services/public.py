# ruff: noqa: D102, N802 - RPCs are named, and told of, in the .proto file
"""Health and reflection: the standard services, with our limits. Health is for all, reflection for those we know."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection

from spinetta.errors import UserError
from spinetta.node.hub import closing
from spinetta.node.services.desk import Asked, Desk
from spinetta.rights import Call


class Health(health.aio.HealthServicer):  # type: ignore[misc] # has no types
    """``grpc.health.v1.Health``."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        check = super().Check
        return await self._desk.answer(context, Call.HEALTH, lambda _: check(request, context))

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:  # noqa: ARG002 - gRPC's signature
        async def all_of_them(_: Asked) -> health_pb2.HealthListResponse:
            known = {name: health_pb2.HealthCheckResponse(status=s) for name, s in self._server_status.items()}
            return health_pb2.HealthListResponse(statuses=known)

        return await self._desk.answer(context, Call.HEALTH, all_of_them)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        watch = super().Watch
        await self._desk.answer(context, Call.HEALTH, lambda _: watch(request, context), is_long=True)


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc] # has no types
    """``grpc.reflection.v1alpha.ServerReflection``."""

    def __init__(self, desk: Desk, services: Sequence[str]) -> None:
        super().__init__(services)
        self._desk = desk

    async def ServerReflectionInfo(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        tell = super().ServerReflectionInfo
        read = _read(requests)
        async with closing(self._desk.stream(context, Call.REFLECTION, lambda _: tell(read, context))) as answers:
            async for each in answers:
                yield each


async def _read(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    try:
        async for request in requests:
            yield request
    except DecodeError:
        raise UserError("the request cannot be read", field="request", reason="invalid") from None
