"""Get and List: what is there now, with bounded work for each call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from spinetta import keys, validate
from spinetta.model import NodeId, Revision, TaskId
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup, ordered, pagetokens, views
from spinetta.node.services.live import LiveUsage
from spinetta.store.protocol import Store
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb

_STATUS = {pb.BLOCKED: keys.BLOCKED, pb.QUEUED: keys.QUEUED, pb.COMPLETE: keys.COMPLETE}
_EVERY_STATE = frozenset({pb.BLOCKED, pb.QUEUED, pb.RUNNING, pb.COMPLETE})


@dataclass(frozen=True, slots=True)
class Run:
    """Some tasks in order.

    Attributes:
        shown: those of them that match.
        looked_at: how many were read.
        last: the last one that was read; the next run begins after it.
        more: there may be others after it.
        revision: at which the order was read.
    """

    shown: tuple[api.TaskView, ...]
    looked_at: int
    last: TaskId | None
    more: bool
    revision: Revision


class Query:
    """Answers questions about tasks."""

    def __init__(self, port: NodePort, live: LiveUsage) -> None:
        self._port = port
        self._live = live

    async def get(self, request: api.GetRequest) -> api.GetResponse:
        """The tasks with these ids.

        Raises:
            NotFound: one does not exist.
            UserError: a fragment of an id fits several.
        """
        ids = await lookup.resolve(self._port, request.ids, limit=validate.GET_IDS_MAX)
        found = await lookup.read_views(self._port.store, ids)
        for task_id, field in ids.items():
            if task_id not in found:
                raise lookup.missing(task_id, field)
        shown = [found[i] for i in ids]
        await self._live.add(shown)
        return api.GetResponse(tasks=views.fitting(shown))

    async def list(self, request: api.ListRequest) -> api.ListResponse:
        """One page of the tasks that match, in the order of their ids, which is that of submission."""
        page = await self._page(request)
        if request.with_usage:
            await self._live.add(page.tasks)
        return page

    async def _page(self, request: api.ListRequest) -> api.ListResponse:
        size = validate.check_page_size(request.page_size)
        wanted = views.Wanted(request.filter)
        newest = request.newest_first
        after = pagetokens.parse(request.page_token, newest=newest)
        now_ms = self._port.wall_ms() if newest else None
        out: list[api.TaskView] = []
        looked_at, room, revision = 0, limits.ANSWER_BYTES_MAX, Revision(0)
        while True:
            step = limits.SCAN_STEP if wanted.is_selective else min(size - len(out), limits.SCAN_STEP)
            run = await read_run(self._port.store, wanted, after=after, limit=step, newest_before_ms=now_ms)
            revision = revision or run.revision
            for v in run.shown:
                bytes_ = v.ByteSize() + 8
                if len(out) == size or (out and bytes_ > room):
                    token = pagetokens.make(out[-1].task.spec.id, newest=newest)
                    return api.ListResponse(tasks=out, next_page_token=token, revision=revision)
                out.append(v)
                room -= bytes_
            if not run.more or run.last is None:
                return api.ListResponse(tasks=out, revision=revision)
            after = run.last
            looked_at += run.looked_at
            if len(out) >= size or looked_at >= limits.SCAN_MAX:
                token = pagetokens.make(after, newest=newest)
                return api.ListResponse(tasks=out, next_page_token=token, revision=revision)
            await asyncio.sleep(0)


async def everything(store: Store, wanted: views.Wanted) -> AsyncIterator[Run]:
    """All tasks that match, oldest first, run by run."""
    after = ""
    while True:
        run = await read_run(store, wanted, after=after, limit=limits.SCAN_STEP)
        yield run
        if not run.more or run.last is None:
            return
        after = run.last


async def read_run(
    store: Store, wanted: views.Wanted, *, after: str, limit: int, newest_before_ms: int | None = None
) -> Run:
    """Up to `limit` tasks beyond `after`, through the status keys when the filter names states.

    With `newest_before_ms`, roughly the present time, in the reverse order.
    """
    listed = await _ids(store, wanted, after=after, limit=limit, newest_before_ms=newest_before_ms)
    found = await lookup.read_all(store, [keys.task(i) for i in listed.ids])
    entries = [found[keys.task(i)] for i in listed.ids if keys.task(i) in found]
    shown = [v for v in map(views.readable, entries) if v is not None and wanted.matches(v)]
    await lookup.add_holdings(store, shown)
    last = listed.ids[-1] if listed.ids else None
    return Run(tuple(shown), len(listed.ids), last, listed.more, listed.revision)


async def _ids(
    store: Store, wanted: views.Wanted, *, after: str, limit: int, newest_before_ms: int | None
) -> ordered.Ids:
    """Ids of the wanted states in order.

    All prefixes are read at one revision: a task on its way from one state to another is then seen exactly once.
    """
    prefixes = [keys.TASK]
    running = False
    if wanted.states and wanted.states != _EVERY_STATE:
        prefixes = [prefix for state, prefix in _STATUS.items() if state in wanted.states]
        running = pb.RUNNING in wanted.states
    newest = newest_before_ms is not None
    ids: set[TaskId] = set()
    horizon: TaskId | None = None  # beyond it some prefix has not been read
    more, revision = False, Revision(0)
    for prefix in prefixes:
        if newest_before_ms is not None:
            part = await ordered.newest_first(
                store, prefix, before=after, limit=limit, now_ms=newest_before_ms, revision=revision
            )
        else:
            part = await ordered.oldest_first(store, prefix, after=after, limit=limit, revision=revision)
        revision = revision or part.revision
        ids.update(part.ids)
        more = more or part.more
        if part.more and part.ids:
            horizon = part.ids[-1] if horizon is None else (max if newest else min)(horizon, part.ids[-1])
    if running:
        prefix = keys.running_on(NodeId(wanted.node)) if wanted.node else keys.RUNNING
        page = await store.list(prefix, limit=limits.RUNNING_KEYS_MAX, keys_only=True, revision=revision)
        revision = revision or page.revision
        held = (found[1] for e in page.entries if (found := keys.find_running(e.key)) is not None)
        ids.update(t for t in held if not after or (t < after if newest else t > after))
    in_order = sorted(ids, reverse=newest)
    if horizon is not None:
        in_order = [t for t in in_order if (t >= horizon if newest else t <= horizon)]
    return ordered.Ids(tuple(in_order[:limit]), more or len(in_order) > limit, revision)
