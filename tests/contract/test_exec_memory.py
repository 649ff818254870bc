"""Memory that runs out for a command beside a task: the command's end, not the task's, when it is sure whose it was."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.runtime.execs import Ended, open_command
from tests.contract.containers import RUNC, rootfs, script
from tests.contract.shims import asynchronous, end_of, groups_of, runtime, shell, state_dir
from tests.contract.test_exec import everything

pytestmark = pytest.mark.contract
_ = (rootfs, state_dir)  # fixtures

MIB = 1 << 20
HOG = (sys.executable, "-S", "-c", "bytearray(512 << 20)")
WAITS = "while [ ! -e gate ]; do sleep 0.05; done; "


@asynchronous
async def test_a_command_that_memory_runs_out_for_ends_alone(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for key, last in (("t.1", "exit 3"), ("t.2", "exit 0"), ("t.3", "kill -9 $$")):
            assert await rt.start(shell(key, WAITS + last, memory_bytes=64 * MIB)) is None
            if not groups_of(key):
                pytest.skip("memory is not limited here")
            for _n in range(2):
                async with open_command(state_dir, key, HOG) as command:
                    assert (await everything(command))[2] == Ended(0, signal.SIGKILL, "memory ran out")
            async with open_command(state_dir, key, ["sh", "-c", "kill -9 $$"]) as command:
                assert (await everything(command))[2] == Ended(0, signal.SIGKILL)
            (state_dir / "scratch" / key / "gate").touch()
        ends = [await end_of(rt, key) for key in ("t.1", "t.2", "t.3")]
        assert [(e.reason, e.exit_code, e.signal) for e in ends] == [
            (Reason.EXIT, 3, 0),
            (Reason.EXIT, 0, 0),
            (Reason.SIGNAL, None, 9),
        ]


@asynchronous
async def test_what_may_have_been_the_tasks_own_counts_as_that(state_dir: Path) -> None:
    """A process of the command was killed, and it went on: the counter does not say whose it was."""
    async with runtime(state_dir) as rt:
        for key, last in (("t.1", "exit 0"), ("t.2", f"{' '.join(HOG[:-1])} 'bytearray(512 << 20)'; exit 0")):
            assert await rt.start(shell(key, WAITS + last, memory_bytes=64 * MIB)) is None
            if not groups_of(key):
                pytest.skip("memory is not limited here")
            hog = HOG if key == "t.2" else ("sh", "-c", '"$@"; exit 0', "sh", *HOG)
            async with open_command(state_dir, key, hog) as command:
                await everything(command)
            (state_dir / "scratch" / key / "gate").touch()
            assert (await end_of(rt, key)).reason is Reason.OUT_OF_MEMORY, key


@pytest.mark.skipif(not Path(RUNC).exists(), reason="runc is not installed")
@asynchronous
async def test_in_a_container(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        for key, more in (("t.1", ""), ("t.2", "; exit 0")):
            started = script(state_dir, rootfs, key, WAITS + "exit 3", memory_bytes=64 * MIB)
            assert await rt.start(started) is None
            async with open_command(state_dir, key, ["sh", "-c", "head -c 512m /dev/zero | tail" + more]) as command:
                end = (await everything(command))[2]
            assert (end.exit_code, end.message) == ((0, "") if more else (137, "memory ran out"))
            (state_dir / "scratch" / key / "work" / "gate").touch()
            ended = await end_of(rt, key)
            assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_MEMORY if more else Reason.EXIT, 3)
