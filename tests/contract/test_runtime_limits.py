"""Limits: memory, processes, CPU, wall time, and the dead-man's switch."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from pathlib import Path

import pytest

from spinetta.model import Reason
from tests.contract.shims import (
    KILL_MARGIN_S,
    asynchronous,
    boottime_s,
    end_of,
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
MIB = 1 << 20
HOG = "x = bytearray(400 << 20); print(len(x))"


@asynchronous
async def test_this_machine_has_all_that_the_tests_below_need(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert {"memory-limit", "cpu-limit", "pids-limit", "cgroup-kill", "oom-report"} <= set(rt.capabilities())
        assert "pid-namespace" in rt.capabilities()


@asynchronous
async def test_memory(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        ended = await ran(rt, launch("hog.1", sys.executable, "-S", "-c", HOG, memory_bytes=64 * MIB))
        assert (ended.reason, ended.exit_code, ended.signal) == (Reason.OUT_OF_MEMORY, None, 9)
        assert "memory limit of 67108864 bytes" in ended.message
        assert 32 * MIB < ended.usage.memory_peak_bytes <= 64 * MIB
        # A child of it is killed, the main process copes: still out of memory, and the exit code is kept.
        script = f"{sys.executable} -S -c '{HOG}'; exit 3"
        ended = await ran(rt, shell("hog.2", script, memory_bytes=64 * MIB))
        assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_MEMORY, 3)
        ended = await ran(rt, launch("fits.1", sys.executable, "-S", "-c", HOG, memory_bytes=600 * MIB))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 0)
        assert ended.usage.memory_peak_bytes > 400 * MIB


@asynchronous
async def test_less_memory_than_a_start_takes(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        ended = await ran(rt, launch("small.1", "sleep", "1000", memory_bytes=64 << 10))
        assert ended.reason is Reason.OUT_OF_MEMORY, ended
        assert (await ran(rt, launch("next.1", "true"))).exit_code == 0


@asynchronous
async def test_a_fork_bomb_is_contained(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    bomb = f"import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n# {marker}"
    async with runtime(state_dir, isolate=isolate) as rt:
        attempt = launch("bomb.1", sys.executable, "-S", "-c", bomb, pids_max=40, cpu_millis=500, stop_wait_s=0.2)
        assert await rt.start(attempt) is None
        await until(lambda: len(living(marker)) >= 35)
        assert len(living(marker)) <= 40
        assert (await ran(rt, launch("meanwhile.1", "true"))).exit_code == 0
        await rt.stop("bomb.1", Reason.CANCELLED)
        assert (await end_of(rt, "bomb.1")).reason is Reason.CANCELLED
        assert living(marker) == []


@asynchronous
async def test_cpu(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        ended = await ran(rt, shell("cpu.1", "while :; do :; done", cpu_millis=200, walltime_s=2.0, stop_wait_s=0.1))
        used_s = ended.usage.cpu_user_s + ended.usage.cpu_system_s
        assert 0.05 < used_s < 0.8  # 0.4 and what the last period and the machine's load add or take


@asynchronous
async def test_walltime(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    async with runtime(state_dir, isolate=isolate) as rt:
        began_s = time.monotonic()
        script = (
            f"trap 'echo asked' TERM; (trap '' TERM; while :; do sleep 1000; : {marker}; done) & while :; do wait; done"
        )
        ended = await ran(rt, shell("wall.1", script, walltime_s=1.0, stop_wait_s=1.0))
        assert (ended.reason, ended.signal) == (Reason.WALLTIME, 9)
        assert time.monotonic() - began_s >= 2.0
        assert rt.log_path("wall.1", "stdout").read_text() == "asked\n"
        assert living(marker) == []
        ended = await ran(rt, shell("wall.2", "exit 0", walltime_s=5.0))
        assert ended.reason is Reason.EXIT


@asynchronous
async def test_nothing_starts_before_a_renewal_or_after_its_time(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate, renewed=False) as rt:
        ended = await rt.start(launch("early.1", "true"))
        assert ended is not None
        assert ended.reason is Reason.FENCED
        assert "has not renewed" in ended.message
        await rt.renew(boottime_s() - 10)
        ended = await rt.start(launch("late.1", "true", grace_s=10.0 + KILL_MARGIN_S))
        assert ended is not None
        assert ended.reason is Reason.FENCED
        assert "too old" in ended.message
        await rt.renew(boottime_s() / 2)  # never backwards, also where not much time has passed since the start
        assert (await ran(rt, launch("in-time.1", "true", grace_s=60.0))).reason is Reason.EXIT


@asynchronous
async def test_the_dead_mans_switch(state_dir: Path, isolate: bool) -> None:
    marker = uuid.uuid4().hex
    async with runtime(state_dir, isolate=isolate) as rt:
        in_time_s = 2.5  # for three starts on a busy machine
        renewed_s, deadline_ms = boottime_s(), 1000 * (time.time() + in_time_s)
        await rt.renew(renewed_s)
        stubborn = f"trap '' TERM; setsid sh -c 'sleep 1000; : {marker}' & while :; do sleep 1000; : {marker}; done"
        assert await rt.start(shell("short.1", stubborn, grace_s=in_time_s + KILL_MARGIN_S)) is None
        assert await rt.start(shell("long.1", "sleep 1000", grace_s=60.0)) is None
        assert await rt.start(shell("for-ever.1", "sleep 1000", grace_s=float("inf"))) is None
        ended = await end_of(rt, "short.1")
        assert ended.reason is Reason.FENCED
        assert -10 <= ended.ended_ms - deadline_ms < 1000 * KILL_MARGIN_S
        assert living(marker) == []
        assert [held.key for held in await rt.held() if held.exit is None] == ["for-ever.1", "long.1"]


@asynchronous
async def test_renewals_put_the_switch_off_and_a_future_one_is_not_believed(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("kept.1", "sleep 1000", grace_s=1.5 + KILL_MARGIN_S)) is None
        for _i in range(10):
            await rt.renew(boottime_s())
            await asyncio.sleep(0.2)
        assert [held.key for held in await rt.held() if held.exit is None] == ["kept.1"]
        await rt.renew(boottime_s() + 1000)
        before_s = boottime_s()
        assert (await end_of(rt, "kept.1")).reason is Reason.FENCED
        assert boottime_s() - before_s < 1.5 + KILL_MARGIN_S


@asynchronous
async def test_a_client_with_a_wider_margin_widens_it(state_dir: Path) -> None:
    from spinetta.runtime.process import ProcessRuntime

    async with runtime(state_dir) as rt:
        assert await rt.start(shell("wide.1", "sleep 1000", grace_s=20.0)) is None
        async with ProcessRuntime.connect(state_dir, node="n1", kill_margin_s=19.5) as wide:
            assert (await end_of(wide, "wide.1", 5)).reason is Reason.FENCED
        async with ProcessRuntime.connect(state_dir, node="n1", kill_margin_s=1.0) as narrow:
            await narrow.renew(boottime_s())
            ended = await narrow.start(shell("narrow.1", "sleep 1000", grace_s=19.0))
            assert ended is not None
            assert ended.reason is Reason.FENCED


@asynchronous
async def test_the_switch_needs_no_disk_and_no_client(state_dir: Path) -> None:
    """The process that writes to the disk is stopped, as a frozen disk would stop it."""
    import os
    import signal

    from tests.contract.shims import children, name_of

    marker = uuid.uuid4().hex
    async with runtime(state_dir) as rt:
        shim = rt.shim_pid()
        await rt.start(shell("frozen.1", f"while :; do sleep 1000; : {marker}; done", grace_s=2.5 + KILL_MARGIN_S))
        await until(lambda: living(marker))
        writer = next(child.pid for child in children(shim) if name_of(child.pid) == "spinetta-writer")
        os.kill(writer, signal.SIGSTOP)
    try:
        await until(lambda: not living(marker), 5.0)
        async with runtime(state_dir) as rt:
            # Reported all the same, once the disk has had its time; written when it is back.
            ended = await end_of(rt, "frozen.1", 10.0)
            assert ended.reason is Reason.FENCED
            assert "not recorded yet" in ended.message
            # It waits as a zombie for its record, since a reaped child's end is nowhere else.
            assert [child.state for child in children(shim) if child.pid != writer] == ["Z"]
            assert '"started"' in (state_dir / "attempts" / "frozen.1").read_text()
            os.kill(writer, signal.SIGCONT)
            await until(lambda: [child.pid for child in children(shim)] == [writer])
            await until(lambda: '"ended"' in (state_dir / "attempts" / "frozen.1").read_text())
    finally:
        os.kill(writer, signal.SIGCONT)
