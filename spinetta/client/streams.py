"""Streams that outlive the node which serves them: opened again at another one, from where they stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

from spinetta.client import views
from spinetta.client.channels import RETRY_WAIT_MAX_S, Nodes
from spinetta.client.errors import NODE_UNREACHABLE, Throttled
from spinetta.errors import Compacted, StoreUnavailable, UserError
from spinetta.model import TaskId
from spinetta.trust.backoff import Backoff
from spinetta.v1 import api_pb2 as api

PATIENCE_S = 60.0  # how long to look for a node that answers
PAUSE_FIRST_S = 0.05


class _Patience:
    """How long a stream looks for a node that answers, and how it waits between."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None
        self._wait = Backoff(PAUSE_FIRST_S, RETRY_WAIT_MAX_S)
        self._asked_s = 0.0

    def reset(self) -> None:
        """Something came."""
        self._since_s = None
        self._wait.reset()

    def check(self, error: Exception) -> None:
        """Raise the error when there have been only errors for too long."""
        now_s = time.monotonic()
        self._asked_s = error.retry_after_s if isinstance(error, Throttled) else 0.0
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s >= self._limit_s:
            raise error

    async def pause(self) -> None:
        """Longer each time, by chance, and as long as the node has asked for."""
        asked_s, self._asked_s = self._asked_s, 0.0
        await asyncio.sleep(asked_s + self._wait.next_s())


async def watch(nodes: Nodes, request: api.WatchRequest) -> AsyncGenerator[views.TaskChanges, None]:
    """Changes of tasks, for ever. `request` is used to remember where to go on.

    Raises:
        StoreUnavailable: no node answers for `PATIENCE_S`.
    """
    begun = False
    patience = _Patience(PATIENCE_S)
    while True:
        restarted = begun and not request.from_revision  # broken within the first state: it comes again, whole
        try:
            async with contextlib.aclosing(nodes.stream(lambda stub: stub.Watch, request)) as answers:
                async for m in answers:
                    patience.reset()
                    begun = True
                    if m.restarted:
                        request.from_revision = 0
                    elif m.revision:
                        request.from_revision = m.revision + 1
                    yield views.TaskChanges(
                        tuple(views.task_info(t) for t in m.tasks),
                        tuple(TaskId(i) for i in m.removed_ids),
                        m.initial_done,
                        m.restarted or restarted,
                    )
                    restarted = False
        except Compacted:
            request.from_revision = 0
        except StoreUnavailable as e:
            patience.check(e)
        await patience.pause()


async def log(
    nodes: Nodes, request: api.LogRequest, on_gap: Callable[[str], None] = lambda _why: None
) -> AsyncGenerator[views.LogChunk, None]:
    """Bytes of a log. `request` is used to remember where to go on.

    `on_gap` is told once of each time that nothing can be had for a while, though it had been. The bytes that follow
    are those after the last ones all the same.

    Raises:
        StoreUnavailable: no node answers for `PATIENCE_S`, or for the client's time for a call if it is not followed.
        UserError: no such log; with reason ``node-unreachable`` when its node does not answer (if followed: for
            `PATIENCE_S`).
    """
    limited, all_attempts = bool(request.limit_bytes), not request.attempt
    patience = _Patience(PATIENCE_S if request.follow else min(PATIENCE_S, nodes.timeout_s))
    begun = told = False
    while True:
        try:
            async with contextlib.aclosing(nodes.stream(lambda stub: stub.Log, request)) as chunks:
                async for m in chunks:
                    patience.reset()
                    begun, told = True, False
                    # From here on a new call must continue: same attempt, the byte after the last one.
                    request.attempt, request.offset, request.tail_bytes = m.attempt, m.offset + len(m.data), 0
                    if limited:
                        request.limit_bytes = max(request.limit_bytes - len(m.data), 0)
                    if m.data:
                        yield views.LogChunk(m.data, m.offset, m.attempt, m.node)
                    if limited and not request.limit_bytes:
                        return
        except (StoreUnavailable, UserError) as e:
            # Who follows waits for a node that is being restarted; who does not wants to know.
            if isinstance(e, UserError) and not (request.follow and e.reason == NODE_UNREACHABLE):
                raise
            patience.check(e)
            if begun and not told:
                told = True
                on_gap(e.message if isinstance(e, UserError) else str(e))
            await patience.pause()
            continue
        # A call that was told an attempt ends with it; the first one, told none, has followed them all.
        if not (request.follow and all_attempts and begun) or not await _next_attempt(nodes, request):
            return


async def _next_attempt(nodes: Nodes, request: api.LogRequest) -> bool:
    """Whether a followed task has gone on to a further attempt; if so the request is set to its beginning."""
    answer = await nodes.call(lambda stub: stub.Get, api.GetRequest(ids=[request.id]))
    if answer.tasks[0].task.attempts_started <= request.attempt:
        return False
    request.attempt, request.offset = request.attempt + 1, 0
    return True
