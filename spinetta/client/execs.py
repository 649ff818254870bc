"""Commands beside running tasks, and files out of their scratch spaces."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import AsyncGeneratorType
from typing import Any, cast

from spinetta import validate
from spinetta.client.channels import Nodes
from spinetta.errors import StoreUnavailable
from spinetta.model import TaskId
from spinetta.v1 import api_pb2 as api

INPUT_BYTES_MAX = 256 << 10  # of one message
_AHEAD = 4  # messages that wait to be sent: whoever gives more waits


@dataclass(frozen=True, slots=True)
class ExecOutput:
    """Bytes that the command wrote; `is_error`: to standard error (never with a terminal)."""

    data: bytes
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class ExecEnd:
    """How the command ended: by `signal` if that is not 0. `message`: why it was ended, when not by itself."""

    exit_code: int
    signal: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class CopiedEntry:
    """What is copied: a file, or a directory, whose bytes are then those of a tar archive.

    `name` is the last part of its path, empty for all of the scratch space. `size_bytes` is a file's; it may grow.
    """

    task: TaskId
    attempt: int
    node: str
    name: str
    is_directory: bool
    size_bytes: int
    mode: int
    modified_ms: int


@dataclass(frozen=True, slots=True)
class CopySkipped:
    """What was left out of a directory: neither file, directory nor symbolic link, or unreadable; some of the names."""

    names: tuple[str, ...]
    count: int


class _Requests:
    """What is sent: the start again to each node that is asked, the rest to the one that has begun."""

    def __init__(self, start: api.ExecStart) -> None:
        self._start = start
        self.id = start.id  # of the task; a node that we are sent to by another wants all of it
        self.queue: asyncio.Queue[api.ExecRequest | None] = asyncio.Queue(_AHEAD)
        self.is_over = False
        self.call: Any = None  # to the present node
        self.is_left = False  # by the block within which the command runs

    async def sent(self) -> AsyncIterator[api.ExecRequest]:
        """To one node."""
        self.end()  # of what was sent to the one before: gRPC goes on reading what a call that has failed would send
        queue = self.queue = asyncio.Queue(_AHEAD)
        self._start.id = self.id
        yield api.ExecRequest(start=self._start)
        while (request := await queue.get()) is not None:
            yield request

    def end(self) -> None:
        """Nothing more is sent to the present node."""
        with contextlib.suppress(asyncio.QueueFull):  # then nobody waits for more
            self.queue.put_nowait(None)

    def leave(self) -> None:
        """End the call, and so the command, also while somebody waits for what it writes."""
        self.is_left = True
        self.close()
        if self.call is not None:
            self.call.cancel()

    def close(self) -> None:
        """Nor to another; who waits to send need not wait any longer."""
        self.is_over = True
        while not self.queue.empty():
            self.queue.get_nowait()
        self.end()


class Execution:
    """A command that runs. Made by `AsyncClient.exec`.

    Attributes:
        task, attempt, node: beside what it runs, and where.
        end: how it ended, once `outputs` is through.
    """

    def __init__(
        self, started: api.ExecStarted, requests: _Requests, answers: AsyncGenerator[api.ExecResponse, None]
    ) -> None:
        self.task, self.attempt, self.node = TaskId(started.id), started.attempt, started.node
        self.end: ExecEnd | None = None
        self._requests = requests
        self._answers = answers

    async def send(self, data: bytes) -> None:
        """To its standard input; waits while the command does not read, and is lost once it has ended."""
        for i in range(0, len(data), INPUT_BYTES_MAX):
            await self._put(api.ExecRequest(input=data[i : i + INPUT_BYTES_MAX]))

    async def end_input(self) -> None:
        """No more input."""
        await self._put(api.ExecRequest(input_end=True))

    async def resize(self, rows: int, columns: int) -> None:
        """The terminal has another size."""
        await self._put(api.ExecRequest(resize=api.WindowSize(rows=rows, columns=columns)))

    async def signal(self, number: int) -> None:
        """A signal to its process group."""
        await self._put(api.ExecRequest(signal=number))

    async def outputs(self) -> AsyncGenerator[ExecOutput, None]:
        """What it writes, until it has ended.

        Raises:
            StoreUnavailable: the connection to it broke, or its block was left, and so it was ended.
        """
        try:
            async for answer in self._answers:
                match answer.WhichOneof("what"):
                    case "output":
                        yield ExecOutput(answer.output)
                    case "errors":
                        yield ExecOutput(answer.errors, is_error=True)
                    case "ended":
                        ended = answer.ended
                        self.end = ExecEnd(ended.exit_code, ended.signal, ended.message)
        except StoreUnavailable as e:
            raise self._lost(str(e)) from e
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._requests.is_left or task is None or task.cancelling():
                raise
            # Nobody has cancelled the reader: so gRPC tells it that the call was cancelled.
        finally:
            self._requests.close()
        if self.end is None and self._requests.is_left:
            raise StoreUnavailable(f"the block of the command was left, which ended it; task {self.task} goes on")
        if self.end is None:
            raise self._lost(f"node {self.node} ended the call")

    def _lost(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"the connection to the command broke: {why}; it was ended, task {self.task} goes on",
            hint="the node's daemon may have been restarted; try again",
        )

    async def _put(self, request: api.ExecRequest) -> None:
        if not self._requests.is_over:
            await self._requests.queue.put(request)


@asynccontextmanager
async def execute(
    nodes: Nodes,
    task_id: str,
    command: Sequence[str],
    *,
    terminal: tuple[int, int] | None,
    takes_input: bool,
    working_directory: str,
    env: Mapping[str, str],
) -> AsyncIterator[Execution]:
    """See `AsyncClient.exec`."""
    validate.check_exec(command, env, working_directory)
    start = api.ExecStart(
        id=validate.id_fragment(task_id, "id"),
        command=command,
        terminal=terminal is not None,
        takes_input=takes_input,
        working_directory=working_directory,
        env=env,
    )
    if terminal is not None:
        start.size.rows, start.size.columns = terminal
    requests = _Requests(start)

    def method(stub: Any) -> Any:
        def begin(sent: _Requests) -> Any:
            sent.call = stub.Exec(sent.sent())
            return sent.call

        return begin

    # Not a call of one request; of a stream of requests the node is found in the same way.
    answers = cast("AsyncGeneratorType[api.ExecResponse, None]", nodes.stream(method, requests))
    try:
        async for answer in answers:
            yield Execution(answer.started, requests, answers)
            return
        raise StoreUnavailable("the node ended the call without an answer")
    finally:
        requests.leave()
        if not answers.ag_running:  # else whoever reads is told, and closes it
            await answers.aclose()


async def copy_out(
    nodes: Nodes, task_id: str, path: str, attempt: int
) -> AsyncGenerator[CopiedEntry | bytes | CopySkipped, None]:
    """See `AsyncClient.copy_out`."""
    request = api.CopyOutRequest(id=validate.id_fragment(task_id, "id"), path=path, attempt=attempt)
    async with contextlib.aclosing(nodes.stream(lambda stub: stub.CopyOut, request)) as chunks:
        async for chunk in chunks:
            if chunk.HasField("entry"):
                e = chunk.entry
                yield CopiedEntry(
                    TaskId(e.id), e.attempt, e.node, e.name, e.is_directory, e.size_bytes, e.mode, e.modified_ms
                )
            if chunk.data:
                yield chunk.data
            if chunk.skipped_count:
                yield CopySkipped(tuple(chunk.skipped), chunk.skipped_count)
