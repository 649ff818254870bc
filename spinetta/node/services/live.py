"""What running tasks use now, asked of the nodes that run them. Nobody waits long for it, and nothing fails without."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import grpc.aio

from spinetta import messages, validate
from spinetta.errors import StoreUnavailable, UserError
from spinetta.model import NodeId, TaskId
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.peers import Peers
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb


class OwnUsage:
    """Of the tasks that run on this node."""

    def __init__(self, port: NodePort) -> None:
        self._port = port

    async def sample(self, request: api.SampleRequest) -> api.SampleResponse:
        """What each of them uses; those that do not run here are left out.

        Raises:
            UserError: too many ids, or one is none.
        """
        if len(request.ids) > validate.LIST_PAGE_MAX:
            raise UserError(f"{len(request.ids)} ids", field="ids", hint=f"at most {validate.LIST_PAGE_MAX}")
        for i, text in enumerate(request.ids):
            validate.check_task_id(text, f"ids[{i}]")
        return api.SampleResponse(tasks=await self.of(request.ids))

    async def of(self, ids: Iterable[str]) -> list[api.Sampled]:
        """The same for ids that are known to be some."""
        found = []
        for task_id in ids:
            sample = await self._port.running_sample(TaskId(task_id))
            if sample is not None:
                given = {name: ",".join(labels) for name, labels in sample.units}
                now = api.RunningUsage(memory_bytes=sample.memory_bytes, pids=sample.pids, units=given)
                usage = messages.usage_to_pb(sample.usage)
                found.append(api.Sampled(id=task_id, attempt=sample.attempt, usage=usage, now=now))
        return found


class LiveUsage:
    """Of running tasks, wherever they run."""

    def __init__(self, port: NodePort, peers: Peers) -> None:
        self._port = port
        self._peers = peers
        self._own = OwnUsage(port)

    async def add(self, views: Sequence[api.TaskView]) -> None:
        """Put into each view of a running task what its node tells; what it does not tell in time stays out."""
        wanted: dict[NodeId, dict[str, api.TaskView]] = {}
        for v in views:
            if v.task.state == pb.RUNNING and v.node and v.task.attempts:
                wanted.setdefault(NodeId(v.node), {})[v.task.spec.id] = v
        at_once = asyncio.Semaphore(limits.SAMPLE_CALLS_MAX)

        async def tell(node: NodeId, of: dict[str, api.TaskView]) -> None:
            async with at_once:
                for told in await self._ask(node, list(of)):
                    view = of.get(told.id)
                    if view is not None and view.task.attempts[-1].number == told.attempt:
                        view.task.attempts[-1].usage.CopyFrom(told.usage)
                        view.now.CopyFrom(told.now)

        async with asyncio.TaskGroup() as group:
            for node, of in sorted(wanted.items())[: limits.SAMPLE_NODES_MAX]:
                group.create_task(tell(node, of))

    async def _ask(self, node: NodeId, ids: list[str]) -> Sequence[api.Sampled]:
        if node == self._port.name:
            return await self._own.of(ids)
        try:
            async with asyncio.timeout(limits.SAMPLE_TIMEOUT_S):
                stub = await self._peers.peer_stub(await self._peers.record(node))
                request = api.SampleRequest(ids=ids[: validate.LIST_PAGE_MAX])
                return (await stub.Sample(request, timeout=limits.SAMPLE_TIMEOUT_S)).tasks
        except (UserError, StoreUnavailable, grpc.aio.AioRpcError, TimeoutError):
            return ()  # lost, frozen, or of a version that does not know the call: the task is shown without
