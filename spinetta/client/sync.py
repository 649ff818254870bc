"""The client for programs without asyncio: `AsyncClient` on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from spinetta import validate
from spinetta.client import execs, views
from spinetta.client.aio import AsyncClient
from spinetta.client.credentials import Bearer, Source
from spinetta.client.specs import TaskOptions
from spinetta.client.syncadmin import Admin
from spinetta.client.syncexecs import Execution, execute
from spinetta.client.syncimages import Images
from spinetta.config import DEFAULT_ADDRESS, ClientSettings
from spinetta.model import TaskId, TaskSpec
from spinetta.options import NO_CREDENTIALS

T = TypeVar("T")


CLOSE_LIMIT_S = 5.0  # for calls that are cancelled to end


class _LoopThread:
    """An event loop in a thread, and the end of both."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.closed = False
        self._thread = threading.Thread(target=self.loop.run_forever, name="spinetta-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it here."""
        if self.closed:
            work.close()
            raise RuntimeError("this client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread must end the call, too
            raise

    def close(self, client: AsyncClient) -> None:
        """End all calls, connections and the thread. May be called twice.

        Registered to run before the interpreter stops daemon threads: whoever waits for one after that waits for ever.
        """
        if self.closed:
            return
        if threading.current_thread() is self._thread:  # the garbage collector happened to run there
            self.closed = True
            self.loop.stop()
            return
        try:
            self.run(self._end_all(client))
        finally:
            self.closed = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    @staticmethod
    async def _end_all(client: AsyncClient) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=CLOSE_LIMIT_S)
        await asyncio.get_running_loop().shutdown_asyncgens()
        await client.close()


class Client:
    """Talks to a cluster through any of its nodes. Methods, arguments and errors are those of `AsyncClient`.

    May be used from several threads. Close it, or use it in a ``with`` statement. After a fork make a new one.
    """

    def __init__(
        self,
        nodes: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 20.0,
        credentials: Source | None = None,
        bearer: Bearer | None = None,
    ) -> None:
        self._client = AsyncClient(nodes, timeout_s=timeout_s, credentials=credentials, bearer=bearer)
        self._thread = _LoopThread()
        self.admin = Admin(self._client.admin, self._run)
        self.images = Images(self._client.images, self._run)
        self._end = weakref.finalize(self, self._thread.close, self._client)

    @classmethod
    def from_settings(cls, settings: ClientSettings) -> Self:
        """A client as the settings say."""
        return cls(
            settings.nodes,
            timeout_s=settings.timeout_s,
            credentials=settings.credentials if settings.credentials not in ("", NO_CREDENTIALS) else None,
            bearer=settings.bearer_file or None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections and end the thread. May be called twice."""
        self._end()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._thread.run(work)

    def _iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        try:
            while True:
                try:
                    yield self._run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(RuntimeError):  # the client was closed before the iterator: all has ended
                self._run(items.aclose())

    def submit(self, command: str | Sequence[str] | TaskSpec, **options: Unpack[TaskOptions]) -> TaskHandle:
        """Submit one task; options are those of `make_spec`. Trying again never makes two of it."""
        return TaskHandle(self, self._run(self._client.submit(command, **options)).id)

    def submit_many(self, specs: Iterable[TaskSpec]) -> list[views.Submitted]:
        """Submit tasks, in as few requests as their sizes allow; the answers are in order."""
        return self._run(self._client.submit_many(specs))

    def put_secret(self, name: str, content: bytes, *, owner: str = "", labels: Sequence[str] = ()) -> int:
        """Store a secret for one's tasks, or those of a project; its version."""
        return self._run(self._client.put_secret(name, content, owner=owner, labels=labels))

    def task(self, task_id: str) -> TaskHandle:
        """A handle for a task by its id or a unique fragment of it; asks nobody yet."""
        return TaskHandle(self, TaskId(validate.id_fragment(task_id, "id")))

    def get(self, task_id: str) -> views.TaskInfo:
        """One task by its id or a unique fragment of it."""
        return self._run(self._client.get(task_id))

    def get_many(self, ids: Sequence[str]) -> list[views.TaskInfo]:
        """Tasks by ids or unique fragments, in order."""
        return self._run(self._client.get_many(ids))

    def watch(
        self,
        wanted: views.TaskFilter = views.ALL_TASKS,
        *,
        ids: Sequence[str] = (),
    ) -> Iterator[views.TaskChanges]:
        """The tasks that match, then their changes, for ever."""
        return self._iterate(self._client.watch(wanted, ids=ids))

    def log(self, task_id: str, **options: Any) -> Iterator[views.LogChunk]:
        """A task's log, chunk by chunk; options are those of `AsyncClient.log`."""
        return self._iterate(self._client.log(task_id, **options))

    def exec(self, task_id: str, command: Sequence[str], **options: Any) -> AbstractContextManager[Execution]:
        """Run a command beside a running task; leaving the block ends it. Options are those of `AsyncClient.exec`."""
        opening = self._client.exec(task_id, command, **options)
        return execute(opening, self._run, self._iterate, lambda: self._thread.closed)

    def copy_out(
        self, task_id: str, path: str = "", *, attempt: int = 0
    ) -> Iterator[execs.CopiedEntry | bytes | execs.CopySkipped]:
        """A file or directory of a task's scratch space: first what it is, then bytes; as `AsyncClient.copy_out`."""
        return self._iterate(self._client.copy_out(task_id, path, attempt=attempt))

    def wait(self, ids: Sequence[str], *, timeout_s: float | None = None, any_: bool = False) -> views.WaitResult:
        """Wait until all (or any) of the tasks have ended."""
        return self._run(self._client.wait(ids, timeout_s=timeout_s, any_=any_))

    def cancel(self, ids: Sequence[str], reason: str = "") -> list[views.CancelResult]:
        """Cancel tasks: waiting ones are over when this answers, of running ones the node has been asked."""
        return self._run(self._client.cancel(ids, reason))

    def list_archived(self, wanted: views.TaskFilter = views.ALL_TASKS, **options: Any) -> Iterator[views.ArchivedPage]:
        """Finished tasks that have left the cluster's store, in pages; options as of `AsyncClient.list_archived`."""
        return self._iterate(self._client.list_archived(wanted, **options))

    def nodes(self) -> views.NodeList:
        """All nodes, and notices for their administrators."""
        return self._run(self._client.nodes())

    def cluster(self) -> views.ClusterInfo:
        """The cluster, as the node that answers sees it."""
        return self._run(self._client.cluster())

    def drain(self, node: str = "", *, release: bool = False, force: bool = False) -> None:
        """A node takes no more tasks and gives back what it has not started; with `release` see `AsyncClient.drain`."""
        self._run(self._client.drain(node, release=release, force=force))

    def undrain(self, node: str = "") -> None:
        """A drained node takes tasks again."""
        self._run(self._client.undrain(node))

    def confirm_dead(self, node: str) -> views.ConfirmedDead:
        """Vouch that nothing runs any more on a lost node."""
        return self._run(self._client.confirm_dead(node))

    def leave(self, node: str = "", *, timeout_s: float | None = None) -> Iterator[views.LeaveStep]:
        """A node drains, gives up its seat, deregisters and ends."""
        return self._iterate(self._client.leave(node, timeout_s=timeout_s))

    # Last, because within the class its name hides the type's.
    def list(self, wanted: views.TaskFilter = views.ALL_TASKS, **options: Any) -> Iterator[views.TaskInfo]:
        """Tasks in order of submission; options ``newest_first``, ``limit``, ``page_size``, ``with_usage``."""
        return self._iterate(self._client.list(wanted, **options))


class TaskHandle:
    """A submitted task."""

    def __init__(self, client: Client, task_id: TaskId) -> None:
        self._client = client
        self.id = task_id

    def __repr__(self) -> str:
        return f"<task {self.id}>"

    def status(self) -> views.TaskInfo:
        """The task as it is now."""
        return self._client.get(self.id)

    def wait(self, timeout_s: float | None = None) -> views.TaskInfo:
        """The task once it has ended.

        Raises:
            TimeoutError: it has not within `timeout_s`.
        """
        result = self._client.wait([self.id], timeout_s=timeout_s)
        if result.timed_out:
            raise TimeoutError(f"task {self.id} has not ended within {timeout_s} s")
        return result.tasks[0]

    def cancel(self, reason: str = "") -> views.CancelResult:
        """Cancel it."""
        return self._client.cancel([self.id], reason)[0]

    def log(self, **options: Any) -> Iterator[views.LogChunk]:
        """Its log; options are those of `AsyncClient.log`."""
        return self._client.log(self.id, **options)

    def exec(self, command: Sequence[str], **options: Any) -> AbstractContextManager[Execution]:
        """Run a command beside it; options are those of `AsyncClient.exec`."""
        return self._client.exec(self.id, command, **options)

    def copy_out(self, path: str = "", *, attempt: int = 0) -> Iterator[execs.CopiedEntry | bytes | execs.CopySkipped]:
        """A file or directory of its scratch space; see `AsyncClient.copy_out`."""
        return self._client.copy_out(self.id, path, attempt=attempt)
