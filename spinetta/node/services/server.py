# ruff: noqa: D102, N802 - RPCs are named, and told of, in the .proto file
"""The gRPC server of a node: its services put together, with limits, health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spinetta import validate
from spinetta.errors import UserError
from spinetta.node.hub import Hub
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.cancel import Canceller
from spinetta.node.services.errors import answer, stream
from spinetta.node.services.follow import Waiter, Watcher
from spinetta.node.services.logs import Logs
from spinetta.node.services.nodes import Beats, Nodes
from spinetta.node.services.peers import Peers
from spinetta.node.services.query import Query
from spinetta.node.services.submit import Submitter
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc

log = logging.getLogger(__name__)

SERVICES = ("spinetta.v1.Spinetta", "spinetta.v1.Peer")
STOP_GRACE_S = 2.0  # for calls in flight when the daemon stops, then they are cut
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", validate.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", validate.MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", limits.RPCS_MAX),
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not a silent sharing with another node
    ("grpc.keepalive_time_ms", 30_000),  # streams of clients that vanished are ended
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # nodes ping each other every 10 s
    ("grpc.keepalive_permit_without_calls", 1),
)


class Api(rpc.SpinettaServicer):
    """``spinetta.v1.Spinetta``: each call to the part that knows it, its errors to a status."""

    def __init__(self, port: NodePort, hub: Hub, peers: Peers, beats: Beats) -> None:
        self._submitter = Submitter(port)
        self._canceller = Canceller(port)
        self._query = Query(port)
        self._waiter = Waiter(port, hub)
        self._watcher = Watcher(port, hub)
        self._logs = Logs(port, hub, peers)
        self._nodes = Nodes(port, peers, beats)

    async def Submit(self, request: api.SubmitRequest, context: Any) -> api.SubmitResponse:
        return await answer(context, self._submitter.submit(request))

    async def Cancel(self, request: api.CancelRequest, context: Any) -> api.CancelResponse:
        return await answer(context, self._canceller.cancel(request))

    async def Get(self, request: api.GetRequest, context: Any) -> api.GetResponse:
        return await answer(context, self._query.get(request))

    async def List(self, request: api.ListRequest, context: Any) -> api.ListResponse:
        return await answer(context, self._query.list(request))

    async def Watch(self, request: api.WatchRequest, context: Any) -> AsyncIterator[api.WatchResponse]:
        async for response in stream(context, self._watcher.watch(request)):
            yield response

    async def Log(self, request: api.LogRequest, context: Any) -> AsyncIterator[api.LogChunk]:
        async for chunk in stream(context, self._logs.log(request)):
            yield chunk

    async def Wait(self, request: api.WaitRequest, context: Any) -> api.WaitResponse:
        return await answer(context, self._waiter.wait(request, context.time_remaining()))

    async def ListNodes(self, request: api.ListNodesRequest, context: Any) -> api.ListNodesResponse:  # noqa: ARG002
        return await answer(context, self._nodes.list_nodes())

    async def Drain(self, request: api.DrainRequest, context: Any) -> api.DrainResponse:
        await answer(context, self._nodes.drain(request.node, draining=True, metadata=_metadata(context)))
        return api.DrainResponse()

    async def Undrain(self, request: api.UndrainRequest, context: Any) -> api.UndrainResponse:
        await answer(context, self._nodes.drain(request.node, draining=False, metadata=_metadata(context)))
        return api.UndrainResponse()

    async def Leave(self, request: api.LeaveRequest, context: Any) -> AsyncIterator[api.LeaveProgress]:
        async for progress in stream(context, self._nodes.leave(request, _metadata(context))):
            yield progress

    async def DescribeCluster(
        self,
        request: api.DescribeClusterRequest,  # noqa: ARG002
        context: Any,
    ) -> api.DescribeClusterResponse:
        return await answer(context, self._nodes.describe())


class PeerApi(rpc.PeerServicer):
    """``spinetta.v1.Peer``: what nodes ask of each other."""

    def __init__(self, port: NodePort) -> None:
        self._port = port

    async def TakeSeat(self, request: api.TakeSeatRequest, context: Any) -> api.TakeSeatResponse:
        await answer(context, self._port.take_seat(request.member_id, request.initial_cluster, request.cluster_id))
        return api.TakeSeatResponse()

    async def GiveUpSeat(self, request: api.GiveUpSeatRequest, context: Any) -> api.GiveUpSeatResponse:
        await answer(context, self._port.give_up_seat(request.member_id))
        return api.GiveUpSeatResponse()


class ApiServer:
    """A server that has been started. Made by `serve`."""

    def __init__(self, addresses: Sequence[str], hub: Hub, health_servicer: health.aio.HealthServicer) -> None:
        self.addresses = tuple(addresses)
        """Where it listens, HOST:PORT, with the real ports."""
        self.hub = hub
        self._health = health_servicer

    async def set_serving(self, serving: bool) -> None:
        """What the health service says."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, status)


@asynccontextmanager
async def serve(port: NodePort, addresses: Sequence[str], *, hub: Hub | None = None) -> AsyncIterator[ApiServer]:
    """Serve the API on these addresses (HOST:PORT; port 0: any free one) for as long as the context lasts.

    Raises:
        UserError: an address cannot be had, for example because its port is in use.
    """
    hub = hub or Hub(port.store)
    peers = Peers(port.store)
    beats = Beats(port)
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=limits.RPCS_MAX)
    rpc.add_SpinettaServicer_to_server(Api(port, hub, peers, beats), server)
    rpc.add_PeerServicer_to_server(PeerApi(port), server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    bound = [_bind(server, address) for address in addresses]
    api_server = ApiServer(bound, hub, health_servicer)
    of_body: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(hub.run(), name="hub"), group.create_task(beats.run(), name="beats")]
            await server.start()
            await api_server.set_serving(True)
            try:
                yield api_server
            except BaseException as e:
                of_body = e
                raise
            finally:
                hub.close()  # streams and waiters end at once, and their clients ask another node
                await server.stop(STOP_GRACE_S)
                for task in running:
                    task.cancel()
    except BaseExceptionGroup as several:
        if of_body is not None and of_body in several.exceptions:
            raise of_body from None  # the caller's own error, not one of ours
        raise
    finally:
        await peers.close()


def _bind(server: grpc.aio.Server, address: str) -> str:
    host, colon, _ = address.rpartition(":")
    if not colon or not host:
        raise UserError(f"not an address: {address!r}", field="address", hint="HOST:PORT")
    try:
        number = server.add_insecure_port(address)
    except RuntimeError as e:
        raise UserError(
            f"cannot listen on {address}",
            field="address",
            hint="another program uses this port, or this machine does not have the address",
            reason="address-in-use",
        ) from e
    return f"{host}:{number}"


def _metadata(context: Any) -> dict[str, object]:
    return dict(context.invocation_metadata() or ())
