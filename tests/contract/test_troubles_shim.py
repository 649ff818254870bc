"""What a shim that was killed leaves, what the next one makes of it, and whose things it does not touch."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Reason
from spinetta.runtime.shim import remains
from tests.contract.shims import (
    asynchronous,
    children,
    clean_up,
    end_of,
    groups_of,
    identity,
    isolate,
    kill_shim,
    launch,
    living,
    name_of,
    ran,
    runtime,
    shell,
    state_dir,
    until,
)

pytestmark = pytest.mark.contract
PIDFD_GETFD = 438  # the same number on all architectures
_ = (isolate, state_dir)  # fixtures


def writer_of(shim_pid: int) -> int:
    (pid,) = [child.pid for child in children(shim_pid) if name_of(child.pid) == "spinetta-writer"]
    return pid


def openers(path: Path) -> set[int]:
    """Processes that have a file open."""
    found = set()
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if fd.readlink() == path:
                found.add(int(fd.parts[2]))
    return found


def has_been_told(pid: int) -> bool:
    """Whether something waits to be read in a socket of another process."""
    process = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not str(entry.readlink()).startswith("socket:"):
                continue
            fd = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, int(entry.name), 0)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=fd) as ours, contextlib.suppress(BlockingIOError):
                if ours.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return True
    finally:
        os.close(process)
    return False


def lock_owner(path: Path) -> int:
    """Who has taken the lock on a file, dead perhaps; 0: nobody that we can see."""
    for words in map(str.split, Path("/proc/locks").read_text().splitlines()):
        if words[1] == "FLOCK" and words[5].endswith(f":{path.stat().st_ino}"):
            return int(words[4])
    return 0


@contextlib.contextmanager
def another(state_dir: Path) -> Iterator[Path]:
    """A second node's state directory beside the first."""
    path = state_dir.parent / "another" / "state"
    try:
        yield path
    finally:
        clean_up(path)


@asynchronous
async def test_the_next_shim_waits_for_what_the_killed_one_still_writes(state_dir: Path) -> None:
    """Without a pid namespace nothing ends the writer with its shim."""
    async with runtime(state_dir, isolate=False) as rt:
        os.mkfifo(state_dir / "go")
        assert await rt.start(shell("last.1", "read line < go; exit 7", working_directory=str(state_dir))) is None
        shim, writer = rt.shim_pid(), writer_of(rt.shim_pid())
        os.kill(writer, signal.SIGSTOP)
    try:
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "echo > go", cwd=state_dir)
        await process.wait()
        # The exit has been handed to the writer, who does not read.
        await until(lambda: any(child.state == "Z" for child in children(shim)) and has_been_told(writer))
        owner = lock_owner(state_dir / "shim.lock")
        os.kill(shim, signal.SIGKILL)
        connecting = asyncio.create_task(_reasons(state_dir, "last.1"))
        await until(lambda: openers(state_dir / "shim.lock") - {writer})
        waits_s = time.monotonic() + 1.0
        while time.monotonic() < waits_s:
            assert lock_owner(state_dir / "shim.lock") == owner, "the killed shim's lock went to another"
            await asyncio.sleep(0.02)
        assert not connecting.done(), "it has read records while an earlier writer could still change them"
    finally:
        os.kill(writer, signal.SIGCONT)
    async with asyncio.timeout(30):
        assert await connecting == (Reason.EXIT, 7)


async def _reasons(state_dir: Path, key: str) -> tuple[Reason, int | None]:
    async with runtime(state_dir, isolate=False) as rt:
        end = await end_of(rt, key)
        return end.reason, end.exit_code


# A child in a session of its own, out of every control group, its parent gone.
ESCAPED = (
    "(setsid sh -c 'for f in $(ls -d /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs 2>/dev/null); "
    "do echo $$ > $f; done 2>/dev/null; echo up; sleep 1000; : {0}' &) ; sleep 1000"
)


@asynchronous
async def test_orphans_of_a_killed_shim_are_found_wherever_they_hide(state_dir: Path) -> None:
    marker, foreign = uuid.uuid4().hex, uuid.uuid4().hex
    user = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", f"sleep 1000; : {foreign}", env={remains.MARK: "spinetta-n1-000000000000"}
    )
    try:
        with another(state_dir) as beside:
            async with runtime(beside, isolate=False) as other, runtime(state_dir, isolate=False) as rt:
                assert await other.start(shell("same.1", ESCAPED.format(foreign))) is None
                assert await rt.start(shell("same.1", ESCAPED.format(marker))) is None
                for each in (other, rt):
                    await until(lambda each=each: "up" in each.log_path("same.1", "stdout").read_text())  # type: ignore[misc]
                before = living(foreign)
            kill_shim(state_dir)
            assert living(marker), "nothing was left to be found: the test tests nothing"
            # Whatever the next shim is like, it ends what the earlier left before it does anything else.
            async with runtime(state_dir, isolate=True) as rt:
                assert living(marker) == []
                assert (await end_of(rt, "same.1")).reason is Reason.SHIM_LOST
                assert living(foreign) == before
                assert user.returncode is None
            async with runtime(beside, isolate=False) as other:
                assert [held.exit for held in await other.held()] == [None]
    finally:
        for pid in living(foreign):  # out of every group: nobody else ends them
            for one in (*(child.pid for child in children(pid)), pid):
                os.kill(one, signal.SIGKILL)
        await user.wait()


@asynchronous
async def test_a_copy_of_a_state_directory_is_another_node(state_dir: Path) -> None:
    marker = uuid.uuid4().hex
    with another(state_dir) as copy:
        async with runtime(state_dir, isolate=False) as rt:
            assert await rt.start(shell("same.1", f"sleep 1000; : {marker}")) is None
            shutil.copytree(state_dir, copy, ignore=shutil.ignore_patterns("*.sock", "*.lock"))
            async with runtime(copy, isolate=False) as second:
                # What the copied record speaks of is the original's; here it counts as lost, and is not killed.
                assert (await end_of(second, "same.1")).reason is Reason.SHIM_LOST
                assert len(living(marker)) >= 1
                assert [held.exit for held in await rt.held()] == [None]


@asynchronous
async def test_leftovers_are_found_without_any_file(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(shell("left.1", "sleep 1000")) is None
        name = identity(state_dir)["cgroup_name"]
        (state_dir / "scratch" / "nobodys.1" / "deep").mkdir(parents=True)
    folders = groups_of(name)
    assert folders
    kill_shim(state_dir)
    # Made by an earlier shim in groups that it was then killed before it could use, and by another node.
    strangers = f"spinetta-n1-{uuid.uuid4().hex[:12]}"
    stranger = [folder.with_name(strangers) for folder in folders]
    for folder in stranger:
        folder.mkdir(exist_ok=True)
    try:
        (state_dir / "shim.json").unlink()
        shutil.rmtree(state_dir / "attempts")
        (state_dir / ".shim.json.tmp").write_text("half")
        async with runtime(state_dir, isolate=isolate) as rt:
            assert identity(state_dir)["cgroup_name"] == name
            assert await rt.held() == []
            assert not any((folder / "left.1").exists() for folder in folders)
            await until(lambda: not list((state_dir / "trash").iterdir()))
            assert not (state_dir / "scratch" / "nobodys.1").exists()
            assert not (state_dir / "scratch" / "left.1").exists()
            assert not (state_dir / ".shim.json.tmp").exists()
            await rt.shutdown_shim()
        assert groups_of(name) == []
        assert all(folder.is_dir() for folder in stranger)
    finally:
        for folder in stranger:
            folder.rmdir()


@asynchronous
async def test_a_damaged_record_is_put_aside_and_named(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for key in ("good.1", "bad.1"):
            await ran(rt, shell(key, "exit 1"))
        record = state_dir / "attempts" / "bad.1"
        await until(lambda: b'"exit_code": 1' in record.read_bytes())  # it is told a moment before
    kill_shim(state_dir)
    data = record.read_bytes()
    # One bit, and its failure would be a success.
    record.write_bytes(data.replace(b'"exit_code": 1', b'"exit_code": 0'))
    (state_dir / "attempts" / "no key").write_text("")
    (state_dir / "attempts" / "folder").mkdir()
    async with runtime(state_dir) as rt:
        assert (await end_of(rt, "good.1")).exit_code == 1
        bad = await end_of(rt, "bad.1")
        assert (bad.reason, bad.exit_code, bad.message) == (Reason.SHIM_LOST, None, "its record was damaged")
        told = [warning for warning in rt.warnings() if "was damaged" in warning]
        assert [warning.split()[2] for warning in told] == [
            str(state_dir / "attempts" / name) for name in ("bad.1", "folder", "no")
        ]
        assert len(list((state_dir / "broken").iterdir())) == 3
        for key in ("good.1", "bad.1", "folder"):
            await end_of(rt, key)
            await rt.forget(key)
        assert list((state_dir / "attempts").iterdir()) == []
    kill_shim(state_dir)
    async with runtime(state_dir) as rt:  # and no longer at the next start
        assert not [warning for warning in rt.warnings() if "was damaged" in warning]


@asynchronous
async def test_a_damaged_identity_stops_nobody(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        await ran(rt, shell("kept.1", "exit 3"))
    path = state_dir / "shim.json"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole.replace(b"spinetta", b"/../../")):
        kill_shim(state_dir)
        path.write_bytes(damage)
        async with runtime(state_dir) as rt:
            assert (await end_of(rt, "kept.1")).exit_code == 3
    assert json.loads(path.read_bytes())["cgroup_name"] == json.loads(whole)["cgroup_name"]


@pytest.mark.usefixtures("state_dir")
@asynchronous
async def test_a_lock_file_that_is_a_folder(state_dir: Path) -> None:
    (state_dir / "shim.lock").mkdir(parents=True)
    with pytest.raises(RuntimeUnavailable, match=r"shim\.lock"):
        async with runtime(state_dir):
            pass


@asynchronous
async def test_a_writer_that_cannot_live_is_not_started_in_a_loop(state_dir: Path) -> None:
    """The folder that it writes to is gone: puts fail, and the shim serves on."""
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("held.1", "exit 5")) is None or True
        for _ in range(3):
            writer = writer_of(rt.shim_pid())
            os.kill(writer, signal.SIGKILL)
            await until(
                lambda old=writer: [  # type: ignore[misc]
                    c for c in children(rt.shim_pid()) if name_of(c.pid) == "spinetta-writer" and c.pid != old
                ]
            )
        assert (await end_of(rt, "held.1")).exit_code == 5
        assert (await ran(rt, launch("more.1", "true"))).exit_code == 0


@contextlib.contextmanager
def pids_group(name: str) -> Iterator[Path]:
    """A control group in which the number of processes can be limited, on either version."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {controller: line.split(":", 2)[2] for line in lines for controller in line.split(":", 2)[1].split(",")}
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup" in line]
    top = next((m[4] for m in mounts if "pids" in m[-1].split(",")), None)
    folder = Path(f"{top}{own['pids']}" if top else f"{mounts[0][4]}{own['']}") / name
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")
@asynchronous
async def test_no_process_left(state_dir: Path, isolate: bool) -> None:
    """Nothing can be started, all that runs goes on, and later everything works again."""
    with pids_group(f"spinetta-test-{uuid.uuid4().hex[:12]}") as group:
        try:
            async with runtime(state_dir, isolate=isolate) as rt:
                os.mkfifo(state_dir / "go")
                waiter = shell("held.1", "read line < go; exit 4", working_directory=str(state_dir))
                assert await rt.start(waiter) is None
                shim, writer = rt.shim_pid(), writer_of(rt.shim_pid())
                (group / "cgroup.procs").write_text(str(shim))
                (group / "pids.max").write_text("1")
                unfit = await rt.start(launch("none.1", "true"))
                assert unfit is not None
                assert (unfit.reason, unfit.message) == (
                    Reason.NODE_UNFIT,
                    "cannot fork: Resource temporarily unavailable",
                )
                await rt.forget("none.1")
                # Not even the process that writes can be started again: what is to be written waits.
                os.kill(writer, signal.SIGKILL)
                await until(lambda: name_of(writer) == "")
                waiting = asyncio.create_task(rt.start(launch("waits.1", "true")))
                async with asyncio.timeout(30):
                    while [held.key for held in await rt.held()] != ["held.1", "waits.1"]:  # noqa: ASYNC110 - it tells no events
                        await asyncio.sleep(0.01)
                assert not waiting.done()
                (group / "pids.max").write_text("max")
                await waiting
                assert (await end_of(rt, "waits.1")).exit_code == 0
                assert (await ran(rt, launch("again.1", "true"))).exit_code == 0
                (state_dir / "go").write_text("\n")
                assert (await end_of(rt, "held.1")).exit_code == 4
                await rt.shutdown_shim()
        finally:
            kill_shim(state_dir)
            await until(lambda: not (group / "cgroup.procs").read_text())
