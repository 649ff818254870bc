"""``spinetta node drain --wait``: what it shows, how it ends, and that Ctrl-C ends the waiting only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.contract.api_world import Etcd, Node, announce, etcd, etcd_member, node, run

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
LIMIT_S = 40.0


@asynccontextmanager
async def drain(a: Node, tmp_path: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "spinetta.cli", "node", "drain", "a", *options,
        env={**os.environ, "SPINETTA_NODE": a.address, "HOME": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def line(stream: asyncio.StreamReader | None) -> str:
    assert stream is not None
    return (await asyncio.wait_for(stream.readline(), LIMIT_S)).decode().rstrip()


def test_it_waits_and_tells_what_is_left(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await announce(a.store, "a", a.address, draining=True, running=2)
            async with drain(a, tmp_path, "--wait", "--json") as process:
                for left in (2, 1, 0):
                    await announce(a.store, "a", a.address, draining=True, running=left)
                    said = json.loads(await line(process.stdout))
                    assert said == {"node": "a", "status": "draining", "running": left, "done": left == 0}
                assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
            assert a.port.draining == [True]

    run(scenario())


def test_ctrl_c_ends_the_waiting_and_not_the_drain(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await announce(a.store, "a", a.address, draining=True, running=2)
            async with drain(a, tmp_path, "--wait", "--release") as process:
                assert "waiting for 2 that run there" in await line(process.stderr)
                process.send_signal(signal.SIGINT)
                assert await asyncio.wait_for(process.wait(), LIMIT_S) == 130
                assert process.stderr is not None
                rest = (await process.stderr.read()).decode()
            assert "the node goes on draining, until: spinetta node undrain a\n" in rest
            assert "Traceback" not in rest
            assert (a.port.draining, a.port.given_back) == ([True], (True, False))

    run(scenario())


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--timeout", "3s"), 2, "--wait"),
        (("--force",), 2, "--release"),
        (("--wait", "--timeout", "0s"), 5, "tasks still run after 0s; the node goes on draining\n"),
        (("--wait", "--release", "--timeout", "0s"), 5, "--force gives those with --no-restart back, too"),
    ],
)
def test_how_it_ends_otherwise(etcd: Etcd, tmp_path: Path, options: tuple[str, ...], code: int, text: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await announce(a.store, "a", a.address, draining=True, running=2)
            async with drain(a, tmp_path, *options) as process:
                _, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
            assert (process.returncode, text in err.decode()) == (code, True), err
            assert a.port.draining == ([True] if code == 5 else [])

    run(scenario())


def test_one_that_is_undrained_meanwhile_is_not_waited_for(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await announce(a.store, "a", a.address, draining=True, running=2)
            async with drain(a, tmp_path, "--wait") as process:
                assert "waiting for 2" in await line(process.stderr)
                await announce(a.store, "a", a.address, running=2)
                _, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
            assert process.returncode == 2
            assert "does not drain any more" in err.decode()

    run(scenario())
