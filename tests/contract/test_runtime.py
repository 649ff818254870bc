"""The process runtime against its protocol: real shim, real processes, with a pid namespace and without."""

from __future__ import annotations

import asyncio
import os
import stat
import uuid
from pathlib import Path
from typing import Any

import pytest

from spinetta.errors import InvariantViolation, UserError
from spinetta.model import Exit, Reason, Usage
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import Runtime
from tests.contract.shims import (
    ENV,
    asynchronous,
    end_of,
    identity,
    isolate,
    launch,
    living,
    ran,
    runtime,
    shell,
    state_dir,
    until,
)

pytestmark = pytest.mark.contract
_ = (isolate, state_dir)  # fixtures


@asynchronous
async def test_exit_codes_and_signals(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        for code in (0, 1, 127, 255):
            ended = await ran(rt, shell(f"code.{code}", f"exit {code}"))
            assert (ended.reason, ended.exit_code, ended.signal) == (Reason.EXIT, code, 0)
            assert 0 < ended.started_ms <= ended.ended_ms
        for name, number in (("KILL", 9), ("SEGV", 11), ("TERM", 15)):
            ended = await ran(rt, shell(f"signal.{number}", f"kill -{name} $$"))
            assert (ended.reason, ended.exit_code, ended.signal) == (Reason.SIGNAL, None, number)


@asynchronous
async def test_surroundings_of_a_process(state_dir: Path, isolate: bool) -> None:
    env = {"PATH": "/usr/bin:/bin", "A": "1 2\n3", "UMLAUT": "grün", "BYTES": "\udcff"}
    async with runtime(state_dir, isolate=isolate) as rt:
        await ran(rt, launch("env.1", "env", "-0", env=env))
        got = rt.log_path("env.1", "stdout").read_bytes()
        if not isolate:  # so that the next shim finds what no pid namespace ends with this one
            env["SPINETTA_HOLDER"] = identity(state_dir)["cgroup_name"]
        assert sorted(got.split(b"\0")[:-1]) == sorted(os.fsencode(f"{k}={v}") for k, v in env.items())
        script = (
            "umask; grep -E '^(SigBlk|SigIgn)' /proc/self/status; cat /proc/self/oom_score_adj; "
            "ls /proc/self/fd | wc -l; readlink /proc/self/fd/0; ps -o ni=,sid=,pgid= -p $$; echo $$; echo oops >&2; "
            "ulimit -n; cat"
        )
        ended = await ran(rt, shell("around.1", script))
        assert ended.exit_code == 0
        lines = rt.log_path("around.1", "stdout").read_text().splitlines()
        assert lines[0] == "0022"
        assert [line.split()[1] for line in lines[1:3]] == ["0" * 16] * 2
        assert int(lines[3]) > 0
        assert lines[4] == "4"  # 0, 1, 2 and the one that ls opens itself
        assert lines[5] == "/dev/null"
        nice, session, group = lines[6].split()
        assert (nice, session, group) == ("0", lines[7], lines[7])
        assert rt.log_path("around.1", "stderr").read_text() == "oops\n"
        assert stat.S_IMODE(rt.log_path("around.1", "stdout").stat().st_mode) == 0o640


@asynchronous
async def test_working_directory(state_dir: Path, isolate: bool, tmp_path: Path) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        await ran(rt, shell("given.1", "pwd", working_directory=str(tmp_path)))
        assert rt.log_path("given.1", "stdout").read_text() == f"{tmp_path}\n"
        await ran(rt, shell("fresh.1", "pwd; mkdir -p a/b; touch a/b/c; chmod 0 a"))
        scratch = Path(rt.log_path("fresh.1", "stdout").read_text().strip())
        assert (scratch / "a").is_dir()
        await rt.forget("fresh.1")
        await until(lambda: not scratch.exists())
        await until(lambda: list((state_dir / "trash").iterdir()) == [])


FAILURES = {
    "nothing": (launch("x.1", "no-such-program"), "program not found: no-such-program"),
    "no file": (launch("x.1", "/no/such/file"), "program not found: /no/such/file"),
    "not executable": (launch("x.1", "/etc/passwd"), "not executable: /etc/passwd (permission denied)"),
    "a directory": (launch("x.1", "/etc"), "not executable: /etc (permission denied)"),
    "empty": (launch("x.1"), "the command is empty"),
    "empty name": (launch("x.1", ""), "the command is empty"),
    "no directory": (launch("x.1", "true", working_directory="/no/such"), "working directory missing: /no/such"),
    "a file": (launch("x.1", "true", working_directory="/etc/passwd"), "working directory missing: /etc/passwd"),
    "NUL": (launch("x.1", "true", "a\0b"), "an argument contains a NUL character"),
    "surrogate": (launch("x.1", "true", "\ud800"), "an argument or environment variable cannot be written in bytes"),
    "variable": (launch("x.1", "true", env={"A=B": "c"}), "the environment variable 'A=B' has a name or value"),
    "long": (launch("x.1", "/bin/true", "a" * 200_000), "the arguments and environment together are too long"),
    "PATH": (launch("x.1", "true", env={"PATH": "/etc"}), "program not found: true"),
}


@pytest.mark.parametrize("name", FAILURES)
@asynchronous
async def test_what_cannot_start_says_why(name: str, state_dir: Path) -> None:
    attempt, message = FAILURES[name]
    async with runtime(state_dir) as rt:
        ended = await rt.start(attempt)
        assert ended is not None
        assert (ended.reason, ended.exit_code) == (Reason.SPAWN_FAILED, None)
        assert ended.message.startswith(message)
        assert await end_of(rt, "x.1") == ended


@asynchronous
async def test_scripts_that_cannot_run(state_dir: Path, tmp_path: Path) -> None:
    for name, content in (("no-interpreter", "#!/no/such\n"), ("no-header", "echo hi\n")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    async with runtime(state_dir) as rt:
        ended = await rt.start(launch("a.1", str(tmp_path / "no-interpreter")))
        assert ended is not None
        assert "the interpreter named in its first line was not found" in ended.message
        ended = await rt.start(launch("a.2", str(tmp_path / "no-header")))
        assert ended is not None
        assert "neither a program for this machine nor a script" in ended.message


@asynchronous
async def test_a_second_start_changes_nothing(state_dir: Path, isolate: bool, tmp_path: Path) -> None:
    attempt = shell("twice.1", "echo once >> mark; sleep 0.3; exit 5", working_directory=str(tmp_path))
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await asyncio.gather(*(rt.start(attempt) for _ in range(5))) == [None] * 5
        ended = await end_of(rt, "twice.1")
        assert await rt.start(attempt) == ended
        await rt.forget("twice.1")
        late = await rt.start(attempt)  # one that was on its way all the time
        assert late == ended
        assert (tmp_path / "mark").read_text() == "once\n"
        assert await rt.held() == []


@asynchronous
async def test_stop_is_term_then_kill_of_all(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    async with runtime(state_dir, isolate=isolate) as rt:
        # Handles TERM and says so by its exit code, which is kept beside the reason.
        assert await rt.start(shell("polite.1", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")) is None
        await until(lambda: rt.log_path("polite.1", "stdout").read_text() == "ready\n")
        await rt.stop("polite.1", Reason.CANCELLED)
        ended = await end_of(rt, "polite.1")
        assert (ended.reason, ended.exit_code) == (Reason.CANCELLED, 9)
        # Ignores it, as do its children, one of them in a session of its own.
        script = f"trap '' TERM; setsid sh -c 'sleep 1000; : {marker}' & (sleep 1000; : {marker}) & echo ready; wait"
        assert await rt.start(shell("rude.1", script, stop_wait_s=0.3)) is None
        await until(lambda: rt.log_path("rude.1", "stdout").read_text() == "ready\n" and len(living(marker)) >= 2)
        await rt.stop("rude.1", Reason.RELEASED)
        await rt.stop("rude.1", Reason.CANCELLED)  # the first reason stays
        ended = await end_of(rt, "rude.1")
        assert (ended.reason, ended.exit_code, ended.signal) == (Reason.RELEASED, None, 9)
        assert living(marker) == []
        await rt.stop("unknown.1", Reason.CANCELLED)
        await rt.stop("rude.1", Reason.CANCELLED)
        assert {held.key: held.exit for held in await rt.held()}["rude.1"] == ended


@asynchronous
async def test_stopped_processes_are_stopped_too(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("stopped.1", "trap 'exit 4' TERM; kill -STOP $$; echo went on; exit 1")) is None
        pid = (await rt.held())[0].started_ms
        assert pid
        await rt.stop("stopped.1", Reason.CANCELLED)
        ended = await end_of(rt, "stopped.1", 5)
        assert ended.reason is Reason.CANCELLED


@asynchronous
async def test_stop_that_overtakes_the_start(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for n in range(20):
            attempt = shell(f"race.{n}", "sleep 1000", stop_wait_s=5.0)
            ended, _ = await asyncio.gather(rt.start(attempt), rt.stop(f"race.{n}", Reason.CANCELLED))
            ended = ended or await end_of(rt, f"race.{n}", 4)
            assert ended.reason is Reason.CANCELLED


@asynchronous
async def test_an_exit_of_its_own_stays_its_own(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        ended = await ran(rt, shell("own.1", "exit 3"))
        await rt.stop("own.1", Reason.CANCELLED)
        assert await end_of(rt, "own.1") == ended
        assert ended.reason is Reason.EXIT


@asynchronous
async def test_what_the_main_process_leaves_is_killed(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    daemon = f"setsid sh -c '(sleep 1000; : {marker}) & sleep 1000; : {marker}' & sleep 0.2; exit 6"
    async with runtime(state_dir, isolate=isolate) as rt:
        ended = await ran(rt, shell("leaves.1", daemon))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 6)
        assert living(marker) == []


@asynchronous
async def test_forget(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        await ran(rt, shell("f.1", "echo out"))
        assert (state_dir / "attempts" / "f.1").exists()
        for _ in range(3):
            await rt.forget("f.1")
        assert not (state_dir / "attempts" / "f.1").exists()
        assert await rt.held() == []
        assert rt.log_path("f.1", "stdout").read_text() == "out\n"
        await rt.start(shell("f.2", "sleep 1000"))
        with pytest.raises(InvariantViolation, match="has not ended"):
            await rt.forget("f.2")


@asynchronous
async def test_held_and_usage(state_dir: Path) -> None:
    async with runtime(state_dir, renewed=False) as rt:
        for n in range(300):  # more than one page; refused, since nothing was renewed
            ended = await rt.start(launch(f"h.{n:03}", "true"))
            assert ended is not None
            assert ended.reason is Reason.FENCED
        assert [held.key for held in await rt.held()] == [f"h.{n:03}" for n in range(300)]
    async with runtime(state_dir) as rt:
        attempt = shell("busy.1", "while :; do :; done", token=99, incarnation="i9")
        assert await rt.start(attempt) is None
        held = next(held for held in await rt.held() if held.key == "busy.1")
        assert (held.token, held.incarnation, held.exit) == (99, "i9", None)
        used: list[Usage] = []
        while not used or used[-1].cpu_user_s < 0.2:
            usage = await rt.usage("busy.1")
            assert usage is not None
            used.append(usage)
            await asyncio.sleep(0.05)
        assert used[-1].memory_peak_bytes > 0
        assert await rt.usage("unknown.1") is None
        await rt.stop("busy.1", Reason.CANCELLED)
        assert (await end_of(rt, "busy.1")).usage.cpu_user_s >= used[-1].cpu_user_s
        assert await rt.usage("busy.1") is None


@pytest.mark.parametrize("key", ["", "..", "a/b", ".hidden", "a" * 129, "a b", "ä"])
@asynchronous
async def test_bad_keys_never_reach_the_disk(key: str, state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        with pytest.raises(UserError, match="cannot be the name"):
            await rt.start(launch(key, "true"))
        await rt.stop(key, Reason.CANCELLED)
        await rt.forget(key)
        assert await rt.usage(key) is None


@asynchronous
async def test_keys_that_are_names_of_control_files_do_no_harm(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for key in ("cgroup.procs", "tasks", "memory.limit_in_bytes", "cpu.stat"):
            ended: Exit = await ran(rt, launch(key, "true"))
            assert ended.reason in (Reason.EXIT, Reason.SPAWN_FAILED)
            await rt.forget(key)


@asynchronous
async def test_a_long_state_directory(tmp_path: Path) -> None:
    from tests.contract.shims import clean_up

    path = tmp_path / ("d" * 100) / ("e" * 100)
    try:
        async with runtime(path) as rt:
            assert (await ran(rt, launch("a.1", "true", env=ENV))).exit_code == 0
    finally:
        clean_up(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"working_directory": "relative"}, "the working directory must be an absolute path, not 'relative'"),
        ({"working_directory": "/a\0b"}, "the working directory must be an absolute path"),
        ({"cpu_millis": -1}, "cpu_millis must be 0 to"),
        ({"memory_bytes": 1 << 63}, "memory_bytes must be 0 to"),
        ({"walltime_s": -0.5}, "walltime_s must not be negative"),
        ({"grace_s": float("nan")}, "grace_s must not be negative"),
        ({"env": {"A": "x" * (3 << 20)}}, "the arguments and environment together are too long for any machine"),
    ],
)
@asynchronous
async def test_what_no_shim_would_take_ends_at_once(change: dict[str, Any], message: str, state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        ended = await rt.start(launch("a.1", "true", **change))
        assert ended is not None
        assert ended.reason is Reason.SPAWN_FAILED
        assert ended.message.startswith(message)
        assert await rt.held() == []


@asynchronous
async def test_a_task_that_leaves_its_group_is_found(state_dir: Path) -> None:
    """It runs as root here, and moves itself to the root of one hierarchy after the other but the last."""
    marker = uuid.uuid4().hex
    async with runtime(state_dir) as rt:
        roots = {Path(folder).parent for folder in identity(state_dir)["cgroups"]}
        moves = "".join(f"echo 0 > {root}/cgroup.procs; " for root in sorted(roots)[1:])
        script = f"setsid sh -c '{moves}echo away; sleep 1000; : {marker}' & while ! grep -q . $OUT; do :; done"
        out = str(rt.log_path("away.1", "stdout"))
        await ran(rt, shell("away.1", script, env={**ENV, "OUT": out}))
        await until(lambda: not living(marker))
        await until(lambda: not any((Path(folder) / "away.1").exists() for folder in identity(state_dir)["cgroups"]))


def as_the_protocol_has_it(runtime: ProcessRuntime) -> Runtime:
    """For the type checker."""
    return runtime
