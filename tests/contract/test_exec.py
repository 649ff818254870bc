"""Commands beside a running attempt, with real shims: what they are, what ends them, what they cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from spinetta.errors import Busy, RuntimeUnavailable, UserError
from spinetta.model import Reason
from spinetta.runtime.execs import Command, Ended, NotRunning, Output, Size, open_command
from spinetta.runtime.shim import proctable
from spinetta.runtime.shim.wire import DESCRIPTORS_MAX, EXECS_PER_ATTEMPT_MAX, encode
from tests.contract.oldshims import copy_of_the_code, installed
from tests.contract.shims import (
    LIMIT_S,
    asynchronous,
    end_of,
    groups_of,
    identity,
    isolate,
    kill_shim,
    living,
    ran,
    runtime,
    shell,
    state_dir,
    until,
)

pytestmark = pytest.mark.contract
_ = (isolate, state_dir)  # fixtures


async def everything(command: Command) -> tuple[bytes, bytes, Ended]:
    """What it writes to each stream, and its end."""
    out, err = b"", b""
    async with asyncio.timeout(LIMIT_S):
        async for item in command.outputs():
            if isinstance(item, Ended):
                return out, err, item
            if item.is_error:
                err += item.data
            else:
                out += item.data
    raise AssertionError("no end")


async def until_says(command: Command, words: bytes) -> bytes:
    """Read until it has written something."""
    out = b""
    try:
        async with asyncio.timeout(LIMIT_S):
            async for item in command.outputs():
                assert isinstance(item, Output), (item, out)
                out += item.data
                if words in out:
                    return out
    except TimeoutError:
        pass
    raise AssertionError(out)


@asynchronous
async def test_it_lives_where_the_attempt_does(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        started = shell(
            "t.1", "echo left > here; exec sleep 100", env={"PATH": "/usr/bin:/bin", "WHO": "task"},
            secrets=(("token", b"secret"),), memory_bytes=64 << 20,
        )  # fmt: skip
        assert await rt.start(started) is None
        scratch = state_dir / "scratch" / "t.1"
        await until((scratch / "here").exists)
        script = 'pwd; cat here; echo $WHO $MORE; cat "$SPINETTA_SECRETS/token"; cat /proc/self/cgroup; echo bad >&2'
        async with open_command(state_dir, "t.1", ["sh", "-c", f"{script}; exit 7"], env={"MORE": "yes"}) as command:
            out, err, end = await everything(command)
        lines = out.decode().splitlines()
        assert (end, err) == (Ended(7), b"bad\n")
        assert lines[:3] == [str(scratch), "left", "task yes"]
        assert lines[3].startswith("secret")
        assert groups_of("t.1"), "it has groups here"
        assert sum("/t.1" in line for line in lines) >= 1
        async with open_command(state_dir, "t.1", ["sh", "-c", "kill -KILL $$"]) as command:
            assert (await everything(command))[2] == Ended(0, signal.SIGKILL)
        async with open_command(state_dir, "t.1", ["pwd"], working_directory="/usr") as command:
            assert (await everything(command))[0] == b"/usr\n"
        assert await rt.usage("t.1") is not None, "the attempt goes on"


@asynchronous
async def test_input_goes_in_and_its_end_too(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        async with open_command(state_dir, "t.1", ["wc", "-c"]) as command:
            for _n in range(100):
                await command.write(b"x" * 10_000)
            command.end_input()
            assert (await everything(command))[0].strip() == b"1000000"
        async with open_command(state_dir, "t.1", ["cat"], takes_input=False) as command:
            assert await everything(command) == (b"", b"", Ended(0))
        async with open_command(state_dir, "t.1", ["true"]) as command:
            assert (await everything(command))[2] == Ended(0)
            await command.write(b"nobody reads this" * 10_000)


@asynchronous
async def test_with_a_terminal(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        script = "trap 'stty size' WINCH; test -t 0 && tty; stty size; echo ready; while sleep 0.1; do :; done"
        async with open_command(state_dir, "t.1", ["sh", "-c", script], terminal=Size(24, 80)) as command:
            assert b"24 80" in await until_says(command, b"ready")
            await command.resize(Size(50, 132))
            await until_says(command, b"50 132")
            await command.write(b"\x03")
            assert (await everything(command))[2] == Ended(0, signal.SIGINT)
        async with open_command(state_dir, "t.1", ["cat"], terminal=Size(24, 80)) as command:
            await command.write(b"typed\n")
            await until_says(command, b"typed\r\ntyped")
            await command.write(b"\x04")
            assert (await everything(command))[2] == Ended(0)


@asynchronous
async def test_a_terminal_of_a_shim_that_knows_of_no_sizes(state_dir: Path, tmp_path: Path) -> None:
    code = copy_of_the_code(tmp_path / "shim")
    server = code / "server.py"
    line = '            "exec_resize": execs.resize,\n'
    assert server.read_text().count(line) == 1
    server.write_text(server.read_text().replace(line, ""))
    with installed(code):
        async with runtime(state_dir) as rt:
            assert await rt.start(shell("t.1", "exec sleep 100")) is None
            argv = ["sh", "-c", "read x; stty size"]
            async with open_command(state_dir, "t.1", argv, terminal=Size(24, 80)) as command:
                await command.resize(Size(50, 132))
                await command.write(b"\n")
                await until_says(command, b"50 132")


@asynchronous
async def test_requests_that_follow_each_other_at_once_are_all_answered(state_dir: Path) -> None:
    """Whoever reads from the shim at the moment, what comes is for the one that it answers."""
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        for _n in range(60):
            async with open_command(state_dir, "t.1", ["sleep", "100"]) as command:
                for _m in range(6):
                    await command.signal(signal.SIGCONT)
                await command.signal(signal.SIGTERM)
                assert (await everything(command))[2] == Ended(0, signal.SIGTERM)


@asynchronous
async def test_it_ends_with_its_attempt(state_dir: Path, isolate: bool) -> None:
    marker = f"100{os.getpid()}"
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(shell("t.1", "echo x > begun; exec sleep 100")) is None
        script = f"trap '' TERM HUP INT; setsid sleep {marker} & echo up; wait; sleep {marker}"
        async with open_command(state_dir, "t.1", ["sh", "-c", script]) as command:
            await until_says(command, b"up")
            await rt.stop("t.1", "cancelled")
            assert (await end_of(rt, "t.1")).reason is Reason.CANCELLED
            _out, _err, end = await everything(command)
            assert end.signal == signal.SIGKILL
            assert end.message == "the task has ended"
        await until(lambda: not living(marker))
        await until(lambda: groups_of("t.1") == [])
        with pytest.raises(NotRunning, match=r"does not run|is ending"):
            async with open_command(state_dir, "t.1", ["true"]):
                pass
        with pytest.raises(NotRunning):
            async with open_command(state_dir, "t.2", ["true"]):
                pass


@asynchronous
async def test_it_ends_with_whoever_asked(state_dir: Path, isolate: bool) -> None:
    marker = f"200{os.getpid()}"
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        for script in (f"echo up; exec sleep {marker}", f"trap '' HUP; echo up; sleep {marker}; sleep {marker}"):
            async with open_command(state_dir, "t.1", ["sh", "-c", script]) as command:
                await until_says(command, b"up")
                assert living(marker)
            await until(lambda: not living(marker))
        async with open_command(state_dir, "t.1", ["sleep", marker], terminal=Size(24, 80)):
            await until(lambda: living(marker))
        await until(lambda: not living(marker))
        assert (await rt.held())[0].exit is None
        await rt.stop("t.1", "cancelled")
        assert (await end_of(rt, "t.1")).reason is Reason.CANCELLED


@asynchronous
async def test_an_attempt_ends_though_commands_run_beside_it(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        attempt = shell("t.1", "read x < go; exit 3")
        os.mkfifo(state_dir / "go")
        assert await rt.start(shell("t.1", f"read x < {state_dir / 'go'}; exit 3")) is None
        async with open_command(state_dir, attempt.key, ["sh", "-c", "trap '' HUP TERM; echo up; cat"]) as command:
            await until_says(command, b"up")
            (state_dir / "go").write_bytes(b"\n")
            end = await end_of(rt, "t.1")
            assert (end.reason, end.exit_code) == (Reason.EXIT, 3)
            assert (await everything(command))[2].signal == signal.SIGKILL
        await rt.forget("t.1")


@asynchronous
async def test_what_cannot_be_started_is_told(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        for argv, cwd, words in (
            (["/no/such"], "", "program not found: /no/such"),
            (["true"], "/no/place", "working directory missing: /no/place"),
            ([], "", "the command is empty"),
        ):
            with pytest.raises(UserError, match=words) as caught:
                async with open_command(state_dir, "t.1", argv, working_directory=cwd):
                    pass
            assert caught.value.reason == "cannot-start"
        with pytest.raises(RuntimeUnavailable):
            async with open_command(state_dir / "logs", "t.1", ["true"]):
                pass


@asynchronous
async def test_so_many_and_no_more(state_dir: Path) -> None:
    async with runtime(state_dir) as rt, contextlib.AsyncExitStack() as stack:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        assert await rt.start(shell("t.2", "exec sleep 100")) is None
        for _n in range(EXECS_PER_ATTEMPT_MAX):
            await stack.enter_async_context(open_command(state_dir, "t.1", ["sleep", "100"]))
        with pytest.raises(Busy, match=f"{EXECS_PER_ATTEMPT_MAX} commands"):
            async with open_command(state_dir, "t.1", ["true"]):
                pass
        async with open_command(state_dir, "t.2", ["true"]) as command:
            assert (await everything(command))[2] == Ended(0)


@asynchronous
async def test_a_slow_reader_holds_the_command_up(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        much = 20_000_000 + os.getpid()  # nobody else's
        async with open_command(state_dir, "t.1", ["head", "-c", str(much), "/dev/zero"]) as command:
            outputs = aiter(command.outputs())
            first = await anext(outputs)
            (pid,) = living(str(much))
            await until(lambda: (p := proctable.read(pid)) is not None and p.state == "S")  # waits for room
            assert isinstance(first, Output)
            total = len(first.data)
            async for item in outputs:
                total += len(item.data) if isinstance(item, Output) else 0
            assert total == much


@asynchronous
async def test_what_it_leaves_behind_holds_nobody_up(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        for left in ("sleep 100", "yes"):
            async with open_command(state_dir, "t.1", ["sh", "-c", f"{left} & echo done; exit 5"]) as command:
                out, _err, end = await everything(command)
                assert end == Ended(5)
                assert b"done" in out


@asynchronous
async def test_a_shim_that_dies_is_told_of(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", "exec sleep 100")) is None
        async with open_command(state_dir, "t.1", ["sleep", "100"]) as command:
            await asyncio.to_thread(kill_shim, state_dir)
            with pytest.raises(RuntimeUnavailable):
                await everything(command)


@asynchronous
async def test_descriptors_that_nobody_asked_for(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        shim = Path(f"/proc/{identity(state_dir)['pid']}/fd")

        def count() -> int:
            return len(list(shim.iterdir()))

        before = count()
        for times, fds in ((1, DESCRIPTORS_MAX), (2, DESCRIPTORS_MAX), (1, 60)):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(LIMIT_S)
                sock.connect(str(state_dir / "shim.sock"))
                for _n in range(times):
                    socket.send_fds(sock, [encode({"id": 1, "op": "hello", "version": 1})], [0] * fds)
                answered = bool(sock.recv(1 << 16))
                assert answered or fds > DESCRIPTORS_MAX, "only who sends too many is cut"
            await until(lambda: count() == before)
        assert (await ran(rt, shell("t.1", "exit 4"))).exit_code == 4


@asynchronous
async def test_a_scratch_directory_is_kept_if_wanted(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for key, keep_s in (("t.1", 90.5), ("t.2", 0)):
            assert (await ran(rt, shell(key, "echo here > file", keep_scratch_s=keep_s))).exit_code == 0
            await rt.forget(key)
            await rt.forget(key)
        kept = state_dir / "kept"
        await until(lambda: [p.name for p in kept.iterdir()] == ["t.1@91"])
        assert (kept / "t.1@91" / "file").read_text() == "here\n"
        assert await rt.start(shell("t.3", "echo here > file; exec sleep 100", keep_scratch_s=60)) is None
        await until((state_dir / "scratch" / "t.3" / "file").exists)
        await asyncio.to_thread(kill_shim, state_dir)
        assert (await end_of(rt, "t.3")).reason is Reason.SHIM_LOST
        await rt.forget("t.3")
        await until((kept / "t.3@60" / "file").exists)
    assert not list((state_dir / "scratch").iterdir())
