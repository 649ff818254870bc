"""The client for asyncio. `spinetta.client.sync` is the same for everyone else."""

from __future__ import annotations

import contextlib
import time as clock
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from spinetta import validate
from spinetta.client import execs, streams, views
from spinetta.client.admin import AsyncAdmin
from spinetta.client.channels import Nodes
from spinetta.client.credentials import Bearer, Source, check_reachable, make_dialer
from spinetta.client.images import AsyncImages
from spinetta.client.requests import check_fragments, node_or_empty, parse_nodes, parts, submit_requests
from spinetta.client.sealing import STALE, TRIES_MAX, Sealer
from spinetta.client.specs import TaskOptions, make_spec
from spinetta.config import DEFAULT_ADDRESS, ClientSettings
from spinetta.errors import UserError
from spinetta.model import State, TaskId, TaskSpec
from spinetta.options import NO_CREDENTIALS
from spinetta.v1 import api_pb2 as api

T = TypeVar("T")

WAIT_POLL_S = 30.0  # one Wait call: longer ones would notice a frozen node too late
WAIT_MARGIN_S = 5.0
_STREAMS = {"stdout": api.STDOUT, "stderr": api.STDERR}


class AsyncClient:
    """Talks to a cluster through any of its nodes.

    Every call is tried at the other nodes, too, while there is time. Errors: `UserError` (with `NotFound` and
    `AlreadyExists`) for what the cluster refuses, `StoreUnavailable` when no node could answer and nothing was
    changed, `OutcomeUnknown` when something may have been.

    Attributes:
        admin: who may be here, and with which rights.
        images: images of containers on nodes.

    Args:
        nodes: addresses, in order of preference.
        timeout_s: for one call with all its retries; waiting and following have limits of their own.
        first_contact_s: the same, for as long as no node has ever answered; None: no shorter.
        credentials: of a secured cluster: the file that `spinetta login` wrote, or what is in it. None: plain text,
            on loopback only.
        bearer: an OIDC bearer token's file, read at each call, or what gives the token. It says who is calling, and
            `credentials` then only which authorities to believe.
    """

    def __init__(
        self,
        nodes: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 20.0,
        first_contact_s: float | None = None,
        credentials: Source | None = None,
        bearer: Bearer | None = None,
    ) -> None:
        patience_s = timeout_s if first_contact_s is None else first_contact_s
        dialer = make_dialer(credentials, bearer)
        addresses = parse_nodes(nodes)
        check_reachable(addresses, dialer)
        self._nodes = Nodes(addresses, timeout_s, patience_s, dialer)
        self.admin = AsyncAdmin(self._nodes)
        self.images = AsyncImages(self._nodes)
        self._sealer = Sealer(self._nodes)

    @classmethod
    def from_settings(cls, settings: ClientSettings, *, first_contact_s: float | None = None) -> Self:
        """A client as the settings say."""
        return cls(
            settings.nodes,
            timeout_s=settings.timeout_s,
            first_contact_s=first_contact_s,
            credentials=settings.credentials if settings.credentials not in ("", NO_CREDENTIALS) else None,
            bearer=settings.bearer_file or None,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        await self._nodes.close()

    # --- tasks -------------------------------------------------------------------------------------------------

    async def submit(self, command: str | Sequence[str] | TaskSpec, **options: Unpack[TaskOptions]) -> AsyncTaskHandle:
        """Submit one task; options are those of `make_spec`. Trying again never makes two of it."""
        if options and isinstance(command, TaskSpec):
            raise UserError("options beside a specification", field=next(iter(options)), hint="give them to make_spec")
        spec = command if isinstance(command, TaskSpec) else make_spec(command, **options)
        done = await self.submit_many([spec])
        return AsyncTaskHandle(self, done[0].id)

    async def submit_many(self, specs: Iterable[TaskSpec]) -> list[views.Submitted]:
        """Submit tasks, in as few requests as their sizes allow; the answers are in order.

        Checked as a whole before anything is sent. When a later request fails, the tasks of those before it are
        submitted: try again with the same ids, which changes nothing for them. What tasks with clearance labels run
        is sealed here: no node that is not cleared for it can read it, nor can `get` show it.
        """
        checked = list(specs)
        seen: dict[str, int] = {}
        for i, spec in enumerate(checked):
            validate.check_spec(spec, f"tasks[{i}]", to_be_sealed=True)
            if seen.setdefault(spec.id, i) != i:
                raise UserError(
                    f"the id of tasks[{seen[spec.id]}] is given again",
                    field=f"tasks[{i}].id",
                    hint="give each task its own id",
                )
        try:
            return await self._submit_sealed(checked)
        finally:
            self._sealer.trim()

    async def _submit_sealed(self, specs: Sequence[TaskSpec]) -> list[views.Submitted]:
        done: list[views.Submitted] = []
        ready = await self._sealer.seal(specs)
        tries = 1
        while len(done) < len(specs):
            try:
                for request in submit_requests(ready[len(done) :]):
                    answer = await self._submit(request, first=len(done))
                    done += [views.Submitted(TaskId(t.id), t.existed) for t in answer.tasks]
            except UserError as e:
                if e.reason != STALE or tries >= TRIES_MAX:
                    raise
                tries += 1
                ready = await self._sealer.seal(specs, anew=True)
        return done

    async def put_secret(self, name: str, content: bytes, *, owner: str = "", labels: Sequence[str] = ()) -> int:
        """Store a secret for one's tasks, or those of a project; its version. See `Sealer.put_secret`."""
        return await self._sealer.put_secret(name, content, owner=owner, labels=labels)

    async def _submit(self, request: api.SubmitRequest, first: int) -> api.SubmitResponse:
        try:
            return await self._nodes.call(lambda stub: stub.Submit, request, writes=True)
        except UserError as e:
            # The node counts within the request, the caller within all of them.
            if first and e.field.startswith("tasks["):
                index, bracket, rest = e.field.removeprefix("tasks[").partition("]")
                if bracket and index.isdecimal():
                    e.field = f"tasks[{int(index) + first}]{rest}"
            raise

    def task(self, task_id: str) -> AsyncTaskHandle:
        """A handle for a task by its id or a unique fragment of it; asks nobody yet."""
        return AsyncTaskHandle(self, TaskId(validate.id_fragment(task_id, "id")))

    async def get(self, task_id: str) -> views.TaskInfo:
        """One task by its id or a unique fragment of it."""
        return (await self.get_many([task_id]))[0]

    async def get_many(self, ids: Sequence[str]) -> list[views.TaskInfo]:
        """Tasks by ids or unique fragments, in order. Raises NotFound when any is missing."""
        found: list[views.TaskInfo] = []
        for part in parts(check_fragments(ids), validate.GET_IDS_MAX):
            answer = await self._get(part)
            for m in answer.tasks:
                # One alone always fits.
                whole = m if not m.spec_omitted else (await self._get([m.task.spec.id])).tasks[0]
                found.append(views.task_info(whole))
        return found

    async def _get(self, ids: Sequence[str]) -> api.GetResponse:
        request = api.GetRequest(ids=ids)
        return await self._nodes.call(lambda stub: stub.Get, request)

    async def cancel(self, ids: Sequence[str], reason: str = "") -> list[views.CancelResult]:
        """Cancel tasks: waiting ones are over when this answers, of running ones the node has been asked."""
        validate.check_reason(reason)
        done: list[views.CancelResult] = []
        for part in parts(check_fragments(ids), validate.GET_IDS_MAX):
            answer = await self._cancel(api.CancelRequest(ids=part, reason=reason))
            done += [views.CancelResult(TaskId(c.id), State(c.state), c.was_complete) for c in answer.tasks]
        return done

    async def _cancel(self, request: api.CancelRequest) -> api.CancelResponse:
        return await self._nodes.call(lambda stub: stub.Cancel, request, writes=True)

    async def wait(self, ids: Sequence[str], *, timeout_s: float | None = None, any_: bool = False) -> views.WaitResult:
        """Wait until all (or any) of the tasks have ended; `timeout_s` None: for as long as it takes.

        Goes on at another node when the one that was asked goes away.
        """
        fragments = check_fragments(ids)
        if any_ and len(fragments) > validate.WAIT_IDS_MAX:
            raise UserError(
                f"{len(fragments)} tasks to wait for any of", field="ids", hint=f"at most {validate.WAIT_IDS_MAX}"
            )
        if timeout_s is not None:
            validate.check_wait_timeout(timeout_s)
        end_s = None if timeout_s is None else clock.monotonic() + timeout_s
        found: list[views.TaskInfo] = []
        timed_out = False
        for part in parts(fragments, validate.WAIT_IDS_MAX):
            answer = await self._wait(part, end_s, any_=any_)
            found += [views.task_info(m) for m in answer.tasks]
            timed_out = timed_out or answer.timed_out
        return views.WaitResult(tuple(found), timed_out)

    async def _wait(self, ids: Sequence[str], end_s: float | None, *, any_: bool) -> api.WaitResponse:
        while True:
            left_s = WAIT_POLL_S if end_s is None else end_s - clock.monotonic()
            # 0 would mean: as long as you like.
            poll_s = max(min(left_s, WAIT_POLL_S), 0.001)
            request = api.WaitRequest(ids=ids, timeout_s=poll_s, any=any_)
            answer = await self._nodes.call(
                lambda stub: stub.Wait,
                request,
                timeout_s=poll_s + max(WAIT_MARGIN_S, self._nodes.timeout_s),
                attempt_s=poll_s + WAIT_MARGIN_S,
            )
            if not answer.timed_out or (end_s is not None and clock.monotonic() >= end_s):
                return answer

    async def watch(
        self,
        wanted: views.TaskFilter = views.ALL_TASKS,
        *,
        ids: Sequence[str] = (),
    ) -> AsyncGenerator[views.TaskChanges, None]:
        """The tasks that match, then their changes, for ever; goes on at another node when one goes away."""
        request = api.WatchRequest(filter=views.filter_to_pb(wanted), ids=check_fragments(ids) if ids else [])
        async with contextlib.aclosing(streams.watch(self._nodes, request)) as changes:
            async for change in changes:
                yield change

    async def log(
        self,
        task_id: str,
        *,
        stream: str = "stdout",
        follow: bool = False,
        attempt: int = 0,
        offset: int = 0,
        limit_bytes: int = 0,
        tail_bytes: int = 0,
        on_gap: Callable[[str], None] = lambda _why: None,
    ) -> AsyncGenerator[views.LogChunk, None]:
        """A task's log, chunk by chunk.

        With `follow` until the task has ended (over all attempts, when `attempt` is 0), going on at the same byte
        through another node when one goes away.

        Args:
            task_id: id or unique fragment.
            stream: ``stdout`` or ``stderr``.
            follow: wait for more.
            attempt: which; 0: the latest.
            offset: bytes to skip.
            limit_bytes: 0: none.
            tail_bytes: > 0: begin this many bytes before the end.
            on_gap: told why nothing can be had for a while, when the node goes away; then it goes on at the same byte.
        """
        if stream not in _STREAMS:
            raise UserError(f"there is no stream {stream!r}", field="stream", hint="stdout or stderr")
        request = api.LogRequest(
            id=validate.id_fragment(task_id, "id"),
            stream=_STREAMS[stream],
            offset=offset,
            follow=follow,
            attempt=attempt,
            limit_bytes=limit_bytes,
            tail_bytes=tail_bytes,
        )
        async with contextlib.aclosing(streams.log(self._nodes, request, on_gap)) as chunks:
            async for chunk in chunks:
                yield chunk

    def exec(
        self,
        task_id: str,
        command: Sequence[str],
        *,
        terminal: tuple[int, int] | None = None,
        takes_input: bool = False,
        working_directory: str = "",
        env: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[execs.Execution]:
        """Run a command beside a running task: on its node, within its limits; leaving the block ends it.

        Args:
            task_id: id or unique fragment.
            command: program and arguments.
            terminal: give it a terminal of so many rows and columns; None: three pipes.
            takes_input: input will be sent; else it has none.
            working_directory: relative to that of the task.
            env: beside the task's own variables.

        Raises:
            UserError: the task does not run (``not-running``), the command cannot be started (``cannot-start``), or its
                node does not answer.
            StoreUnavailable: no node could be reached.
        """
        return execs.execute(
            self._nodes,
            task_id,
            command,
            terminal=terminal,
            takes_input=takes_input,
            working_directory=working_directory,
            env=env or {},
        )

    def copy_out(
        self, task_id: str, path: str = "", *, attempt: int = 0
    ) -> AsyncGenerator[execs.CopiedEntry | bytes | execs.CopySkipped, None]:
        """A file or directory of a task's scratch space: first what it is, then its bytes.

        Of a directory those are a tar archive; then what had to be left out, if anything.

        Args:
            task_id: id or unique fragment.
            path: within the scratch space; empty: all of it.
            attempt: which; 0: the latest.
        """
        return execs.copy_out(self._nodes, task_id, path, attempt)

    async def list_archived(
        self,
        wanted: views.TaskFilter = views.ALL_TASKS,
        *,
        since_ms: int = 0,
        before_ms: int = 0,
        newest_first: bool = False,
        limit: int = 0,
    ) -> AsyncGenerator[views.ArchivedPage, None]:
        """Finished tasks that have left the cluster's store, in order of submission, page by page.

        Args:
            wanted: which.
            since_ms: submitted then or later, in milliseconds since 1970; 0: any time.
            before_ms: submitted before then; 0: any time.
            newest_first: the other order.
            limit: of tasks in all; 0: all.
        """
        token, left = "", limit
        while True:
            request = api.ListArchivedRequest(
                filter=views.filter_to_pb(wanted),
                page_size=min(left, validate.LIST_PAGE_MAX) if limit else 0,
                page_token=token,
                newest_first=newest_first,
                since_ms=since_ms,
                before_ms=before_ms,
            )
            answer = await self._nodes.call(lambda stub: stub.ListArchived, request)
            tasks = tuple(views.task_info(m) for m in answer.tasks)
            yield views.ArchivedPage(tasks, {s.node: s.why for s in answer.silent})
            token, left = answer.next_page_token, left - len(tasks)
            if not token or (limit and left <= 0):
                return

    # --- nodes -------------------------------------------------------------------------------------------------

    async def nodes(self) -> views.NodeList:
        """All nodes, and notices for their administrators."""
        request = api.ListNodesRequest()
        answer = await self._nodes.call(lambda stub: stub.ListNodes, request)
        found = sorted((views.node_info(m) for m in answer.nodes), key=lambda n: n.record.name)
        return views.NodeList(tuple(found), tuple(answer.notices))

    async def cluster(self) -> views.ClusterInfo:
        """The cluster, as the node that answers sees it."""
        request = api.DescribeClusterRequest()
        answer = await self._nodes.call(lambda stub: stub.DescribeCluster, request)
        return views.cluster_info(answer, self._nodes.answered_by())

    async def drain(self, node: str = "", *, release: bool = False, force: bool = False) -> None:
        """A node takes no more tasks, and gives back what it has not started. Empty: the node that is asked.

        It stays so until `undrain`, whatever is restarted.

        Args:
            node: its name.
            release: running tasks go back to the queue, too, except those that must not be started twice …
            force: … those as well.
        """
        request = api.DrainRequest(node=node_or_empty(node), release=release, force=force)
        await self._nodes.call(lambda stub: stub.Drain, request, writes=True)

    async def undrain(self, node: str = "") -> None:
        """A drained node takes tasks again."""
        request = api.UndrainRequest(node=node_or_empty(node))
        await self._nodes.call(lambda stub: stub.Undrain, request, writes=True)

    async def confirm_dead(self, node: str) -> views.ConfirmedDead:
        """Vouch that nothing runs any more on a lost node: its tasks are put back without the wait for its certain end.

        If that is wrong, two attempts of a task may run at once; still one result is recorded.

        Raises:
            UserError: it is alive, or not known.
        """
        request = api.ConfirmDeadRequest(node=node_or_empty(node))
        answer = await self._nodes.call(lambda stub: stub.ConfirmDead, request, writes=True)
        return views.ConfirmedDead(answer.incarnation, answer.running, answer.was_dead)

    async def leave(self, node: str = "", *, timeout_s: float | None = None) -> AsyncGenerator[views.LeaveStep, None]:
        """A node drains, gives up its seat, deregisters and ends. After `timeout_s` (None: its own
        setting) its tasks go back to the queue.

        Ends after the step that is `done`. When the connection breaks before it: `OutcomeUnknown`; ask `nodes`.
        """
        if timeout_s is not None:
            validate.check_wait_timeout(timeout_s)
        request = api.LeaveRequest(node=node_or_empty(node), timeout_s=timeout_s)
        answers = self._nodes.stream(lambda stub: stub.Leave, request, writes=True)
        async with contextlib.aclosing(answers) as steps:
            async for m in steps:
                yield views.LeaveStep(m.step, m.running, m.done)
                if m.done:
                    return

    # Last, because within the class its name hides the type's.
    async def list(
        self,
        wanted: views.TaskFilter = views.ALL_TASKS,
        *,
        newest_first: bool = False,
        limit: int = 0,
        page_size: int = 0,
        with_usage: bool = False,
    ) -> AsyncGenerator[views.TaskInfo, None]:
        """Tasks in order of submission, page by page; `limit` 0: all. `with_usage`: also what running ones use now."""
        token, left = "", limit
        while True:
            size = min(left, validate.LIST_PAGE_MAX) if limit and not page_size else page_size
            request = api.ListRequest(
                filter=views.filter_to_pb(wanted),
                page_size=size,
                page_token=token,
                newest_first=newest_first,
                with_usage=with_usage,
            )
            answer = await self._list(request)
            for m in answer.tasks:
                yield views.task_info(m)
                left -= 1
                if limit and left <= 0:
                    return
            token = answer.next_page_token
            if not token:
                return

    async def _list(self, request: api.ListRequest) -> api.ListResponse:
        return await self._nodes.call(lambda stub: stub.List, request)


class AsyncTaskHandle:
    """A submitted task."""

    def __init__(self, client: AsyncClient, task_id: TaskId) -> None:
        self._client = client
        self.id = task_id

    def __repr__(self) -> str:
        return f"<task {self.id}>"

    async def status(self) -> views.TaskInfo:
        """The task as it is now."""
        return await self._client.get(self.id)

    async def wait(self, timeout_s: float | None = None) -> views.TaskInfo:
        """The task once it has ended.

        Raises:
            TimeoutError: it has not within `timeout_s`.
        """
        result = await self._client.wait([self.id], timeout_s=timeout_s)
        if result.timed_out:
            raise TimeoutError(f"task {self.id} has not ended within {timeout_s} s")
        return result.tasks[0]

    async def cancel(self, reason: str = "") -> views.CancelResult:
        """Cancel it."""
        return (await self._client.cancel([self.id], reason))[0]

    def log(self, **options: Any) -> AsyncIterator[views.LogChunk]:
        """Its log; options are those of `AsyncClient.log`."""
        return self._client.log(self.id, **options)

    def exec(self, command: Sequence[str], **options: Any) -> AbstractAsyncContextManager[execs.Execution]:
        """Run a command beside it; options are those of `AsyncClient.exec`."""
        return self._client.exec(self.id, command, **options)

    def copy_out(
        self, path: str = "", *, attempt: int = 0
    ) -> AsyncGenerator[execs.CopiedEntry | bytes | execs.CopySkipped, None]:
        """A file or directory of its scratch space; see `AsyncClient.copy_out`."""
        return self._client.copy_out(self.id, path, attempt=attempt)
