"""The gateway on a gRPC server: its calls, and what their errors are for the caller."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from spinetta import gatewaycodec as gc
from spinetta.errors import Compacted, Denied, InvariantViolation, SpinettaError, StoreUnavailable, UserError
from spinetta.node.gateway.service import HANDLERS, Unreadable
from spinetta.node.gateway.service import GatewayService as GatewayService
from spinetta.node.services.errors import Context

log = logging.getLogger(__name__)

CODES = {
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "denied": grpc.StatusCode.PERMISSION_DENIED,
}


def add_gateway(server: grpc.aio.Server, service: GatewayService) -> None:
    """Serve the gateway on this server, before it starts."""
    handlers: dict[str, Any] = {}
    for method in HANDLERS:
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            _unary(service, method), _reader(method), method.encode_response
        )
    handlers[gc.WATCH.name] = grpc.unary_stream_rpc_method_handler(
        _stream(service), _reader(gc.WATCH), gc.WATCH.encode_response
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(gc.SERVICE, handlers),))


def _reader(method: gc.Method) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return method.request.FromString(data)
        except DecodeError:
            return Unreadable()

    return read


def _unary(service: GatewayService, method: gc.Method) -> Callable[[Any, Any], Awaitable[Any]]:
    async def run(request: Any, context: Any) -> Any:
        try:
            return await service.answer(method, request, context)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, the caller gets a status
            await _end(context, error)

    return run


def _stream(service: GatewayService) -> Callable[[Any, Any], AsyncIterator[bytes]]:
    async def run(request: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            if isinstance(request, Unreadable):
                raise InvariantViolation("the request cannot be read")
            caller = await service.called(context)
            async for message in service.watch(context, caller, request):
                yield message
        except Exception as error:  # noqa: BLE001 - the same
            await _end(context, error)

    return run


async def _end(context: Context, error: Exception) -> NoReturn:
    if not isinstance(error, SpinettaError):
        log.error("a call to the gateway failed in a way nobody thought of", exc_info=error)
        error = StoreUnavailable("the voter met an error nobody thought of")
        # Whether it was carried out is not known: no trailer, so that a write counts as unknown.
        await context.abort(grpc.StatusCode.INTERNAL, str(error))
    match error:
        case UserError():
            code = CODES.get(error.reason, grpc.StatusCode.INVALID_ARGUMENT)
            if isinstance(error, Denied) and error.reason not in CODES:
                code = grpc.StatusCode.PERMISSION_DENIED
        case StoreUnavailable():
            code = grpc.StatusCode.UNAVAILABLE
        case Compacted():
            code = grpc.StatusCode.OUT_OF_RANGE
        case InvariantViolation():
            code = grpc.StatusCode.INVALID_ARGUMENT
        case _:
            code = grpc.StatusCode.ABORTED
    message = gc.error_to_pb(error)
    trailer = ((gc.ERROR_KEY, message.SerializeToString()),)
    await context.abort(code, message.message or str(error)[: gc.TEXT_CHARS_MAX], trailer)
