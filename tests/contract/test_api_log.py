"""Log: from here, from another node, while it grows, across attempts, and when it cannot be had."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from spinetta import keys
from spinetta.model import Exit, NodeId, Reason, TaskId
from spinetta.node.services import limits
from spinetta.v1 import api_pb2 as api
from tests.contract.api_world import (
    Etcd,
    Node,
    announce,
    delete,
    etcd,
    etcd_member,
    eventually,
    failure,
    node,
    run,
    spec,
)

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode


class Following:
    """A client that follows a log."""

    def __init__(self, n: Node, task_id: str, **fields: Any) -> None:
        self.call = n.api.Log(api.LogRequest(id=task_id, follow=True, **fields))
        self.chunks: list[api.LogChunk] = []
        self.end = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for chunk in self.call:
            self.chunks.append(chunk)

    @property
    def data(self) -> bytes:
        return b"".join(c.data for c in self.chunks)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await eventually(lambda: condition() or self.end.done(), what=what)
        if not condition():
            await self.end
        assert condition(), f"{what}; got {self.data[-200:]!r}"


async def started(n: Node, data: bytes = b"", **fields: Any) -> str:
    """A task that runs on this node and has written something."""
    (task_id,) = await n.submit(spec(**fields))
    assert await n.claim(task_id)
    n.write_log(task_id, data)
    return task_id


@pytest.fixture(params=["here", "elsewhere"])
def asked(request: pytest.FixtureRequest) -> str:
    """Which node is asked: the one that has the log, or another."""
    return str(request.param)


def test_parts_of_a_log(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            n = a if asked == "here" else b
            data = os.urandom(200_000)
            task_id = await started(a, data)
            a.write_log(task_id, b"err", stream="stderr")
            for fields, expected in (
                ({}, data),
                ({"offset": 150_000}, data[150_000:]),
                ({"offset": 200_000}, b""),
                ({"limit_bytes": 70_000}, data[:70_000]),
                ({"offset": 10, "limit_bytes": 5}, data[10:15]),
                ({"tail_bytes": 100}, data[-100:]),
                ({"tail_bytes": 300_000}, data),
                ({"tail_bytes": 100, "limit_bytes": 10}, data[-100:-90]),
                ({"stream": api.STDERR}, b"err"),
                ({"attempt": 1}, data),
            ):
                chunks = await n.read_log(task_id, **fields)
                assert b"".join(c.data for c in chunks) == expected, fields
                assert {(c.node, c.attempt) for c in chunks} <= {("a", 1)}
                position = chunks[0].offset if chunks else 0
                for chunk in chunks:
                    assert chunk.offset == position
                    position += len(chunk.data)
            assert (await n.read_log(task_id, tail_bytes=100))[0].offset == 199_900

    run(scenario())


def test_follow_until_the_end(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            n = a if asked == "here" else b
            task_id = await started(a, b"one\n")
            f = Following(n, task_id)
            await f.until(lambda: f.data == b"one\n", "what is there")
            for i in range(5):
                a.write_log(task_id, b"more %d\n" % i)
                await f.until(lambda i=i: f.data.endswith(b"more %d\n" % i), "what is added")  # type: ignore[misc]
            a.write_log(task_id, b"x" * 500_000 + b"last\n")
            await a.end(task_id)
            ended_s = time.monotonic()
            await f.end
            assert time.monotonic() - ended_s < 10.0
            assert f.data.endswith(b"last\n")
            assert len(f.data) == 4 + 5 * 7 + 500_005

    run(scenario())


def test_follow_a_task_that_has_not_started(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            n = a if asked == "here" else b
            (task_id,) = await a.submit()
            f = Following(n, task_id[-12:])
            await eventually(lambda: n.server.hub.listeners == 1)
            assert await a.claim(task_id)
            await eventually(lambda: a.server.hub.listeners == 1)  # it looks for a file that is not there yet
            a.write_log(task_id, b"hello\n")
            await f.until(lambda: f.data == b"hello\n", "the first line")
            await a.end(task_id)
            await f.end

    run(scenario())


def test_follow_ends_when_a_waiting_task_is_cancelled(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit()
            f = Following(a, task_id)
            await eventually(lambda: a.server.hub.listeners == 1)
            await a.api.Cancel(api.CancelRequest(ids=[task_id], reason="enough"))
            await f.end
            assert not f.chunks
            failed = await failure(a.read_log(task_id))
            assert (failed.code, failed.detail.reason) == (Code.NOT_FOUND, "no-log")
            assert "ended before it was started: enough" in failed.text

    run(scenario())


def test_follow_goes_on_with_the_next_attempt(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b, node(etcd, tmp_path, "c") as c:
            n = a if asked == "here" else c
            task_id = await started(a, b"first\n", retries=1)
            f = Following(n, task_id)
            await f.until(lambda: f.data == b"first\n", "the first attempt")
            one = asyncio.ensure_future(n.read_log(task_id, follow=True, attempt=1))
            await a.end(task_id, Exit(Reason.EXIT, 1))
            assert [x.data for x in await one] == [b"first\n"]  # asked for that attempt only
            assert not f.end.done()
            assert await b.claim(task_id)
            b.write_log(task_id, b"second\n", attempt=2)
            await f.until(lambda: f.data == b"first\nsecond\n", "the second attempt")
            await b.end(task_id)
            await f.end
            assert [(x.attempt, x.node, x.offset) for x in f.chunks] == [(1, "a", 0), (2, "b", 0)]
            assert [x.data for x in await n.read_log(task_id)] == [b"second\n"]
            assert [x.data for x in await n.read_log(task_id, attempt=1)] == [b"first\n"]
            failed = await failure(n.read_log(task_id, attempt=3))
            assert (failed.code, failed.detail.field) == (Code.NOT_FOUND, "attempt")
            failed = await failure(n.read_log(task_id, attempt=3, follow=True))
            assert (failed.code, failed.detail.field) == (Code.NOT_FOUND, "attempt")

    run(scenario())


def test_follow_with_a_limit_over_attempts(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            task_id = await started(a, b"12345", retries=1)
            f = Following(a, task_id, limit_bytes=8)
            await f.until(lambda: f.data == b"12345", "the first attempt")
            await a.end(task_id, Exit(Reason.EXIT, 1))
            await a.claim(task_id)
            a.write_log(task_id, b"67890", attempt=2)
            await f.end
            assert f.data == b"12345678"

    run(scenario())


def test_bad_requests(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            n = a if asked == "here" else b
            task_id = await started(a, b"12345")
            (waiting,) = await a.submit()
            for fields, code, field, text in (
                ({"id": ""}, Code.INVALID_ARGUMENT, "id", "not a task id"),
                ({"id": "ffffffff"}, Code.NOT_FOUND, "id", "there is no task"),
                ({"id": waiting}, Code.FAILED_PRECONDITION, "id", "has not started yet"),
                ({"offset": 6}, Code.OUT_OF_RANGE, "offset", "has 5 bytes"),
                ({"tail_bytes": -1}, Code.INVALID_ARGUMENT, "tail_bytes", "not negative"),
                ({"tail_bytes": 1, "offset": 1}, Code.INVALID_ARGUMENT, "tail_bytes", "exclude each other"),
                ({"stream": 7}, Code.INVALID_ARGUMENT, "stream", "no stream 7"),
                ({"attempt": 2}, Code.NOT_FOUND, "attempt", "has had 1 attempts"),
            ):
                failed = await failure(n.read_log(**{"task_id": fields.pop("id", task_id), **fields}))  # type: ignore[arg-type]
                assert (failed.code, failed.detail.field) == (code, field)
                assert text in failed.text

    run(scenario())


def test_logs_that_cannot_be_read(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            n = a if asked == "here" else b
            (fresh, gone, unborn, directory, fifo, loop) = await a.submit(*(spec() for _ in range(6)))
            for task_id in (fresh, gone, unborn, directory, fifo, loop):
                await a.claim(task_id)
            assert await n.read_log(fresh) == []  # claimed, and nothing written yet
            await a.end(gone)
            await a.end(unborn, Exit(Reason.SPAWN_FAILED, message="no such program: /bin/nothing"))
            a.port.log_path(TaskId(directory), 1, "stdout").mkdir()
            os.mkfifo(a.port.log_path(TaskId(fifo), 1, "stdout"))
            path = a.port.log_path(TaskId(loop), 1, "stdout")
            path.symlink_to(path)
            for task_id, code, reason, text in (
                (gone, Code.NOT_FOUND, "no-log", f"the stdout log of attempt 1 of task {gone} on a does not exist"),
                (unborn, Code.NOT_FOUND, "no-log", "could not be started: no such program: /bin/nothing"),
                (directory, Code.FAILED_PRECONDITION, "log-unreadable", "it is not a file"),
                (fifo, Code.FAILED_PRECONDITION, "log-unreadable", "it is not a file"),
                (loop, Code.FAILED_PRECONDITION, "log-unreadable", "Too many levels of symbolic links"),
            ):
                for follow in (False, True):
                    failed = await failure(n.read_log(task_id, follow=follow))
                    assert (failed.code, failed.detail.reason) == (code, reason)
                    assert text in failed.text

    run(scenario())


def test_a_log_that_becomes_shorter(etcd: Etcd, tmp_path: Path, asked: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            task_id = await started(a, b"123456789")
            f = Following(a if asked == "here" else b, task_id)
            await f.until(lambda: f.data == b"123456789", "what is there")
            os.truncate(a.port.log_path(TaskId(task_id), 1, "stdout"), 3)
            failed = await failure(f.end)
            assert (failed.code, failed.detail.reason) == (Code.DATA_LOSS, "log-truncated")
            assert "3 bytes, 9 had been read" in failed.text

    run(scenario())


def test_an_offset_that_the_log_has_not_reached(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            one, two = await started(a, b"123"), await started(a, b"123")
            f, g = Following(a, one, offset=5), Following(a, two, offset=5)
            await eventually(lambda: a.server.hub.listeners == 2)
            a.write_log(one, b"456789")
            await f.until(lambda: f.data == b"6789", "the rest")
            await a.end(one)
            await f.end
            await a.end(two)
            failed = await failure(g.end)
            assert (failed.code, failed.detail.field) == (Code.OUT_OF_RANGE, "offset")

    run(scenario())


def test_the_node_that_has_the_log_is_gone(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            async with node(etcd, tmp_path, "b") as b:
                task_id = await started(b, b"far away")
            with mock.patch.object(limits, "LOG_RECONNECT_S", 1.0):
                for follow in (False, True):  # its record is still there, but nobody answers at the address
                    failed = await failure(a.read_log(task_id, follow=follow))
                    assert (failed.code, failed.detail.reason) == (Code.UNAVAILABLE, "node-unreachable")
                    assert f"the stdout log of attempt 1 of task {task_id} on b cannot be had" in failed.text
                    assert "it lies on b" in failed.detail.hint
                await delete(a.store, keys.node(NodeId("b")))
                failed = await failure(a.read_log(task_id))
                assert failed.code is Code.UNAVAILABLE
                assert "node b is lost" in failed.text
                await delete(a.store, keys.incarnation(NodeId("b")))
                failed = await failure(a.read_log(task_id))
                assert failed.code is Code.UNAVAILABLE
                assert "there is no node b" in failed.text

    run(scenario())


def test_follow_survives_the_restart_of_a_daemon(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            async with node(etcd, tmp_path, "b") as b:
                task_id = await started(b, b"before ")
                f = Following(a, task_id)
                await f.until(lambda: f.data == b"before ", "what is there")
            assert not f.end.done()
            async with node(etcd, tmp_path, "b") as b:
                b.write_log(task_id, b"after")
                await f.until(lambda: f.data == b"before after", "the rest, and nothing twice")
                await b.end(task_id)
                await f.end

    run(scenario())


def test_follow_leaves_a_lost_node_for_the_next_attempt(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            async with node(etcd, tmp_path, "b") as b:
                task_id = await started(b, b"before ")
                f = Following(a, task_id)
                await f.until(lambda: f.data == b"before ", "what is there")
            async with node(etcd, tmp_path, "b") as b:  # stands in for the leader
                await b.end(task_id, Exit(Reason.NODE_LOST))
            await announce(a.store, "b", "127.0.0.1:1")
            assert await a.claim(task_id)
            a.write_log(task_id, b"again", attempt=2)
            await f.until(lambda: f.data == b"before again", "the next attempt")
            await a.end(task_id)
            await f.end

    run(scenario())


def test_a_client_that_goes_away_leaves_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            task_id = await started(a, b"x")
            f = Following(b, task_id)
            await f.until(lambda: f.data == b"x", "what is there")
            assert (a.server.hub.listeners, b.server.hub.listeners) == (1, 1)
            f.call.cancel()
            await asyncio.wait({f.end})
            await eventually(lambda: a.server.hub.listeners == b.server.hub.listeners == 0, what="both let go")
            path = str(a.port.log_path(TaskId(task_id), 1, "stdout"))
            await eventually(lambda: path not in open_files(), what="the file closed")

    def open_files() -> set[str]:
        return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}

    run(scenario())


def test_local_only_is_not_passed_on(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            task_id = await started(a, b"x")
            failed = await failure(b.read_log(task_id, local_only=True))
            assert failed.code is Code.NOT_FOUND
            assert "was made on a, not on b" in failed.text

    run(scenario())


def test_too_many_streams(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            task_id = await started(a, b"x")
            with mock.patch.object(limits, "LOG_STREAMS_MAX", 1):
                f = Following(a, task_id)
                await f.until(lambda: f.data == b"x", "what is there")
                failed = await failure(a.read_log(task_id))
                assert (failed.code, failed.detail.reason) == (Code.RESOURCE_EXHAUSTED, "busy")
            await a.end(task_id)
            await f.end
            assert len(await a.read_log(task_id)) == 1

    run(scenario())


def test_a_writer_faster_than_the_reader_does_not_hold_a_plain_read(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            task_id = await started(a, b"x" * 300_000)
            call = a.api.Log(api.LogRequest(id=task_id))
            size = 0
            async for chunk in call:
                size += len(chunk.data)
                a.write_log(task_id, b"y" * 2 * len(chunk.data))
            assert size == 300_000

    run(scenario())
