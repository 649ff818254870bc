"""Containers held by the shim, with the real runc: how they run, end, are stopped, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.ociprograms import HYBRID, cgroup_mode
from spinetta.runtime import launch as launching
from spinetta.runtime.protocol import Launch
from tests.contract.containers import (
    CRUN,
    OUTSIDE,
    PROGRAM,
    RUNC,
    contained,
    gone,
    rootfs,
    script,
    standing_in,
    traces,
)
from tests.contract.shims import (
    KILL_MARGIN_S,
    asynchronous,
    boottime_s,
    end_of,
    files_with,
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
_ = (isolate, rootfs, state_dir)  # fixtures
SECRET = b"sesame-8d1f"


@asynchronous
async def test_a_container_runs_and_ends(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        assert {"containers", "overlay"} <= set(rt.capabilities())
        text = "pwd; id -u; echo $GREETING; echo bad >&2; echo kept > here; touch /no || echo read-only; exit 3"
        ended = await ran(rt, script(state_dir, rootfs, "a.1", text, env={"PATH": "/bin", "GREETING": "hello"}))
        assert (ended.reason, ended.exit_code, ended.signal, ended.message) == (Reason.EXIT, 3, 0, "")
        assert rt.log_path("a.1", "stdout").read_text().split() == ["/work", "1000", "hello", "read-only"]
        assert rt.log_path("a.1", "stderr").read_text().startswith("bad\n")
        assert ended.usage.memory_peak_bytes > 0
        assert 0 < ended.started_ms <= ended.ended_ms
        kept = state_dir / "scratch/a.1/work/here"
        assert (kept.read_text(), kept.stat().st_uid) == ("kept\n", OUTSIDE + 1000)
        await gone(state_dir, "a.1")
        await rt.forget("a.1")
        await until(lambda: not list((state_dir / "scratch").iterdir()))
        assert (await ran(rt, contained(state_dir, rootfs, "a.2", "/bin/true"))).exit_code == 0


@asynchronous
async def test_a_writable_root_is_the_attempts_own(state_dir: Path, rootfs: Path) -> None:
    layer = state_dir.parent / "layer,with:odd\\name"
    layer.mkdir(mode=0o755)
    (layer / "new").mkdir()
    async with runtime(state_dir) as rt:
        text = "echo mine > /new/file && cat /bin/../new/file && touch /bin/x && echo done"
        changes = {"writable": True, "lower": (layer,)}
        os.chown(layer / "new", OUTSIDE + 1000, OUTSIDE + 1000)
        ended = await ran(rt, script(state_dir, rootfs, "w.1", text, **changes))
        # The image's folders belong to the container's root, and this is not root.
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 1)
        assert rt.log_path("w.1", "stdout").read_text() == "mine\n"
        assert (state_dir / "scratch/w.1/upper/new/file").read_text() == "mine\n"
        assert not (layer / "new/file").exists()
        ended = await ran(rt, script(state_dir, rootfs, "w.2", "ls /new; ls /work; touch /new/x", lower=(layer,)))
        assert ended.exit_code == 1, "laid over each other, and read-only"
        assert rt.log_path("w.2", "stdout").read_text() == ""
        await rt.forget("w.1")
        await until(lambda: not (state_dir / "scratch/w.1").exists())
        await until(lambda: not list((state_dir / "trash").iterdir()))


@asynchronous
@pytest.mark.parametrize(("text", "number"), [("kill -9 $$", 9), ("kill -TERM $$", 15), ("kill -SEGV $$", 11)])
async def test_a_command_that_ends_by_a_signal(state_dir: Path, rootfs: Path, text: str, number: int) -> None:
    async with runtime(state_dir) as rt:
        ended = await ran(rt, script(state_dir, rootfs, "s.1", text))
        assert (ended.reason, ended.signal, ended.exit_code) == (Reason.SIGNAL, number, 128 + number)


@asynchronous
async def test_a_stop_is_passed_on_and_then_enforced(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        polite = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 1000 & wait; done"
        assert await rt.start(script(state_dir, rootfs, "t.1", polite)) is None
        await until(lambda: "up" in rt.log_path("t.1", "stdout").read_text())
        await rt.stop("t.1", Reason.CANCELLED)
        ended = await end_of(rt, "t.1")
        assert (ended.reason, ended.exit_code) == (Reason.CANCELLED, 7)
        assert rt.log_path("t.1", "stdout").read_text() == "up\nbye\n"
        deaf = "trap '' TERM; echo up; (setsid sleep 1000 &); while :; do sleep 1000; done"
        assert await rt.start(script(state_dir, rootfs, "t.2", deaf, stop_wait_s=0.3)) is None
        await until(lambda: "up" in rt.log_path("t.2", "stdout").read_text())
        await rt.stop("t.2", Reason.RELEASED)
        ended = await end_of(rt, "t.2")
        assert (ended.reason, ended.signal, ended.exit_code) == (Reason.RELEASED, 9, None)
        await gone(state_dir, "t.1", "t.2")


@asynchronous
async def test_secrets_command_and_environment_are_nowhere_on_disk(
    state_dir: Path, rootfs: Path, isolate: bool, tmp_path: Path
) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        text = ": command-5e1a; cat /run/secrets/spinetta/key; ls -l /run/secrets/spinetta; while :; do sleep 1; done"
        secret = script(
            state_dir,
            rootfs,
            "x.1",
            text,
            env={"PATH": "/bin", "TOKEN": "value-77ab"},
            secrets=(("key", SECRET + b"\n"),),
        )
        assert await rt.start(secret) is None
        log = rt.log_path("x.1", "stdout")
        await until(lambda: "key" in log.read_text())
        assert log.read_bytes().startswith(SECRET)
        log.write_text("")
        needles = [b"command-5e1a", b"value-77ab", SECRET]
        assert files_with(state_dir, *needles) == []
        assert list((state_dir / "bundle").iterdir()) == []
        await rt.stop("x.1", Reason.CANCELLED)
        assert (await end_of(rt, "x.1")).reason is Reason.CANCELLED
        assert files_with(state_dir, *needles) == []


@asynchronous
async def test_orphans_are_reaped_and_end_with_the_command(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        text = """
            (setsid sh -c 'exit 0' &); (sh -c 'sleep 0 &'); (setsid sleep 4711 &)
            until ps -o args | grep -q '^sleep 4711'; do sleep 0; done
            while ps -o stat | grep -q Z; do sleep 0; done; exit 0
        """
        ended = await ran(rt, script(state_dir, rootfs, "o.1", text))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 0)
        await gone(state_dir, "o.1")


@asynchronous
async def test_a_container_does_not_outlive_its_deadline(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(script(state_dir, rootfs, "d.1", "sleep 1000", grace_s=2.5 + KILL_MARGIN_S)) is None
        ended = await end_of(rt, "d.1")
        assert (ended.reason, ended.signal) == (Reason.FENCED, 9)
        await rt.renew(boottime_s())
        ended = await ran(rt, script(state_dir, rootfs, "d.2", "sleep 1000", walltime_s=0.2, stop_wait_s=0.2))
        assert ended.reason is Reason.WALLTIME
        await gone(state_dir, "d.1", "d.2")


# --- what cannot be made ---------------------------------------------------------------------------------------------


@asynchronous
async def test_what_cannot_be_made_is_told_apart(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        usual = script(state_dir, rootfs, "n.1", "true")
        assert usual.container is not None

        async def told(key: str, attempt: Launch) -> tuple[Reason, str]:
            ended = await ran(rt, replace(attempt, key=key))
            assert (ended.exit_code, ended.signal) == (None, 0), ended
            await gone(state_dir, key)
            return ended.reason, ended.message

        reason, message = await told("n.1", contained(state_dir, rootfs, "n.1", "/bin/nothing", init=False))
        assert reason is Reason.SPAWN_FAILED
        assert "/bin/nothing" in message
        assert "no such file" in message.lower()
        sealed = contained(state_dir, rootfs, "n.2", "/bin/nothing", init=False, private=True)
        reason, message = await told("n.2", sealed)
        assert (reason, "nothing" in message) == (Reason.SPAWN_FAILED, False)
        for key, change, words in (
            ("n.3", {"program": "/usr/sbin/no-such-runc"}, "cannot execute the container runtime"),
            ("n.4", {"lower": (str(state_dir / "gone"),)}, "cannot mount the root file system"),
            ("n.5", {"config": {"ociVersion": "1.0.2", "root": {}}}, "could not be made"),
            ("n.6", {"config": {"linux": "x"}}, "could not be made"),
        ):
            reason, message = await told(key, replace(usual, container=replace(usual.container, **change)))
            assert reason is Reason.NODE_UNFIT
            assert words in message
        # The node goes on.
        assert (await ran(rt, script(state_dir, rootfs, "n.9", "exit 5"))).exit_code == 5


@asynchronous
async def test_limits_that_are_too_low_even_for_the_start(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        if PROGRAM == RUNC:  # crun starts a container in a MiB
            ended = await ran(rt, script(state_dir, rootfs, "m.1", "true", memory_bytes=1 << 20))
            assert ended.reason is Reason.OUT_OF_MEMORY, ended
        ended = await ran(rt, script(state_dir, rootfs, "m.2", "true", pids_max=1))
        assert ended.reason in (Reason.OUT_OF_PIDS, Reason.SPAWN_FAILED), ended
        assert "limit" in ended.message
        await gone(state_dir, "m.1", "m.2")


@asynchronous
async def test_crun_refuses_control_groups_of_both_versions(state_dir: Path, rootfs: Path) -> None:
    if cgroup_mode(Path("/proc/self/mountinfo").read_text()) != HYBRID:  # noqa: ASYNC240 - the kernel's
        pytest.skip("this machine has one version only")
    async with runtime(state_dir) as rt:
        ended = await ran(rt, script(state_dir, rootfs, "c.1", "true", program=CRUN))
        assert ended.reason is Reason.NODE_UNFIT
        assert "hybrid" in ended.message
        await gone(state_dir, "c.1")


# --- between create and start ----------------------------------------------------------------------------------------


@asynchronous
async def test_a_container_that_is_stopped_while_it_is_made_never_starts(
    state_dir: Path, rootfs: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = standing_in(tmp_path, f"[ $command = create ] && cat {gate}")
    async with runtime(state_dir) as rt:
        starting = asyncio.create_task(rt.start(script(state_dir, rootfs, "b.1", "touch ran", program=program)))
        await until(lambda: living(str(gate)))
        await rt.stop("b.1", Reason.CANCELLED)
        await asyncio.to_thread(gate.write_text, "")
        ended = await starting
        assert ended is not None
        assert ended.reason is Reason.CANCELLED
        assert not (state_dir / "scratch/b.1/work/ran").exists()
        await gone(state_dir, "b.1")
        # And when it does not come to an end by itself.
        slow = script(state_dir, rootfs, "b.2", "touch ran", program=program, stop_wait_s=0.2)
        starting = asyncio.create_task(rt.start(slow))
        await until(lambda: living(str(gate)))
        await rt.stop("b.2", Reason.CANCELLED)
        ended = await starting
        assert ended is not None
        assert ended.reason is Reason.CANCELLED
        await gone(state_dir, "b.2")


@asynchronous
async def test_the_deadline_is_looked_at_again_before_the_start(state_dir: Path, rootfs: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = standing_in(tmp_path, f"[ $command = create ] && cat {gate}")
    async with runtime(state_dir) as rt:
        late = script(state_dir, rootfs, "l.1", "touch ran", program=program, grace_s=1.5)
        starting = asyncio.create_task(rt.start(late))
        ended = await starting
        assert ended is not None
        assert ended.reason is Reason.FENCED
        assert not (state_dir / "scratch/l.1/work/ran").exists()
        await gone(state_dir, "l.1")


@asynchronous
async def test_the_runtimes_own_start_and_delete_serve_when_ours_do_not(
    state_dir: Path, rootfs: Path, tmp_path: Path
) -> None:
    moved = f"""
        if [ $command = create ]; then
            for word; do case $word in */.pid-*) file=$word; word=$word.new;; esac; set -- "$@" "$word"; shift; done
            {PROGRAM} "$@" || exit 1
            cd $root/*/; mv exec.fifo aside; mkdir more; cat $file.new > $file; rm $file.new; exit 0
        fi
        if [ $command = start ]; then echo start >> {tmp_path}/said; (cd $root/*/; mv aside exec.fifo); fi
        if [ $command = delete ]; then echo delete >> {tmp_path}/said; fi
    """
    async with runtime(state_dir) as rt:
        program = standing_in(tmp_path, moved)
        ended = await ran(rt, script(state_dir, rootfs, "f.1", "exit 4", program=program))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 4), ended.message
        await until(lambda: (tmp_path / "said").read_text().split() == ["start", "delete"])
        await until(lambda: traces(state_dir, "f.1") == [])


# --- who outlives whom -----------------------------------------------------------------------------------------------


@asynchronous
async def test_a_container_goes_on_without_the_daemon(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        text = "until [ -e go ]; do sleep 0; done; exit 42"
        assert await rt.start(script(state_dir, rootfs, "g.1", text)) is None
    async with runtime(state_dir, isolate=isolate) as rt:
        assert [(held.key, held.exit) for held in await rt.held()] == [("g.1", None)]
        (state_dir / "scratch/g.1/work/go").write_text("")
        assert (await end_of(rt, "g.1")).exit_code == 42


@asynchronous
async def test_a_shim_that_dies_takes_its_containers_along(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    marker = f"marker-{os.urandom(8).hex()}"
    text = f"(setsid sh -c 'sleep 1000; : {marker}' &); touch up; sleep 1000; : {marker}"
    async with runtime(state_dir, isolate=isolate) as rt:
        for number in range(3):
            attempt = script(state_dir, rootfs, f"k.{number}", text, writable=number == 1)
            assert await rt.start(attempt) is None
            await until((state_dir / f"scratch/k.{number}/work/up").exists)
        kill_shim(state_dir)
        if isolate:
            await until(lambda: not living(marker))
    async with runtime(state_dir, isolate=isolate) as rt:
        assert living(marker) == []
        await gone(state_dir, "k.0", "k.1", "k.2")
        held = await rt.held()
        assert [(one.key, one.exit.reason if one.exit else None) for one in held] == [
            (f"k.{number}", Reason.SHIM_LOST) for number in range(3)
        ]
        for one in held:
            await rt.forget(one.key)
        await until(lambda: not list((state_dir / "scratch").iterdir()))
        assert (await ran(rt, script(state_dir, rootfs, "k.9", "exit 6"))).exit_code == 6


OLDER = """
import sys
sys.path[:0] = [{parent!r}]
from shim import main, server
hello = server.Server._hello
def of_old(self, connection, message):
    if message["version"] != 1:
        raise server.Refused("version", "the shim speaks version 1 of its protocol, not 2")
    hello(self, connection, message)
server.Server._hello = of_old
sys.exit(main.main(sys.argv[1:]))
"""


@asynchronous
async def test_a_shim_of_the_version_before_runs_processes_only(
    state_dir: Path, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tmp_path / "older"
    entry.mkdir()
    (entry / "__main__.py").write_text(OLDER.format(parent=str(launching.SHIM_DIR.parent)))
    monkeypatch.setattr(launching, "SHIM_DIR", entry)
    async with runtime(state_dir) as rt:
        assert (await ran(rt, shell("v.1", "exit 8"))).exit_code == 8
        ended = await ran(rt, script(state_dir, rootfs, "v.2", "true"))
        assert ended.reason is Reason.NODE_UNFIT
        assert "version" in ended.message


def test_control_groups_of_version_2_only(rootfs: Path) -> None:
    """In a mount namespace in which there is nothing else, with what runs on this machine in it."""
    mounts = "mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
    command = [sys.executable, "-m", "tests.contract.pure_v2", str(rootfs)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["runs", "stops", "dies", "clean"]


REAPS = """#!/usr/bin/python3
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become ours
code = subprocess.run(["PROGRAM", *sys.argv[1:]], close_fds=False).returncode
if "create" in sys.argv and not code:
    with open(sys.argv[sys.argv.index("--pid-file") + 1]) as file:
        pid = int(file.read())
    os.kill(pid, 9)
    os.waitpid(pid, 0)
sys.exit(code)
"""


@asynchronous
async def test_a_runtime_that_waits_itself_for_what_it_has_made_keeps_no_end_back(
    state_dir: Path, rootfs: Path, tmp_path: Path, isolate: bool
) -> None:
    """As one may that fails after all, when the container's first process is known already."""
    program = tmp_path / "reaps"
    program.write_text(REAPS.replace("PROGRAM", PROGRAM))
    program.chmod(0o755)
    async with runtime(state_dir, isolate=isolate) as rt:
        ended = await ran(rt, script(state_dir, rootfs, "r.1", "echo started; sleep 1000", program=str(program)))
        assert ended.signal == 9 or ended.reason is Reason.NODE_UNFIT, ended
        await gone(state_dir, "r.1")
        assert "Traceback" not in (state_dir / "shim.log").read_text()
