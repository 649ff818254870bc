"""Wait and Watch: told by the hub, and never dependent on one event."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from spinetta import keys, validate
from spinetta.errors import Compacted, UserError
from spinetta.model import Revision, TaskId
from spinetta.node.hub import Hub, Listener, closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup, query, views
from spinetta.store.protocol import Change
from spinetta.v1 import api_pb2 as api

log = logging.getLogger(__name__)


def _reread_after_s() -> float:
    return limits.REREAD_S * random.uniform(0.75, 1.25)  # noqa: S311 - spreads the load, no secret


class Waiter:
    """Answers when tasks are complete."""

    def __init__(self, port: NodePort, hub: Hub) -> None:
        self._port = port
        self._hub = hub

    async def wait(self, request: api.WaitRequest, deadline_s: float | None) -> api.WaitResponse:
        """All of the tasks (or any) are complete, or the time is over.

        Args:
            request: which, and for how long.
            deadline_s: seconds until the caller stops listening; None: it never does.

        Raises:
            NotFound: one does not exist, or was removed before its end was seen.
        """
        validate.check_wait_timeout(request.timeout_s)
        ids = await lookup.resolve(self._port, request.ids, limit=validate.WAIT_IDS_MAX)
        limit_s = min(request.timeout_s or limits.WAIT_MAX_S, limits.WAIT_MAX_S)
        if deadline_s is not None:
            limit_s = min(limit_s, deadline_s - limits.WAIT_MARGIN_S)
        end_s = time.monotonic() + limit_s
        known: dict[TaskId, api.TaskView] = {}
        pending: set[TaskId] = set(ids)
        async with self._hub.listen(ids) as listener:
            await self._read(pending, ids, known)
            reread_s = time.monotonic() + _reread_after_s()
            while pending and not (request.any and len(pending) < len(ids)):
                now_s = time.monotonic()
                if now_s >= end_s:
                    break
                news = await listener.news(min(end_s, reread_s) - now_s)
                if news.gap or time.monotonic() >= reread_s:
                    await self._read(pending, ids, known)
                    reread_s = time.monotonic() + _reread_after_s()
                self._take(news.changes, ids, pending, known)
        over = not pending or (request.any and len(pending) < len(ids))
        return api.WaitResponse(tasks=views.fitting([known[i] for i in ids]), timed_out=not over)

    async def _read(self, pending: set[TaskId], ids: dict[TaskId, str], known: dict[TaskId, api.TaskView]) -> None:
        found = await lookup.read_views(self._port.store, pending)
        for task_id in list(pending):
            if task_id not in found:
                raise lookup.missing(task_id, ids[task_id])
            self._see(task_id, found[task_id], pending, known)

    def _take(
        self,
        changes: Iterable[Change],
        ids: dict[TaskId, str],
        pending: set[TaskId],
        known: dict[TaskId, api.TaskView],
    ) -> None:
        for change in changes:
            task_id = keys.parse_task(change.key)
            if task_id not in pending:
                continue
            if change.value is None:
                raise lookup.missing(task_id, ids[task_id])
            self._see(task_id, views.view(change.value), pending, known)

    @staticmethod
    def _see(task_id: TaskId, v: api.TaskView, pending: set[TaskId], known: dict[TaskId, api.TaskView]) -> None:
        if task_id in known and known[task_id].revision > v.revision:
            return  # an event older than what has been read
        known[task_id] = v
        if views.is_complete(v):
            pending.discard(task_id)


@dataclass(slots=True)
class _Watched:
    """What one Watch has sent.

    Attributes:
        wanted, ids: what the client asked for; no ids: any.
        revision: changes up to it have been sent.
        open: unfinished tasks that matched when they were last sent, with the revision of their record. A task that
            has ended changes no more, so it need not be remembered. At most `WATCHED_MAX`: of others it is not
            reported that they match no longer, and they are not read again.
    """

    wanted: views.Wanted
    ids: dict[TaskId, str]
    revision: Revision = Revision(0)
    open: dict[TaskId, int] = field(default_factory=dict)

    def sees(self, v: api.TaskView) -> bool:
        """Remember a task that is now as in `v`; whether to send it."""
        task_id = TaskId(v.task.spec.id)
        before = self.open.pop(task_id, None)
        if before is not None and before >= v.revision:
            self.open[task_id] = before
            return False
        matches = self.wanted.matches(v)
        if matches and not views.is_complete(v) and len(self.open) < limits.WATCHED_MAX:
            self.open[task_id] = v.revision
        return matches or before is not None

    def response(self, changes: Sequence[Change]) -> api.WatchResponse:
        """What these changes mean for the client."""
        shown: list[api.TaskView] = []
        removed: list[str] = []
        for change in changes:
            task_id = keys.parse_task(change.key)
            if change.revision <= self.revision or (self.ids and task_id not in self.ids):
                continue
            if change.value is None:
                self.open.pop(task_id, None)
                removed.append(task_id)
                continue
            v = views.readable(change.value)
            if v is None:
                self.open.pop(task_id, None)
            elif self.sees(v):
                shown.append(v)
        return api.WatchResponse(tasks=shown, removed_ids=removed)


def _portions(changes: Sequence[Change]) -> Iterator[tuple[Sequence[Change], Revision]]:
    """Portions that can be sent, each with the revision that a client which has got it may resume after."""
    start, room = 0, limits.ANSWER_BYTES_MAX
    for i, change in enumerate(changes):
        size = 300 + (len(change.value.value) if change.value else 0)
        if i > start and size > room:
            # One revision may change many tasks: resuming after half of it would lose the other half.
            yield changes[start:i], Revision(min(changes[i - 1].revision, change.revision - 1))
            start, room = i, limits.ANSWER_BYTES_MAX
        room -= size
    if changes:
        yield changes[start:], changes[-1].revision


class Watcher:
    """Streams the changes of tasks."""

    def __init__(self, port: NodePort, hub: Hub) -> None:
        self._port = port
        self._hub = hub

    async def watch(self, request: api.WatchRequest) -> AsyncIterator[api.WatchResponse]:
        """The present state, then changes; or, with a revision, the changes from it on.

        Ends only when the caller goes. When changes have been lost, starts again with the present state, marked
        `restarted`.
        """
        ids: dict[TaskId, str] = {}
        if request.ids:
            ids = await lookup.resolve(self._port, request.ids, limit=validate.WAIT_IDS_MAX)
        if request.from_revision < 0:
            raise UserError("a revision is not negative", field="from_revision", hint="0: the present state first")
        w = _Watched(views.Wanted(request.filter), ids)
        async with self._hub.listen(ids or None) as listener:
            restarted = False
            if request.from_revision:
                w.revision = Revision(request.from_revision - 1)
                try:
                    async with closing(self._replay(w)) as responses:
                        async for response in responses:
                            yield response
                    async with closing(self._changes(w, listener)) as responses:
                        async for response in responses:
                            yield response
                except Compacted:
                    log.debug("a watch was resumed from revision %d, which is compacted", request.from_revision)
                restarted = True
            while True:
                async with closing(self._initial(w, restarted=restarted)) as responses:
                    async for response in responses:
                        yield response
                async with closing(self._changes(w, listener)) as responses:
                    async for response in responses:
                        yield response
                restarted = True

    async def _initial(self, w: _Watched, *, restarted: bool) -> AsyncIterator[api.WatchResponse]:
        # Read before the tasks: what changes while they are read comes again through the hub.
        base = (await self._port.store.read([keys.GENERATION])).revision
        w.open.clear()
        if restarted:
            yield api.WatchResponse(restarted=True)
        if w.ids:
            found = await lookup.read_views(self._port.store, w.ids)
            for task_id, where in w.ids.items():
                if task_id not in found and not restarted:
                    raise lookup.missing(task_id, where)
            for portion in views.packed(v for v in found.values() if w.sees(v)):
                yield api.WatchResponse(tasks=portion)
        else:
            async with closing(query.everything(self._port.store, w.wanted)) as runs:
                async for run in runs:
                    for portion in views.packed(v for v in run.shown if w.sees(v)):
                        yield api.WatchResponse(tasks=portion)
        w.revision = base
        yield api.WatchResponse(revision=base, initial_done=True)

    async def _replay(self, w: _Watched) -> AsyncIterator[api.WatchResponse]:
        """Changes between the client's revision and what the hub will tell.

        The watch gives no sign of having caught up, so it is left at the first change that is newer than the listener,
        which the listener has too.
        """
        store = self._port.store
        now = (await store.read([keys.GENERATION])).revision
        if now <= w.revision:
            return
        async with closing(store.watch(keys.TASK, start=Revision(w.revision + 1))) as watch:
            async for changes in watch:
                for portion, revision in _portions(changes.events):
                    response = w.response(portion)
                    w.revision = response.revision = revision
                    if response.tasks or response.removed_ids:
                        yield response
                if changes.events and changes.revision >= now:
                    return

    async def _changes(self, w: _Watched, listener: Listener) -> AsyncIterator[api.WatchResponse]:
        """Changes from the hub, until some have been lost."""
        reread_s = time.monotonic() + _reread_after_s()
        while True:
            news = await listener.news(reread_s - time.monotonic())
            if news.gap:
                return
            for portion, revision in _portions(news.changes):
                response = w.response(portion)
                w.revision = response.revision = max(revision, w.revision)
                if response.tasks or response.removed_ids:
                    yield response
            if time.monotonic() >= reread_s:
                reread_s = time.monotonic() + _reread_after_s()
                async with closing(self._again(w)) as responses:
                    async for response in responses:
                        yield response

    async def _again(self, w: _Watched) -> AsyncIterator[api.WatchResponse]:
        """Read unfinished tasks again, in case an event about them never came."""
        oldest = list(itertools.islice(w.open, limits.REREAD_TASKS_MAX))
        found = await lookup.read_views(self._port.store, oldest)
        removed = [t for t in oldest if t not in found]
        for task_id in removed:
            w.open.pop(task_id, None)
        if removed:
            yield api.WatchResponse(removed_ids=removed, revision=w.revision)
        for portion in views.packed(v for v in found.values() if w.sees(v)):
            yield api.WatchResponse(tasks=portion, revision=w.revision)
