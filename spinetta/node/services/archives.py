"""Finished tasks that have left the store: kept on the nodes that finished them, listed from all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc.aio
from google.protobuf.message import DecodeError

from spinetta import codec, keys, trustcodec, validate
from spinetta.access import NodeAcl, NodeRole
from spinetta.errors import StoreUnavailable, UserError
from spinetta.model import NodeId, NodeRecord, TaskId
from spinetta.node.archive import ArchivePage
from spinetta.node.archivelines import record_of
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup, pagetokens, views
from spinetta.node.services.desk import Asked
from spinetta.node.services.peers import Peers
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb

KIND = "a"  # of page tokens
TIME_MS_MAX = (1 << 48) - 1  # what an id can say


@dataclass(frozen=True, slots=True)
class _Part:
    """What one node has told: tasks in order; beyond `horizon` it may have others."""

    tasks: tuple[pb.Task, ...]
    horizon: str | None


class OwnArchive:
    """This node's archive, for the other nodes."""

    def __init__(self, port: NodePort) -> None:
        self._port = port
        self._reading = asyncio.Semaphore(limits.ARCHIVE_READS_MAX)

    async def archive(self, request: api.ArchiveRequest, asked: Asked) -> api.ArchiveResponse:
        """Write down what the leader is about to delete.

        Raises:
            UserError: nothing was written.
        """
        asked.is_repeat = True  # the audit log is not for each of millions of tasks
        if len(request.records) > limits.ARCHIVE_RECORDS_MAX:
            raise UserError(f"{len(request.records)} records at once", field="records", reason="too-large")
        done = await asyncio.to_thread(self._port.archive.append, request.records, self._port.wall_ms())
        return api.ArchiveResponse(ids=done)

    async def read(self, request: api.ReadArchiveRequest, asked: Asked) -> api.ReadArchiveResponse:
        """A page of this node's archive, for another node."""
        asked.is_repeat = True
        size = validate.check_page_size(request.limit, "limit")
        page = await self.page(request, size)
        records = [r for line in page.lines if (r := record_of(line)) is not None]
        return api.ReadArchiveResponse(records=records, last=page.last, more=page.more)

    async def page(self, request: api.ReadArchiveRequest, size: int) -> ArchivePage:
        """At most `size` lines.

        Raises:
            UserError: it is not asked well, or the archive cannot be read now.
        """
        if request.after and not validate.is_task_id(request.after):
            raise UserError("not an id", field="after", hint="give the last id of the page before")
        _check_times(request)
        wanted = views.Wanted(request.filter)

        def matches(line: bytes) -> bool:
            record = record_of(line)
            return record is not None and wanted.matches(_view(pb.Task.FromString(record)))

        async with self._reading:
            return await asyncio.to_thread(
                self._port.archive.page,
                matches,
                after=request.after,
                limit=size,
                bytes_max=limits.ANSWER_BYTES_MAX,
                newest_first=request.newest_first,
                since_ms=request.since_ms,
                before_ms=request.before_ms,
            )


class Archives:
    """The archives of all nodes, for people."""

    def __init__(self, port: NodePort, peers: Peers) -> None:
        self._port = port
        self._own = OwnArchive(port)
        self._peers = peers

    async def list(self, request: api.ListArchivedRequest) -> api.ListArchivedResponse:
        """One page of what the archives of all nodes hold, in the order of ids, without what is still in the store.

        Nodes that do not tell are named in the answer.
        """
        size = validate.check_page_size(request.page_size)
        views.Wanted(request.filter)  # checked here, and not blamed on each node
        _check_times(request)
        newest = request.newest_first
        after = pagetokens.parse(request.page_token, newest=newest, kind=KIND)
        known, holders = await self._holders()
        share = size if known < 3 else max(2 * size // known, limits.ARCHIVE_SHARE_MIN)
        ask = api.ReadArchiveRequest(
            filter=request.filter,
            limit=min(share, size),
            after=after,
            newest_first=newest,
            since_ms=request.since_ms,
            before_ms=request.before_ms,
        )
        merged = _Merged(size, newest)
        silent: dict[str, str] = {}
        at_once = asyncio.Semaphore(limits.ARCHIVE_CALLS_MAX)

        async def tell(node: NodeId, is_worker: bool) -> None:
            async with at_once:
                try:
                    part = await self._part(node, ask)
                except UserError as e:
                    silent[node] = e.message
                except StoreUnavailable as e:
                    silent[node] = str(e)[: limits.SILENT_WHY_CHARS_MAX]
                except grpc.aio.AioRpcError as e:
                    silent[node] = (e.details() or e.code().name)[: limits.SILENT_WHY_CHARS_MAX]
                else:
                    merged.add(part, node if is_worker else None)

        async with asyncio.TaskGroup() as group:
            for node, is_worker in sorted(holders.items()):
                group.create_task(tell(node, is_worker))
        chosen = merged.shown()
        present = await lookup.read_all(self._port.store, [keys.task(TaskId(t.spec.id)) for t in chosen])
        shown: list[api.TaskView] = []
        last, room = after, limits.ANSWER_BYTES_MAX
        more = merged.more
        for task in chosen:
            view = _view(task)
            if keys.task(TaskId(task.spec.id)) not in present:  # archived, and not deleted yet
                room -= view.ByteSize() + 8
                if shown and room < 0:
                    more = True
                    break
                shown.append(view)
            last = task.spec.id
        else:
            last = merged.reached or last
        return api.ListArchivedResponse(
            tasks=shown,
            next_page_token=pagetokens.make(last, newest=newest, kind=KIND) if more and last else "",
            silent=[api.SilentArchive(node=n, why=why) for n, why in sorted(silent.items())],
        )

    async def _holders(self) -> tuple[int, Mapping[NodeId, bool]]:
        """How many nodes have archived something, and all to be asked: whether each is a worker.

        Those that are alive too: a cluster that was restored from a backup has forgotten what was archived since.
        """
        store = self._port.store
        page = await store.list(keys.ARCHIVE, keys_only=True, limit=limits.ARCHIVES_MAX)
        here = await store.list(keys.NODE, keys_only=True, limit=limits.ARCHIVES_MAX)
        names = sorted({keys.parse_node(e.key) for e in (*page.entries, *here.entries)})
        found = await lookup.read_all(self._port.store, [keys.acl_node(n) for n in names])
        out = {}
        for name in names:
            entry = found.get(keys.acl_node(name))
            acl = codec.readable(_node_acl, entry.value) if entry is not None else None
            out[name] = acl is not None and acl.role is NodeRole.WORKER
        return len(page.entries), out

    async def _part(self, node: NodeId, ask: api.ReadArchiveRequest) -> _Part:
        if node == self._port.name:
            page = await self._own.page(ask, ask.limit)
            records: Sequence[bytes] = [r for line in page.lines if (r := record_of(line)) is not None]
            last, more = page.last, page.more
        else:
            record: NodeRecord = await self._peers.record(node)
            stub = await self._peers.peer_stub(record)
            answer = await stub.ReadArchive(ask, timeout=limits.FORWARD_TIMEOUT_S)
            records, last, more = answer.records, answer.last, answer.more
        tasks = tuple(t for r in records if (t := _task(r)) is not None)
        return _Part(tasks, last if more else None)


class _Merged:
    """What several nodes tell, as one list: each task once, nothing beyond where one of them may have more."""

    def __init__(self, size: int, newest: bool) -> None:
        self._size = size
        self._newest = newest
        self._tasks: dict[str, tuple[pb.Task, bool]] = {}  # and whether only a worker says so
        self.reached = ""  # where this page ends, when there is more
        self.more = False

    def add(self, part: _Part, worker: NodeId | None) -> None:
        """One node's. A worker is believed of what it has finished itself, and of nothing else."""
        for task in part.tasks:
            if worker is not None and (not task.attempts or task.attempts[-1].node != worker):
                continue
            known = self._tasks.get(task.spec.id)
            if known is None or (worker is None and (known[1] or known[0].completed_ms <= task.completed_ms)):
                self._tasks[task.spec.id] = task, worker is not None
        if part.horizon is not None:
            self._end(part.horizon)
        if len(self._tasks) > 2 * self._size:  # so that a thousand nodes' answers are not held at once
            self._cut()

    def shown(self) -> list[pb.Task]:
        """The tasks of the page, in order."""
        self._cut()
        return [self._tasks[i][0] for i in self._in_order()]

    def _in_order(self) -> list[str]:
        found = sorted(self._tasks, reverse=self._newest)
        if not self.more:
            return found
        return [i for i in found if (i >= self.reached if self._newest else i <= self.reached)]

    def _cut(self) -> None:
        found = self._in_order()
        if len(found) > self._size:
            self._end(found[self._size - 1])
            found = found[: self._size]
        self._tasks = {i: self._tasks[i] for i in found}

    def _end(self, at: str) -> None:
        if not self.more:
            self.reached, self.more = at, True
        else:
            self.reached = (max if self._newest else min)(self.reached, at)


def _check_times(request: api.ListArchivedRequest | api.ReadArchiveRequest) -> None:
    for field, value in (("since_ms", request.since_ms), ("before_ms", request.before_ms)):
        if not 0 <= value <= TIME_MS_MAX:
            raise UserError(f"{value} is no time of an id", field=field, hint="milliseconds since 1970")


def _task(record: bytes) -> pb.Task | None:
    try:
        task = pb.Task.FromString(record)
    except DecodeError:
        return None
    return task if validate.is_task_id(task.spec.id) else None


def _view(task: pb.Task) -> api.TaskView:
    return api.TaskView(task=task, node=task.attempts[-1].node if task.attempts else "")


def _node_acl(value: bytes) -> NodeAcl:
    return trustcodec.decode(NodeAcl, value)
