"""Readers of a log that is cut while they read it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spinetta.errors import UserError
from spinetta.model import Reason
from spinetta.node.services.tail import Part, Span, tail
from spinetta.runtime.shim.logcap import cut, marker
from tests.contract.shims import asynchronous, end_of, isolate, runtime, shell, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, state_dir)  # fixtures
LIMIT = 1000
END = marker(LIMIT)
KEPT = LIMIT - len(END)


class Task:
    """Over when it is told so."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def ends(self) -> None:
        self._over.set()

    async def moved(self, timeout_s: float) -> None:
        await asyncio.wait([asyncio.ensure_future(self._over.wait())], timeout=min(timeout_s, 0.02))


class Reader:
    """Reads a log in the background."""

    def __init__(self, path: Path, span: Span, task: Task | None) -> None:
        self.parts: list[Part] = []
        self.done = asyncio.create_task(self._read(path, span, task))

    async def _read(self, path: Path, span: Span, task: Task | None) -> None:
        async for part in tail(path, span, task, lambda: "the log"):
            self.parts.append(part)

    @property
    def data(self) -> bytes:
        return b"".join(part.data for part in self.parts)

    async def until(self, condition: Callable[[bytes], bool]) -> None:
        await until(lambda: self.done.done() or condition(self.data))
        assert condition(self.data), self.data[-100:]


def write(path: Path, data: bytes) -> None:
    with path.open("ab") as log:
        log.write(data)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "stdout"


@asynchronous
async def test_followed_from_the_beginning(log: Path) -> None:
    task = Task()
    reader = Reader(log, Span(), task)
    write(log, b"x" * 900)
    await reader.until(lambda data: len(data) == 900)
    write(log, b"y" * 600)  # read before it is cut away, and never again
    await reader.until(lambda data: len(data) == 1500)
    cut(str(log), LIMIT)
    await reader.until(lambda data: data == b"x" * 900 + b"y" * 600 + END)
    assert reader.parts[-1].offset == KEPT
    write(log, b"more that is about to go")
    cut(str(log), LIMIT)
    task.ends()
    await reader.done
    assert reader.data == b"x" * 900 + b"y" * 600 + END


@asynchronous
async def test_followed_after_it_was_cut_and_still_written_to(log: Path) -> None:
    task = Task()
    write(log, b"x" * 3000)
    cut(str(log), LIMIT)
    write(log, b"about to go")
    reader = Reader(log, Span(), task)
    late = Reader(log, Span(offset=2500), task)  # went on elsewhere, after what was cut away
    await reader.until(lambda data: data.endswith(END))
    assert not reader.done.done()
    cut(str(log), LIMIT)
    await late.until(lambda data: data == END)
    assert late.parts[0].offset + len(late.parts[0].data) == LIMIT
    task.ends()
    await reader.done
    await late.done
    assert reader.data == b"x" * KEPT + END


@asynchronous
async def test_the_marker_comes_in_two_parts(log: Path) -> None:
    task = Task()
    write(log, b"x" * KEPT + END[:20])
    reader = Reader(log, Span(), task)
    await reader.until(lambda data: len(data) == KEPT + 20)
    write(log, END[20:] + b"never seen")
    await reader.until(lambda data: data.endswith(END))
    task.ends()
    await reader.done
    assert reader.data == b"x" * KEPT + END


@asynchronous
async def test_read_once(log: Path) -> None:
    write(log, b"x" * 3000)
    cut(str(log), LIMIT)
    write(log, b"about to go")
    for span, seen in (
        (Span(), b"x" * KEPT + END),
        (Span(offset=KEPT + 1), END[1:]),
        (Span(offset=LIMIT), b""),
        (Span(offset=LIMIT + 3), b""),
        (Span(limit_bytes=5), b"xxxxx"),
    ):
        reader = Reader(log, span, None)
        await reader.done
        assert reader.data == seen
    cut(str(log), LIMIT)
    reader = Reader(log, Span(tail_bytes=len(END) + 3), None)
    await reader.done
    assert reader.data == b"xxx" + END


@asynchronous
async def test_one_that_only_looks_cut_is_read_on_and_one_that_was_emptied_is_told(log: Path) -> None:
    task = Task()
    write(log, b"x" * 10 + END + b"goes on")
    reader = Reader(log, Span(), task)
    await reader.until(lambda data: data.endswith(b"goes on"))
    os.truncate(log, 3)
    with pytest.raises(UserError, match="became shorter while it was read: 3 bytes"):
        await reader.done


@asynchronous
async def test_a_task_that_writes_without_end_is_followed(state_dir: Path) -> None:
    """The whole of it: the shim's watcher cuts, the task goes on writing, and a reader follows from the first byte."""
    limit, task = 200_000, Task()
    async with runtime(state_dir) as rt:
        endless = "n=0; while :; do n=$((n+1)); echo line $n; done"
        assert await rt.start(shell("endless.1", endless, log_bytes_max=limit)) is None
        path = rt.log_path("endless.1", "stdout")
        reader = Reader(path, Span(), task)
        await reader.until(lambda data: data.endswith(marker(limit)))
        size = len(reader.data)
        await until(lambda: path.stat().st_size > limit)  # still at it
        await rt.stop("endless.1", Reason.CANCELLED)
        assert (await end_of(rt, "endless.1")).message.startswith("stdout was cut")
        task.ends()
        await reader.done
        assert len(reader.data) == size
        assert reader.data.startswith(b"line 1\nline 2\n")
        late = Reader(path, Span(), None)
        await late.done
        assert late.data == path.read_bytes()
        assert len(late.data) == limit
