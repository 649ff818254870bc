"""The limits of containers: the same as those of plain processes, told apart by the same counters."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from spinetta.model import Reason
from tests.contract.containers import OWNER, rootfs, script, traces
from tests.contract.shims import LIMIT_S, asynchronous, end_of, groups_of, isolate, ran, runtime, state_dir, until
from tests.contract.test_limits import counter

pytestmark = pytest.mark.contract
_ = (isolate, rootfs, state_dir)  # fixtures
MIB = 1 << 20
FILL = "busybox head -c {} /dev/zero >> {}"


@asynchronous
async def test_memory_and_processes(state_dir: Path, rootfs: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        # tail keeps what it reads until a line ends.
        hog = "busybox head -c 200000000 /dev/zero | busybox tail -n 1 > /dev/null; exit 5"
        ended = await ran(rt, script(state_dir, rootfs, "hog.1", hog, memory_bytes=32 * MIB))
        assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_MEMORY, 5)
        assert "memory limit of 33554432 bytes" in ended.message
        assert 16 * MIB < ended.usage.memory_peak_bytes <= 32 * MIB
        bomb = "for n in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; exit 0"
        ended = await ran(rt, script(state_dir, rootfs, "bomb.1", bomb, pids_max=6))
        assert ended.reason is Reason.OUT_OF_PIDS
        assert ended.exit_code not in (0, None)
        assert ended.message.endswith("its limit is 6")
        ended = await ran(rt, script(state_dir, rootfs, "free.1", bomb))
        assert (ended.reason, ended.exit_code, ended.message) == (Reason.EXIT, 0, "")
        assert ended.usage.pids_peak >= 10
        assert traces(state_dir, "hog.1") == []


@asynchronous
async def test_less_memory_than_a_start_takes(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        for kib in (64, 512):
            ended = await ran(rt, script(state_dir, rootfs, f"small-{kib}.1", "sleep 1000", memory_bytes=kib << 10))
            assert ended.reason is Reason.OUT_OF_MEMORY, ended
        assert (await ran(rt, script(state_dir, rootfs, "next.1", "exit 3"))).exit_code == 3


@asynchronous
async def test_disk_logs_and_time(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        fill = f"while :; do {FILL.format(1_000_000, '/work/f')}; done"
        ended = await ran(rt, script(state_dir, rootfs, "work.1", fill, disk_bytes_max=8 * MIB))
        assert ended.reason is Reason.DISK_LIMIT
        assert "more than its disk limit of 8388608 bytes" in ended.message
        removed = "exec 7> gone; busybox rm gone; while :; do busybox head -c 1000000 /dev/zero >&7; done"
        ended = await ran(rt, script(state_dir, rootfs, "removed.1", removed, disk_bytes_max=8 * MIB))
        assert ended.reason is Reason.DISK_LIMIT
        # What a writable root takes lies beside the scratch, and counts with it; /tmp is memory, and does not.
        aside = f"{FILL.format(6_000_000, '/tmp/f')}; {FILL.format(3_000_000, '/work/f')}; sleep 1.5; exit 0"
        ended = await ran(rt, script(state_dir, rootfs, "fits.1", aside, writable=True, disk_bytes_max=8 * MIB))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 0)
        layer = state_dir.parent / "layer"
        (layer / "new").mkdir(parents=True)
        os.chown(layer / "new", *OWNER)
        fill = f"while :; do {FILL.format(1_000_000, '/new/f')}; done"
        writing = script(state_dir, rootfs, "root.1", fill, writable=True, lower=(layer,), disk_bytes_max=8 * MIB)
        assert (await ran(rt, writing)).reason is Reason.DISK_LIMIT
        long = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); echo line $n; done; exit 3"
        ended = await ran(rt, script(state_dir, rootfs, "long.1", long, log_bytes_max=1 << 16))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 3)
        assert ended.message == "stdout was cut at the limit of 64KiB"
        assert rt.log_path("long.1", "stdout").stat().st_size == 1 << 16
        late = script(state_dir, rootfs, "late.1", "while :; do sleep 1; done", walltime_s=0.5, stop_wait_s=0.1)
        ended = await ran(rt, late)
        assert (ended.reason, ended.message) == (Reason.WALLTIME, "ran longer than its wall time of 0.5 s")


@asynchronous
async def test_what_is_removed_from_its_root_and_still_open(state_dir: Path, rootfs: Path) -> None:
    layer = state_dir.parent / "layer"
    (layer / "new").mkdir(parents=True)
    os.chown(layer / "new", *OWNER)
    (layer / "new" / "big").write_bytes(os.urandom(12 * MIB))
    os.chown(layer / "new" / "big", *OWNER)
    common: dict[str, Any] = {"writable": True, "lower": (layer,), "disk_bytes_max": 8 * MIB}
    async with runtime(state_dir) as rt:
        script_of = "exec 7> /new/gone; busybox rm /new/gone; while :; do busybox head -c 1000000 /dev/zero >&7; done"
        ended = await ran(rt, script(state_dir, rootfs, "removed.1", script_of, **common))
        assert ended.reason is Reason.DISK_LIMIT
        keeps = "exec 7< /new/big; busybox rm /new/big; sleep 2; exit 4"  # the image's, which takes no more room
        ended = await ran(rt, script(state_dir, rootfs, "image.1", keeps, **common))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 4)


@asynchronous
async def test_a_cpu_quota_and_what_is_used_now(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        spin = script(state_dir, rootfs, "spin.1", "while :; do :; done", cpu_millis=100, stop_wait_s=0.1)
        assert await rt.start(spin) is None
        await until(lambda: counter("spin.1", "cpu.stat", "nr_throttled") >= 3)
        # In proportion, too, as the shim has set it: the runtime has left it alone.
        shares = [path / name for path in groups_of("spin.1") for name in ("cpu.shares", "cpu.weight")]
        assert [path.read_text().strip() for path in shares if path.exists()] in (["102"], ["10"])
        async with asyncio.timeout(LIMIT_S):
            while (sample := await rt.sample("spin.1")) is None or sample.pids != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # until what becomes the init has no threads, by a tenth of a core
        assert sample.memory_bytes > 0  # of the init, and the shell
        assert sample.usage.cpu_user_s + sample.usage.cpu_system_s > 0
        await rt.stop("spin.1", Reason.CANCELLED)
        assert (await end_of(rt, "spin.1")).reason is Reason.CANCELLED
