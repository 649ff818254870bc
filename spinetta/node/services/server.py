# ruff: noqa: D102, N802 - RPCs are named, and told of, in the .proto file
"""The gRPC server of a node: its services put together, with limits, health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from spinetta import validate
from spinetta.errors import UserError
from spinetta.names import require_loopback
from spinetta.node.acl import AclView
from spinetta.node.health import StoreHealth
from spinetta.node.hub import Hub, closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits, views
from spinetta.node.services.archives import Archives, OwnArchive
from spinetta.node.services.backup import Backups
from spinetta.node.services.callers import Callers, TokenVerifier
from spinetta.node.services.cancel import Canceller
from spinetta.node.services.copying import Copying
from spinetta.node.services.desk import Asked, Desk, short_list
from spinetta.node.services.execute import Execute
from spinetta.node.services.follow import Waiter, Watcher
from spinetta.node.services.images import ImageCalls, Images
from spinetta.node.services.live import LiveUsage, OwnUsage
from spinetta.node.services.logs import Logs
from spinetta.node.services.nodes import Beats, Nodes
from spinetta.node.services.peers import Peers
from spinetta.node.services.public import Health, Reflection
from spinetta.node.services.query import Query
from spinetta.node.services.submit import Submitter
from spinetta.node.services.throttle import Throttle
from spinetta.rights import Call
from spinetta.trust.dial import server_credentials
from spinetta.trust.oidc import OidcVerifier
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc

Shown = TypeVar("Shown", api.GetResponse, api.ListResponse, api.ListArchivedResponse, api.WaitResponse)
log = logging.getLogger(__name__)

SERVICES = ("spinetta.v1.Spinetta", "spinetta.v1.Peer")
NODE_NAME_MAX = 64  # of what a caller calls a node, in the audit log
STOP_GRACE_S = 2.0  # for calls in flight when the daemon stops, then they are cut
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", validate.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", validate.MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", limits.RPCS_MAX),
    ("grpc.max_metadata_size", limits.METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", limits.METADATA_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not a silent sharing with another node
    ("grpc.keepalive_time_ms", 30_000),  # streams of clients that vanished are ended
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # nodes ping each other every 10 s
    ("grpc.keepalive_permit_without_calls", 1),
)


Register = Callable[[grpc.aio.Server, Desk], Sequence[str]]
"""Adds services to a server, and says how they are called; their calls go through the desk."""


class Api(ImageCalls, rpc.SpinettaServicer):
    """``spinetta.v1.Spinetta``: each call to the part that knows it, by way of the desk."""

    def __init__(
        self, port: NodePort, hub: Hub, peers: Peers, beats: Beats, desk: Desk, health: StoreHealth | None = None
    ) -> None:
        self._desk = desk
        self._submitter = Submitter(port, health)
        self._canceller = Canceller(port)
        self._archives = Archives(port, peers)
        self._query = Query(port, LiveUsage(port, peers))
        self._waiter = Waiter(port, hub)
        self._watcher = Watcher(port, hub)
        self._logs = Logs(port, hub, peers)
        self._execute = Execute(port, peers)
        self._copying = Copying(port, peers)
        self._nodes = Nodes(port, peers, beats, health)
        self._backups = Backups(port)
        self._images = Images(port, peers)

    async def Submit(self, request: api.SubmitRequest, context: Any) -> api.SubmitResponse:
        return await self._desk.answer(context, Call.SUBMIT, lambda asked: self._submitter.submit(request, asked))

    async def Cancel(self, request: api.CancelRequest, context: Any) -> api.CancelResponse:
        subject = short_list(request.ids)
        return await self._desk.answer(
            context, Call.CANCEL, lambda asked: self._canceller.cancel(request, asked), subject=subject
        )

    async def Get(self, request: api.GetRequest, context: Any) -> api.GetResponse:
        return await self._desk.answer(context, Call.STATUS, lambda asked: _shown(asked, self._query.get(request)))

    async def List(self, request: api.ListRequest, context: Any) -> api.ListResponse:
        return await self._desk.answer(context, Call.STATUS, lambda asked: _shown(asked, self._query.list(request)))

    async def ListArchived(self, request: api.ListArchivedRequest, context: Any) -> api.ListArchivedResponse:
        return await self._desk.answer(context, Call.STATUS, lambda asked: _shown(asked, self._archives.list(request)))

    async def Watch(self, request: api.WatchRequest, context: Any) -> AsyncIterator[api.WatchResponse]:
        async with closing(
            self._desk.stream(context, Call.STATUS, lambda asked: _all_shown(asked, self._watcher.watch(request)))
        ) as responses:
            async for response in responses:
                yield response

    async def Log(self, request: api.LogRequest, context: Any) -> AsyncIterator[api.LogChunk]:
        async with closing(
            self._desk.stream(context, Call.LOG, lambda asked: self._logs.log(request, asked), subject=request.id)
        ) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Exec(self, requests: AsyncIterator[api.ExecRequest], context: Any) -> AsyncIterator[api.ExecResponse]:
        async with closing(
            self._desk.stream(context, Call.EXEC, lambda asked: self._execute.exec(requests, asked))
        ) as responses:
            async for response in responses:
                yield response

    async def CopyOut(self, request: api.CopyOutRequest, context: Any) -> AsyncIterator[api.CopyOutChunk]:
        async with closing(
            self._desk.stream(
                context, Call.COPY, lambda asked: self._copying.copy_out(request, asked), subject=request.id
            )
        ) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Wait(self, request: api.WaitRequest, context: Any) -> api.WaitResponse:
        limit_s = context.time_remaining()
        return await self._desk.answer(
            context, Call.STATUS, lambda asked: _shown(asked, self._waiter.wait(request, limit_s)), is_long=True
        )

    async def ListNodes(self, request: api.ListNodesRequest, context: Any) -> api.ListNodesResponse:  # noqa: ARG002 - gRPC's signature
        return await self._desk.answer(context, Call.NODES, lambda _: self._nodes.list_nodes())

    async def Drain(self, request: api.DrainRequest, context: Any) -> api.DrainResponse:
        how = " --release" * request.release + " --force" * request.force
        await self._desk.answer(
            context,
            Call.DRAIN,
            lambda asked: self._nodes.drain(request, asked),
            subject=f"drain {request.node[:NODE_NAME_MAX]}{how}",
        )
        return api.DrainResponse()

    async def Undrain(self, request: api.UndrainRequest, context: Any) -> api.UndrainResponse:
        await self._desk.answer(
            context,
            Call.DRAIN,
            lambda asked: self._nodes.undrain(request.node, asked),
            subject=f"undrain {request.node[:NODE_NAME_MAX]}",
        )
        return api.UndrainResponse()

    async def Leave(self, request: api.LeaveRequest, context: Any) -> AsyncIterator[api.LeaveProgress]:
        async with closing(
            self._desk.stream(
                context,
                Call.LEAVE,
                lambda asked: self._nodes.leave(request, asked),
                subject=request.node[:NODE_NAME_MAX],
            )
        ) as steps:
            async for step in steps:
                yield step

    async def ConfirmDead(self, request: api.ConfirmDeadRequest, context: Any) -> api.ConfirmDeadResponse:
        return await self._desk.answer(
            context,
            Call.CONFIRM_DEAD,
            lambda asked: self._nodes.confirm_dead(request.node, asked),
            subject=request.node[:NODE_NAME_MAX],
        )

    async def DescribeCluster(
        self,
        request: api.DescribeClusterRequest,  # noqa: ARG002 - gRPC's signature
        context: Any,
    ) -> api.DescribeClusterResponse:
        return await self._desk.answer(context, Call.NODES, lambda _: self._nodes.describe(), anyhow=True)

    async def Backup(self, request: api.BackupRequest, context: Any) -> AsyncIterator[api.BackupChunk]:  # noqa: ARG002 - gRPC's signature
        async with closing(self._desk.stream(context, Call.BACKUP, self._backups.backup)) as chunks:
            async for chunk in chunks:
                yield chunk


class PeerApi(rpc.PeerServicer):
    """``spinetta.v1.Peer``: what nodes ask of each other."""

    def __init__(self, port: NodePort, desk: Desk) -> None:
        self._port = port
        self._desk = desk
        self._archive = OwnArchive(port)
        self._usage = OwnUsage(port)

    async def TakeSeat(self, request: api.TakeSeatRequest, context: Any) -> api.TakeSeatResponse:
        await self._desk.answer(
            context,
            Call.PEER,
            lambda _: self._port.take_seat(request.member_id, request.initial_cluster, request.cluster_id),
            subject=f"take seat {request.member_id:x}",
        )
        return api.TakeSeatResponse()

    async def GiveUpSeat(self, request: api.GiveUpSeatRequest, context: Any) -> api.GiveUpSeatResponse:
        await self._desk.answer(
            context,
            Call.PEER,
            lambda _: self._port.give_up_seat(request.member_id),
            subject=f"give up seat {request.member_id:x}",
        )
        return api.GiveUpSeatResponse()

    async def Archive(self, request: api.ArchiveRequest, context: Any) -> api.ArchiveResponse:
        return await self._desk.answer(
            context, Call.PEER, lambda asked: self._archive.archive(request, asked), subject="archive"
        )

    async def ReadArchive(self, request: api.ReadArchiveRequest, context: Any) -> api.ReadArchiveResponse:
        return await self._desk.answer(
            context, Call.PEER, lambda asked: self._archive.read(request, asked), subject="read archive"
        )

    async def Sample(self, request: api.SampleRequest, context: Any) -> api.SampleResponse:
        return await self._desk.answer(context, Call.USAGE, lambda _: self._usage.sample(request))


class ApiServer:
    """A server that has been started. Made by `serve`."""

    def __init__(self, addresses: Sequence[str], hub: Hub, desk: Desk, health_servicer: Health) -> None:
        self.addresses = tuple(addresses)
        """Where it listens, HOST:PORT, with the real ports."""
        self.hub = hub
        self.desk = desk
        self._health = health_servicer

    async def set_serving(self, serving: bool) -> None:
        """What the health service says."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, status)


@asynccontextmanager
async def serve(
    port: NodePort,
    addresses: Sequence[str],
    *,
    hub: Hub | None = None,
    acl: AclView | None = None,
    tokens: TokenVerifier | None = None,
    throttle: Throttle | None = None,
    extra: Sequence[Register] = (),
    store_health: StoreHealth | None = None,
) -> AsyncIterator[ApiServer]:
    """Serve the API on these addresses (HOST:PORT; port 0: any free one) for as long as the context lasts.

    With the port's credentials: mutual TLS only. Without: plain text, on loopback addresses only.

    Args:
        port: the node.
        addresses: where to listen.
        hub: tells of changes of tasks; None: a new one.
        acl: the records of rights; None: a new view of them, kept for as long as the server runs.
        tokens: knows bearer tokens; None: a new verifier of the policy's issuers.
        throttle: how much one caller may ask for.
        extra: further services.
        store_health: how the store stands; None: errors tell what a single call has met, and nothing more.

    Raises:
        UserError: an address cannot be had, for example because its port is in use, or may not be served so.
    """
    hub = hub or Hub(port.store)
    view = acl or AclView(port.store)
    desk = Desk(port, Callers(port, view, tokens or OidcVerifier()), throttle, store_health)
    peers = Peers(port.store, port.dialer)
    beats = Beats(port)
    gates = [desk.gate] if port.credentials is not None else []
    server = grpc.aio.server(interceptors=gates, options=OPTIONS, maximum_concurrent_rpcs=limits.RPCS_MAX)
    rpc.add_SpinettaServicer_to_server(Api(port, hub, peers, beats, desk, store_health), server)
    rpc.add_PeerServicer_to_server(PeerApi(port, desk), server)
    health_servicer = Health(desk)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    more = [name for register in extra for name in register(server, desk)]
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
        Reflection(desk, (*SERVICES, *more, health.SERVICE_NAME, reflection.SERVICE_NAME)), server
    )
    bound = [_bind(server, address, port) for address in addresses]
    api_server = ApiServer(bound, hub, desk, health_servicer)
    of_body: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(hub.run(), name="hub")]
            if not desk.callers.is_worker:  # it answers nobody's questions about nodes, and may not see them all
                running.append(group.create_task(beats.run(), name="beats"))
            if acl is None and port.credentials is not None and not desk.callers.is_worker:
                running.append(group.create_task(view.run(), name="acl"))
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


def _bind(server: grpc.aio.Server, address: str, port: NodePort) -> str:
    host, colon, _ = address.rpartition(":")
    if not colon or not host:
        raise UserError(f"not an address: {address!r}", field="address", hint="HOST:PORT")
    credentials = port.credentials
    if credentials is None:
        require_loopback(address, "address")
    try:
        if credentials is None:
            number = server.add_insecure_port(address)
        else:
            number = server.add_secure_port(address, server_credentials(credentials.pems))
    except RuntimeError as e:
        raise UserError(
            f"cannot listen on {address}",
            field="address",
            hint="another program uses this port, or this machine does not have the address",
            reason="address-in-use",
        ) from e
    return f"{host}:{number}"


async def _shown(asked: Asked, answer: Awaitable[Shown]) -> Shown:
    response = await answer
    views.withhold(response.tasks, lambda owner: asked.may(Call.PAYLOAD, owner))
    return response


async def _all_shown(asked: Asked, responses: AsyncIterator[api.WatchResponse]) -> AsyncIterator[api.WatchResponse]:
    async with closing(responses):
        async for response in responses:
            views.withhold(response.tasks, lambda owner: asked.may(Call.PAYLOAD, owner))
            yield response
