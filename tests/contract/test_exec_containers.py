"""Commands beside an attempt in a container: inside of it, as its user, ended with it and with whoever asked."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from spinetta.model import Reason
from spinetta.runtime.execs import Ended, Size, open_command
from spinetta.runtime.protocol import Launch
from tests.contract.containers import INSIDE, RUNC, rootfs, script, traces
from tests.contract.shims import asynchronous, end_of, isolate, living, ran, runtime, state_dir, until
from tests.contract.test_exec import everything, until_says

pytestmark = [pytest.mark.contract, pytest.mark.skipif(not Path(RUNC).exists(), reason="runc is not installed")]
_ = (isolate, rootfs, state_dir)  # fixtures


@asynchronous
async def test_it_is_in_the_container(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        env = {"PATH": "/bin", "WHO": "task"}
        assert await rt.start(script(state_dir, rootfs, "t.1", "echo left > here; exec sleep 100", env=env)) is None
        await until((state_dir / "scratch/t.1/work/here").exists)
        words = "pwd; cat here; echo $WHO $MORE; id -u; ps | grep -c sleep; cat /proc/self/status; echo bad >&2; exit 7"
        async with open_command(state_dir, "t.1", ["sh", "-c", words], env={"MORE": "yes"}) as command:
            out, err, end = await everything(command)
        assert (end, err) == (Ended(7), b"bad\n"), out
        lines = out.decode().splitlines()
        assert lines[:4] == ["/work", "left", "task yes", str(INSIDE)]
        status = dict(line.split(":\t", 1) for line in lines[5:] if ":\t" in line)
        assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        async with open_command(state_dir, "t.1", ["cat"]) as command:
            await command.write(b"x" * 100_000)
            command.end_input()
            assert len((await everything(command))[0]) == 100_000
        async with open_command(state_dir, "t.1", ["sh", "-c", "kill -9 $$"]) as command:
            end = (await everything(command))[2]
            assert end.exit_code == 128 + signal.SIGKILL
        async with open_command(state_dir, "t.1", ["/no/such"]) as command:
            _out, err, end = await everything(command)
            assert end.exit_code == 126, err
            assert "could not be started" in end.message
            assert "/no/such" in end.message
        async with open_command(state_dir, "t.1", ["sh", "-c", "exit 255"]) as command:
            assert (await everything(command))[2] == Ended(255)
        await rt.stop("t.1", "cancelled")
        assert (await end_of(rt, "t.1")).reason is Reason.CANCELLED
        await until(lambda: not traces(state_dir, "t.1"))


def with_terminals(attempt: Launch) -> Launch:
    """As the node's own configuration has it; where the limits of containers are tried, none is needed."""
    assert attempt.container is not None
    options = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    terminals = {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": options}
    cast("Any", attempt.container.config["mounts"]).append(terminals)
    return attempt


@asynchronous
async def test_with_a_terminal(state_dir: Path, rootfs: Path) -> None:
    marker = f"400{os.getpid()}"
    async with runtime(state_dir) as rt:
        assert await rt.start(with_terminals(script(state_dir, rootfs, "t.1", "exec sleep 100"))) is None
        async with open_command(state_dir, "t.1", ["sh"], terminal=Size(24, 80)) as command:
            await until_says(command, b"$ ")
            await command.write(b"/bin/busybox stty size; /bin/busybox tty\n")
            assert b"24 80" in await until_says(command, b"/dev/pts/0")
            await command.resize(Size(50, 132))
            await command.write(b"/bin/busybox stty size\n")
            await until_says(command, b"50 132")
            await command.write(f"sleep {marker}\n".encode())
            await until(lambda: living(marker))
            await command.write(b"\x03")
            await until(lambda: not living(marker))
            await command.write(b"exit 5\n")
            assert (await everything(command))[2] == Ended(5)
        words = "while sleep 0.1; do /bin/busybox stty size; done"
        async with open_command(state_dir, "t.1", ["sh", "-c", words], terminal=Size(24, 80)) as command:
            for rows in (30, 40, 50):  # before the command's terminal is there
                await command.resize(Size(rows, 132))
            await until_says(command, b"50 132")
        async with open_command(state_dir, "t.1", ["sh", "-c", "cat; exit 6"]) as command:
            await command.resize(Size(50, 132))  # of nothing
            command.end_input()
            assert (await everything(command))[2] == Ended(6)


@asynchronous
async def test_it_ends_with_the_container_and_with_whoever_asked(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    marker = f"300{os.getpid()}"
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(script(state_dir, rootfs, "t.1", "exec sleep 100")) is None
        words = f"trap '' HUP TERM; echo up; sleep {marker}; sleep {marker}"
        async with open_command(state_dir, "t.1", ["sh", "-c", words]) as command:
            await until_says(command, b"up")
            assert living(marker)
        await until(lambda: not living(marker))
        assert await rt.usage("t.1") is not None
        async with open_command(state_dir, "t.1", ["sh", "-c", words]) as command:
            await until_says(command, b"up")
            await rt.stop("t.1", "cancelled")
            assert (await end_of(rt, "t.1")).reason is Reason.CANCELLED
            assert (await everything(command))[2].message == "the task has ended"
        await until(lambda: not living(marker))
        await until(lambda: not traces(state_dir, "t.1"))


@asynchronous
async def test_what_a_container_left_is_kept_without_its_root(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        attempt = script(state_dir, rootfs, "t.1", "echo here > file; touch /other", writable=True, keep_scratch_s=60)
        assert (await ran(rt, attempt)).exit_code == 0
        await rt.forget("t.1")
        await until((state_dir / "kept/t.1@60/file").exists)
        kept = state_dir / "kept/t.1@60"
        assert [p.name for p in kept.iterdir()] == ["file"]
