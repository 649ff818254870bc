"""Log: the bytes of an attempt's output, from whichever node has them, attempt after attempt."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import grpc.aio

from spinetta import codec, keys, validate
from spinetta.access import NodeRole
from spinetta.errors import AskElsewhere, Denied, NotFound, UserError
from spinetta.match import uncleared
from spinetta.model import Attempt, Outcome, Reason, Revision, State, Task, TaskId
from spinetta.node.hub import Hub, Listener, News, closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup
from spinetta.node.services.desk import Asked, ask_a_voter
from spinetta.node.services.errors import busy
from spinetta.node.services.peers import FORWARDED, Peers
from spinetta.node.services.tail import NoLog, Span, tail
from spinetta.rights import CallerKind
from spinetta.store.protocol import KeyValue
from spinetta.v1 import api_pb2 as api

_NAMES = {api.STREAM_UNSPECIFIED: "stdout", api.STDOUT: "stdout", api.STDERR: "stderr"}
_SPAWN_FAILED = Reason.SPAWN_FAILED.value
_LOST_LOG = frozenset({"no-log", "node-unreachable"})


@dataclass(slots=True)
class _Looks:
    """In a listener's place on a worker, which may not watch all tasks: it looks at its own now and then."""

    next_s: float = 0.0

    async def news(self, timeout_s: float) -> News:
        """Nothing, or that something may have been missed, so that the task is read."""
        await asyncio.sleep(max(min(timeout_s, self.next_s - time.monotonic()), 0.0))
        if time.monotonic() < self.next_s:
            return News((), gap=False)
        self.next_s = time.monotonic() + limits.LOG_LOOK_S
        return News((), gap=True)


@dataclass(slots=True)
class _Followed:
    """A task and what becomes of it. Without a listener it stays as it was read."""

    port: NodePort
    id: TaskId
    task: Task
    revision: Revision
    listener: Listener | _Looks | None
    reread_s: float

    @classmethod
    async def begin(cls, port: NodePort, task_id: TaskId, listener: Listener | _Looks | None) -> _Followed:
        """Read the task for the first time."""
        entry = await _read(port, task_id)
        reread_s = time.monotonic() + limits.REREAD_S
        return cls(port, task_id, codec.decode_task(entry.value), entry.modified, listener, reread_s)

    async def moved(self, timeout_s: float) -> None:
        """Return when the task has changed, or after the time."""
        if self.listener is None:
            return
        news = await self.listener.news(timeout_s)
        for change in news.changes:
            if change.value is None:
                raise lookup.missing(self.id, "id")
            self._see(change.value)
        if news.gap or time.monotonic() >= self.reread_s:
            self.reread_s = time.monotonic() + limits.REREAD_S
            self._see(await _read(self.port, self.id))

    def _see(self, entry: KeyValue) -> None:
        if entry.modified > self.revision:  # an event may be older than what has been read
            self.task, self.revision = codec.decode_task(entry.value), entry.modified

    def attempt(self, number: int) -> Attempt | None:
        """The record of an attempt; None when it is too old to be kept, or has not begun."""
        return next((a for a in self.task.attempts if a.number == number), None)

    def is_over(self, number: int) -> bool:
        """Nothing of this attempt runs any more, or at least its node no longer owns it."""
        return self.task.state is not State.RUNNING or self.task.attempts_started > number

    def is_passed_on(self, number: int) -> bool:
        """The attempt is over and another one follows it."""
        return self.is_over(number) and (self.task.state is not State.COMPLETE or self.task.attempts_started > number)


@dataclass(frozen=True, slots=True)
class _Writer:
    """One attempt as `tail` wants to know it."""

    followed: _Followed
    number: int

    @property
    def over(self) -> bool:
        return self.followed.is_over(self.number)

    async def moved(self, timeout_s: float) -> None:
        await self.followed.moved(timeout_s)


class Logs:
    """Streams logs."""

    def __init__(self, port: NodePort, hub: Hub, peers: Peers) -> None:
        self._port = port
        self._hub = hub
        self._peers = peers
        self._open = 0

    @property
    def _is_worker(self) -> bool:
        credentials = self._port.credentials
        return credentials is not None and credentials.role is NodeRole.WORKER

    async def log(self, request: api.LogRequest, asked: Asked) -> AsyncIterator[api.LogChunk]:
        """Bytes of a log in order.

        Raises:
            Denied: the task is not one whose logs the caller may read, or it carries labels that the caller lacks.
            AskElsewhere: its labels are not this node's to handle, or this node is a worker and does not have it.
            NotFound: no such task or attempt.
            NoLog: the attempt has none.
            UserError: it has not begun (``not-started``), cannot be read, or lies on a node that does not answer
                (``node-unreachable``).
        """
        if request.stream not in _NAMES:
            raise UserError(f"there is no stream {request.stream}", field="stream", hint="1 stdout, 2 stderr")
        if request.tail_bytes < 0:
            raise UserError(
                "a length is not negative", field="tail_bytes", hint="how many bytes before the end to start"
            )
        if request.tail_bytes and request.offset:
            raise UserError("offset and tail_bytes exclude each other", field="tail_bytes", hint="give one of them")
        if self._open >= limits.LOG_STREAMS_MAX:
            raise busy("log streams", limits.LOG_STREAMS_MAX)
        self._open += 1
        try:
            async with closing(self._attempts(request, asked)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._open -= 1

    async def _attempts(self, request: api.LogRequest, asked: Asked) -> AsyncIterator[api.LogChunk]:
        if asked.caller.kind is CallerKind.NODE and not (asked.is_forwarded and request.local_only):
            raise Denied(f"{asked.caller.title} may only pass on what a person has asked for")
        if self._is_worker and not validate.is_task_id(request.id):
            raise ask_a_voter(self._port)  # which can look for what a fragment means
        task_id = await lookup.resolve_one(self._port, request.id)
        asked.subject = task_id
        async with contextlib.AsyncExitStack() as stack:
            listener: Listener | _Looks | None = None
            if request.follow:
                if self._is_worker:
                    listener = _Looks()
                else:
                    listener = await stack.enter_async_context(self._hub.listen([task_id]))
            followed = await _Followed.begin(self._port, task_id, listener)
            spec = followed.task.spec
            await asked.check(owner=spec.owner, clearance=spec.clearance)
            number = request.attempt or max(followed.task.attempts_started, 1)
            span = Span(request.offset, request.tail_bytes, request.limit_bytes)
            if not await self._has_begun(followed, number):
                if request.follow and not request.attempt:
                    return  # it ended without having been started: there was nothing to follow
                raise _not_begun(followed.task, number)
            while True:
                only = not request.follow or request.attempt > 0
                sent = 0
                try:
                    async with closing(self._one(followed, number, span, request)) as chunks:
                        async for chunk in chunks:
                            sent += len(chunk.data)
                            yield chunk
                except UserError as e:
                    # The log of an attempt that is not the last one may be lost with its node: go on with the next.
                    if only or e.reason not in _LOST_LOG or not followed.is_passed_on(number):
                        raise
                if only or (span.limit_bytes and sent >= span.limit_bytes):
                    return
                span = Span(limit_bytes=span.limit_bytes - sent if span.limit_bytes else 0)
                while not followed.is_over(number):  # its node was told before us
                    await followed.moved(limits.LOG_POLL_MAX_S)
                number += 1
                if not await self._has_begun(followed, number):
                    return

    async def _has_begun(self, followed: _Followed, number: int) -> bool:
        """Wait for an attempt to begin, if it is followed; False when it will not, or not while we look."""
        while followed.task.attempts_started < number:
            if followed.listener is None or followed.task.state is State.COMPLETE:
                return False
            await followed.moved(limits.REREAD_S)
        return True

    async def _one(
        self, followed: _Followed, number: int, span: Span, request: api.LogRequest
    ) -> AsyncIterator[api.LogChunk]:
        """One attempt, from here or from the node that made it."""
        attempt = followed.attempt(number)
        if attempt is None:
            raise NotFound(
                f"attempt {number} of task {followed.id} is too old to be known",
                field="attempt",
                hint=f"the oldest one is {followed.task.attempts[0].number}",
            )
        if attempt.node == self._port.name:
            items = self._local(followed, attempt, span, request)
        elif request.local_only:
            raise NotFound(
                f"attempt {number} of task {followed.id} was made on {attempt.node}, not on {self._port.name}",
                field="attempt",
            )
        else:
            if self._is_worker:
                raise ask_a_voter(self._port)
            await self._check_cleared(followed, attempt)
            items = self._remote(followed, attempt, span, request)
        async with closing(items) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _check_cleared(self, followed: _Followed, attempt: Attempt) -> None:
        """What passes through this node it could read, so it must be cleared for it."""
        lacking = uncleared(followed.task.spec.clearance, self._port.clearances)
        if not lacking or self._port.credentials is None:
            return
        peer = await self._peers.record(attempt.node, field="id")
        raise AskElsewhere(
            f"{self._port.name} is not cleared for {', '.join(lacking)}; the log lies on {attempt.node}",
            addresses=(peer.address,),
            field="id",
            object_=followed.id,
            reason="ask-node",
        )

    async def _local(
        self, followed: _Followed, attempt: Attempt, span: Span, request: api.LogRequest
    ) -> AsyncIterator[api.LogChunk]:
        path = self._port.log_path(followed.id, attempt.number, _NAMES[request.stream])
        progress = _Writer(followed, attempt.number) if request.follow else None
        try:
            async with closing(tail(path, span, progress, lambda: _name(followed, attempt, request))) as parts:
                async for part in parts:
                    yield api.LogChunk(data=part.data, offset=part.offset, attempt=attempt.number, node=self._port.name)
        except NoLog:
            now = followed.attempt(attempt.number) or attempt
            if now.reason == _SPAWN_FAILED:
                raise NoLog(
                    f"attempt {now.number} of task {followed.id} could not be started: {now.message}", field="id"
                ) from None
            if now.outcome is Outcome.NONE and not request.follow:
                return  # claimed a moment ago: nothing has been written yet
            raise

    async def _remote(
        self, followed: _Followed, attempt: Attempt, span: Span, request: api.LogRequest
    ) -> AsyncIterator[api.LogChunk]:
        """From the node that has it; while following, its daemon may be restarted in between."""
        position: int | None = None
        left = span.limit_bytes or None
        heard_s = time.monotonic()
        while True:
            ask = api.LogRequest(
                id=followed.id,
                stream=request.stream,
                attempt=attempt.number,
                follow=request.follow,
                local_only=True,
                limit_bytes=left or 0,
                offset=span.offset if position is None else position,
                tail_bytes=span.tail_bytes if position is None else 0,
            )
            try:
                peer = await self._peers.record(attempt.node, field="id")
                call = (await self._peers.stub(peer)).Log(ask, metadata=(FORWARDED,))
                try:
                    async for chunk in call:
                        heard_s = time.monotonic()
                        position = chunk.offset + len(chunk.data)
                        left = None if left is None else left - len(chunk.data)
                        yield chunk
                        if left is not None and left <= 0:
                            return
                    return
                finally:
                    call.cancel()
            except (UserError, grpc.aio.AioRpcError) as e:
                if isinstance(e, grpc.aio.AioRpcError) and e.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                patient = request.follow and time.monotonic() - heard_s < limits.LOG_RECONNECT_S
                if not patient or followed.is_passed_on(attempt.number):
                    raise _unreachable(followed, attempt, request, e) from e
            await followed.moved(limits.LOG_POLL_MAX_S)


async def _read(port: NodePort, task_id: TaskId) -> KeyValue:
    entry = (await port.store.read([keys.task(task_id)])).entries[keys.task(task_id)]
    if entry is None:
        raise lookup.missing(task_id, "id")
    return entry


def _not_begun(task: Task, number: int) -> UserError:
    if number > 1:
        return NotFound(
            f"task {task.id} has had {task.attempts_started} attempts", field="attempt", hint="0: the latest"
        )
    if task.state is State.COMPLETE:
        return NoLog(f"task {task.id} ended before it was started: {task.message}", field="id")
    return UserError(f"task {task.id} has not started yet", field="id", reason="not-started", hint="follow it")


def _name(followed: _Followed, attempt: Attempt, request: api.LogRequest) -> str:
    return f"the {_NAMES[request.stream]} log of attempt {attempt.number} of task {followed.id} on {attempt.node}"


def _unreachable(
    followed: _Followed, attempt: Attempt, request: api.LogRequest, e: UserError | grpc.aio.AioRpcError
) -> UserError:
    why = e.message if isinstance(e, UserError) else f"node {attempt.node} does not answer ({e.details()})"
    return UserError(
        f"{_name(followed, attempt, request)} cannot be had: {why}",
        field="id",
        reason="node-unreachable",
        hint=f"it lies on {attempt.node}; ask again when that node is back",
    )
