"""Who outlives whom: daemons come and go, shims die, records stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Reason
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import Exited, ShimLost
from spinetta.runtime.shim import proctable
from tests.contract.shims import (
    KILL_MARGIN_S,
    asynchronous,
    boottime_s,
    children,
    clean_up,
    end_of,
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
_ = (isolate, state_dir)  # fixtures

# Detached twice over: another session, another parent.
ESCAPING = "setsid sh -c '(setsid sh -c \"echo up; sleep 1000; : {0}\" &)' & sleep 1000; : {0}"


@asynchronous
async def test_a_daemon_restart_changes_nothing(state_dir: Path, isolate: bool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with runtime(state_dir, isolate=isolate) as rt:
        first, pid = rt.shim_id(), rt.shim_pid()
        assert await rt.start(shell("on.1", f"cat {gate}; exit 42", token=11)) is None
    async with runtime(state_dir, isolate=isolate) as rt:
        assert (rt.shim_id(), rt.shim_pid()) == (first, pid)
        events = rt.events()
        assert [(held.key, held.token, held.exit) for held in await rt.held()] == [("on.1", 11, None)]
        await asyncio.to_thread(gate.write_text, "")
        async with asyncio.timeout(10):
            event = await anext(events)
        assert isinstance(event, Exited)
        assert (event.key, event.exit.exit_code) == ("on.1", 42)


@asynchronous
async def test_an_exit_that_nobody_was_there_to_see(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(shell("alone.1", "sleep 0.2; exit 17")) is None
    record = state_dir / "attempts" / "alone.1"
    await until(lambda: json.loads(record.read_text())["state"] == "ended")
    for _again in range(2):  # until it is forgotten
        async with runtime(state_dir) as rt:
            assert (await end_of(rt, "alone.1")).exit_code == 17
    async with runtime(state_dir) as rt:
        await rt.forget("alone.1")
    async with runtime(state_dir) as rt:
        assert await rt.held() == []


@asynchronous
async def test_a_forgotten_end_answers_a_late_start_of_that_very_attempt_only(state_dir: Path) -> None:
    """In a cluster that was restored from a backup the numbers of attempts come again."""
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("twice.1", "exit 3", token=11)) is None
        await end_of(rt, "twice.1")
        await rt.forget("twice.1")
        late = await rt.start(shell("twice.1", "exit 3", token=11))
        assert late is not None
        assert late.exit_code == 3
        assert await rt.start(shell("twice.1", "exit 4", token=9)) is None
        assert (await end_of(rt, "twice.1")).exit_code == 4


@asynchronous
async def test_one_shim_however_many_ask_for_it(state_dir: Path) -> None:
    async def attach() -> tuple[str, int]:
        async with runtime(state_dir) as rt:
            return rt.shim_id(), rt.shim_pid()

    assert len(set(await asyncio.gather(*(attach() for _ in range(5))))) == 1


@asynchronous
async def test_shims_of_two_nodes_of_one_name_stay_apart(state_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    try:
        async with runtime(state_dir) as a:
            assert await a.start(shell("same.1", "sleep 1000")) is None
            async with runtime(other) as b:
                assert a.shim_pid() != b.shim_pid()
                assert await b.start(shell("same.1", "exit 1")) is None
                assert (await end_of(b, "same.1")).exit_code == 1
            kill_shim(other)
            async with runtime(other):
                assert [held.exit for held in await a.held()] == [None]
    finally:
        clean_up(other)


@asynchronous
async def test_a_killed_shim_takes_all_with_it(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    log = state_dir.parent / "service.log"
    async with runtime(state_dir, isolate=isolate) as rt:
        first = rt.shim_id()
        events = rt.events()
        assert await rt.start(shell("daemon.1", ESCAPING.format(marker))) is None
        service = await rt.start_service("svc", ["/bin/sh", "-c", f"sleep 1000; : {marker}"], {}, "/", log)
        assert service.exit is None
        await ran(rt, shell("done.1", "exit 3"))
        await until(lambda: "up" in rt.log_path("daemon.1", "stdout").read_text())
        assert len(living(marker)) >= 3
        folders = identity(state_dir)["cgroups"]
        os.kill(rt.shim_pid(), signal.SIGKILL)
        # Nobody has to do anything: the runtime starts another shim, which reports what became of the old one's.
        seen: dict[str, Reason] = {}
        lost = False
        async with asyncio.timeout(30):
            async for event in events:
                if isinstance(event, ShimLost):
                    lost = True
                elif lost:
                    seen[event.key] = event.exit.reason
                if lost and len(seen) == 2:
                    break
        assert seen == {"daemon.1": Reason.SHIM_LOST, "done.1": Reason.EXIT}
        assert living(marker) == []
        assert rt.shim_id() != first
        gone = await rt.service("svc")
        assert gone is not None
        assert gone.exit is not None
        assert gone.exit.reason is Reason.SHIM_LOST
        assert {held.key: held.token for held in await rt.held()} == {"daemon.1": 7, "done.1": 7}
        assert identity(state_dir)["cgroups"] == folders
        assert not any((Path(folder) / "daemon.1").exists() for folder in folders)
        await rt.renew(boottime_s())
        assert (await ran(rt, launch("next.1", "true"))).exit_code == 0
    if isolate:
        return
    assert any("pid-namespace is missing" in warning for warning in rt.warnings())


@asynchronous
async def test_with_a_pid_namespace_the_kernel_does_it(state_dir: Path) -> None:
    """No shim comes after it here."""
    marker = uuid.uuid4().hex
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("daemon.1", ESCAPING.format(marker))) is None
        await until(lambda: "up" in rt.log_path("daemon.1", "stdout").read_text())
    kill_shim(state_dir)
    assert living(marker) == []


@asynchronous
async def test_without_a_pid_namespace_main_processes_die_at_least(state_dir: Path) -> None:
    marker = uuid.uuid4().hex
    async with runtime(state_dir, isolate=False) as rt:
        assert await rt.start(launch("main.1", "/bin/sh", "-c", f"sleep 1000; : {marker}")) is None
        await until(lambda: living(marker))
    kill_shim(state_dir)
    await until(lambda: not living(marker))


@asynchronous
async def test_the_shim_ignores_the_signals_of_terminals(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        first = rt.shim_id()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1):
            os.kill(rt.shim_pid(), number)
        assert (await ran(rt, launch("after.1", "true"))).exit_code == 0
        assert rt.shim_id() == first
        assert os.getsid(rt.shim_pid()) == os.getpgid(rt.shim_pid()) != os.getsid(0)


@asynchronous
async def test_the_writing_process_is_replaced(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        writer = next(child.pid for child in children(rt.shim_pid()) if name_of(child.pid) == "spinetta-writer")
        os.kill(writer, signal.SIGKILL)
        for n in range(10):
            assert (await ran(rt, shell(f"w.{n}", f"exit {n}"))).exit_code == n
        record = state_dir / "attempts" / "w.9"  # the end is told a moment before it is there
        await until(lambda: json.loads(record.read_text()).get("exit", {}).get("exit_code") == 9)


@asynchronous
async def test_shutdown(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    log = state_dir.parent / "service.log"
    async with runtime(state_dir, isolate=isolate) as rt:
        pid = rt.shim_pid()
        assert await rt.start(shell("r.1", f"trap '' TERM; sleep 1000; sleep 1000; : {marker}")) is None
        script = "trap 'echo stopped; exit' TERM; echo up; while :; do sleep 0.05; done"
        await rt.start_service("svc", ["/bin/sh", "-c", script], {"PATH": "/bin"}, "/", log)
        await until(lambda: "up" in log.read_text())
        await rt.shutdown_shim(wait_s=0.3)
        assert proctable.read(pid) is None or proctable.read(pid).state == "Z"  # type: ignore[union-attr]
        assert living(marker) == []
        assert log.read_text().splitlines()[-1] == "stopped"
        assert [folder for folder in identity(state_dir)["cgroups"] if os.path.exists(folder)] == []  # noqa: ASYNC240, PTH110
        with pytest.raises(RuntimeUnavailable):
            await rt.start(launch("late.1", "true"))
    async with runtime(state_dir) as rt:
        assert (await end_of(rt, "r.1")).reason is Reason.RELEASED


@asynchronous
async def test_a_shim_that_hangs_is_not_mistaken_for_a_dead_one(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("kept.1", "sleep 1000")) is None
        first = rt.shim_id()
        os.kill(rt.shim_pid(), signal.SIGSTOP)
        try:
            with pytest.raises(RuntimeUnavailable, match="did not answer 'ping' within"):
                await rt._ask("ping", 0.5)
        finally:
            os.kill(rt.shim_pid(), signal.SIGCONT)
        assert [held.key for held in await rt.held()] == ["kept.1"]
        assert rt.shim_id() == first


@asynchronous
async def test_a_start_whose_answer_was_lost(state_dir: Path, tmp_path: Path) -> None:
    attempt = shell("lost.1", "echo once >> mark; sleep 0.5; exit 8", working_directory=str(tmp_path))
    async with runtime(state_dir) as rt:
        starting = asyncio.create_task(rt.start(attempt))
        await asyncio.sleep(0)  # it has been sent, or is about to be
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
    async with runtime(state_dir) as rt:
        assert (await ran(rt, attempt)).exit_code == 8
    assert (tmp_path / "mark").read_text() == "once\n"


@asynchronous
async def test_a_shim_that_is_of_no_use_ends(state_dir: Path) -> None:
    async def connect(rt: contextlib.AsyncExitStack) -> ProcessRuntime:
        connection = ProcessRuntime.connect(state_dir, node="n1", kill_margin_s=1.0, idle_end_s=0.4)
        return await rt.enter_async_context(connection)

    async with contextlib.AsyncExitStack() as stack:
        rt = await connect(stack)
        await rt.renew(boottime_s())
        pid = rt.shim_pid()
        assert await rt.start(shell("keeps.1", "read line; exit 3")) is None
        assert (await end_of(rt, "keeps.1")).exit_code == 3
        assert await rt.start(shell("keeps.2", "sleep 1.5")) is None
        await asyncio.sleep(0.8)  # longer than its patience, but it has somebody to talk to
        assert proctable.read(pid)
    await until(lambda: json.loads((state_dir / "attempts" / "keeps.2").read_text())["state"] == "ended")
    await until(lambda: (process := proctable.read(pid)) is None or process.state == "Z")
    assert not any(Path(folder).exists() for folder in identity(state_dir)["cgroups"])  # noqa: ASYNC240
    async with contextlib.AsyncExitStack() as stack:
        rt = await connect(stack)
        assert [(held.key, held.exit and held.exit.reason) for held in await rt.held()] == [
            ("keeps.1", Reason.EXIT),
            ("keeps.2", Reason.EXIT),
        ]


@asynchronous
async def test_services(state_dir: Path, isolate: bool) -> None:
    log = state_dir.parent / "logs" / "service.log"
    env = {"PATH": "/bin:/usr/bin", "X": "y"}
    async with runtime(state_dir, isolate=isolate, renewed=False) as rt:
        assert await rt.service("svc") is None
        assert await rt.stop_service("svc") is None
        script = "trap 'exit 7' INT; echo $X >&2; while :; do sleep 0.05; done"
        first = await rt.start_service("svc", ["sh", "-c", script], env, "/tmp", log)
        assert first.exit is None
        # The pid is one that we can use.
        assert name_of(first.pid) == "sh"
        assert await asyncio.to_thread(os.readlink, f"/proc/{first.pid}/cwd") == "/tmp"
        again = await rt.start_service("svc", ["false"], env, "/", log)
        assert again == first
    async with runtime(state_dir, isolate=isolate, renewed=False) as rt:
        assert await rt.service("svc") == first
        await until(lambda: log.read_text() == "y\n")  # the trap is set
        ended = await rt.stop_service("svc", signal.SIGINT, 5.0)
        assert ended is not None
        assert ended.exit is not None
        assert (ended.exit.reason, ended.exit.exit_code) == (Reason.RELEASED, 7)
        assert await rt.service("svc") == ended
        second = await rt.start_service("svc", ["sh", "-c", "echo more; exit 3"], env, "/", log)
        assert second.pid != first.pid
        async with asyncio.timeout(10):
            while (own := await rt.service("svc")) is None or own.exit is None:  # noqa: ASYNC110 - it is asked for, not told
                await asyncio.sleep(0.01)
        assert (own.exit.reason, own.exit.exit_code) == (Reason.EXIT, 3)
        assert log.read_text() == "y\nmore\n"
        failed = await rt.start_service("other", ["no-such-program"], env, "/", log)
        assert failed.exit is not None
        assert failed.exit.message == "program not found: no-such-program"


@asynchronous
async def test_services_are_exempt_from_the_dead_mans_switch(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        log = state_dir.parent / "log"
        await rt.start_service("svc", ["/bin/sleep", "1000"], {}, "/", log)
        assert await rt.start(shell("short.1", "sleep 1000", grace_s=KILL_MARGIN_S + 2.5)) is None
        assert (await end_of(rt, "short.1")).reason is Reason.FENCED
        service = await rt.service("svc")
        assert service is not None
        assert service.exit is None


@asynchronous
async def test_two_hundred_leave_nothing(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        await ran(rt, launch("warm.1", "true"))
        await rt.forget("warm.1")
        shim = rt.shim_pid()
        files = sorted(os.listdir(f"/proc/{shim}/fd"))  # noqa: PTH208
        folders = [path for path in map(Path, identity(state_dir)["cgroups"]) if path.is_dir()]

        async def one(n: int) -> None:
            # Leaves an orphan behind for the shim to reap.
            attempt = shell(f"t.{n}", "(setsid sleep 1000 &) ; exit 0") if n % 10 == 0 else launch(f"t.{n}", "true")
            assert (await ran(rt, attempt)).exit_code == 0
            await rt.forget(f"t.{n}")

        for batch in range(20):
            async with asyncio.TaskGroup() as tasks:
                for n in range(10):
                    tasks.create_task(one(batch * 10 + n))
        await until(lambda: sorted(os.listdir(f"/proc/{shim}/fd")) == files)  # noqa: PTH208
        await until(lambda: [name_of(child.pid) for child in children(shim)] == ["spinetta-writer"])
        await until(lambda: not any(inner.is_dir() for folder in folders for inner in folder.iterdir()))
        for name in ("attempts", "scratch"):
            assert list((state_dir / name).iterdir()) == []
        await until(lambda: not list((state_dir / "trash").iterdir()))  # between two that empty it there may be none
        assert await rt.held() == []


@asynchronous
async def test_a_record_that_cannot_be_read_is_an_end_all_the_same(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        await rt.start(shell("torn.1", "sleep 1000"))
    kill_shim(state_dir)
    (state_dir / "attempts" / "torn.1").write_text('{"v": 1, "sta')
    (state_dir / "attempts" / ".other.tmp").write_text("half")
    async with runtime(state_dir) as rt:
        assert (await end_of(rt, "torn.1")).reason is Reason.SHIM_LOST
        await rt.forget("torn.1")
        assert list((state_dir / "attempts").iterdir()) == []


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of one megabyte at `path`."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "spinetta-test", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """Leave no byte on the disk of `path`."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return filler


@asynchronous
async def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "full"
    with small_disk(path):
        try:
            async with runtime(path) as rt:
                assert await rt.start(shell("held.1", "sleep 1000")) is None
                filler = fill(path)
                ended = await rt.start(launch("full.1", "true"))
                assert ended is not None
                assert ended.reason is Reason.NODE_UNFIT
                assert ended.message == "cannot write the record of the attempt: No space left on device"
                await rt.stop("held.1", Reason.CANCELLED)
                ended = await end_of(rt, "held.1")
                assert ended.reason is Reason.CANCELLED
                assert "could not be recorded: No space left on device" in ended.message
                filler.unlink()
                record = path / "attempts" / "held.1"
                await until(lambda: json.loads(record.read_text())["state"] == "ended")
            kill_shim(path)
            async with runtime(path) as rt:
                assert (await end_of(rt, "held.1")).reason is Reason.CANCELLED
        finally:
            clean_up(path)


@asynchronous
async def test_a_state_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeUnavailable, match="cannot use"):
        async with ProcessRuntime.connect(tmp_path / "file" / "x", node="n1", kill_margin_s=1.0):
            pass
