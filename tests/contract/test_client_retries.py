"""The client over ways that break, to nodes that have too much to do: each task once, under the id that it made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from spinetta import keys
from spinetta.client.aio import AsyncClient
from spinetta.client.errors import TOO_MANY_RETRY_S
from spinetta.client.specs import make_spec
from spinetta.errors import OutcomeUnknown
from spinetta.node.services import limits
from spinetta.store.etcd import EtcdStore
from spinetta.v1 import api_pb2 as api
from tests.contract.api_world import Etcd, Node, etcd, etcd_member, node, run

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract


class Cutter:
    """A way to a node that passes everything on to it, and of its answers to calls nothing: `cuts` times."""

    def __init__(self, target: str, cuts: int) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.cuts = cuts
        self.cut = 0
        self.address = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        asked = asyncio.Event()

        async def pump(from_: asyncio.StreamReader, to: asyncio.StreamWriter, answers: bool) -> None:
            while data := await from_.read(65536):
                if not answers and b"/spinetta.v1.Spinetta/Submit" in data:
                    asked.set()
                if answers and asked.is_set() and self.cut < self.cuts and len(data) > 60:
                    self.cut += 1  # the node has answered: it is done, and nobody is told
                    return
                to.write(data)
                await to.drain()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(pump(reader, up_writer, False)),
                    group.create_task(pump(up_reader, writer, True)),
                ]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
        except* OSError:
            pass
        finally:
            for each in (writer, up_writer):
                each.transport.abort()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Cutter]:
        """For as long as the context lasts."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await server.wait_closed()


async def stored(etcd: Etcd) -> set[str]:
    store = EtcdStore([etcd.endpoint])
    try:
        return {keys.parse_task(e.key) for e in (await store.list(keys.TASK)).entries}
    finally:
        await store.close()


async def is_full(a: Node) -> bool:
    """Whether all places for calls are taken."""
    try:
        await a.api.DescribeCluster(api.DescribeClusterRequest())
    except grpc.aio.AioRpcError as e:
        return e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


def test_an_answer_that_is_lost_makes_no_second_task(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            before = await stored(etcd)
            async with (
                Cutter(a.address, cuts=1).open() as way,
                AsyncClient([way.address, b.address], timeout_s=20) as client,
            ):
                spec = make_spec(["true"])
                (done,) = await client.submit_many([spec])
            assert way.cut == 1
            assert (done.id, done.existed) == (spec.id, True)  # the other node found it
            assert await stored(etcd) - before == {spec.id}

    run(scenario())


def test_answers_lost_again_and_again_end_in_not_known_and_the_same_submit_later_in_one_task(
    etcd: Etcd, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            before = await stored(etcd)
            spec = make_spec(["true"])
            async with Cutter(a.address, cuts=1000).open() as way, AsyncClient([way.address], timeout_s=3) as client:
                with pytest.raises(OutcomeUnknown):
                    await client.submit_many([spec])
            assert way.cut > 1
            async with AsyncClient([a.address]) as client:
                (done,) = await client.submit_many([spec])
            assert done.existed
            assert await stored(etcd) - before == {spec.id}

    run(scenario())


def test_the_command_line_prints_the_one_id_that_there_is(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            before = await stored(etcd)
            async with Cutter(a.address, cuts=1).open() as way:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "spinetta.cli", "submit", "--json", "--", "true",
                    env={**os.environ, "SPINETTA_NODE": f"{way.address},{b.address}", "HOME": str(tmp_path)},
                    stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
                out, _ = await asyncio.wait_for(process.communicate(), 40)
            assert process.returncode == 0
            assert way.cut == 1
            assert await stored(etcd) - before == {json.loads(out)["tasks"][0]["id"]}

    run(scenario())


def test_a_node_with_too_many_calls_is_asked_again_later(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RPCS_MAX", 2)

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, AsyncClient([a.address], timeout_s=20) as client:
            handle = await client.submit(["true"])
            async with asyncio.TaskGroup() as group:
                waiting = [group.create_task(client.wait([handle.id], timeout_s=2.5)) for _ in range(2)]
                async with asyncio.timeout(10):
                    while not await is_full(a):
                        pass
                before_s = time.monotonic()
                assert (await client.get(handle.id)).id == handle.id  # refused at first, and then answered
                waited_s = time.monotonic() - before_s
            assert all(t.result().timed_out for t in waiting)
            assert waited_s >= TOO_MANY_RETRY_S

    run(scenario())
