"""Containers where there is version 2 of control groups only; run by test_containers in a mount namespace like that."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from spinetta.model import Reason
from tests.contract.containers import script, traces
from tests.contract.shims import clean_up, end_of, kill_shim, living, ran, runtime, until


async def story(state_dir: Path, rootfs: Path) -> None:
    """Run one to its end, stop one, let one die with its shim."""
    async with runtime(state_dir) as rt:
        assert "cgroup2-only" in rt.capabilities()
        ended = await ran(rt, script(state_dir, rootfs, "a.1", "cat /proc/self/cgroup; exit 3"))
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 3), ended
        assert "0::/\n" in rt.log_path("a.1", "stdout").read_text()
        await until(lambda: not traces(state_dir, "a.1"))
        _say("runs")
        assert await rt.start(script(state_dir, rootfs, "a.2", "trap '' TERM; sleep 1000", stop_wait_s=0.2)) is None
        await rt.stop("a.2", Reason.CANCELLED)
        assert (await end_of(rt, "a.2")).reason is Reason.CANCELLED
        await until(lambda: not traces(state_dir, "a.2"))
        _say("stops")
        marker = f": {state_dir}"
        assert await rt.start(script(state_dir, rootfs, "a.3", f"sleep 1000; {marker}")) is None
        kill_shim(state_dir)
        await until(lambda: not living(marker))
        _say("dies")
    async with runtime(state_dir):
        await until(lambda: not traces(state_dir, "a.3"))
        _say("clean")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="spinetta-v2-") as folder:
        try:
            asyncio.run(story(Path(folder) / "state", Path(sys.argv[1])))
        finally:
            clean_up(Path(folder) / "state")
