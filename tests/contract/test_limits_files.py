"""The limit of open files, real: of plain processes and of containers, and of commands beside them."""

from __future__ import annotations

import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.node import detect
from spinetta.runtime.execs import open_command
from spinetta.runtime.protocol import Launch, Runtime, ShimRuntime
from tests.contract.shims import asynchronous, runtime, state_dir
from tests.contract.test_exec import everything
from tests.contract.test_runtimes import World, image, ran, start

pytestmark = pytest.mark.contract
_ = (image, state_dir)  # fixtures

SHOWS = "ulimit -Sn; ulimit -Hn"
LIMIT = 100
FILLS = (
    "import os\n"
    "try:\n"
    "    while True:\n"
    "        last = os.dup(0)\n"
    "except OSError as error:\n"
    "    print(last + 1, error.strerror)\n"
)


class OneShim(World):
    """Whose state directory is the node's own."""

    @asynccontextmanager
    async def shim(self) -> AsyncIterator[ShimRuntime]:
        async with runtime(self.state_dir) as one:
            yield one


@pytest.fixture(params=["process", "runc"])
def world(request: pytest.FixtureRequest, state_dir: Path, image: Path) -> World:
    state_dir.parent.chmod(0o755)
    return OneShim(request.param, state_dir, image)


def said(rt: Runtime, key: str, stream: str = "stdout") -> list[str]:
    return rt.log_path(key, stream).read_text().split("\n")[:-1]


def filling(world: World, key: str) -> Launch:
    """It opens files until it gets no more, and says so."""
    if world.kind == "process":
        return world.launch(key, sys.executable, "-S", "-c", FILLS, open_files=(LIMIT, LIMIT))
    files = " ".join(["/.spinetta/init"] * 2 * LIMIT)  # a tail of so many keeps them all open
    script = f"/bin/busybox tail -n 0 {files} 2>&1 >/dev/null | /bin/busybox grep -c 'Too many open files'"
    return world.shell(key, script, open_files=(LIMIT, LIMIT))


@asynchronous
async def test_each_has_what_it_was_given(world: World) -> None:
    async with world.connect() as rt:
        assert "open-files-limit" in rt.capabilities()
        for n, given in enumerate([(64, 64), (1024, 4096), (2000, 2000)]):
            assert (await ran(rt, world.shell(f"t.{n}", SHOWS, open_files=given))).exit_code == 0
            assert said(rt, f"t.{n}") == [str(number) for number in given]
        assert (await ran(rt, world.shell("own.1", SHOWS))).exit_code == 0
        assert said(rt, "own.1")[1] == str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


@asynchronous
async def test_more_are_refused_and_nothing_else_suffers(world: World) -> None:
    async with world.connect() as rt:
        ended = await ran(rt, filling(world, "t.1"))
        assert (ended.reason, ended.exit_code, ended.message) == (Reason.EXIT, 0, "")
        if world.kind == "process":
            assert said(rt, "t.1") == [f"{LIMIT} Too many open files"]
        else:
            refused = int(said(rt, "t.1")[0])
            assert LIMIT < refused <= LIMIT + 10  # what it has from the start counts, too
        # What a task may have is each process's own, and others have theirs.
        script = f"cat /dev/null && echo well; ulimit -n {LIMIT + 1} && echo raised"
        await ran(rt, world.shell("t.2", script, open_files=(LIMIT, LIMIT)))
        assert said(rt, "t.2") == ["well"]


@asynchronous
async def test_more_than_the_machine_lets_us_set_is_the_nodes_fault(world: World) -> None:
    most = detect.open_files_most()
    async with world.connect() as rt:
        assert (await ran(rt, world.shell("t.1", SHOWS, open_files=(most, most)))).exit_code == 0
        assert said(rt, "t.1") == [str(most), str(most)]
        ended = await start(rt, world.shell("t.2", SHOWS, open_files=(most + 1, most + 1)))
        assert ended is not None
        assert ended.reason is Reason.NODE_UNFIT
        assert "cannot set its limit of open files" in ended.message


@asynchronous
async def test_commands_beside_it_have_the_same(world: World) -> None:
    async with world.connect() as rt:
        assert await start(rt, world.shell("t.1", "sleep 100", open_files=(64, 80))) is None
        async with open_command(world.state_dir, "t.1", ["sh", "-c", SHOWS]) as command:
            out, err, end = await everything(command)
        soft, hard = out.split()
        assert (hard, end.exit_code) == (b"80", 0), err
        # A runc made with Go 1.19 to 1.20 raises the soft limit of what it executes, as far as it may.
        assert soft == b"64" or (world.kind == "runc" and soft == b"80")
        await rt.stop("t.1", "cancelled")
