"""Commands beside running tasks, for programs without asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

from spinetta.client import execs

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Any]], Any]
Iterate = Callable[[AsyncGenerator[T, None]], Iterator[T]]


class Execution:
    """A command that runs. Made by `Client.exec`. One thread may send while another reads what the command writes.

    Attributes:
        task, attempt, node: beside what it runs, and where.
    """

    def __init__(self, execution: execs.Execution, run: Run, iterate: Iterate[execs.ExecOutput]) -> None:
        self._execution = execution
        self._run = run
        self._iterate = iterate
        self.task, self.attempt, self.node = execution.task, execution.attempt, execution.node

    @property
    def end(self) -> execs.ExecEnd | None:
        """How it ended, once `outputs` is through."""
        return self._execution.end

    def send(self, data: bytes) -> None:
        """To its standard input; waits while the command does not read, and is lost once it has ended.

        A command that writes much before it has read all waits for whoever reads `outputs`: do that in another thread.
        """
        self._run(self._execution.send(data))

    def end_input(self) -> None:
        """No more input."""
        self._run(self._execution.end_input())

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has another size."""
        self._run(self._execution.resize(rows, columns))

    def signal(self, number: int) -> None:
        """A signal to its process group."""
        self._run(self._execution.signal(number))

    def outputs(self) -> Iterator[execs.ExecOutput]:
        """What it writes, until it has ended.

        Raises:
            StoreUnavailable: the connection to it broke, or its block was left, and so it was ended.
        """
        return self._iterate(self._execution.outputs())


@contextmanager
def execute(
    opening: AbstractAsyncContextManager[execs.Execution],
    run: Run,
    iterate: Iterate[execs.ExecOutput],
    is_closed: Callable[[], bool],
) -> Iterator[Execution]:
    """See `AsyncClient.exec`. `is_closed`: the client, which has ended all its calls then."""
    execution: execs.Execution = run(_enter(opening))
    try:
        yield Execution(execution, run, iterate)
    finally:
        if not is_closed():
            run(_exit(opening))


async def _enter(opening: AbstractAsyncContextManager[execs.Execution]) -> execs.Execution:
    return await opening.__aenter__()


async def _exit(opening: AbstractAsyncContextManager[execs.Execution]) -> None:
    await opening.__aexit__(None, None, None)
