"""How many calls may be open at once, told before a byte of their requests is read.

gRPC hands over a call when its request has arrived. Whoever sends it slowly, or not at all, holds one of the server's
calls until then, and memory for as much as has come. So on a secured node each method is served as if its request were
a stream: then we are called first, and read it when the caller has been given a place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from spinetta.errors import Busy, UserError
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.callers import certificate, peer_address
from spinetta.node.services.errors import refuse
from spinetta.node.services.throttle import Throttle
from spinetta.trust import certificates


class Gate(grpc.aio.ServerInterceptor):
    """Gives each call a place, by whom its certificate names; `keep` tells when a bearer token has named somebody."""

    def __init__(self, port: NodePort, throttle: Throttle) -> None:
        self._port = port
        self._throttle = throttle
        self._wrapped: dict[str, tuple[Any, Any]] = {}
        self._guests: dict[int, ExitStack] = {}  # places by the id of the call's context

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, with a place before it; None: there is no such method."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(handler))
        wrapped: grpc.RpcMethodHandler[Any, Any] = known[1]
        return wrapped

    def known(self, context: Any) -> None:
        """One without a certificate has turned out to be somebody: its place is no longer a guest's."""
        place = self._guests.pop(id(context), None)
        if place is not None:
            place.close()

    def _wrap(self, handler: Any) -> Any:
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._answering_many(handler), **coders)
        return grpc.stream_unary_rpc_method_handler(self._answering(handler), **coders)

    def _answering(self, handler: Any) -> Any:
        async def answer(requests: AsyncIterator[Any], context: Any) -> Any:
            with ExitStack() as place:
                await self._enter(context, place)
                if handler.request_streaming:
                    return await handler.stream_unary(requests, context)
                return await handler.unary_unary(await self._request(context), context)

        return answer

    def _answering_many(self, handler: Any) -> Any:
        async def answer(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            with ExitStack() as place:
                await self._enter(context, place)
                if handler.request_streaming:
                    items = handler.stream_stream(requests, context)
                else:
                    items = handler.unary_stream(await self._request(context), context)
                if isinstance(items, Awaitable):  # it writes to the context itself
                    await items
                    return
                try:
                    async for item in items:
                        yield item
                finally:
                    await items.aclose()

        return answer

    async def _enter(self, context: Any, place: ExitStack) -> None:
        try:
            named = self._named(context)
            if named:
                place.enter_context(self._throttle.place(f"open {named}", named, limits.CALLS_OPEN_PER_CALLER_MAX))
                return
            peer = peer_address(context)
            guest = place.enter_context(ExitStack())
            guest.enter_context(self._throttle.place(f"guest {peer}", f"newcomers at {peer}", limits.GUEST_OPEN_MAX))
            guest.enter_context(self._throttle.place("guests", "newcomers", limits.GUESTS_OPEN_MAX))
            self._guests[id(context)] = guest
            place.callback(self._guests.pop, id(context), None)
        except Busy as error:
            await refuse(context, error)

    def _named(self, context: Any) -> str:
        credentials = self._port.credentials
        pem = certificate(context)
        if credentials is None or not pem:
            return ""
        now_s = self._port.wall_ms() / 1000
        identity = certificates.identity_of(pem, (credentials.ca_pem,), credentials.cluster, now_s=now_s)
        return f"{identity.kind} {identity.name}" if identity is not None else ""

    async def _request(self, context: Any) -> Any:
        try:
            async with asyncio.timeout(limits.REQUEST_S):
                # Not by the iterator: leaving one halfway costs more than all the rest of this.
                request = await context.read()
            if request is not grpc.aio.EOF:
                return request
            error = UserError("the call has no request", field="request")
        except DecodeError:
            error = UserError("this is no request of this kind", field="request", hint="see the .proto files")
        except TimeoutError:
            error = Busy(f"the request has not arrived within {limits.REQUEST_S:g} s", retry_after_s=1.0)
        return await refuse(context, error)
