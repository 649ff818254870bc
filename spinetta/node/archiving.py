"""Carrying out what the leader wants archived: here, or on another node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc.aio

from spinetta.errors import UserError
from spinetta.model import NodeId, NodeRecord, TaskId
from spinetta.node.archive import Archive
from spinetta.trust.dial import Dialer, node_name
from spinetta.v1 import api_pb2 as pb
from spinetta.v1.api_pb2_grpc import PeerStub

CALL_S = 20.0  # for another node to write and flush a few MiB, on a slow disk
WHY_CHARS_MAX = 300  # of another node's reason, in our log


class Archivist(Protocol):
    """Has finished tasks written down."""

    async def archive(self, node: NodeId, records: Sequence[bytes]) -> tuple[frozenset[TaskId], str]:
        """Which of the tasks with these records are on that node's disk to stay, and why not all, if that is known."""
        ...


class Nowhere:
    """For a daemon without an archive."""

    async def archive(self, node: NodeId, records: Sequence[bytes]) -> tuple[frozenset[TaskId], str]:  # noqa: ARG002 - the protocol's
        """Nothing is kept."""
        return frozenset(), "this daemon keeps no archive"


class NodeArchivist:
    """Writes into this node's archive, or asks another node to."""

    def __init__(
        self, name: NodeId, archive: Archive, dialer: Dialer, peers: Callable[[], Sequence[NodeRecord]]
    ) -> None:
        self._name = name
        self._archive = archive
        self._dialer = dialer
        self._peers = peers

    async def archive(self, node: NodeId, records: Sequence[bytes]) -> tuple[frozenset[TaskId], str]:
        """As `Archivist.archive`; no answer is none."""
        try:
            if node == self._name:
                done: Sequence[str] = await asyncio.to_thread(
                    self._archive.append, records, time.time_ns() // 1_000_000
                )
            else:
                done = await self._elsewhere(node, records)
        except UserError as e:
            return frozenset(), e.message
        except grpc.aio.AioRpcError as e:
            return frozenset(), (e.details() or e.code().name)[:WHY_CHARS_MAX]
        return frozenset(TaskId(t) for t in done), ""

    async def _elsewhere(self, node: NodeId, records: Sequence[bytes]) -> Sequence[str]:
        record = next((r for r in self._peers() if r.name == node), None)
        if record is None:
            raise UserError(f"node {node} is not here")
        async with self._dialer.channel(record.address, node_name(node)) as channel:
            answer = await PeerStub(channel).Archive(pb.ArchiveRequest(records=records), timeout=CALL_S)
        return list(answer.ids)
