"""Each limit exceeded for real, told apart from the others, and missing where none was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from spinetta.model import Reason, Usage
from spinetta.runtime.client import parse_sample
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.shim import watcher
from spinetta.runtime.shim.records import seal
from tests.contract.shims import (
    asynchronous,
    children,
    end_of,
    groups_of,
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
MIB = 1 << 20
THREADS = (
    "import threading,time\nfor n in range(30): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
)
SLEEPERS = "for n in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; "


def watchers_of(rt: ProcessRuntime) -> list[int]:
    return [child.pid for child in children(rt.shim_pid()) if name_of(child.pid) == "spinetta-watch"]


def counter(key: str, file: str, name: str) -> int:
    """A number of a control file of an attempt that runs, whichever hierarchy has it."""
    for group in groups_of(key):
        with contextlib.suppress(OSError):
            for line in (group / file).read_text().splitlines():
                if line.split()[0] == name:
                    return int(line.split()[1])
    return -1


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def on_a_disk(path: Path) -> bool:
    """Else it is in memory, or in a layer of a container."""
    return os.major(path.stat().st_dev) != 0


@asynchronous
async def test_too_many_processes(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        ended = await ran(rt, shell("forks.1", SLEEPERS + "wait", pids_max=4))
        assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_PIDS, 2)
        assert "could not make another process or thread" in ended.message
        assert ended.message.endswith("its limit is 4")
        assert ended.usage.pids_peak == 4
        ended = await ran(rt, launch("threads.1", sys.executable, "-S", "-c", THREADS, pids_max=10))
        assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_PIDS, 1)
        assert ended.usage.pids_peak == 10
        # One that copes has not failed; one that fails for another reason, without having asked for more, is no such.
        coping = "import os\ntry: os.fork()\nexcept OSError: print('alone')"
        ended = await ran(rt, launch("copes.1", sys.executable, "-S", "-c", coping, pids_max=1))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 0)
        assert "could not make another process or thread, once: its limit is 1" in ended.message
        ended = await ran(rt, shell("fails.1", "sleep 0 & wait; exit 3", pids_max=4))
        assert (ended.reason, ended.exit_code, ended.message) == (Reason.EXIT, 3, "")
        ended = await ran(rt, shell("unlimited.1", SLEEPERS + "exit 0"))
        assert (ended.reason, ended.exit_code, ended.message) == (Reason.EXIT, 0, "")
        assert ended.usage.pids_peak >= 9


@asynchronous
async def test_memory_is_not_taken_for_processes(state_dir: Path) -> None:
    hog = "x = bytearray(400 << 20)"
    async with runtime(state_dir) as rt:
        hogging = launch("hog.1", sys.executable, "-S", "-c", hog, memory_bytes=64 * MIB, pids_max=50)
        ended = await ran(rt, hogging)
        assert (ended.reason, ended.signal) == (Reason.OUT_OF_MEMORY, 9)
        # Killed by somebody else: 137 alone says nothing.
        assert (await ran(rt, shell("killed.1", "kill -9 $$", memory_bytes=64 * MIB))).reason is Reason.SIGNAL
        assert (await ran(rt, shell("says.1", "exit 137", memory_bytes=64 * MIB))).reason is Reason.EXIT


@asynchronous
async def test_too_much_on_the_disk(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        script = "mkdir -p a/b; while :; do head -c 1000000 /dev/zero >> a/b/file; done"
        ended = await ran(rt, shell("disk.1", script, disk_bytes_max=8 * MIB))
        assert ended.reason is Reason.DISK_LIMIT
        assert ended.signal in (15, 9)  # on a busy machine it may be far beyond before it is looked at
        assert ended.message.startswith("its scratch directory held ")
        assert ended.message.endswith("bytes, more than its disk limit of 8388608 bytes")
        assert int(ended.message.split()[4]) > 8 * MIB
        # Many small files: lengths alone would not tell.
        script = "n=0; while :; do n=$((n+1)); echo > f$n; done"
        ended = await ran(rt, shell("files.1", script, disk_bytes_max=MIB))
        assert ended.reason is Reason.DISK_LIMIT
        # Removed, and still open: it takes room all the same.
        script = "exec 7> gone; rm gone; while :; do head -c 1000000 /dev/zero >&7; done"
        ended = await ran(rt, shell("removed.1", script, disk_bytes_max=8 * MIB))
        assert ended.reason is Reason.DISK_LIMIT
        # As large as may be, a sparse file, links, and what lies elsewhere.
        script = "head -c 4000000 /dev/zero > f; ln f g; ln -s /usr h; truncate -s 1T i; sleep 1"
        ended = await ran(rt, shell("fits.1", script, disk_bytes_max=8 * MIB))
        assert (ended.reason, ended.exit_code, ended.message) == (Reason.EXIT, 0, "")
        assert (await ran(rt, shell("free.1", "head -c 20000000 /dev/zero > f; sleep 0.5"))).exit_code == 0
        assert len(watchers_of(rt)) == 1


@asynchronous
async def test_one_that_goes_on_filling_the_disk_gets_no_time(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        began_s = time.monotonic()
        stubborn = "trap '' TERM; while :; do head -c 10000000 /dev/zero >> f; done"
        ended = await ran(rt, shell("stubborn.1", stubborn, disk_bytes_max=MIB, stop_wait_s=600.0))
        assert (ended.reason, ended.signal) == (Reason.DISK_LIMIT, 9)
        assert time.monotonic() - began_s < 60
        # One that only does not want to go has its time.
        script = "trap 'echo asked; exit 5' TERM; head -c 2000000 /dev/zero > f; while :; do sleep 1000 & wait; done"
        ended = await ran(rt, shell("tidy.1", script, disk_bytes_max=MIB, stop_wait_s=600.0))
        assert (ended.reason, ended.exit_code) == (Reason.DISK_LIMIT, 5)


@asynchronous
async def test_other_file_systems_in_the_scratch_are_not_counted(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        # In the shim's own mount namespace, where its watcher sees it and the machine does not.
        script = "mkdir m && mount -t tmpfs none m || exit 7; head -c 20000000 /dev/zero > m/f; sleep 1.5; umount m"
        ended = await ran(rt, shell("mount.1", script, disk_bytes_max=4 * MIB))
        if ended.exit_code == 7:
            pytest.skip("no mounting here")
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 0)


@asynchronous
async def test_too_long_a_log(state_dir: Path, isolate: bool) -> None:
    lines = "n=0; while [ $n -lt 30000 ]; do n=$((n+1)); echo line $n; done"
    async with runtime(state_dir, isolate=isolate) as rt:
        ended = await ran(rt, shell("long.1", f"({lines}) | tee /dev/stderr; echo done > done", log_bytes_max=1 << 16))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 0)
        assert ended.message == "stdout and stderr were cut at the limit of 64KiB"
        for stream in ("stdout", "stderr"):
            log = rt.log_path("long.1", stream).read_bytes()
            assert len(log) == 1 << 16
            assert log.startswith(b"line 1\nline 2\n")
            assert log.endswith(b"\n[spinetta: this log is cut here: its limit is 64KiB]\n")
        # While it runs it is cut again and again, and the task goes on.
        endless = "while :; do head -c 100000 /dev/zero; sleep 0.01; done"
        assert await rt.start(shell("endless.1", endless, log_bytes_max=300_000)) is None
        log_path = rt.log_path("endless.1", "stdout")
        await until(lambda: log_path.exists() and b"its limit is 300000 bytes" in log_path.read_bytes())
        for _i in range(3):
            await until(lambda: log_path.stat().st_size > 300_000)
            await until(lambda: log_path.stat().st_size == 300_000)
        await rt.stop("endless.1", Reason.CANCELLED)
        ended = await end_of(rt, "endless.1")
        assert (ended.reason, ended.message) == (Reason.CANCELLED, "stdout was cut at the limit of 300000 bytes")
        assert log_path.stat().st_size == 300_000
        ended = await ran(rt, shell("short.1", "echo hello", log_bytes_max=1 << 16))
        assert (ended.message, rt.log_path("short.1", "stdout").read_bytes()) == ("", b"hello\n")
        ended = await ran(rt, shell("free.1", lines))
        assert (ended.message, rt.log_path("free.1", "stdout").read_bytes().count(b"\n")) == ("", 30000)


@asynchronous
async def test_the_next_shim_knows_that_a_log_was_cut(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        said = (await ran(rt, shell("long.1", "head -c 100000 /dev/zero; exit 4", log_bytes_max=5000))).message
        first = rt.shim_id()
        await rt.shutdown_shim()
    async with runtime(state_dir) as rt:
        assert rt.shim_id() != first
        ended = await end_of(rt, "long.1")
        assert (ended.exit_code, ended.message) == (4, said)
        assert "stdout was cut" in said


@asynchronous
async def test_an_end_recorded_by_an_earlier_version_is_read(state_dir: Path) -> None:
    """It says nothing of disks and processes."""
    end = {"reason": "exit", "exit_code": 3, "signal": 0, "message": "", "started_ms": 1, "ended_ms": 2}
    end |= {"cpu_user_s": 1.5, "cpu_system_s": 0.5, "memory_peak_bytes": 4096}
    record = {"v": 2, "state": "ended", "key": "old.1", "token": 7, "incarnation": "i1", "started_ms": 1, "exit": end}
    (state_dir / "attempts").mkdir(parents=True)
    (state_dir / "attempts" / "old.1").write_text(json.dumps(seal(record)))
    async with runtime(state_dir) as rt:
        ended = await end_of(rt, "old.1")
        assert (ended.exit_code, ended.usage) == (3, Usage(1.5, 0.5, 4096))
    assert parse_sample({"cpu_user_s": 1.0, "cpu_system_s": 0.0, "memory_peak_bytes": 1}).pids == 0


@asynchronous
async def test_a_cpu_quota(state_dir: Path) -> None:
    spin = "while :; do :; done"
    async with runtime(state_dir) as rt:
        await rt.start(shell("quota.1", spin, cpu_millis=50, stop_wait_s=0.1))
        await rt.start(shell("free.1", spin, stop_wait_s=0.1))
        await until(lambda: counter("quota.1", "cpu.stat", "nr_throttled") >= 3)
        assert counter("free.1", "cpu.stat", "nr_throttled") in (0, -1)
        for key in ("quota.1", "free.1"):
            await rt.stop(key, Reason.CANCELLED)
            assert (await end_of(rt, key)).reason is Reason.CANCELLED


@asynchronous
async def test_without_a_quota_that_binds_tasks_share_by_what_they_asked_for(state_dir: Path) -> None:
    """All are told to one core, which they want twice over; the one that asked for three times as much gets it."""
    core = str(sorted(os.sched_getaffinity(0))[0])
    spin = f"exec taskset -c {core} sh -c 'while :; do :; done'"
    async with runtime(state_dir) as rt:
        for key, millis in (("much.1", 3000), ("little.1", 1000)):
            await rt.start(shell(key, spin, cpu_millis=millis, stop_wait_s=0.1))

        async def used_s(key: str) -> float:
            usage = await rt.usage(key)
            assert usage is not None
            return usage.cpu_user_s + usage.cpu_system_s

        async with asyncio.timeout(60):
            while await used_s("much.1") + await used_s("little.1") < 1.5:  # noqa: ASYNC110 - as in `until`
                await asyncio.sleep(0.05)
        assert await used_s("much.1") > 1.5 * await used_s("little.1")
        for key in ("much.1", "little.1"):
            await rt.stop(key, Reason.CANCELLED)
            await end_of(rt, key)


@asynchronous
async def test_walltime_is_told_from_the_others(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        limits = {"walltime_s": 0.5, "stop_wait_s": 0.1, "disk_bytes_max": MIB, "log_bytes_max": MIB, "pids_max": 3}
        ended = await ran(rt, shell("late.1", "while :; do sleep 0.1; done", **limits))
        assert (ended.reason, ended.message) == (Reason.WALLTIME, "ran longer than its wall time of 0.5 s")


@asynchronous
async def test_what_was_used_is_measured(state_dir: Path) -> None:
    write = "dd if=/dev/zero of=f bs=1M count=8 conv=fsync status=none; sync -f f; "
    read = "dd if=f of=/dev/null bs=1M iflag=direct status=none 2>/dev/null || dd if=f of=/dev/null status=none"
    async with runtime(state_dir) as rt:
        ended = await ran(rt, shell("io.1", write + read))
        assert ended.exit_code == 0
        if on_a_disk(state_dir):
            assert ended.usage.io_write_bytes >= 8 * MIB
            assert ended.usage.io_read_bytes >= 8 * MIB
        assert ended.usage.pids_peak >= 2
        # Its log files had to be made.
        assert (await ran(rt, launch("none.1", "true"))).usage.io_write_bytes < MIB
        hold = "x = bytearray(30 << 20); print(len(x), flush=True); import time; time.sleep(1000)"
        await rt.start(launch("live.1", sys.executable, "-S", "-c", hold, stop_wait_s=0.1))
        await until(lambda: rt.log_path("live.1", "stdout").exists() and rt.log_path("live.1", "stdout").read_bytes())
        sample = await rt.sample("live.1")
        assert sample is not None
        assert 30 * MIB <= sample.memory_bytes <= sample.usage.memory_peak_bytes < 100 * MIB
        assert (sample.pids, sample.usage.pids_peak) == (1, 1)
        await rt.stop("live.1", Reason.CANCELLED)
        await end_of(rt, "live.1")
        assert await rt.sample("live.1") is None


@asynchronous
async def test_a_watcher_that_dies_is_started_again(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        script = "while [ ! -e ../../go.{} ]; do sleep 0.05; done; head -c 4000000 /dev/zero > f; sleep 1000"
        for key in ("a", "b"):
            await rt.start(shell(f"{key}.1", script.format(key), disk_bytes_max=MIB))
        (first,) = watchers_of(rt)
        os.kill(first, signal.SIGKILL)
        await until(lambda: watchers_of(rt) not in ([], [first]))
        (second,) = watchers_of(rt)
        (state_dir / "go.a").touch()
        assert (await end_of(rt, "a.1")).reason is Reason.DISK_LIMIT
        # Stopped for good, as by a disk that does not answer, it holds nobody up; found too large once it goes on.
        os.kill(second, signal.SIGSTOP)
        try:
            (state_dir / "go.b").touch()
            await until((state_dir / "scratch" / "b.1" / "f").exists)
            assert (await ran(rt, launch("meanwhile.1", "true", disk_bytes_max=MIB, log_bytes_max=MIB))).exit_code == 0
        finally:
            os.kill(second, signal.SIGCONT)
        assert (await end_of(rt, "b.1")).reason is Reason.DISK_LIMIT
        assert watchers_of(rt) == [second]
        await rt.shutdown_shim()
    await until(lambda: not Path(f"/proc/{second}").exists())


@asynchronous
async def test_a_watcher_goes_with_its_shim(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        await rt.start(shell("held.1", "sleep 1000", log_bytes_max=MIB))
        (watching,) = watchers_of(rt)
        kill_shim(state_dir)
    await until(lambda: name_of(watching) != "spinetta-watch")


@asynchronous
async def test_looking_costs_a_small_share_of_one_core(state_dir: Path) -> None:
    """A tree so large that a look takes a while: the next one waits the longer."""
    files = "import os\nfor d in range(20):\n  os.mkdir(str(d))\n  for n in range(250): os.mknod(f'{d}/{n}')\n"
    files += "open('ready', 'w')"
    marker = "spinetta-test-tree"
    async with runtime(state_dir) as rt:
        script = f'{sys.executable} -S -c "{files}"; : {marker}; while :; do sleep 1000; done'
        for n in range(2):
            await rt.start(shell(f"tree{n}.1", script, disk_bytes_max=1 << 40, log_bytes_max=1 << 30))
        await until(lambda: all((state_dir / "scratch" / f"tree{n}.1" / "ready").exists() for n in range(2)))
        (pid,) = watchers_of(rt)

        def cpu_s() -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before_s, began_s = cpu_s(), time.monotonic()
        await until(lambda: time.monotonic() - began_s > 2.5)
        share = (cpu_s() - before_s) / (time.monotonic() - began_s)
        # The most it may take, one look more than that, and the clock's coarseness.
        assert share < watcher.SCANS_SHARE + watcher.LOGS_SHARE + 0.05
        for process in (pid, rt.shim_pid(), *(child.pid for child in children(rt.shim_pid()))):
            if name_of(process).startswith("spinetta"):
                assert resident_bytes(process) < 15 * MIB
        assert living(marker)
        await rt.shutdown_shim(wait_s=0.1)
