"""Many containers, one after the other and several at once: what one leaves behind, a thousand show.

    python -m tests.contract.churn [--starts 1000] [--at-once 4] [--subreaper]

Control groups, mounts, descriptors of the shim, its memory and processes are counted before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from spinetta.model import Exit, Reason
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.shim import proctable, remains
from tests.contract.containers import make_rootfs, script, traces
from tests.contract.shims import boottime_s, clean_up, end_of, groups_of, runtime, until

WARM = 8  # containers that run before anything is counted


@dataclass(frozen=True)
class Count:
    """What a shim holds of the machine."""

    groups: int
    mounts: int
    files: int
    processes: int
    descriptors: int
    resident_kib: int


def count(state_dir: Path, pid: int) -> Count:
    """At this moment."""
    name = remains.name_of(state_dir, "n1")
    status = Path(f"/proc/{pid}/status").read_text()
    return Count(
        groups=sum(len(below) for group in groups_of(name) for _, below, _ in os.walk(group)),
        mounts=len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()),
        files=len(list(Path(f"/proc/{pid}/root{state_dir}/runc").iterdir())),
        processes=len([process for process in proctable.read_all() if process.parent == pid]),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        resident_kib=next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")),
    )


async def one(rt: ProcessRuntime, state_dir: Path, rootfs: Path, number: int) -> None:
    """Start one and have it end: by itself, by a stop, by a signal, by not being startable; writable or not."""
    key, kind = f"c.{number}", number % 4
    texts = ("exit 3", "touch up; sleep 1000", "kill -9 $$", "true")
    attempt = script(state_dir, rootfs, key, texts[kind], writable=number % 3 == 0, secrets=(("key", b"secret"),))
    if kind == 3 and attempt.container is not None:
        attempt.container.config["mounts"].append(  # type: ignore[attr-defined]
            {"destination": "/work", "type": "bind", "source": "/nowhere/at/all", "options": ["bind"]}
        )
    ended = await rt.start(attempt)
    if ended is None and kind == 1:
        await rt.stop(key, Reason.CANCELLED)
    ended = ended or await end_of(rt, key)
    check(ended, kind)
    await rt.forget(key)


def check(ended: Exit, kind: int) -> None:
    """It ended as it should have."""
    expected = (Reason.EXIT, Reason.CANCELLED, Reason.SIGNAL, None)[kind]
    if expected is not None:
        assert ended.reason is expected, ended
    else:
        assert ended.reason in (Reason.SPAWN_FAILED, Reason.NODE_UNFIT), ended


async def churn(
    state_dir: Path, rootfs: Path, starts: int, at_once: int, *, isolate: bool = True
) -> tuple[Count, Count]:
    """So many starts; counts from before and after."""
    async with runtime(state_dir, isolate=isolate) as rt:
        await _all(rt, state_dir, rootfs, range(WARM), at_once)
        await _settled(state_dir)
        before = count(state_dir, rt.shim_pid())
        await _all(rt, state_dir, rootfs, range(WARM, WARM + starts), at_once)
        await _settled(state_dir)
        with contextlib.suppress(TimeoutError):  # what is just dying is no leak
            await until(lambda: not leaks(before, count(state_dir, rt.shim_pid())))
        after = count(state_dir, rt.shim_pid())
        await rt.shutdown_shim()
    name = remains.name_of(state_dir, "n1")
    await until(lambda: not groups_of(name) and not traces(state_dir))
    return before, after


async def _all(rt: ProcessRuntime, state_dir: Path, rootfs: Path, numbers: range, at_once: int) -> None:
    room = asyncio.Semaphore(at_once)

    async def next_one(number: int) -> None:
        async with room:
            await rt.renew(boottime_s())
            await one(rt, state_dir, rootfs, number)

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(next_one(number))


async def _settled(state_dir: Path) -> None:
    """What goes to the trash takes its time."""
    await until(lambda: not [*(state_dir / "trash").iterdir(), *(state_dir / "scratch").iterdir()], 60)


def leaks(before: Count, after: Count) -> list[str]:
    """What has become more; memory may by a little, for tables that keep their size."""
    found = [
        f"{name}: {getattr(before, name)}, then {getattr(after, name)}"
        for name in ("groups", "mounts", "files", "processes", "descriptors")
        if getattr(after, name) > getattr(before, name)
    ]
    if after.resident_kib > before.resident_kib + 2048:
        found.append(f"resident_kib: {before.resident_kib}, then {after.resident_kib}")
    return found


def main() -> int:
    """Churn, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--subreaper", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spinetta-churn-") as folder:
        state_dir, rootfs = Path(folder) / "state", make_rootfs(Path(folder) / "rootfs")
        begun_s = time.monotonic()
        try:
            story = churn(state_dir, rootfs, options.starts, options.at_once, isolate=not options.subreaper)
            before, after = asyncio.run(story)
        finally:
            clean_up(state_dir)
    took_s = time.monotonic() - begun_s
    sys.stdout.write(f"{options.starts} starts in {took_s:.1f} s\nbefore: {before}\nafter:  {after}\n")
    found = leaks(before, after)
    sys.stdout.writelines(f"LEAK {line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
