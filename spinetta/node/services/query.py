"""Get and List: what is there now, with bounded work for each call."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from spinetta import codec, keys, validate
from spinetta.errors import UserError
from spinetta.model import NodeId, Revision, TaskId
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup, views
from spinetta.store.protocol import KeyValue, Store
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

    def __init__(self, port: NodePort) -> None:
        self._port = port

    async def get(self, request: api.GetRequest) -> api.GetResponse:
        """The tasks with these ids.

        Raises:
            NotFound: one does not exist.
            UserError: a fragment of an id fits several.
        """
        ids = await lookup.resolve(self._port.store, request.ids, limit=validate.GET_IDS_MAX)
        found = await lookup.read_views(self._port.store, ids)
        for task_id, field in ids.items():
            if task_id not in found:
                raise lookup.missing(task_id, field)
        shown = [found[i] for i in ids]
        for v in shown:
            await self._add_usage(v)
        return api.GetResponse(tasks=views.fitting(shown))

    async def _add_usage(self, v: api.TaskView) -> None:
        """What a task that runs here has used so far; those elsewhere show it once they have ended."""
        if v.task.state != pb.RUNNING or v.node != self._port.name or not v.task.attempts:
            return
        usage = await self._port.running_usage(TaskId(v.task.spec.id))
        if usage is not None:
            v.task.attempts[-1].usage.CopyFrom(codec.usage_to_pb(usage))

    async def list(self, request: api.ListRequest) -> api.ListResponse:
        """One page of the tasks that match, in the order of their ids, which is that of submission."""
        size = validate.check_page_size(request.page_size)
        wanted = views.Wanted(request.filter)
        newest = request.newest_first
        after = _parse_token(request.page_token, newest=newest)
        out: list[api.TaskView] = []
        looked_at, room, revision = 0, limits.ANSWER_BYTES_MAX, Revision(0)
        while True:
            step = min(
                limits.SCAN_STEP, max(size - len(out), 1) if not _selective(request.filter) else limits.SCAN_STEP
            )
            run = await read_run(self._port.store, wanted, after=after, limit=step, newest_first=newest)
            revision = revision or run.revision
            for v in run.shown:
                bytes_ = v.ByteSize() + 8
                if len(out) == size or (out and bytes_ > room):
                    token = _token(TaskId(out[-1].task.spec.id), newest=newest)
                    return api.ListResponse(tasks=out, next_page_token=token, revision=revision)
                out.append(v)
                room -= bytes_
            looked_at += run.looked_at
            if not run.more or run.last is None:
                return api.ListResponse(tasks=out, revision=revision)
            after = run.last
            if len(out) >= size or looked_at >= limits.SCAN_MAX:
                return api.ListResponse(tasks=out, next_page_token=_token(after, newest=newest), revision=revision)
            await asyncio.sleep(0)


def _selective(f: api.Filter) -> bool:
    """It says more than states, so that most of what is read may not match."""
    return bool(f.outcomes or f.labels or f.owner or f.name or f.node)


async def everything(store: Store, wanted: views.Wanted) -> AsyncIterator[Run]:
    """All tasks that match, oldest first, run by run."""
    after: TaskId | None = None
    while True:
        run = await read_run(store, wanted, after=after, limit=limits.SCAN_STEP, newest_first=False)
        yield run
        if not run.more or run.last is None:
            return
        after = run.last


async def read_run(store: Store, wanted: views.Wanted, *, after: TaskId | None, limit: int, newest_first: bool) -> Run:
    """Up to `limit` tasks after `after`, through the status keys when the filter names states."""
    if not wanted.states or wanted.states == _EVERY_STATE:
        page = await store.list(
            keys.TASK, after=keys.task(after) if after else "", limit=limit, newest_first=newest_first
        )
        entries: Sequence[KeyValue] = page.entries
        more, revision = page.more, page.revision
        last = keys.parse_task(entries[-1].key) if entries else None
    else:
        ids, more, revision = await _by_status(store, wanted, after=after, limit=limit, newest_first=newest_first)
        found = await lookup.read_all(store, [keys.task(i) for i in ids])
        entries = [found[keys.task(i)] for i in ids if keys.task(i) in found]
        last = ids[-1] if ids else None
        limit = max(len(ids), 1)
    shown = [v for v in map(views.view, entries) if wanted.matches(v)]
    await lookup.add_holdings(store, shown)
    return Run(tuple(shown), min(len(entries), limit), last, more, revision)


async def _by_status(
    store: Store, wanted: views.Wanted, *, after: TaskId | None, limit: int, newest_first: bool
) -> tuple[list[TaskId], bool, Revision]:
    """The first `limit` ids after `after` among the status keys of the wanted states, whether there are more, and
    the revision.

    All prefixes are read at one revision: a task on its way from one state to another is then seen exactly once.
    """
    ids: set[TaskId] = set()
    horizon: TaskId | None = None  # beyond it some prefix has not been read
    revision = Revision(0)
    for state, prefix in _STATUS.items():
        if state not in wanted.states:
            continue
        page = await store.list(
            prefix,
            after=prefix + after if after else "",
            limit=limit,
            keys_only=True,
            newest_first=newest_first,
            revision=revision,
        )
        revision = revision or page.revision
        ids.update(keys.parse_task(e.key) for e in page.entries)
        if page.more and page.entries:
            last = keys.parse_task(page.entries[-1].key)
            horizon = last if horizon is None else (max if newest_first else min)(horizon, last)
    if pb.RUNNING in wanted.states:
        prefix = keys.running_on(NodeId(wanted.node)) if wanted.node else keys.RUNNING
        page = await store.list(prefix, limit=limits.RUNNING_KEYS_MAX, keys_only=True, revision=revision)
        revision = revision or page.revision
        running = (keys.parse_running(e.key)[1] for e in page.entries)
        ids.update(t for t in running if after is None or (t < after if newest_first else t > after))
    ordered = sorted(ids, reverse=newest_first)
    if horizon is not None:
        ordered = [t for t in ordered if (t >= horizon if newest_first else t <= horizon)]
    return ordered[:limit], horizon is not None or len(ordered) > limit, revision


def _token(last: TaskId, *, newest: bool) -> str:
    return base64.urlsafe_b64encode(f"{'n' if newest else 'o'}{last}".encode()).decode()


def _parse_token(token: str, *, newest: bool) -> TaskId | None:
    if not token:
        return None
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode("ascii")
    except (ValueError, binascii.Error, UnicodeError):
        text = ""
    order, last = text[:1], text[1:]
    if order not in ("n", "o") or not validate.is_task_id(last):
        raise UserError("not a page token", field="page_token", hint="use the one of the page before, unchanged")
    if (order == "n") != newest:
        raise UserError("this page token is of the other order", field="page_token", hint="keep newest_first as it was")
    return TaskId(last)
